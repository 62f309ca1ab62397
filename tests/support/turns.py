"""A fake daemon for clients of /ws: on each connection it sends set frames, perhaps a close.

It serves for frames that a real daemon sends only in trouble. Frames: docs/wire.md.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol


def subscribed(
    offset: int = 0,
    *,
    recovered: bool = False,
    topic: str = "t",
    epoch: str = "e1",
    **more: str,
) -> str:
    """Return the `subscribed` notice of a topic."""
    return json.dumps(
        {
            "type": "subscribed",
            "topic": topic,
            "epoch": epoch,
            "offset": offset,
            "recovered": recovered,
            "window": 100,
            **more,
        }
    )


def found(topic: str, epoch: str, offset: int = 0, *, recovered: bool = False) -> str:
    """Return the `subscribed` notice of a topic that the pattern ``p.*`` has brought."""
    return subscribed(offset, recovered=recovered, topic=topic, epoch=epoch, pattern="p.*")


def gap_frame(topic: str, first: int | None, last: int | None, reason: str) -> str:
    """Return a `gap` notice."""
    count = None if first is None or last is None else last - first + 1
    gap = {"topic": topic, "from": first, "to": last, "count": count, "reason": reason}
    return json.dumps({"type": "gap", **gap})


def message(offset: int, topic: str = "t") -> str:
    """Return a message with the fields that a client reads."""
    return json.dumps({"id": f"msg-{offset}", "topic": topic, "data": offset, "offset": offset})


WATCHING = json.dumps({"type": "watching", "pattern": "p.*"})


class Turn(NamedTuple):
    """The frames of one connection; code 0 leaves it open."""

    frames: list[str | bytes]
    code: int = 0
    pongs: bool = True


class FakeServer:
    """Sends one turn's frames on each connection, once it subscribes; keeps its commands."""

    def __init__(self, turns: list[Turn]) -> None:
        self._turns = iter(turns)
        self.url = ""
        # The subscribe command of each connection; and the clients' later frames.
        self.wishes: list[dict[str, Any]] = []
        self.heard: list[dict[str, Any]] = []

    async def connected(self, connection: ServerConnection) -> None:
        """Send the frames of the next turn."""
        self.wishes.append(json.loads(await connection.recv()))
        turn = next(self._turns)
        for frame in turn.frames:
            await connection.send(frame)
        if turn.code:
            await connection.close(turn.code, "because")
        async for frame in connection:
            self.heard.append(json.loads(frame))
            if self.heard[-1] == {"type": "ping"} and turn.pongs:
                await connection.send('{"type":"pong"}')


@asynccontextmanager
async def faking(*turns: Turn) -> AsyncIterator[FakeServer]:
    """Run a fake server."""
    fake = FakeServer(list(turns))
    protocols = [Subprotocol("clevrd.v1")]
    async with serve(fake.connected, "127.0.0.1", 0, subprotocols=protocols) as server:
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield fake
