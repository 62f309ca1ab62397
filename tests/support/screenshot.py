"""Takes the README's picture of /dashboard: `make screenshot`, where Chromium is.

A daemon of its own serves three topics to readers that keep up, and to a slow one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import sys
from pathlib import Path

import aiohttp
from daemons import daemon_process
from playwright.async_api import ViewportSize, async_playwright

ROOT = Path(__file__).parents[2]
READERS = 30
BATCH = 40
PAUSE_S = 0.1
# What the slow reader lets pass before it takes the next message.
SLOW_S = 0.3
# Long enough for the curves of the rates to have a shape.
WATCHED_MS = 60_000
SIZE: ViewportSize = {"width": 1280, "height": 1000}


async def read(session: aiohttp.ClientSession, url: str, number: int, *, is_slow: bool) -> None:
    """Subscribe to a topic, and take what comes, at once or one after the other."""
    topic = f"orders.{('eu', 'us', 'asia')[number % 3]}"
    async with session.ws_connect(f"{url}/subscribe?topic={topic}", max_msg_size=0) as socket:
        async for _ in socket:
            if is_slow:
                await asyncio.sleep(SLOW_S)


async def publish(session: aiohttp.ClientSession, url: str) -> None:
    """Publish to the topics, one after the other, for ever."""
    for number in itertools.count():
        region = ("eu", "us", "asia", "eu")[number % 4]
        order = {"id": number, "items": ["a", "b"], "note": "x" * 1_500}
        line = json.dumps({"topic": f"orders.{region}", "data": order})
        async with session.post(f"{url}/publish/batch", data="\n".join([line] * BATCH)) as answer:
            await answer.read()
        await asyncio.sleep(PAUSE_S)


async def take(url: str, path: Path) -> None:
    """Take a picture of the page at ``url`` while the daemon is in use."""
    async with aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(publish(session, url))]
        for number in range(READERS):
            reader = read(session, url, number, is_slow=number == 0)
            tasks.append(asyncio.create_task(reader))
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = await browser.new_page(viewport=SIZE)
            await page.goto(f"{url}/dashboard")
            await page.wait_for_timeout(WATCHED_MS)
            await page.screenshot(path=path)
            await browser.close()
        for task in tasks:
            task.cancel()


def main() -> None:
    """Write the picture to the path of the command line, or to its place in docs/."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "dashboard.png"
    with daemon_process() as daemon:
        asyncio.run(take(f"http://127.0.0.1:{daemon.port}", path))


if __name__ == "__main__":
    main()
