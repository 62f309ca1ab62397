"""Daemons that share a journal, and what is asked of them from outside."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from daemons import Daemon, running
from websockets.asyncio.client import ClientConnection


@asynccontextmanager
async def nodes(url: str, count: int = 2, **table: Any) -> AsyncIterator[list[Daemon]]:
    """Run daemons on one journal."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running(journal_table={"url": url, **table}))
            for _ in range(count)
        ]


async def received(reader: ClientConnection, count: int, within_s: float = 20.0) -> list[Any]:
    """Return the next frames."""
    async with asyncio.timeout(within_s):
        return [json.loads(await reader.recv()) for _ in range(count)]


async def published(daemon: Daemon, topic: str, data: Any) -> dict[str, Any]:
    """Publish once, asking again and again while the journal is away."""
    key = secrets.token_hex(8)
    while True:
        body = json.dumps({"topic": topic, "data": data, "idempotency_key": key})
        async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
            answer: dict[str, Any] = await response.json()
            if response.status == 200:
                return answer
            assert answer["retryable"], answer
        await asyncio.sleep(0.05)


async def refused(daemon: Daemon, topic: str, data: Any) -> tuple[int, str, dict[str, Any]]:
    """Publish until that is refused; return status, Retry-After and the answer."""
    while True:
        body = json.dumps({"topic": topic, "data": data})
        async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
            if response.status != 200:
                again = response.headers.get("Retry-After", "")
                return response.status, again, await response.json()


def resume(daemon: Daemon, answer: dict[str, Any], topic: str = "t") -> str:
    """Return the URL of a reader that goes on behind the message that ``answer`` is for."""
    position = f"offset={answer['offset']}&epoch={answer['epoch']}"
    return f"{daemon.ws_url}/subscribe?topic={topic}&control=1&{position}"
