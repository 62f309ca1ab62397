"""Clients for tests: `websockets` subscribers, and raw sockets for bytes no library would send.

No daemon here (daemons.py). Framing: RFC 6455 §5.2; the parser is the tests' own on purpose.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

# The module is None where it is not installed.
CURL = shutil.which("curl")
needs_curl = pytest.mark.skipif(CURL is None, reason="curl is not installed")

# Buffers so small that a stalled reader is noticed after some dozen messages.
SMALL_BUFFERS: dict[str, Any] = {
    "send_buffer_bytes": 8192,
    "write_high_bytes": 8192,
    "write_low_bytes": 2048,
}
# Data that makes a message of about 250 bytes.
RECORD = b'"%b"' % (b"x" * 100)

TEXT = 0x1
CLOSE = 0x8
PING = 0x9
PONG = 0xA

# The key of RFC 6455's example (§1.3), and the answer to it.
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def subscribe(ws_url: str, topic: str = "t", *, stalls: bool = False, **options: Any) -> connect:
    """Return a `websockets` client of ``topic``, with ``options`` as its query.

    The client answers pings by itself and sends none. A client that ``stalls`` reads ahead as
    little as possible, so it stops reading as soon as the test stops taking messages.
    """
    url = f"{ws_url}/subscribe?{urlencode({'topic': topic, **options})}"
    if stalls:
        return client_of(url, max_queue=1, sock=small_socket(int(ws_url.rsplit(":", 1)[1])))
    return client_of(url)


def client_of(url: str, **settings: Any) -> connect:
    """Return a `websockets` client of ``url`` that sends no pings of its own."""
    fixed = {"compression": None, "ping_interval": None, "proxy": None, "max_size": None}
    return connect(url, **{**fixed, "max_queue": None, "close_timeout": 2, **settings})


def small_socket(port: int, receive_bytes: int = 4096) -> socket.socket:
    """Return a connection whose kernel buffer takes few bytes while it is not read."""
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # The buffer is set before connecting, since the offered window would stay otherwise.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    return client


def reset_by_peer(writer: asyncio.StreamWriter) -> None:
    """Reset a connection, so that its peer is told at once that no one reads any more."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def offsets(reader: ClientConnection, upto: int) -> list[int]:
    """Return the offsets of the next messages, up to and with offset ``upto``."""
    seen = [offset_of(await reader.recv())]
    while seen[-1] < upto:
        seen.append(offset_of(await reader.recv()))
    return seen


class Ending(NamedTuple):
    """A subscriber's offsets, and the code and reason of its close."""

    offsets: list[int]
    code: int | None
    reason: str | None


async def read_to_the_end(reader: ClientConnection) -> Ending:
    """Read until the connection is closed; code 1006 means without a close frame."""
    seen: list[int] = []
    with suppress(ConnectionClosed):
        async for message in reader:
            seen.append(offset_of(message))  # noqa: PERF401  # the end raises, and would lose all
    return Ending(seen, reader.close_code, reader.close_reason)


def offset_of(message: str | bytes) -> int:
    """Return the offset in a message's JSON."""
    offset: int = json.loads(message)["offset"]
    return offset


def missing(seen: list[int]) -> int:
    """Return how many offsets between the first and the last of ``seen`` are missing.

    Fails when an offset came twice or out of order.
    """
    assert all(a < b for a, b in itertools.pairwise(seen)), "twice, or out of order"
    return seen[-1] - seen[0] + 1 - len(seen)


# Program of a client in a process of its own: it subscribes, prints that, and answers pings until
# it is ended.
_SUBSCRIBER = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1], ping_interval=None, proxy=None) as reader:
    print("subscribed", flush=True)
    for _ in reader:
        pass
"""


@asynccontextmanager
async def subscriber_process(ws_url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a subscriber of topic t in a process that can be stopped by a signal."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _SUBSCRIBER, f"{ws_url}/subscribe?topic=t"),
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"subscribed\n"
        yield process
    finally:
        process.kill()
        await process.wait()


# --- publishers ----------------------------------------------------------------------------------


def publish_request(topic: str, data_json: bytes) -> bytes:
    """Return a plain publish as bytes."""
    body = b'{"topic":%b,"data":%b}' % (json.dumps(topic).encode(), data_json)
    head = "POST /publish HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class PublishRefused(Exception):
    """A publish was answered with an error."""


class RawPublisher:
    """Publishes over one kept connection, many requests ahead of their answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        # Offsets of the acknowledged messages, in order.
        self.acknowledged: list[int] = []

    async def send(self, topic: str, count: int, data_json: bytes = b"1") -> None:
        """Publish ``count`` messages in one go, then wait for all their answers."""
        self._writer.write(publish_request(topic, data_json) * count)
        for _ in range(count):
            self.acknowledged.append(await self._answered_offset())

    async def _answered_offset(self) -> int:
        head = await self._reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        answer = json.loads(await self._reader.readexactly(size))
        if not answer["success"]:
            raise PublishRefused(answer)
        offset: int = answer["offset"]
        return offset


