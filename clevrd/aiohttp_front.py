"""The aiohttp side of the door: its requests as Request values, Answers as its responses.

Every HTTP feature that is not worth a fast path is aiohttp's: odd but legal requests, chunked
bodies, keep-alive, error pages for what is no HTTP. What a request means is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, NoReturn, cast

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from clevrd.config import Config
from clevrd.errors import (
    ClevrdError,
    HeaderTooLarge,
    InvalidRequest,
    MessageTooLarge,
    RequestTimeout,
    Unavailable,
    UpgradeRequired,
)
from clevrd.exchange import (
    HOST,
    TOO_MUCH_INPUT,
    Answer,
    Reply,
    Request,
    ResponseRenderer,
    Router,
    Takeover,
    Upgrade,
    refusal_answer,
)
from clevrd.input_budget import InputBudget
from clevrd.metrics import Counters

# How long the rest of a refused request is read and ignored, so that the refusal is not lost to a
# reset: closing a socket with unread bytes makes the kernel send one.
LINGER_S: Final = 2.0

# The request line, and each header field, in bytes.
MAX_LINE_BYTES: Final = 8_190

# Bytes that a body may cost on the wire beyond twice its limit: chunks of one byte are six times
# their size, and half a second of parsing per MiB.
CHUNKING_SLACK_BYTES: Final = 65_536

# Turns of the loop within which aiohttp begins to handle a request that has arrived; it takes 3.
TURNS_TO_BEGIN: Final = 8

# Field lines that mean something else, or an attack, when they come twice (RFC 9110 §5.3).
_SINGLE: Final = frozenset(
    {
        "authorization",
        "content-encoding",
        "content-length",
        "content-type",
        "host",
        "idempotency-key",
        "last-event-id",
        "origin",
        "sec-websocket-key",
        "sec-websocket-version",
        "transfer-encoding",
        "x-tenant-id",
    }
)


class FrontConnection(RequestHandler):
    """aiohttp's connection with what it lacks: an end to slow heads, unread answers, half-closes.

    Only public methods of asyncio's Protocol and of aiohttp's handler are overridden.
    """

    __slots__ = (
        "_front",
        "_gone",
        "_handled",
        "_is_ending",
        "_limit",
        "_stall",
        "awaited",
        "current",
        "has_eof",
        "received_bytes",
    )

    def __init__(self, front: AiohttpFront, server: web.Server, **options: Any) -> None:
        super().__init__(server, loop=front.loop, **options)
        self._front = front
        # The request being handled.
        self.current: web.BaseRequest | None = None
        # What it waits for, where that is of no use to anybody else.
        self.awaited: asyncio.Future[Answer] | None = None
        self.received_bytes = 0
        # How many requests were begun.
        self._handled = 0
        # What ends the connection unless the request under way arrives, or the client leaves.
        self._limit: asyncio.TimerHandle | None = None
        # What ends it unless the client takes what was written.
        self._stall: asyncio.TimerHandle | None = None
        # The client sends nothing more, and may still read.
        self.has_eof = False
        # The last word has been said: what still comes is ignored.
        self._is_ending = False
        self._gone: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have `pause_writing` called as soon as anything is left unsent."""
        super().connection_made(transport)
        # After it, since what the raw path left unsent calls `pause_writing` at once.
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        """Start the clock of a request with its first bytes."""
        if self._is_ending:
            return
        self.received_bytes += len(data)
        if self.current is None and self._limit is None and data.strip(b"\r\n"):
            self._limit = self._front.loop.call_later(
                self._front.request_timeout_s, self._expire_head
            )
        super().data_received(data)

    def begin(self, http_request: web.BaseRequest) -> None:
        """Note that a request's head has arrived and is being handled."""
        self._cancel_limit()
        self.current = http_request
        self._handled += 1
        if self.has_eof:
            _cut_short(http_request)

    def end(self) -> None:
        """Note that the request has been answered."""
        self.current = None
        if self.has_eof:
            self._close_when_idle(self._handled, TURNS_TO_BEGIN)

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp never keeps it open
        """Answer what was asked before closing: a client may shut its side down after a request."""
        if self._is_ending:
            return False
        self.has_eof = True
        if self.current is None:
            self._close_when_idle(self._handled, TURNS_TO_BEGIN)
        else:
            _cut_short(self.current)
        return True

    def pause_writing(self) -> None:
        """Give the client time to read what it was answered, and no more."""
        super().pause_writing()
        if self.transport is not None:
            self._watch_stall(self.transport, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read it all."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the clocks; also when the connection is handed on."""
        super().connection_lost(exc)
        if self.awaited is not None:
            self.awaited.cancel()
        self._cancel_limit()
        if self._stall is not None:
            self._stall.cancel()
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP as any other refusal; it may hold secrets, so it is not logged."""
        self._cancel_limit()
        if isinstance(exc, ConnectionError):
            raise ConnectionResetError("the client has gone") from exc
        if isinstance(exc, LineTooLong):
            return self._front.last_word(
                self, HeaderTooLarge(f"A line of the head is over {MAX_LINE_BYTES} bytes.")
            )
        return self._front.last_word(
            self, InvalidRequest("That is not HTTP/1.1 as this server takes it (RFC 9112).")
        )

    def linger(self) -> asyncio.Future[None]:
        """Send nothing more, ignore what comes, and close when the client has, or after LINGER_S.

        Returns:
            what is done when the connection is gone.
        """
        loop = self._front.loop
        self._gone = loop.create_future()
        self._is_ending = True
        self._cancel_limit()
        if self.transport is None or self.transport.is_closing():
            self._gone.set_result(None)
            return self._gone
        self.transport.write_eof()
        self.transport.resume_reading()
        self._limit = loop.call_later(LINGER_S, self.force_close)
        return self._gone

    def _expire_head(self) -> None:
        self._limit = None
        timeout_s = self._front.request_timeout_s
        self._end_early(RequestTimeout(f"The request did not arrive within {timeout_s:g} s."))

    def _end_early(self, error: ClevrdError) -> None:
        """Refuse a request whose head is not whole, which aiohttp knows nothing of yet."""
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.write(self._front.render(error))
        self.close()
        self.linger()

    def _cancel_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _close_when_idle(self, handled: int, turns: int) -> None:
        """Close unless aiohttp takes up a request that has arrived within so many turns."""
        if self._handled > handled or self._is_ending:
            return
        if turns == 0:
            self.force_close()
            return
        self._front.loop.call_soon(self._close_when_idle, handled, turns - 1)

    def _watch_stall(self, transport: asyncio.Transport, unsent_bytes: int) -> None:
        self._stall = self._front.loop.call_later(
            self._front.keepalive_timeout_s, self._check_stall, transport, unsent_bytes
        )

    def _check_stall(self, transport: asyncio.Transport, unsent_bytes: int) -> None:
        left_bytes = transport.get_write_buffer_size()
        # Half of it each time, so that a byte now and then does not hold the connection for ever.
        if 2 * left_bytes > unsent_bytes:
            transport.abort()
        else:
            self._watch_stall(transport, left_bytes)


class FrontServer(web.Server):
    """aiohttp's low-level server with our connections, and a count of them."""

    def __init__(self, front: AiohttpFront, **options: Any) -> None:
        super().__init__(front.handle)
        self._front = front
        self._options = options
        # Of the connections that are aiohttp's now.
        self._transports: dict[RequestHandler, asyncio.Transport] = {}

    @property
    def open_connections(self) -> int:
        """How many connections there are."""
        return len(self._transports)

    def __call__(self) -> RequestHandler:
        """Return the protocol of one connection."""
        return FrontConnection(self._front, self, **self._options)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """One more."""
        self._transports[handler] = transport
        super().connection_made(handler, transport)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """One less; also when a connection is handed on."""
        self._transports.pop(handler, None)
        super().connection_lost(handler, exc)

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # aiohttp's
        """End all connections; those that don't take their last answer without it."""
        await super().shutdown(timeout)
        for transport in self._transports.values():
            transport.abort()


class AiohttpFront:
    """Answers aiohttp's requests through a Router."""

    def __init__(
        self, router: Router, counters: Counters, budget: InputBudget, config: Config
    ) -> None:
        self._router = router
        self.budget = budget
        self._counters = counters
        self._renderer = ResponseRenderer()
        self.request_timeout_s = config.request_timeout_s
        self.keepalive_timeout_s = config.keepalive_timeout_s
        self.loop = asyncio.get_running_loop()
        # Requests whose answers are due.
        self.in_flight = 0
        self._server: FrontServer | None = None

    @property
    def open_connections(self) -> int:
        """How many connections are aiohttp's now."""
        return self._server.open_connections if self._server is not None else 0

    def make_server(self, keepalive_timeout_s: float) -> FrontServer:
        """Return the factory of aiohttp's connection protocols."""
        self._server = FrontServer(
            self,
            # aiohttp's access log prints query strings; ours never sees a request's text.
            access_log=None,
            keepalive_timeout=keepalive_timeout_s,
            # Every refusal lingers by itself (`_LastWord`).
            lingering_time=0,
            # 415 instead of inflating what a stranger compressed (handlers/publish.py).
            auto_decompress=False,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )
        return self._server

    async def handle(self, http_request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; every refusal is counted, none raises."""
        connection = cast(FrontConnection, http_request.protocol)
        self.in_flight += 1
        connection.begin(http_request)
        try:
            return await self._handle(http_request, connection)
        finally:
            connection.end()
            self.in_flight -= 1

    def last_word(
        self, connection: FrontConnection, error: Exception, request: Request | None = None
    ) -> web.Response:
        """Return the response to ``error``, after which the connection is closed."""
        return _LastWord(connection, self._refusal(error, request))

    def render(self, error: ClevrdError) -> bytes:
        """Return the response to ``error`` as bytes, for when aiohttp has no request to answer."""
        return self._renderer.render(self._refusal(error, None), must_close=True)

    def _refusal(self, error: Exception, request: Request | None) -> Answer:
        return refusal_answer(error, request, self._counters.count_refusal)

    async def _handle(
        self, http_request: web.BaseRequest, connection: FrontConnection
    ) -> web.StreamResponse:
        request: Request | None = None
        try:
            request = to_request(http_request)
            reply = await self._reply(request, http_request)
        except ConnectionError:
            raise
        except Exception as error:
            # Without a request its framing is in doubt; with a body there is more to come, which
            # is not worth waiting for.
            if request is None or http_request.can_read_body:
                return self.last_word(connection, error, request)
            return to_response(self._refusal(error, request))
        if isinstance(reply, Takeover):
            return _take_over(http_request, reply)
        return to_response(reply)

    async def _reply(self, request: Request, http_request: web.BaseRequest) -> Reply:
        endpoint = self._router.find(request)
        endpoint.admit(request)
        body = b""
        if endpoint.max_body_bytes:
            body = await self._read_body(http_request, endpoint.max_body_bytes)
        elif http_request.body_exists:
            raise InvalidRequest(f"{request.method} {request.path} takes no body; send none.")
        reply = endpoint.answer(request, body)
        if isinstance(reply, Upgrade):
            _check_upgrade(http_request)
        if isinstance(reply, Answer | Takeover):
            return reply
        if isinstance(reply, asyncio.Future):
            return await _unless_gone(cast(FrontConnection, http_request.protocol), reply)
        return await reply

    async def _read_body(self, http_request: web.BaseRequest, max_bytes: int) -> bytes:
        """Return the whole body, of ``max_bytes`` at most.

        Raises:
            MessageTooLarge: as soon as it is known, with the rest unread.
            RequestTimeout: it did not arrive in time.
            InvalidRequest: its framing is broken.
        """
        content = http_request.content
        if content.is_eof():
            # Arrived with the head, as small ones do: nothing to wait for.
            body = content.read_nowait()
            _check_size(len(body), max_bytes)
            return body
        if _expects_continue(http_request):
            open_transport(http_request.transport).write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(self.request_timeout_s):
                return await _collect(
                    content, cast(FrontConnection, http_request.protocol), max_bytes, self.budget
                )
        except TimeoutError as error:
            raise RequestTimeout(
                f"The request did not arrive within {self.request_timeout_s:g} s."
            ) from error
        except web.RequestPayloadError as error:
            raise InvalidRequest("The body is cut short; send all of it.") from error
        except OSError as error:
            raise ConnectionResetError("the client has gone") from error


async def _unless_gone(connection: FrontConnection, reply: asyncio.Future[Answer]) -> Answer:
    """Return the reply, or end the request when its client goes first."""
    connection.awaited = reply
    try:
        return await reply
    except asyncio.CancelledError:
        if connection.transport is not None:
            raise
        raise ConnectionResetError("the client has gone") from None
    finally:
        connection.awaited = None


async def _collect(
    content: StreamReader, connection: FrontConnection, max_bytes: int, budget: InputBudget
) -> bytes:
    collected = bytearray()
    most_bytes = connection.received_bytes + 2 * max_bytes + CHUNKING_SLACK_BYTES
    try:
        async for chunk in content.iter_any():
            fits = budget.change(len(collected), len(collected) + len(chunk))
            collected += chunk
            _check_size(len(collected), max_bytes)
            if connection.received_bytes > most_bytes:
                raise MessageTooLarge(max_bytes)
            if not fits:
                raise Unavailable(TOO_MUCH_INPUT)
        return bytes(collected)
    finally:
        budget.change(len(collected), 0)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MessageTooLarge(max_bytes)


def to_request(http_request: web.BaseRequest) -> Request:
    """Return aiohttp's request as ours.

    Raises:
        InvalidRequest: a field that may stand once stands twice, the target is not a path, the
            host is not one, or the framing is not plainly HTTP/1.1's or HTTP/1.0's.
    """
    headers: dict[str, str] = {}
    for name, value in http_request.headers.items():
        key = name.lower()
        if key not in headers:
            headers[key] = value
        elif key in _SINGLE:
            raise InvalidRequest(f"The header {key} is sent twice; send it once.")
        else:
            headers[key] = f"{headers[key]}, {value}"
    target = http_request.raw_path
    if not target.startswith("/"):
        raise InvalidRequest("The request target must be a path.")
    host = headers.get("host")
    if host and not HOST.fullmatch(host):
        raise InvalidRequest("The Host header is not a host; send a name or an address.")
    _check_framing(http_request.version, headers)
    is_http_1_0 = http_request.version == HttpVersion10
    return Request(http_request.method, target, headers, is_http_1_0=is_http_1_0)


def _check_framing(version: HttpVersion, headers: dict[str, str]) -> None:
    """Refuse what two readers of HTTP could take differently, and aiohttp lets pass."""
    if version not in (HttpVersion10, HttpVersion11):
        raise InvalidRequest("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    coding = headers.get("transfer-encoding")
    # RFC 9112 §6.1: in HTTP/1.0 it is faulty framing.
    if coding is not None and (version == HttpVersion10 or coding.lower() != "chunked"):
        raise InvalidRequest("The only Transfer-Encoding taken is chunked, in HTTP/1.1.")


def _check_upgrade(http_request: web.BaseRequest) -> None:
    """Refuse an upgrade that aiohttp's parser did not take for one: it drops what follows it."""
    upgrade = http_request.headers.get("Upgrade", "")
    if upgrade.lower() != "websocket" or http_request.version != HttpVersion11:
        raise UpgradeRequired("Ask for WebSocket alone (Upgrade: websocket), in HTTP/1.1.")


def _expects_continue(http_request: web.BaseRequest) -> bool:
    # RFC 9110 §10.1.1: never answered in HTTP/1.0.
    expects = http_request.headers.get("Expect", "").lower() == "100-continue"
    return expects and http_request.version == HttpVersion11


def _cut_short(http_request: web.BaseRequest) -> None:
    """Tell who reads the body that no more of it will come."""
    if not http_request.content.is_eof():
        http_request.content.set_exception(web.RequestPayloadError("cut short"))


def to_response(answer: Answer) -> web.Response:
    """Return ``answer`` as aiohttp's response, its headers in the order the raw path sends them."""
    return web.Response(status=answer.status, body=answer.body, headers=_fields_of(answer))


def _fields_of(answer: Answer) -> list[tuple[str, str]]:
    return [("Content-Type", answer.content_type), *answer.headers, ("Server", "clevrd")]


class _LastWord(web.Response):
    """A refusal that ends the connection, once the client can have read it."""

    def __init__(self, connection: FrontConnection, answer: Answer) -> None:
        super().__init__(status=answer.status, body=answer.body, headers=_fields_of(answer))
        self._connection = connection
        self.force_close()

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        await self._connection.linger()


class _EarlyData:
    """Takes what aiohttp has read behind an upgrade's head; the shape of its frame parsers."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """Nothing to do: the transport's end is told to its next protocol."""


class _HandedOver(web.StreamResponse):
    """What a handler returns when the connection is no longer aiohttp's.

    Raising from `prepare` is how a handler ends aiohttp's connection task without a response.
    """

    async def prepare(self, request: web.BaseRequest) -> NoReturn:
        raise ConnectionResetError("handed over")


def _take_over(http_request: web.BaseRequest, upgrade: Takeover) -> web.StreamResponse:
    """Write the head and give the transport to the protocol of what follows it."""
    protocol = cast(FrontConnection, http_request.protocol)
    transport = open_transport(http_request.transport)
    early = _EarlyData()
    protocol.set_parser(early)  # type: ignore[arg-type]  # it is only ever fed
    transport.write(upgrade.head)
    # aiohttp lets go: without a transport it has nothing to close when it hears of the loss.
    protocol.transport = None
    protocol.connection_lost(None)
    upgrade.attach(transport, early.data)
    if protocol.has_eof:
        transport.close()
    return _HandedOver()


def open_transport(transport: asyncio.Transport | None) -> asyncio.Transport:
    """Return ``transport``, or end the request as aiohttp ends those whose client has gone."""
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client has gone")
    return transport
