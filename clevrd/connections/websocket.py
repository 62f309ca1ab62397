"""What every WebSocket has in common: frames in, pings, closing, and one sweep for all of them.

No handshake here (handlers decide it) and no timer per connection. Rules: RFC 6455 §5.5 (control
frames), §7 (closing).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import ClassVar, Final, Protocol, cast

from clevrd.config import Config
from clevrd.connections.farewells import Farewells
from clevrd.connections.presence import Peer, Presence
from clevrd.core import client_frames
from clevrd.core.client_frames import POLICY_VIOLATION, ClientFrames, FrameError, close_code_of
from clevrd.core.server_frames import close_frame, ping_frame, pong_frame
from clevrd.input_budget import InputBudget
from clevrd.metrics.counters import Counters
from clevrd.pace import sent_step_bytes
from clevrd.progress import reset, unsent_bytes_of
from clevrd.scheduling.deadlines import Deadlines
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.scheduling.timers import Tasks, Timers

log = logging.getLogger(__name__)

_CLOSE_POLL_S: Final = 0.02
# A close is a write, so as many of them as a round writes between two turns of the loop.
CLOSES_PER_BATCH: Final = 256

# When clients are asked to come back after a planned close, each at a time of its own: not before
# a process could have been replaced, and at 2,000 a second, half of what one core takes.
RECONNECT_FIRST_MS: Final = 200
RECONNECT_SPREAD_MS: Final = 1_000
RECONNECTS_PER_MS: Final = 2

# Notice frames of any kind within BUDGET_WINDOW_S, and all bytes a subscriber sends; beyond
# either it is closed with 1008.
BUDGET_FRAMES: Final = 100
BUDGET_WINDOW_S: Final = 10.0

_PING: Final = ping_frame()
_CLOSE_WITHOUT_CODE: Final = b"\x88\x00"

TRY_AGAIN_LATER: Final = 1013
RESTARTING: Final = 1012


class WebSocketConnection(asyncio.Protocol):
    """One WebSocket after the handshake; subclasses say what its messages mean.

    It reads strictly, answers pings, and closes so that the peer can read why.
    """

    __slots__ = (
        "_budget_frames",
        "_budget_until_s",
        "_frames",
        "_has_failed",
        "_held_bytes",
        "_sockets",
        "awaits_pong",
        "is_closing",
        "transport",
        "wheel_slot",
        "write",
    )

    answers_pings: ClassVar[bool] = True

    def __init__(self, sockets: WebSockets, transport: asyncio.Transport) -> None:
        self._sockets = sockets
        self.transport = transport
        # The transport's own, nothing in between.
        self.write: Callable[[bytes], None] = transport.write
        # Made when bytes come, dropped when none are held back: most peers are silent.
        self._frames: ClientFrames | None = None
        self._budget_until_s = 0.0
        self._budget_frames = 0
        # What the budget of all connections was told that _frames holds; the registry's own.
        self._held_bytes = 0
        self.awaits_pong = False
        self.wheel_slot = 0
        # A close frame or a FIN was sent or received (nothing may follow it, RFC 6455 §5.5.1), or
        # the transport is gone.
        self.is_closing = False
        # The peer's bytes mean nothing any more: it broke a rule, or it said goodbye.
        self._has_failed = False

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read the peer's frames."""
        self._sockets.budget.received_bytes += len(data)
        if not self._has_failed:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        frames = self._frames
        if frames is None:
            frames = self._frames = self.new_frames()
        seen = frames.frames_seen
        try:
            messages = frames.feed(data)
        except FrameError as error:
            self.before_fault(error.completed)
            self._fail(error.close_with, error.reason)
            return
        if not self._affords(len(data), frames.frames_seen - seen, len(messages)):
            self.over_budget()
            return
        self._receive(messages)
        self._keep_unfinished(frames, has_progress=bool(messages))

    def _keep_unfinished(self, frames: ClientFrames, *, has_progress: bool) -> None:
        """Hold an unfinished message within its time and the budget of all connections."""
        if frames.is_idle:
            if self._held_bytes:
                self._sockets.settle_unfinished(self, 0, has_progress=True)
            self._frames = None
        elif not self._sockets.settle_unfinished(
            self, frames.held_bytes, has_progress=has_progress
        ):
            self._fail(TRY_AGAIN_LATER, "too_much_unfinished")

    def end_unfinished(self) -> None:
        """Close because a message did not arrive whole in time."""
        self._fail(POLICY_VIOLATION, "message_too_slow")

    def eof_received(self) -> bool | None:
        """Let the transport close: the peer sends no more, so it can't even answer a ping."""
        if not self.is_closing:
            self._begin_to_end()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone, whoever closed it: nothing is written or begun any more."""
        self.is_closing = True
        self.leave()
        self._sockets.remove(self)

    # --- what subclasses say ---------------------------------------------------------------------

    def leave(self) -> None:
        """Stop whatever this connection is for; called once or more, before it ends."""

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Tell the peer, if it wants to know, that a planned close follows; nobody, here."""

    @property
    def is_sending(self) -> bool:
        """Whether the peer is in the middle of a message, which its pong can't overtake."""
        return self._held_bytes > 0

    def stall_allowed_s(self) -> float:
        """Return how long the peer was promised that it may take nothing; 0 for no promise."""
        return 0.0

    def new_frames(self) -> ClientFrames:
        """Return a reader of frames with this kind of connection's bounds."""
        raise NotImplementedError

    def message(self, opcode: int, payload: bytes) -> None:
        """Take one whole text or binary message."""

    def before_fault(self, messages: list[tuple[int, bytes]]) -> None:
        """Take what the peer sent whole in the read in which it broke a rule; nothing, here."""

    def over_budget(self) -> None:
        """Close because the peer sends more than it may."""
        self._fail(POLICY_VIOLATION, "too_many_frames")

    def _affords(self, size: int, frames: int, messages: int) -> bool:
        """Count what the peer sent against its budget; return whether it is within it."""
        raise NotImplementedError

    def spend_frames(self, count: int, budget: int) -> bool:
        """Count ``count`` frames against ``budget`` in BUDGET_WINDOW_S; return whether it holds."""
        now_s = self._sockets.now_s()
        if now_s >= self._budget_until_s:
            self._budget_until_s = now_s + BUDGET_WINDOW_S
            self.renew_budget()
        self._budget_frames += count
        return self._budget_frames <= budget

    def renew_budget(self) -> None:
        """Begin a new budget window."""
        self._budget_frames = 0

    # --- closing ---------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Send a close frame and let the peer answer it; the sweep ends what takes too long."""
        if self.is_closing:
            return
        self._sockets.counters.count_close(code)
        log.debug("closing websocket code=%d reason=%s", code, reason)
        self._say_goodbye(close_frame(code, reason))

    def cut(self) -> None:
        """End the connection without a word: the peer is not listening."""
        self.transport.abort()

    def unsent_bytes(self) -> int:
        """Return how much of what was written the peer has not acknowledged, as far as is known."""
        return unsent_bytes_of(self.transport)

    def ping(self) -> None:
        """Ask whether the peer is there."""
        self.awaits_pong = True
        self.write(_PING)

    def _fail(self, code: int, reason: str) -> None:
        """Close because the peer broke the rules: nothing it sends is read any more.

        RFC 6455 §7.1.7. Our side is shut down behind the close frame, and the rest is received
        and ignored until the peer or the sweep ends it: closing a socket with unread bytes would
        reset it and could take the close frame with it.
        """
        self._has_failed = True
        self._frames = None
        self._sockets.settle_unfinished(self, 0, has_progress=True)
        self.close(code, reason)
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def _say_goodbye(self, frame: bytes) -> None:
        self._begin_to_end()
        self.write(frame)

    def _begin_to_end(self) -> None:
        self.is_closing = True
        self.leave()
        self._sockets.await_close(self)

    def _receive(self, messages: list[tuple[int, bytes]]) -> None:
        for opcode, payload in messages:
            self._receive_one(opcode, payload)

    def _receive_one(self, opcode: int, payload: bytes) -> None:
        if opcode == client_frames.PONG:
            # The answer to a ping is none of what the peer says of its own accord.
            self._budget_frames -= self.awaits_pong
            self.awaits_pong = False
        elif opcode == client_frames.PING:
            if not self.is_closing:
                self.write(pong_frame(payload))
        elif opcode == client_frames.CLOSE:
            if not self.is_closing:
                self._say_goodbye(echo_of_close(payload))
            # RFC 6455 §7.1.1: the server closes the TCP connection first.
            self._has_failed = True
            self.transport.close()
        elif not self.is_closing:
            self.message(opcode, payload)


