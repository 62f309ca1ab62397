"""aiohttp's connection with what it lacks: ends to slow heads and stalls, half-closes, last words.

And shares of the loop's turns: aiohttp parses all that one read brings at once, which takes 40 ms
for a body in chunks of one byte. In this order below. Bodies are `body`'s, and what a request is
answered is `front`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn, cast

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from clevrd.aiohttp_front.framing import (
    CUT_SHORT,
    MAX_LINE_BYTES,
    NOT_HTTP,
    TOO_LONG,
    Framing,
    KnownHeads,
    WrongVersion,
)
from clevrd.config import Config
from clevrd.errors import (
    ClevrdError,
    HeaderTooLarge,
    InvalidRequest,
    MessageTooLarge,
    RequestTimeout,
    Unavailable,
)
from clevrd.http_values import LINGER_S, TOO_MUCH_INPUT, Request, Response, ResponseRenderer
from clevrd.input_budget import InputBudget
from clevrd.pace import reads_on
from clevrd.progress import ask_when_silent, progress_of, reset
from clevrd.scheduling.fair_turns import FairTurns

# What no part of a head may hold: aiohttp's parser reports it as a fault at this place, behind the
# requests that are whole, and its sentence tells it from a fault of the client's before it.
_BREAK: Final = b"\0clevrd\0"

# Of a read, which brings up to 256 KiB, what aiohttp is given between two looks at the time: 1.3 ms
# where it is a body in chunks of one byte.
SLICE_BYTES: Final = 8_192

# Turns of the loop within which aiohttp begins to handle a request that has arrived; it takes 3.
TURNS_TO_BEGIN: Final = 8


class FrontConnection(RequestHandler):
    """One connection of aiohttp's, until it is closed or taken over.

    Only public methods of asyncio's Protocol and of aiohttp's handler are overridden.
    """

    __slots__ = (
        "_awaited",
        "_current",
        "_fault",
        "_framing",
        "_gone",
        "_handled",
        "_is_ending",
        "_is_eof_held",
        "_limit",
        "_max_body_bytes",
        "_server",
        "_stall",
        "_unread",
        "_wants_more",
        "has_eof",
        "received_bytes",
    )

    def __init__(self, server: FrontServer, **options: Any) -> None:
        super().__init__(server, loop=server.loop, **options)
        self._server = server
        # The request being handled.
        self._current: web.BaseRequest | None = None
        # What it waits for, where that is of no use to anybody else.
        self._awaited: asyncio.Future[Response] | None = None
        self.received_bytes = 0
        # Received and not yet given to aiohttp, which is read on when its turn has come.
        self._unread = b""
        # Whether aiohttp would be read on, where it is we who don't.
        self._wants_more = True
        # The client has shut its side down behind what is not read yet.
        self._is_eof_held = False
        self._framing = Framing(server.known_heads)
        # What is wrong with the last request, as far as it is not aiohttp that finds it.
        self._fault: ClevrdError | None = None
        # Of the request being handled, once its body is waited for.
        self._max_body_bytes: int | None = None
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

    # --- from the first byte to the last ---------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have `pause_writing` called as soon as anything is left unsent."""
        super().connection_made(transport)
        # After it, since what the raw path left unsent calls `pause_writing` at once.
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        """Read a share of it now, or all of it in a later turn."""
        if not data:
            # aiohttp's own call: it has room again for what its parser holds.
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

    def uncount(self, data: bytes) -> None:
        """Leave the counting of ``data``, which was read, to whoever is given it next."""
        self._server.budget.received_bytes -= len(data)

    def begin(self, http_request: web.BaseRequest) -> None:
        """Note that a request's head has arrived and is being handled."""
        self._cancel_limit()
        self._current = http_request
        self._handled += 1
        if self.has_eof:
            _cut_short(http_request)

    async def unless_gone(self, reply: asyncio.Future[Response]) -> Response:
        """Return the reply to the request, or end the request when its client goes first.

        It may have gone before the request got its turn: then nobody else would end it. Nothing may
        be sent before the answer, so the kernels have to ask each other.
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
        """Return the transport, or end the request as aiohttp does when the client has gone."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the client has gone")
        return self.transport

    def limit_body(self, max_bytes: int) -> None:
        """Refuse the body of the request being handled as soon as its chunks say it is larger."""
        self._max_body_bytes = max_bytes
        self._check_declared()

    def _check_declared(self) -> None:
        limit_bytes, current = self._max_body_bytes, self._current
        if limit_bytes is None or current is None or current.content.is_eof():
            return
        if self._framing.declared_bytes > limit_bytes:
            current.content.set_exception(MessageTooLarge(limit_bytes))

    def end(self) -> None:
        """Note that the request has been answered."""
        self._current = None
        self._max_body_bytes = None
        if self.has_eof:
            self._close_when_idle(self._handled, TURNS_TO_BEGIN)
        elif self._framing.is_in_head:
            # It has begun to arrive behind the one that was handled.
            self._start_limit()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the clocks; also when the connection is handed on."""
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
        """Give aiohttp as much of ``data`` as the share of this turn allows; hold the rest."""
        for start in range(0, len(data), SLICE_BYTES):
            if start and self._server.turns.is_spent():
                self._hold(data[start:])
                return
            self._give(data[start : start + SLICE_BYTES])
            if self._fault is not None:
                break
        framing = self._framing
        if self._current is None and (framing.is_in_head or framing.is_lost):
            self._start_limit()

    def _give(self, data: bytes) -> None:
        """Give ``data`` to aiohttp, as far as it is HTTP as it should be."""
        passed, fault = self._framing.take(data)
        super().data_received(passed)
        if fault is not None:
            self._refuse_next(fault)
        if self._max_body_bytes is not None:
            self._check_declared()

    def _hold(self, data: bytes, *, has_begun: bool = True) -> None:
        """Read ``data`` in a later turn, and nothing more from the socket until then."""
        before_bytes = len(self._unread)
        self._unread += data
        if not self._server.budget.change(before_bytes, len(self._unread)):
            self._refuse_unread()
            return
        self._stop_reading()
        if not before_bytes:
            self._server.turns.wait(self._take_turn, len(data), has_begun=has_begun)

    def _take_turn(self) -> None:
        unread = self.take_unread()
        if self.transport is None or self._is_ending:
            return
        self._read_as_wanted(self.transport)
        self._read(unread)
        if self._is_eof_held and not self._unread:
            self._is_eof_held = False
            if not self.eof_received():
                self.transport.close()

    def _stop_reading(self) -> None:
        """Read nothing until `_read_as_wanted`; note whether aiohttp wants more now."""
        if self.transport is not None:
            self._wants_more = self.transport.is_reading()
            self.transport.pause_reading()

    def _read_as_wanted(self, transport: asyncio.Transport) -> None:
        if self._wants_more:
            transport.resume_reading()

    def _parse_on(self) -> None:
        """Let aiohttp parse what it holds itself, now that it has room; that may fill it again."""
        if not self._unread or self.transport is None:
            super().data_received(b"")
            return
        self._read_as_wanted(self.transport)
        super().data_received(b"")
        self._stop_reading()

    def take_unread(self) -> bytes:
        """Return what was received and not read yet; whoever asks has to read it."""
        unread, self._unread = self._unread, b""
        self._server.budget.change(len(unread), 0)
        return unread

    def _refuse_unread(self) -> None:
        """End the connection, with a word where no answer is under way."""
        self.take_unread()
        if self._current is not None or self.transport is None:
            self.force_close()
            return
        self.transport.write(self._server.last_word(Unavailable(TOO_MUCH_INPUT)))
        self.close()
        self.linger()

    # --- slow heads ------------------------------------------------------------------------------

    def _expire_head(self) -> None:
        """Refuse a request whose head is not whole, which aiohttp knows nothing of yet."""
        self._limit = None
        if self.transport is None or self.transport.is_closing():
            return
        error = RequestTimeout(self._server.request_timeout_s)
        self.transport.write(self._server.last_word(error))
        self.close()
        self.linger()

    def _start_limit(self) -> None:
        """Start the clock of a request's head, unless it runs."""
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
        """Give the client time to read what it was answered, and no more."""
        super().pause_writing()
        if self.transport is not None:
            self._watch_stall(self.transport)

    def resume_writing(self) -> None:
        """The client has read it all."""
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
        """Answer what was asked before closing: a client may shut its side down after a request.

        What has arrived is handled, one request after the other; a body that is not whole will
        never be (`begin`, `end`); a connection that is taken over is closed behind its head.
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
            _cut_short(self._current)
        return True

    def _close_when_idle(self, handled: int, turns: int) -> None:
        """Close unless aiohttp takes up a request that has arrived within so many turns."""
        if self._handled > handled or self._is_ending or self._fault is not None:
            return
        if turns == 0:
            self.force_close()
            return
        self._server.loop.call_soon(self._close_when_idle, handled, turns - 1)

    # --- last words ------------------------------------------------------------------------------

    def _refuse_next(self, fault: ClevrdError) -> None:
        """Answer the request that is arriving with ``fault``, behind all that came before it."""
        self._fault = fault
        super().data_received(_BREAK)

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
        error: ClevrdError = InvalidRequest(NOT_HTTP)
        if self._fault is not None and repr(_BREAK)[2:-1] in str(exc):
            error = self._fault
        elif isinstance(exc, LineTooLong):
            error = HeaderTooLarge(TOO_LONG)
        if isinstance(error, WrongVersion):
            return OwnVersion(self, self._server.last_word(error))
        return LastWord(self, self._server.refuse(error, None))

    def linger(self) -> asyncio.Future[None]:
        """Send nothing more, ignore what comes, and close when the client has, or after LINGER_S.

        Returns:
            what is done when the connection is gone.
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
    """An answer that ends the connection, once the client can have read it."""

    def __init__(self, connection: FrontConnection, answer: Response) -> None:
        super().__init__(status=answer.status, body=answer.body, headers=answer.fields())
        self._connection = connection
        self.force_close()

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        await self._connection.linger()