@asynccontextmanager
async def publishing(port: int) -> AsyncIterator[RawPublisher]:
    """Open a connection for publishing, and close it in the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield RawPublisher(reader, writer)
    finally:
        writer.close()


# --- raw subscribers -----------------------------------------------------------------------------


class Frame(NamedTuple):
    """One frame from the daemon."""

    opcode: int
    payload: bytes


class Goodbye(NamedTuple):
    """The end of a connection: the close frame's code and reason, and the frames before it."""

    code: int | None
    reason: str
    before: list[Frame]


def masked(opcode: int, payload: bytes = b"", *, first: int | None = None) -> bytes:
    """Return a client's frame; ``first`` replaces its whole first byte (FIN, RSV, opcode)."""
    mask = b"\x21\x43\x65\x87"
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 65_536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    body = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes((0x80 | opcode if first is None else first,)) + length + mask + body


def upgrade_request(query: str = "topic=t", **fields: str | None) -> bytes:
    """Return a WebSocket handshake; ``fields`` replace its header fields, None removes one."""
    names = {
        "host": "test",
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec_websocket_key": KEY,
        "sec_websocket_version": "13",
        **fields,
    }
    lines = [f"{name.replace('_', '-')}: {text}" for name, text in names.items() if text]
    return "\r\n".join([f"GET /subscribe?{query} HTTP/1.1", *lines, "", ""]).encode()


class RawSubscriber:
    """A subscriber made of bytes: sends only the bytes that the test gives it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, *frames: bytes) -> None:
        """Send bytes, in one segment where the kernel can."""
        self.writer.write(b"".join(frames))

    async def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes as they come."""
        return await self._reader.read(size)

    async def frame(self) -> Frame:
        """Return the next frame; raises IncompleteReadError at the end."""
        first, second = await self._reader.readexactly(2)
        assert first & 0x80, "the daemon never fragments"
        assert not second & 0x80, "the daemon never masks (RFC 6455 §5.1)"
        size = second & 0x7F
        if size > 125:
            size = int.from_bytes(await self._reader.readexactly(2 if size == 126 else 8), "big")
        return Frame(first & 0x0F, await self._reader.readexactly(size))

    async def message(self) -> dict[str, Any]:
        """Return the JSON of the next text frame; skip pings, which come at any time."""
        while (frame := await self.frame()).opcode == PING:
            pass
        message: dict[str, Any] = json.loads(frame.payload)
        return message

    async def _frame_or_end(self) -> Frame | None:
        """Return the next frame; None when the connection ended behind a whole one."""
        try:
            return await self.frame()
        except ConnectionResetError:
            return None
        except asyncio.IncompleteReadError as end:
            if end.partial:
                raise
            return None

    async def goodbye(self) -> Goodbye:
        """Read to the end of the connection; fail if any byte follows the close frame."""
        before: list[Frame] = []
        async with asyncio.timeout(5):
            while (frame := await self._frame_or_end()) is not None:
                if frame.opcode == CLOSE:
                    rest = await self._reader.read()
                    assert rest == b"", "something follows the close frame"
                    code = int.from_bytes(frame.payload[:2], "big") if frame.payload else 1005
                    return Goodbye(code, frame.payload[2:].decode(), before)
                before.append(frame)
        return Goodbye(None, "", before)

    def vanish(self) -> None:
        """Reset the connection, without a close frame or a FIN."""
        linger_0 = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger_0
        )
        self.writer.transport.abort()


async def raw_subscriber(
    port: int,
    query: str = "topic=t",
    *,
    early: bytes = b"",
    receive_bytes: int | None = None,
    **fields: str,
) -> RawSubscriber:
    """Open a raw subscription; ``early`` is sent right behind the handshake, with ``fields``.

    With ``receive_bytes`` the connection takes few bytes while it is not read.
    """
    if receive_bytes is None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    else:
        small = small_socket(port, receive_bytes)
        reader, writer = await asyncio.open_connection(sock=small, limit=1024)
    writer.write(upgrade_request(query, **fields) + early)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    assert ACCEPT.encode() in head
    return RawSubscriber(reader, writer)


def command(**fields: Any) -> bytes:
    """Return one command as a client's frame."""
    return masked(0x1, json.dumps(fields).encode())


def commands_socket() -> bytes:
    """Return the handshake for ``GET /ws``."""
    request = upgrade_request("", sec_websocket_protocol="clevrd.v1")
    return request.replace(b"GET /subscribe?", b"GET /ws")


def publish_socket() -> bytes:
    """Return the handshake of a publish socket."""
    return upgrade_request("").replace(b"GET /subscribe?", b"GET /publish")