def echo_of_close(payload: bytes) -> bytes:
    """Return the close frame that answers a peer's close: its own code, or none if it gave none.

    RFC 6455 §5.5.1: an endpoint typically echoes the status code it received.
    """
    code = close_code_of(payload)
    return _CLOSE_WITHOUT_CODE if code is None else close_frame(code)


class Swept(Peer, Protocol):
    """A connection as the registry sees it: a WebSocket, or a stream."""

    _held_bytes: int

    def leave(self) -> None:
        """Stop whatever the connection is for."""

    def end_unfinished(self) -> None:
        """Close because a message did not arrive whole in time."""

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Tell the peer that a planned close follows."""

    def close(self, code: int, reason: str) -> None:
        """Say goodbye."""

    def cut(self) -> None:
        """End the connection without a word."""


class _Unfinished:
    """A message of which a part has arrived."""

    __slots__ = ("connection", "deadline_s", "steady_at_bytes")

    def __init__(self, connection: Swept) -> None:
        self.connection = connection
        # How much of it has to be there for its time to begin anew.
        self.steady_at_bytes = 0
        # When it has to be whole.
        self.deadline_s = 0.0


class WebSockets:
    """Every WebSocket and stream there is: taken over, pinged, swept and closed in one place."""

    def __init__(
        self,
        counters: Counters,
        tasks: Tasks,
        turns: FairTurns,
        budget: InputBudget,
        config: Config,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.counters = counters
        self.loop = loop
        self.now_s = loop.time
        self._high_bytes = config.write_high_bytes
        self._low_bytes = config.write_low_bytes
        on_error = counters.count_background_error
        self._presence = Presence(
            config.ping_interval_s, config.pong_timeout_s, self._give_up, on_error, loop
        )
        self.stalled = self._presence.stalled
        self.moved = self._presence.moved
        self._message_timeout_s = config.request_timeout_s
        self._messages: Deadlines[_Unfinished] = Deadlines(loop, self._end_unfinished, on_error)
        # Those with an unfinished message.
        self._unfinished: dict[Swept, _Unfinished] = {}
        self.budget = budget
        self._farewells = Farewells(config.ping_interval_s, on_error, loop)
        # Every connection, and the time at which it was taken over.
        self._open: dict[Swept, float] = {}
        # How many of them are streams.
        self.streams = 0
        self._timers = Timers(loop, on_error)
        # Publishes that wait.
        self.tasks = tasks
        # The shares of the loop's turns in which publishes and commands are carried out.
        self.turns = turns

    def __len__(self) -> int:
        """Return how many there are, closing ones included."""
        return len(self._open)

    def transports(self) -> set[asyncio.Transport]:
        """Return the transports of all of them."""
        return {connection.transport for connection in self._open}

    def add(self, connection: Swept) -> None:
        """Take over the transport of ``connection``, to which its head was written."""
        transport = connection.transport
        transport.set_protocol(cast(asyncio.Protocol, connection))
        # uvloop's own low-water mark is 16 bytes, which would wake a reader for every message.
        transport.set_write_buffer_limits(self._high_bytes, self._low_bytes)
        self._open[connection] = self.now_s()
        self.streams += not connection.answers_pings
        self._presence.add(connection)

    def await_close(self, connection: Swept) -> None:
        """Give ``connection``, which says goodbye now, the time that takes and no more."""
        self._farewells.begin(connection, self._presence.silent_s(connection))
        self._presence.remove(connection)

    def remove(self, connection: Swept) -> None:
        """Forget ``connection``, whose transport is gone. Idempotent."""
        self._presence.remove(connection)
        self.settle_unfinished(connection, 0, has_progress=True)
        self._farewells.remove(connection)
        if (opened_s := self._open.pop(connection, None)) is not None:
            self.counters.connection_s.record(self.now_s() - opened_s)
            self.streams -= not connection.answers_pings

    def settle_unfinished(self, connection: Swept, held_bytes: int, *, has_progress: bool) -> bool:
        """Note what ``connection`` holds of an unfinished message; return whether that may be.

        The message's time runs from its first bytes, or from the last message before it, and begins
        anew as long as it comes steadily (`pace`).
        """
        fits = self.budget.change(connection._held_bytes, held_bytes)
        connection._held_bytes = held_bytes
        unfinished = self._unfinished.get(connection)
        if not held_bytes:
            if unfinished is not None:
                del self._unfinished[connection]
                self._messages.remove(unfinished)
        elif has_progress or unfinished is None or held_bytes >= unfinished.steady_at_bytes:
            if unfinished is None:
                unfinished = self._unfinished[connection] = _Unfinished(connection)
            unfinished.steady_at_bytes = held_bytes + sent_step_bytes(self._message_timeout_s)
            self._messages.set(unfinished, self.now_s() + self._message_timeout_s)
        return fits

    def _end_unfinished(self, unfinished: _Unfinished) -> None:
        """Close a connection whose message did not arrive whole in time."""
        self._unfinished.pop(unfinished.connection, None)
        unfinished.connection.end_unfinished()

    def start(self) -> None:
        """Start asking who is there."""
        self._timers.every(self._presence.tick_s, self.ping_due)
        self._timers.every(self._presence.look_s, self.look_at_stalls)

    def stop(self) -> None:
        """Stop that, and end nothing any more."""
        self._timers.stop()
        self._messages.stop()
        self._farewells.stop()

    def ping_due(self) -> None:
        """Ping who is due, and cut who is not there."""
        self._presence.ping_due()

    def look_at_stalls(self) -> None:
        """Cut who has taken nothing for too long."""
        self._presence.look_at_stalls()

    def _give_up(self, peer: Peer) -> None:
        connection = cast(Swept, peer)
        self.counters.pings_cut += 1
        connection.leave()
        reset(connection.transport)

    async def close_all(self, code: int, reason: str, timeout_s: float) -> None:
        """Say goodbye to everyone, wait for their answers, then cut those who gave none."""
        spread_ms = max(RECONNECT_SPREAD_MS, len(self._open) // RECONNECTS_PER_MS)
        for count, connection in enumerate(list(self._open), start=1):
            self._close_one(connection, code, reason, secrets.randbelow(spread_ms))
            if count % CLOSES_PER_BATCH == 0:
                await asyncio.sleep(0)
        deadline_s = self.now_s() + timeout_s
        while self._open and self.now_s() < deadline_s:  # noqa: ASYNC110  # once in a life
            await asyncio.sleep(_CLOSE_POLL_S)
        for connection in list(self._open):
            connection.cut()

    def _close_one(self, connection: Swept, code: int, reason: str, delay_ms: int) -> None:
        """Say goodbye to ``connection``; a fault of one must not keep the others from theirs."""
        try:
            connection.announce_end(RECONNECT_FIRST_MS + delay_ms)
            connection.close(code, reason)
        except Exception:
            self.counters.count_background_error()
            log.exception("a connection could not be closed in order: cutting it")
            self.remove(connection)
            connection.cut()
