"""A client of streams, made of bytes: parses heads, chunks, events and lines strictly.

The parsers are the tests' own on purpose; tests with other parsers are in test_stream_forms.py and
test_streams.py. SSE: WHATWG HTML §9.2.6; chunks: RFC 9112 §7.1.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple, Self

from clients import small_socket

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"


class Item(NamedTuple):
    """One event or line: a message where ``kind`` is empty, a notice otherwise."""

    kind: str
    # The id that the event itself carried, if any.
    id: str | None
    json: dict[str, Any]


class Stream:
    """An open response, read as it comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.head: dict[str, str] = {}
        # Bytes of the body that are not a whole item yet.
        self._rest = b""
        # The whole body so far, without chunk framing.
        self.body = b""
        # Milliseconds of the last `retry:` field.
        self.retry_ms: int | None = None
        self.keep_alives = 0
        # True when the body has ended as its framing requires.
        self.is_whole = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def read_head(self) -> None:
        """Read the head; fail unless it begins a stream."""
        line, *fields = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        assert line == "HTTP/1.1 200 OK", line
        self.head = dict(field.split(": ", 1) for field in fields if field)

    async def item(self) -> Item:
        """Return the next event or line; raises EOFError where there is none."""
        while (found := self._next()) is None:
            part = await self._part()
            if not part:
                raise EOFError(self._rest)
            self._rest += part
            self.body += part
        return found

    async def items(self, count: int) -> list[Item]:
        """Return the next ``count`` events or lines."""
        return [await self.item() for _ in range(count)]

    async def offsets(self, upto: int) -> list[int]:
        """Return the offsets of messages up to ``upto``; skip notices."""
        seen: list[int] = []
        while not seen or seen[-1] < upto:
            item = await self.item()
            if not item.kind:
                seen.append(item.json["offset"])
        return seen

    async def to_the_end(self) -> list[Item]:
        """Return everything to the end of the connection."""
        found = []
        try:
            while True:
                found.append(await self.item())
        except EOFError:
            return found

    async def _part(self) -> bytes:
        """Return some of the body; b"" at its end."""
        async with asyncio.timeout(10):
            if "Transfer-Encoding" not in self.head:
                part = await self._reader.read(65_536)
                self.is_whole = self.is_whole or not part
                return part
            line = await self._reader.readline()
            if not line:
                return b""
            size = int(line, 16)
            data = await self._reader.readexactly(size + 2)
            assert data.endswith(b"\r\n")
            if size == 0:
                self.is_whole = True
                assert await self._reader.read() == b"", "something follows the end"
            return data[:-2]

    def _next(self) -> Item | None:
        is_events = self.head["Content-Type"].startswith(EVENTS)
        end = b"\n\n" if is_events else b"\n"
        if end in self._rest:
            text, _, self._rest = self._rest.partition(end)
            return self._event(text) if is_events else self._line(text)
        return None

    def _line(self, text: bytes) -> Item:
        self.keep_alives += len(text) - len(text.lstrip(b" "))
        value = json.loads(text)
        return Item(value.get("type", ""), None, value)

    def _event(self, text: bytes) -> Item:
        lines = text.decode().split("\n")
        self.keep_alives += lines.count(":")
        fields = dict(line.split(": ", 1) for line in lines if line != ":")
        assert fields.keys() <= {"retry", "id", "event", "data"}
        if "retry" in fields:
            self.retry_ms = int(fields["retry"])
        return Item(fields.get("event", ""), fields.get("id"), json.loads(fields["data"]))


async def open_stream(
    port: int,
    accept: str = EVENTS,
    query: str = "topic=t",
    *fields: str,
    version: str = "1.1",
    behind: bytes = b"",
    receive_bytes: int | None = None,
) -> Stream:
    """Open a stream; ``behind`` is sent right behind the request.

    With ``receive_bytes`` the connection takes few bytes while it is not read.
    """
    if receive_bytes is None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    else:
        small = small_socket(port, receive_bytes)
        reader, writer = await asyncio.open_connection(sock=small, limit=1024)
    lines = [f"GET /subscribe?{query} HTTP/{version}", "Host: test", f"Accept: {accept}", *fields]
    writer.write("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + behind)
    stream = Stream(reader, writer)
    async with asyncio.timeout(5):
        await stream.read_head()
    return stream
