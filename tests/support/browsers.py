"""A real Chromium, the one on PATH, driven by playwright. No daemon here (daemons.py)."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from playwright.async_api import Browser, Error, Page, async_playwright

# Names under which the Makefile looks for Chromium, too.
NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Takes chance and time out of a page: there is no jitter, and a wait is noted and cut to 20 ms. A
# wait of 10 s or more is a time limit, and stays.
QUICK: Final = """
Math.random = () => 0;
globalThis.delays = [];
const wait = globalThis.setTimeout;
globalThis.setTimeout = (call, ms) =>
    ms < 10_000 ? (delays.push(ms), wait(call, Math.min(ms, 20))) : wait(call, ms);
"""


def chromium_path() -> str:
    """Return Chromium's path; without one skip the test, or fail it where CI=true."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    reason = f"none of {', '.join(NAMES)} is on PATH; on Debian: apt-get install chromium"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@asynccontextmanager
async def chromium(*more: str) -> AsyncIterator[Browser]:
    """Run a Chromium; its start takes about a second, so one serves many tests.

    Args:
        more: arguments of its command line.
    """
    path = chromium_path()
    # Chromium's sandbox does not run as root, and containers' /dev/shm is small.
    arguments = ["--disable-dev-shm-usage", *more]
    arguments += ["--no-sandbox"] if os.getuid() == 0 else []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def page_at(browser: Browser, url: str, script: str = QUICK) -> AsyncIterator[Page]:
    """Open ``url`` in a new page after running ``script`` there; fail on errors in the page."""
    context = await browser.new_context()
    await context.add_init_script(script)
    page = await context.new_page()
    errors: list[Error] = []
    page.on("pageerror", lambda error: errors.append(error))
    try:
        await page.goto(url)
        yield page
        assert errors == []
    finally:
        await context.close()


@asynccontextmanager
async def site(text: str = "<!doctype html><title>page</title>") -> AsyncIterator[str]:
    """Serve a page on a port of its own, which makes it an origin of its own; yield that."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = text.encode()
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n"
        while await reader.read(65_536):
            writer.write((head % len(body)).encode() + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def in_page(page: Page, script: str, **arguments: Any) -> Any:
    """Run an async function's body in ``page``, with arguments by name; return its result."""
    names = ", ".join(arguments)
    # Less than pytest's own timeout, which would end the test in the middle of the call.
    async with asyncio.timeout(20):
        return await page.evaluate(f"async ({{ {names} }}) => {{ {script} }}", arguments)


async def until_page(page: Page, claim: str, timeout_s: float = 10.0) -> None:
    """Wait until the expression ``claim`` is true in ``page``."""
    # The page is polled at each frame: polling by time would go through the page's own setTimeout,
    # and appear in `delays`.
    await page.wait_for_function(claim, polling="raf", timeout=timeout_s * 1000)
