"""aiohttp's connection, with limits on slow clients, half-closes, and shares of turns.

aiohttp parses everything that one read brings at once, which takes 40 ms for a body in chunks of
one byte; here parsing is cut into shares of the loop's turns. The methods below stand in this
order: life of a connection, shares of turns, slow heads, stalls, half-closes, final answers. Bodies
are read in `body`, and requests are answered in `front`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from socket import AF_INET
from typing import Any, Final, NoReturn, cast

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from clevrd.address_limit import AddressLimit
from clevrd.addresses import text_of_socket
from clevrd.aiohttp_front.framing import (
    CUT_SHORT,
    MAX_LINE_BYTES,
    NOT_HTTP,
    TOO_LONG,
    BrokenChunks,
    Framing,
    KnownHeads,
    WrongVersion,
)
from clevrd.client_certificates import ClientCertificate, read_certificate
from clevrd.config import Config
from clevrd.errors import (
    ClevrdError,
    HeaderTooLarge,
    InvalidRequest,
    MessageTooLarge,
    RequestTimeout,
)
from clevrd.http_values import (
    LINGER_S,
    AbortOnError,
    Request,
    Response,
    ResponseRenderer,
)
from clevrd.input_budget import NOBODY, InputBudget, Sender
from clevrd.local_requests import is_local_peer
from clevrd.pace import reads_on
from clevrd.progress import ask_when_silent, progress_of, reset
from clevrd.scheduling.fair_turns import FairTurns

# Bytes that no part of a head may hold. Fed to aiohttp's parser, they make it report a fault at
# this place, behind the requests that are whole; the sentence of that fault repeats these bytes,
# which tells it from a fault in the client's own bytes.
_BREAK: Final = b"\0clevrd\0"

# Bytes given to aiohttp between two looks at the time, out of a read of up to 256 KiB: 1.3 ms for a
# body in chunks of one byte.
SLICE_BYTES: Final = 8_192

# Requests that aiohttp holds at most, beside the one that it handles. From 32 on its parser keeps
# their bytes, and parses them later all at once (MAX_MSG_QUEUE_SIZE of its web_protocol).
MAX_QUEUED_REQUESTS: Final = 16

# Turns of the loop after which a request that has arrived is certainly being handled; aiohttp takes
# 3.
TURNS_TO_BEGIN: Final = 8


class FrontConnection(RequestHandler):
    """One connection of aiohttp's, until it is closed or taken over.

    Only public methods of asyncio's Protocol and of aiohttp's handler are overridden.
    """

    __slots__ = (
        "_awaited",
        "_awaits_room",
        "_current",
        "_fault",
        "_framing",
        "_gone",
        "_handled",
        "_is_ending",
        "_is_eof_held",
        "_limit",
        "_max_body_bytes",
        "_sender",
        "_server",
        "_stall",
        "_unread",
        "_wants_more",
        "certificate",
        "has_eof",
        "is_local",
        "local_address",
        "peer",
        "received_bytes",
    )

    def __init__(self, server: FrontServer, **options: Any) -> None:
        super().__init__(server, loop=server.loop, **options)
        self._server = server
        # The request being handled; None between requests. Changed by begin and end.
        self._current: web.BaseRequest | None = None
        # The answer that this request waits for in `unless_gone`, cancelled if the client goes;
        # else None.
        self._awaited: asyncio.Future[Response] | None = None
        self.received_bytes = 0
        # Bytes received and not yet given to aiohttp; a callback in `turns` will give them.
        self._unread = b""
        # The sender for whom the budget counts these bytes; NOBODY while there are none.
        self._sender = NOBODY
        # True while _unread waits until aiohttp has handled requests that it holds.
        self._awaits_room = False
        # Whether aiohttp itself wants more input, while reading is paused here.
        self._wants_more = True
        # True when the client has shut its side down behind bytes that are still in _unread.
        self._is_eof_held = False
        self._framing = Framing(server.known_heads)
        # The fault found in the last request by code here, not by aiohttp; None without one.
        self._fault: ClevrdError | None = None
        # Largest body of the request being handled, set once its body is waited for; None before.
        self._max_body_bytes: int | None = None
        # Number of requests that aiohttp has begun to handle; rises in begin.
        self._handled = 0
        # Timer that ends the connection unless the head under way arrives whole, or, at the end,
        # the client leaves.
        self._limit: asyncio.TimerHandle | None = None
        # Timer that ends the connection unless the client reads its answers.
        self._stall: asyncio.TimerHandle | None = None
        # True once the client has shut its side down; it may still read.
        self.has_eof = False
        # The connection comes over loopback or a Unix socket; set in connection_made.
        self.is_local = False
        # The address of the client, or of a proxy that passes requests on; empty for none.
        self.peer = ""
        # This side of it, as URLs name it; set in connection_made.
        self.local_address = ""
        # The client's certificate, which TLS has verified; set in connection_made.
        self.certificate: ClientCertificate | None = None
        # True once the final answer was sent; input after that is ignored.
        self._is_ending = False
        self._gone: asyncio.Future[None] | None = None

    # --- from the first byte to the last ---------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have `pause_writing` called as soon as any byte is left unsent."""
        super().connection_made(transport)
        found = transport.get_extra_info("socket")
        # The address that a PROXY header named, where there was one.
        self.peer = peer = self._server.addresses.peer_of(transport)
        self.is_local = found is not None and (
            is_local_peer((peer,), AF_INET) if peer else is_local_peer(None, found.family)
        )
        self.local_address = text_of_socket(transport.get_extra_info("sockname"))
        self.certificate = read_certificate(transport.get_extra_info("peercert"))
        # The limit is set after aiohttp's own set-up, since bytes that the raw path left unsent
        # make the transport call `pause_writing` at once.
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        """Parse a share of ``data`` now, or all of it in a later turn."""
        if not data:
            # aiohttp itself calls with no bytes when it has room again for input that its parser
            # holds.
            self._parse_on()
            return
        self._server.budget.received_bytes += len(data)
        if self._is_ending or self._fault is not None:
            return
        self.received_bytes += len(data)
        turns = self._server.turns
        if self._unread or not turns.begin():
            self._hold(data, has_begun=False)
        else:
            try:
                self._read(data)
            finally:
                turns.end()

    def let_go(self) -> None:
        """Be aiohttp's no more: the connection goes on with another protocol."""
        self._server.hand_over(self)
        # Without a transport aiohttp has nothing to close when it hears of the loss.
        self.transport = None
        self.connection_lost(None)

    def forget_client(self, transport: asyncio.Transport) -> None:
        """Note that a connection has ended which was let go and which nobody took."""
        self._server.addresses.left(transport)

    def uncount(self, data: bytes) -> None:
        """Leave the counting of ``data``, which was read, to its next owner."""
        self._server.budget.received_bytes -= len(data)

    def begin(self, http_request: web.BaseRequest) -> None:
        """Note that a request's head has arrived and is being handled."""
        self._cancel_limit()
        self._current = http_request
        self._handled += 1
        if self._awaits_room and not self._is_full:
            self._awaits_room = False
            self._server.turns.wait(self._take_turn, len(self._unread))
        self._fail_broken(http_request)
        if self.has_eof:
            _fail_body(http_request, _cut_short())

    async def unless_gone(self, reply: asyncio.Future[Response]) -> Response:
        """Return the reply to the request, or end the request when its client goes first.

        The client may have gone before the request got its turn, and then no other code would end
        the request. Neither side sends a byte until the answer, so the kernels have to check that
        the peer is there.
        """
        server = self._server
        if self.transport is None:
            reply.cancel()
        else:
            ask_when_silent(self.transport, server.ping_interval_s, server.pong_timeout_s)
        self._awaited = reply
        try:
            return await reply
        except asyncio.CancelledError:
            if self.transport is not None:
                raise
            raise ConnectionResetError("the client has gone") from None
        finally:
            self._awaited = None

    def open_transport(self) -> asyncio.Transport:
        """Return the transport, or raise what aiohttp expects if the client has gone."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the client has gone")
        return self.transport

    def limit_body(self, max_bytes: int) -> None:
        """Refuse the current request's body as soon as its chunk sizes add up to more."""
        self._max_body_bytes = max_bytes
        self._check_declared()

    def _check_declared(self) -> None:
        limit_bytes, current = self._max_body_bytes, self._current
        if limit_bytes is None or current is None or current.content.is_eof():
            return
        if self._framing.declared_bytes > limit_bytes:
            current.content.set_exception(MessageTooLarge(limit_bytes))

    def end(self) -> None:
        """Note that the current request has been answered."""
        self._current = None
        self._max_body_bytes = None
        if self.has_eof:
            self._close_when_idle(self._handled, TURNS_TO_BEGIN)
        elif self._framing.is_in_head:
            # The next request's head has begun to arrive behind the one that was answered.
            self._start_limit()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the timers; also called when an upgrade takes the connection over."""
        super().connection_lost(exc)
        self.take_unread()
        if self._awaited is not None:
            self._awaited.cancel()
        self._cancel_limit()
        if self._stall is not None:
            self._stall.cancel()
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    # --- shares of turns -------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        """Give aiohttp as much of ``data`` as this turn's share allows; hold the rest.

        The last of what aiohttp's parser is given at once may be a fault, for which it drops the
        requests before that. So the parser is given one request at a time, and not so many that
        it would keep some back.
        """
        at = 0
        while at < len(data):
            if self._is_full or (at and self._server.turns.is_spent()):
                self._hold(data[at:])
                return
            at += self._give(data[at : at + SLICE_BYTES])
            if self._fault is not None:
                break
        framing = self._framing
        if self._current is None and (framing.is_in_head or framing.is_lost):
            self._start_limit()

    @property
    def is_first(self) -> bool:
        """Whether the request under way is the connection's first: none was answered before it."""
        return self._handled <= 1

    @property
    def _is_full(self) -> bool:
        """Whether aiohttp holds as many requests as it may."""
        return self._framing.requests - self._handled > MAX_QUEUED_REQUESTS

    def _give(self, data: bytes) -> int:
        """Give aiohttp the part of ``data`` that is well-formed, and refuse what is not.

        The part ends with a request at the latest. Returns how many bytes are done with.
        """
        passed, followed_bytes, fault = self._framing.take(data)
        super().data_received(passed)
        if fault is not None:
            self._refuse_next(fault)
        if self._max_body_bytes is not None:
            self._check_declared()
        return followed_bytes

    def _hold(self, data: bytes, *, has_begun: bool = True) -> None:
        """Parse ``data`` in a later turn, and read no more from the socket until then."""
        before_bytes = len(self._unread)
        self._unread += data
        if self._sender is NOBODY:
            self._sender = self.sender(None, {})
        if not self._server.budget.change(before_bytes, len(self._unread), self._sender):
            self._refuse_unread()
            return
        self._stop_reading()
        if before_bytes:
            return
        if self._is_full:
            self._awaits_room = True
        else:
            self._server.turns.wait(
                self._take_turn, len(data), has_begun=has_begun, is_first=self.is_first
            )

    def _take_turn(self) -> None:
        unread = self.take_unread()
        if self.transport is None or self._is_ending:
            return
        self._read_as_wanted(self.transport)
        with AbortOnError(self.transport):
            self._read(unread)
        if self._is_eof_held and not self._unread:
            self._is_eof_held = False
            if not self.eof_received():
                self.transport.close()

    def _stop_reading(self) -> None:
        """Pause reading until `_read_as_wanted`; note whether aiohttp wants more now."""
        if self.transport is not None:
            self._wants_more = self.transport.is_reading()
            self.transport.pause_reading()

    def _read_as_wanted(self, transport: asyncio.Transport) -> None:
        if self._wants_more:
            transport.resume_reading()

    def _parse_on(self) -> None:
        """Let aiohttp parse the input that it holds itself, now that it has room."""
        if not self._unread or self.transport is None:
            super().data_received(b"")
            return
        self._read_as_wanted(self.transport)
        super().data_received(b"")
        self._stop_reading()

    def take_unread(self) -> bytes:
        """Return the bytes received and not parsed yet; the caller has to handle them."""
        unread, self._unread = self._unread, b""
        self._server.budget.change(len(unread), 0, self._sender)
        self._sender = NOBODY
        return unread

    def sender(self, tenant: str | None, headers: Mapping[str, str]) -> Sender:
        """Return for whom input is counted: the tenant, if it is known, and the client's address.

        Args:
            headers: of the request, by which a listed proxy names its client.
        """
        address = ""
        if self.transport is not None:
            address = self._server.addresses.sender_of(self.transport, headers)
        return self._server.budget.sender(tenant, address)

    def _refuse_unread(self) -> None:
        """End the connection, with a refusal where no other answer is under way."""
        self.take_unread()
        if self._current is not None or self.transport is None:
            self.force_close()
            return
        self.transport.write(self._server.last_word(self._server.budget.refusal()))
        self.close()
        self.linger()

    # --- slow heads ------------------------------------------------------------------------------

    def _expire_head(self) -> None:
        """Refuse a request whose head is not whole; aiohttp knows of no request yet."""
        self._limit = None
        if self.transport is None or self.transport.is_closing():
            return
        error = RequestTimeout(self._server.request_timeout_s)
        self.transport.write(self._server.last_word(error))
        self.close()
        self.linger()

    def _start_limit(self) -> None:
        """Start the timer of a request's head, unless it runs."""
        if self._limit is None:
            self._limit = self._server.loop.call_later(
                self._server.request_timeout_s, self._expire_head
            )

    def _cancel_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    # --- stalls ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Start the timer within which the client has to read its answers."""
        super().pause_writing()
        if self.transport is not None:
            self._watch_stall(self.transport)

    def resume_writing(self) -> None:
        """Stop the timer, since the client has read everything."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _watch_stall(self, transport: asyncio.Transport) -> None:
        before_bytes = progress_of(transport).taken_bytes
        self._stall = self._server.loop.call_later(
            self._server.keepalive_timeout_s, self._check_stall, transport, before_bytes
        )

    def _check_stall(self, transport: asyncio.Transport, before_bytes: int) -> None:
        taken_bytes = progress_of(transport).taken_bytes - before_bytes
        if reads_on(taken_bytes, self._server.keepalive_timeout_s):
            self._watch_stall(transport)
        else:
            reset(transport)

    # --- half-closes -----------------------------------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp never keeps it open
        """Answer requests that have arrived before closing: a client may half-close early.

        Requests that are whole are handled one after the other. A body that is not whole never will
        be, so its request is refused (`begin`, `end`). A connection that an upgrade takes over is
        closed behind its head.
        """
        if self._is_ending:
            return False
        if self._unread:
            self._is_eof_held = True
            return True
        self.has_eof = True
        if self._framing.is_in_head:
            self._refuse_next(InvalidRequest(CUT_SHORT))
        elif self._current is None:
            self._close_when_idle(self._handled, TURNS_TO_BEGIN)
        else:
            _fail_body(self._current, _cut_short())
        return True

    def _close_when_idle(self, handled: int, turns: int) -> None:
        """Close unless aiohttp begins another request within ``turns`` turns of the loop."""
        if self._handled > handled or self._is_ending or self._fault is not None:
            return
        if turns == 0:
            self.force_close()
            return
        self._server.loop.call_soon(self._close_when_idle, handled, turns - 1)

    # --- last words ------------------------------------------------------------------------------

    def _refuse_next(self, fault: ClevrdError) -> None:
        """Refuse the request that is arriving, after the answers to those before it.

        The request may be under way already, and aiohttp does not tell the reader of its body that
        the parser has given up.
        """
        self._fault = fault
        super().data_received(_BREAK)
        if self._current is not None:
            self._fail_broken(self._current)

    def _fail_broken(self, http_request: web.BaseRequest) -> None:
        """Fail the body of the request being handled if its chunks are broken.

        That request is the last that has begun to arrive. The bodies of those before it are whole,
        although aiohttp may hold parts of them back.
        """
        if isinstance(self._fault, BrokenChunks) and self._handled == self._framing.requests:
            _fail_body(http_request, self._fault)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Refuse bytes that are no HTTP; they may hold secrets, so they are not logged."""
        self._cancel_limit()
        if isinstance(exc, ConnectionError):
            raise ConnectionResetError("the client has gone") from exc
        error: ClevrdError = InvalidRequest(NOT_HTTP)
        if self._fault is not None and repr(_BREAK)[2:-1] in str(exc):
            error = self._fault
        elif isinstance(exc, LineTooLong):
            error = HeaderTooLarge(TOO_LONG)
        if isinstance(error, WrongVersion):
            return OwnVersion(self, self._server.last_word(error))
        return LastWord(self, self._server.refuse(error, None))

    def linger(self) -> asyncio.Future[None]:
        """Send no more, ignore input, and close when the client does, or after LINGER_S.

        Returns:
            a future that is done when the connection is closed.
        """
        loop = self._server.loop
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