class OwnVersion(web.StreamResponse):
    """A last word in HTTP/1.1 whatever the request was in (RFC 9110 §2.5), so not aiohttp's."""

    def __init__(self, connection: FrontConnection, word: bytes) -> None:
        super().__init__()
        self._connection = connection
        self._word = word

    async def prepare(self, request: web.BaseRequest) -> NoReturn:
        """Write it; raising is how a handler ends aiohttp's task without a response of its own."""
        self._connection.open_transport().write(self._word)
        await self._connection.linger()
        raise ConnectionResetError("refused")


def _cut_short(http_request: web.BaseRequest) -> None:
    """Tell who reads the body that no more of it will come."""
    if not http_request.content.is_eof():
        http_request.content.set_exception(web.RequestPayloadError("cut short"))


class FrontServer(web.Server):
    """aiohttp's low-level server: makes our connections, counts them, and ends them."""

    def __init__(
        self,
        handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        refuse: Callable[[Exception, Request | None], Response],
        turns: FairTurns,
        budget: InputBudget,
        config: Config,
    ) -> None:
        super().__init__(handle)
        self.loop = asyncio.get_running_loop()
        self.turns = turns
        self.budget = budget
        # Makes and counts the answer to a request that raised.
        self.refuse = refuse
        self.request_timeout_s = config.request_timeout_s
        self.keepalive_timeout_s = config.keepalive_timeout_s
        self.ping_interval_s = config.ping_interval_s
        self.pong_timeout_s = config.pong_timeout_s
        self.known_heads = KnownHeads()
        self._renderer = ResponseRenderer()
        # Of the connections that are aiohttp's now.
        self._transports: dict[RequestHandler, asyncio.Transport] = {}

    @property
    def open_connections(self) -> int:
        """How many connections there are."""
        return len(self._transports)

    def __call__(self) -> RequestHandler:
        """Return the protocol of one connection."""
        return FrontConnection(
            self,
            # aiohttp's access log prints query strings; ours never sees a request's text.
            access_log=None,
            keepalive_timeout=self.keepalive_timeout_s,
            # Every refusal lingers by itself (`LastWord`).
            lingering_time=0,
            # 415 instead of inflating what a stranger compressed (handlers/publish/endpoint.py).
            auto_decompress=False,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )

    def last_word(self, error: ClevrdError) -> bytes:
        """Return the answer to ``error`` as bytes, for when aiohttp has no request to answer."""
        return self._renderer.render(self.refuse(error, None), must_close=True)

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
