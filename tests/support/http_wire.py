"""HTTP as bytes: makes requests that no library would send, and parses the answers strictly.

No daemon here (daemons.py) and no WebSocket frames (clients.py). The parser of answers is the
tests' own on purpose; it accepts only what the daemon may send.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

PUBLISH_LINE = "POST /publish HTTP/1.1"

# Parts of an answer that may differ between two runs of the same requests; a test that needs
# offsets compares them itself.
_VOLATILE = re.compile(
    rb"""msg-\d{8}-\d{6}\.\d{6}
    |\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z
    |(?<="epoch":")[0-9a-f]+
    |(?<=\r\nDate:\ )[^\r]+""",
    re.VERBOSE,
)
# The home page's list of the topics that there are now, and the page's length.
_LISTED_TOPICS = re.compile(rb"\nTopics of [^\n]*\n(?:    [^\n]*\n)*")
_PAGE_LENGTH = re.compile(
    rb"(?<=\r\nCache-Control: no-store\r\nServer: clevrd\r\nContent-Length: )[23]\d{3}(?=\r)"
)


class Response(NamedTuple):
    """One answer; header names are lower case, and each field stood once."""

    version: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Return the body's JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """Return the machine code of a refusal; None of any other answer."""
        return self.json["code"] if self.status >= 400 and self.body else None


def post(
    body: bytes | str = b'{"topic":"t","data":1}',
    *fields: str,
    line: str = PUBLISH_LINE,
    length: str | None = "",
    host: str | None = "test",
) -> bytes:
    """Return a publish as bytes.

    Args:
        body: bytes behind the head.
        fields: header fields, whole lines.
        line: the request line.
        length: Content-Length, if not the true one; None leaves the field out.
        host: the Host field; None leaves it out.
    """
    body = body.encode() if isinstance(body, str) else body
    lines = [line]
    lines += [] if host is None else [f"Host: {host}"]
    lines += [] if length is None else [f"Content-Length: {length or len(body)}"]
    return "\r\n".join([*lines, *fields, "", ""]).encode("utf-8", "surrogateescape") + body


def get(path: str, *fields: str, version: str = "1.1", method: str = "GET") -> bytes:
    """Return a request without a body as bytes."""
    lines = [f"{method} {path} HTTP/{version}", "Host: test", *fields, "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape")


def chunked(body: bytes, size: int, *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    """Return ``body`` in chunks of ``size`` bytes (RFC 9112 §7.1)."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = [b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts]
    return b"".join(chunks) + b"0\r\n" + trailer + b"\r\n"


def responses(transcript: bytes, *, to_head: bool = False) -> list[Response]:
    """Return the answers in ``transcript``; fail unless all of them are whole.

    Bytes behind a 101 are its body. With ``to_head`` the answers are to HEAD, and have no body.
    """
    found = []
    while transcript:
        head, end, transcript = transcript.partition(b"\r\n\r\n")
        assert end, f"an answer is cut short: {head!r}"
        line, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = line.split(" ", 2)
        pairs = [each.split(": ", 1) for each in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), f"a header stands there twice: {lines}"
        size = 0 if to_head else int(headers.get("content-length", 0))
        if status == "101":
            size = len(transcript)
        body, transcript = transcript[:size], transcript[size:]
        assert len(body) == size, f"a body is cut short: {line}"
        found.append(Response(version, int(status), headers, body))
    return found


def settled(transcript: bytes) -> bytes:
    """Return ``transcript`` with all parts that may differ between two runs made equal."""
    transcript = _PAGE_LENGTH.sub(b"####", _LISTED_TOPICS.sub(b"", transcript))
    return _VOLATILE.sub(lambda found: b"#" * len(found[0]), transcript)


async def talk(
    port: int, pieces: Iterable[bytes], *, shut: bool = False, timeout_s: float = 15.0
) -> bytes:
    """Send ``pieces`` one after the other and return all that comes until the daemon closes.

    Each piece is sent by itself and has reached the daemon's socket before the next one. A reset
    fails the test, since no input may cost a client its answer.

    Args:
        port: the port of a daemon in this loop.
        pieces: the bytes to send, in parts.
        shut: whether to send a FIN behind them.
        timeout_s: seconds for the whole exchange.
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            reading = asyncio.ensure_future(reader.read())
            for piece in pieces:
                if reading.done():
                    break
                writer.write(piece)
                # One turn lets the daemon read the bytes, the next one begin its work.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            if shut and not reading.done():
                writer.write_eof()
            return await reading
        finally:
            writer.close()


async def ask(port: int, request: bytes) -> Response:
    """Send one request over a connection of its own and return the one answer to it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await read_response(reader)
    finally:
        writer.close()


async def read_response(reader: asyncio.StreamReader, *, timeout_s: float = 10.0) -> Response:
    """Return the next answer on a connection that stays open."""
    async with asyncio.timeout(timeout_s):
        head = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        body = await reader.readexactly(int(size[1]) if size else 0)
    return responses(head + body)[0]


class Steady:
    """Return a claim for `until`: true once a number is the same in 20 looks."""

    def __init__(self, number: Callable[[], int]) -> None:
        self._number = number
        self._last = -1
        self._looks = 0

    def __call__(self) -> bool:
        now = self._number()
        self._looks = self._looks + 1 if now == self._last else 0
        self._last = now
        return self._looks >= 20


def split_each(data: bytes, at: Sequence[int]) -> list[bytes]:
    """Return ``data`` cut before each position of ``at``."""
    edges = [0, *at, len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if start < end]