class LastWord(web.Response):
    """An answer after which the connection ends, once the client can have read it."""

    def __init__(self, connection: FrontConnection, answer: Response) -> None:
        super().__init__(status=answer.status, body=answer.body, headers=answer.fields())
        self._connection = connection
        self.force_close()

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        await self._connection.linger()


class OwnVersion(web.StreamResponse):
    """A refusal in HTTP/1.1 whatever version the request has (RFC 9110 §2.5)."""

    def __init__(self, connection: FrontConnection, word: bytes) -> None:
        super().__init__()
        self._connection = connection
        self._word = word

    async def prepare(self, request: web.BaseRequest) -> NoReturn:
        """Write the refusal and raise, which ends aiohttp's task without its own response."""
        self._connection.open_transport().write(self._word)
        await self._connection.linger()
        raise ConnectionResetError("refused")


def _fail_body(http_request: web.BaseRequest, fault: Exception) -> None:
    """Make the reader of the body fail, unless the body is whole or has failed before."""
    content = http_request.content
    if not content.is_eof() and content.exception() is None:
        content.set_exception(fault)


def _cut_short() -> Exception:
    return web.RequestPayloadError("cut short")


class FrontServer(web.Server):
    """aiohttp's low-level server: makes FrontConnections, counts them, and ends them."""

    def __init__(
        self,
        handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        refuse: Callable[[Exception, Request | None], Response],
        turns: FairTurns,
        budget: InputBudget,
        addresses: AddressLimit,
        config: Config,
    ) -> None:
        super().__init__(handle)
        self.loop = asyncio.get_running_loop()
        self.turns = turns
        self.budget = budget
        # The client of each connection.
        self.addresses = addresses
        # Makes and counts the answer to a request that raised.
        self.refuse = refuse
        self.request_timeout_s = config.request_timeout_s
        self.keepalive_timeout_s = config.keepalive_timeout_s
        self.ping_interval_s = config.ping_interval_s
        self.pong_timeout_s = config.pong_timeout_s
        self.known_heads = KnownHeads()
        self._renderer = ResponseRenderer()
        # The transports of the connections that aiohttp serves now.
        self._transports: dict[RequestHandler, asyncio.Transport] = {}

    def hand_over(self, handler: RequestHandler) -> None:
        """Forget ``handler``'s connection, which goes on with another protocol."""
        self._transports.pop(handler, None)

    @property
    def open_connections(self) -> int:
        """Number of connections that aiohttp serves now."""
        return len(self._transports)

    def __call__(self) -> RequestHandler:
        """Return the protocol of one connection."""
        return FrontConnection(
            self,
            # aiohttp's access log prints query strings; our own log has no text of a request.
            access_log=None,
            keepalive_timeout=self.keepalive_timeout_s,
            # aiohttp need not wait for input after a refusal: `LastWord` does that.
            lingering_time=0,
            # A compressed body gets a 415, and is not decompressed for a stranger
            # (handlers/publish/endpoint.py).
            auto_decompress=False,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )

    def last_word(self, error: ClevrdError) -> bytes:
        """Return the answer to ``error`` as bytes, for when aiohttp has no request to answer."""
        return self._renderer.render(self.refuse(error, None), must_close=True)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Count ``handler``'s connection."""
        self._transports[handler] = transport
        super().connection_made(handler, transport)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget ``handler``'s connection; also called when an upgrade takes it over."""
        self.addresses.left(self._transports.pop(handler, None))
        super().connection_lost(handler, exc)

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # aiohttp's
        """End all connections; abort those that don't read their last answer in time."""
        await super().shutdown(timeout)
        for transport in self._transports.values():
            transport.abort()
