"""Which requests are plain: publishes, and WebSocket upgrades. No sockets here.

Grammar: RFC 9112 §2 to §6, less everything that has a second reading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from clevrd.admission import Admitted, Endpoint
from clevrd.core.message_headers import SPECVERSION
from clevrd.core.trace_context import TRACEPARENT
from clevrd.head_cache import HeadCache
from clevrd.http_values import HOST, Request

# Request line and header fields together; longer heads are aiohttp's, whose limits are per field.
MAX_HEAD_BYTES: Final = 8_192
# As aiohttp's: a head must not have more on one way than on the other.
MAX_FIELDS: Final = 128

# How each plain request begins, and what none holds: a line end that is not CR LF, or a NUL.
_BEGINNINGS: Final = (b"POST /publish", b"GET /subscribe", b"GET /publish", b"GET /ws")
_NEVER_PLAIN: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\0")
_PUBLISH_LINE: Final = re.compile(rb"POST (/publish(?:\?[!-~]*)?) HTTP/1\.1")
_UPGRADE_LINE: Final = re.compile(rb"GET ((/[a-z]+)(?:\?[!-~]*)?) HTTP/1\.1")
# One field line: a token, and a value of visible ASCII with inner spaces (RFC 9110 §5.5).
_FIELD: Final = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[!-~]+(?:[ \t]+[!-~]+)*)?)[ \t]*"
)
_LENGTH: Final = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)

# Fields that change how a message is framed or what may follow it, or that aiohttp refuses: never
# plain.
_FRAMING: Final = frozenset(
    {
        "content-encoding",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "sec-websocket-key1",
        "te",
        "trailer",
        "transfer-encoding",
    }
)
# Fields that only one publish has, so that its head does not come again: its key, its span, its
# event.
_COMES_ONCE: Final = frozenset({"idempotency-key", TRACEPARENT, SPECVERSION})


class PlainHead:
    """A request head that the grammar recognised whole."""

    __slots__ = ("admitted", "content_length", "endpoint", "generation", "is_upgrade", "request")

    def __init__(
        self, request: Request, endpoint: Endpoint, content_length: int, is_upgrade: bool
    ) -> None:
        self.request = request
        self.endpoint = endpoint
        self.content_length = content_length
        self.is_upgrade = is_upgrade
        # The head as its endpoint admitted it, and the gate's generation at that time; None before
        # that.
        self.admitted: Admitted | None = None
        self.generation = -1


def read_fields(lines: list[bytes]) -> dict[str, str] | None:
    """Return field lines by lower-case name; None unless each is plain and no name comes twice."""
    fields = read_lines(lines)
    return fields if fields is not None and HOST.fullmatch(fields.get("host", "")) else None


def read_lines(lines: list[bytes]) -> dict[str, str] | None:
    """Return ``read_fields`` also where there is no host, as HTTP/1.0 has none."""
    fields: dict[str, str] = {}
    if len(lines) > MAX_FIELDS:
        return None
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            return None
        name = match[1].decode("ascii").lower()
        if name in fields or name in _FRAMING:
            return None
        fields[name] = match[2].decode("ascii")
    return fields


def can_become_plain(part: bytes) -> bool:
    """Return whether ``part``, in which no head ends yet, may be the beginning of a plain one."""
    return begins_like(part, _BEGINNINGS) and _NEVER_PLAIN.search(part) is None


def begins_like(part: bytes, beginnings: tuple[bytes, ...]) -> bool:
    """Return whether ``part`` begins as one of ``beginnings`` does, as far as it goes."""
    return part.startswith(beginnings) or any(each.startswith(part) for each in beginnings)


class PlainGrammar:
    """Recognises the two kinds of plain requests: publishes, and WebSocket upgrades."""

    def __init__(
        self, publish: Endpoint, upgrades: Mapping[str, Endpoint], max_message_bytes: int
    ) -> None:
        self._publish = publish
        # Path -> what answers its upgrades.
        self._upgrades = upgrades
        self._max_message_bytes = max_message_bytes
        # Heads of publishes on kept connections, which are parsed once.
        self._cache: HeadCache[PlainHead] = HeadCache()

    def read(self, head: bytes) -> PlainHead | None:
        """Return what ``head`` asks, without its final empty line; None when it is not plain."""
        cached = self._cache.get(head)
        if cached is not None:
            return cached
        line, *lines = head.split(b"\r\n")
        if match := _PUBLISH_LINE.fullmatch(line):
            plain = self._read_publish(match[1].decode("ascii"), read_fields(lines))
            # A head that is one publish's own would push out those that come again.
            if plain is not None and _COMES_ONCE.isdisjoint(plain.request.headers):
                self._cache.add(head, plain)
            return plain
        if match := _UPGRADE_LINE.fullmatch(line):
            endpoint = self._upgrades.get(match[2].decode("ascii"))
            if endpoint is not None:
                return self._read_upgrade(endpoint, match[1].decode("ascii"), read_fields(lines))
        return None

    def _read_publish(self, target: str, fields: dict[str, str] | None) -> PlainHead | None:
        # The answer to a browser's page has fields of its own, which aiohttp's side alone knows.
        if fields is None or "upgrade" in fields or "origin" in fields:
            return None
        if fields.get("connection", "keep-alive").lower() != "keep-alive":
            return None
        length = fields.get("content-length", "")
        if not _LENGTH.fullmatch(length) or int(length) > self._max_message_bytes:
            return None
        return PlainHead(Request("POST", target, fields), self._publish, int(length), False)

    def _read_upgrade(
        self, endpoint: Endpoint, target: str, fields: dict[str, str] | None
    ) -> PlainHead | None:
        if fields is None or "content-length" in fields:
            return None
        if fields.get("upgrade", "").lower() != "websocket":
            return None
        # Firefox sends "keep-alive, Upgrade".
        connection = fields.get("connection", "").lower().replace(" ", "")
        if connection not in ("upgrade", "keep-alive,upgrade"):
            return None
        return PlainHead(Request("GET", target, fields), endpoint, 0, True)
