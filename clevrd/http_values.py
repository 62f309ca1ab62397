"""Requests and responses as small values, the same for both ways into the daemon.

No sockets here. The raw path and aiohttp both make a Request, ask the same handler and render the
same Response, so a request means the same on both.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, Protocol, cast
from urllib.parse import parse_qsl

import msgspec

from clevrd.client_certificates import ClientCertificate
from clevrd.errors import InvalidRequest

log = logging.getLogger(__name__)

JSON: Final = "application/json; charset=utf-8"
PROBLEM_JSON: Final = "application/problem+json"
TEXT: Final = "text/plain; charset=utf-8"
HTML: Final = "text/html; charset=utf-8"
JAVASCRIPT: Final = "text/javascript; charset=utf-8"

# How long input is ignored after an answer that ends its connection, so that the client can read
# that answer: closing a socket with unread bytes makes the kernel send a reset, which may overtake
# the answer.
LINGER_S: Final = 2.0

# A subscription to 50 topics with a position each has 150 fields; more than this is a mistake or an
# attack.
MAX_QUERY_FIELDS: Final = 256

# The target of an OPTIONS request for the whole server (RFC 9112 §3.2.4).
WHOLE_SERVER: Final = "*"

# A host as clients send it (RFC 9110 §7.2): a name or an address, perhaps with a port.
HOST: Final = re.compile(r"[A-Za-z0-9._\[\]:-]+", re.ASCII)

# Header field of answers that no cache may keep, since they hold for this moment or this request
# alone. Every answer that has no other Cache-Control gets it, except answers to POST, which no
# cache keeps anyway (RFC 9111 §2, §4.2.2).
NOT_STORED: Final = (("Cache-Control", "no-store"),)

_encode = msgspec.json.Encoder().encode

# Header fields by which a request is found in the logs of several programs.
_NAMES: Final = ("x-request-id", "traceparent")


class Request:
    """A request without its body.

    ``target`` is as the client sent it; ``path`` and ``query`` are its two halves, not decoded.
    Header names are lower case. A header's value is one field line, or several joined with commas
    where HTTP allows that (RFC 9110 §5.3).
    """

    __slots__ = (
        *("asker", "certificate", "headers", "is_http_1_0", "is_local_peer"),
        *("local_address", "method", "path", "peer", "query"),
    )

    def __init__(
        self, method: str, target: str, headers: Mapping[str, str], *, is_http_1_0: bool = False
    ) -> None:
        self.is_http_1_0 = is_http_1_0
        self.method = method
        self.path, _, self.query = target.partition("?")
        self.headers = headers
        # The tenant that asks, and its credential, for refusals; None until the gate has found out.
        self.asker: tuple[str, str] | None = None
        # The connection comes over loopback or a Unix socket. Set on aiohttp's side alone: heads
        # that the raw path remembers are many connections', and no endpoint there asks.
        self.is_local_peer = False
        # The address at the connection's other side, for logs; empty for none. Set on aiohttp's
        # side alone, too.
        self.peer = ""
        # The daemon's own side of the connection: ``unix:`` with a path, or host and port. Set on
        # aiohttp's side alone, too.
        self.local_address = ""
        # The client's certificate, which TLS has verified; None for none. Set on aiohttp's side
        # alone, where all connections with one are: see `is_local_peer`.
        self.certificate: ClientCertificate | None = None

    def names(self) -> Request:
        """Return a request with that alone by which a log names this one, to be kept for long."""
        found = {name: self.headers[name] for name in _NAMES if name in self.headers}
        kept = Request(self.method, self.path, found)
        kept.asker = self.asker
        return kept

    def options(self) -> dict[str, list[str]]:
        """Return the query's fields, decoded, each with all its values.

        Raises:
            InvalidRequest: the query is not UTF-8 once decoded, or has too many fields.
        """
        if not self.query:
            return {}
        try:
            pairs = parse_qsl(
                self.query,
                keep_blank_values=True,
                errors="strict",
                max_num_fields=MAX_QUERY_FIELDS,
            )
        except UnicodeDecodeError as error:
            raise InvalidRequest("The query is not UTF-8 once percent-decoded.") from error
        except ValueError as error:
            raise InvalidRequest(
                f"The query has more than {MAX_QUERY_FIELDS} fields; send fewer."
            ) from error
        options: dict[str, list[str]] = {}
        for name, value in pairs:
            options.setdefault(name, []).append(value)
        return options


class Response(msgspec.Struct, frozen=True, gc=False):
    """A whole response: status, body and the headers that only this answer has.

    A 204 has neither body nor content type; only the aiohttp side sends one.
    """

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()

    def fields(self) -> list[tuple[str, str]]:
        """Return the header fields that both ways send first, in their order."""
        kind = [("Content-Type", self.content_type)] if self.content_type else []
        return [*kind, *self.headers, ("Server", "clevrd")]


class Attach(Protocol):
    """Takes a transport over after a head was written to it."""

    def __call__(self, transport: asyncio.Transport, early_data: bytes) -> None: ...


class Upgrade(msgspec.Struct, frozen=True, gc=False):
    """An answer without an end: ``head`` is written, then ``attach`` gets the connection."""

    head: bytes
    attach: Attach


class WebSocketUpgrade(Upgrade, frozen=True, gc=False):
    """The answer to a WebSocket handshake."""


def attach_upgrade(
    upgrade: Upgrade,
    transport: asyncio.Transport,
    early_data: bytes,
    failed: Callable[[Exception], object],
    *,
    has_eof: bool = False,
) -> None:
    """Give ``transport`` to the upgrade; abort it if the upgrade raises, since no one owns it then.

    A transport that is closing already is aborted instead: nothing would end a protocol that begins
    on it.

    Args:
        early_data: bytes received behind the request.
        failed: called with the exception that `attach` raised.
        has_eof: the client has shut its side down behind ``early_data``.
    """
    if transport.is_closing():
        transport.abort()
        return
    try:
        upgrade.attach(transport, early_data)
    except Exception as error:
        transport.abort()
        failed(error)
        return
    if has_eof and not transport.is_closing():
        protocol = cast(asyncio.Protocol, transport.get_protocol())
        if not protocol.eof_received():
            transport.close()


class AbortOnError:
    """A block of a connection's work, behind which the client has an answer or is cut off.

    If it raises, as where memory has run out even for a refusal, the transport is aborted, and the
    error goes on to the code that counts and logs it.
    """

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport | None) -> None:
        self._transport = transport

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """End the connection if the block raised."""
        if isinstance(error, Exception) and self._transport is not None:
            self._transport.abort()


Reply = Response | Upgrade


def json_answer(value: object, status: int = 200) -> Response:
    """Return ``value`` (a struct or plain containers) as a JSON answer to a POST."""
    return Response(status, _encode(value))


def json_view(value: object, fields: tuple[tuple[str, str], ...] = NOT_STORED) -> Response:
    """Return ``value`` as a JSON answer to a GET, which no cache may keep."""
    return Response(200, _encode(value), JSON, fields)


class ResponseRenderer:
    """Renders responses as HTTP/1.1 bytes, with the same fields as the aiohttp side."""

    __slots__ = ("_date", "_second", "_starts")

    def __init__(self) -> None:
        # The wall-clock second that _date holds; both changed by render.
        self._second = -1
        self._date = b""
        # (status, content type) -> the bytes before the answer's own header fields.
        self._starts: dict[tuple[int, str], bytes] = {}

    def render(self, answer: Response, *, must_close: bool = False) -> bytes:
        """Return the whole response."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._date = formatdate(second, usegmt=True).encode()
        key = (answer.status, answer.content_type)
        start = self._starts.get(key) or self._render_start(key)
        own = b""
        if answer.headers:
            own = "".join(f"{name}: {value}\r\n" for name, value in answer.headers).encode()
        return b"%b%bServer: clevrd\r\nContent-Length: %d\r\nDate: %b\r\n%b\r\n%b" % (
            start,
            own,
            len(answer.body),
            self._date,
            b"Connection: close\r\n" if must_close else b"",
            answer.body,
        )

    def _render_start(self, key: tuple[int, str]) -> bytes:
        status, content_type = key
        start = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {content_type}\r\n"
        ).encode()
        self._starts[key] = start
        return start
