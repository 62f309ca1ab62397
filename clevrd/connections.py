"""Subscriber connections: a transport, a Subscriber, and the few frames that clients send.

No handshake here (handlers/subscribe.py decides it) and no timers: one sweep serves all. Rules:
RFC 6455 §5.5 (control frames), §7 (closing).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from clevrd.config import Config
from clevrd.control.ping_wheel import PingWheel
from clevrd.core import client_frames
from clevrd.core.client_frames import ClientFrames, FrameError, close_code_of
from clevrd.core.encoding import close_frame, ping_frame, pong_frame
from clevrd.core.subscriber import DropStrategy, Subscriber
from clevrd.core.topic import Topic
from clevrd.hub import Hub
from clevrd.timers import Timers

log = logging.getLogger(__name__)

# A subscriber has nothing to say but pongs, pings and a close; some libraries also send a text
# now and then to keep a proxy awake. Larger messages are closed with 1009.
MAX_CLIENT_MESSAGE_BYTES: Final = 4_096

# Frames of any kind, and bytes, within BUDGET_WINDOW_S; beyond either it is closed with 1008.
BUDGET_FRAMES: Final = 100
BUDGET_BYTES: Final = 65_536
BUDGET_WINDOW_S: Final = 10.0

# Once our close frame has left the process, how long the peer may take to answer it.
CLOSE_TIMEOUT_S: Final = 5.0
# How long a close frame may wait behind what a stalled peer has not read: a ping and its timeout.
CLOSE_FLUSH_TIMEOUT_S: Final = 35.0

CLOSE_SWEEP_S: Final = 1.0
_CLOSE_POLL_S: Final = 0.02
# A close is a write, so as many of them as a round writes between two turns of the loop.
CLOSES_PER_BATCH: Final = 256

_PING: Final = ping_frame()
_CLOSE_WITHOUT_CODE: Final = b"\x88\x00"

POLICY_VIOLATION: Final = 1008
RESTARTING: Final = 1012


class SubscriberConnection(asyncio.Protocol):
    """One subscriber's WebSocket after the handshake; also the Sink its Subscriber writes to."""

    __slots__ = (
        "_budget_bytes",
        "_budget_frames",
        "_budget_until_s",
        "_connections",
        "_frames",
        "_has_failed",
        "awaits_pong",
        "close_deadline_s",
        "is_closing",
        "reader",
        "topic",
        "transport",
        "wheel_slot",
        "write",
    )

    def __init__(
        self,
        connections: Connections,
        transport: asyncio.Transport,
        topic: Topic,
        strategy: DropStrategy,
        wanted_window: int | None,
    ) -> None:
        self._connections = connections
        self.transport = transport
        # The Sink's write: the transport's own, nothing in between.
        self.write: Callable[[bytes], None] = transport.write
        self.topic = topic
        self.reader = Subscriber(self, strategy, wanted_window)
        # Made when bytes come, dropped when none are held back: most peers are silent.
        self._frames: ClientFrames | None = None
        self._budget_until_s = 0.0
        self._budget_frames = 0
        self._budget_bytes = 0
        self.awaits_pong = False
        self.wheel_slot = 0
        # A close frame or a FIN was sent or received: nothing may follow it (RFC 6455 §5.5.1).
        self.is_closing = False
        # The peer's bytes mean nothing any more: it broke a rule, or it said goodbye.
        self._has_failed = False
        # Loop time after which the transport is closed whatever the peer does.
        self.close_deadline_s = 0.0

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read the peer's frames."""
        if self._has_failed:
            return
        frames = self._frames
        if frames is None:
            frames = self._frames = ClientFrames(MAX_CLIENT_MESSAGE_BYTES)
        seen = frames.frames_seen
        try:
            messages = frames.feed(data)
        except FrameError as error:
            self._fail(error.close_with, error.reason)
            return
        if not self._is_within_budget(len(data), frames.frames_seen - seen):
            self._fail(POLICY_VIOLATION, "subscribers_only_receive")
            return
        for opcode, payload in messages:
            self._handle(opcode, payload)
        if frames.is_idle:
            self._frames = None

    def eof_received(self) -> bool | None:
        """Let the transport close: the peer sends no more, so it can't even answer a ping."""
        if not self.is_closing:
            self._begin_to_end()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone, whoever closed it."""
        self._connections.remove(self)

    def pause_writing(self) -> None:
        """The transport's buffer is over its high-water mark."""
        self._connections.hub.paused(self.topic, self.reader)

    def resume_writing(self) -> None:
        """The transport's buffer is below its low-water mark."""
        # Somebody reads, though the ping may lie far behind what was sent before it.
        self.awaits_pong = False
        self._connections.hub.resumed(self.topic, self.reader)

    # --- closing ---------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Send a close frame and let the peer answer it; the sweep ends what takes too long."""
        if self.is_closing:
            return
        self._connections.hub.counters.count_close(code)
        log.debug("closing subscriber code=%d reason=%s topic=%s", code, reason, self.topic.name)
        self._say_goodbye(close_frame(code, reason))

    def cut(self) -> None:
        """End the connection without a word: the peer is not listening."""
        self.transport.abort()

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
        self.close(code, reason)
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def _say_goodbye(self, frame: bytes) -> None:
        self._begin_to_end()
        self.write(frame)

    def _begin_to_end(self) -> None:
        self.is_closing = True
        self._connections.leave(self)
        self._connections.await_close(self)

    def _handle(self, opcode: int, payload: bytes) -> None:
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
        # Text and binary are within the budget and mean nothing here.

    def _is_within_budget(self, size: int, frames: int) -> bool:
        now_s = self._connections.now_s()
        if now_s >= self._budget_until_s:
            self._budget_until_s = now_s + BUDGET_WINDOW_S
            self._budget_frames = self._budget_bytes = 0
        self._budget_frames += frames
        self._budget_bytes += size
        return self._budget_frames <= BUDGET_FRAMES and self._budget_bytes <= BUDGET_BYTES


def echo_of_close(payload: bytes) -> bytes:
    """Return the close frame that answers a peer's close: its own code, or none if it gave none.

    RFC 6455 §5.5.1: an endpoint typically echoes the status code it received.
    """
    code = close_code_of(payload)
    return _CLOSE_WITHOUT_CODE if code is None else close_frame(code)


class Connections:
    """Every subscriber connection: taken over, pinged, swept and closed in one place."""

    def __init__(self, hub: Hub, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        self.hub = hub
        self.now_s = loop.time
        self._high_bytes = config.write_high_bytes
        self._low_bytes = config.write_low_bytes
        self._wheel: PingWheel[SubscriberConnection] = PingWheel(
            config.ping_interval_s, config.pong_timeout_s
        )
        # Those that have said goodbye, in the order they did.
        self._closing: dict[SubscriberConnection, None] = {}
        self._open: set[SubscriberConnection] = set()
        self._timers = Timers(loop, hub.count_background_error)

    def __len__(self) -> int:
        """Return how many subscriber connections there are, closing ones included."""
        return len(self._open)

    def attach(
        self,
        transport: asyncio.Transport,
        early_data: bytes,
        topic: Topic,
        strategy: DropStrategy,
        wanted_window: int | None,
        last: int,
    ) -> SubscriberConnection:
        """Take over ``transport``, to which the 101 was written, and begin to deliver.

        Args:
            transport: an open connection that has sent a valid handshake.
            early_data: what was received behind the handshake.
            topic: what to deliver.
            strategy: what to do when the reader lags.
            wanted_window: messages it may lag, None for what is allowed.
            last: recent messages to begin with.
        """
        connection = SubscriberConnection(self, transport, topic, strategy, wanted_window)
        transport.set_protocol(connection)
        # uvloop's own low-water mark is 16 bytes, which would wake a reader for every message.
        transport.set_write_buffer_limits(self._high_bytes, self._low_bytes)
        self._open.add(connection)
        self._wheel.add(connection)
        self.hub.subscribe(topic, connection.reader, last)
        if early_data:
            connection.data_received(early_data)
        return connection

    def leave(self, connection: SubscriberConnection) -> None:
        """Stop delivering to ``connection`` and pinging it. Idempotent."""
        self.hub.unsubscribe(connection.topic, connection.reader)
        self._wheel.remove(connection)

    def await_close(self, connection: SubscriberConnection) -> None:
        """Give ``connection``, which says goodbye now, the time that takes and no more."""
        connection.close_deadline_s = self.now_s() + CLOSE_FLUSH_TIMEOUT_S
        self._closing[connection] = None

    def remove(self, connection: SubscriberConnection) -> None:
        """Forget ``connection``, whose transport is gone. Idempotent."""
        self.leave(connection)
        self._closing.pop(connection, None)
        self._open.discard(connection)

    def start(self) -> None:
        """Start the two sweeps: pings, and closes that take too long."""
        self._timers.every(self._wheel.tick_s, self.ping_due)
        self._timers.every(CLOSE_SWEEP_S, self.end_overdue_closes)

    def stop(self) -> None:
        """Stop the sweeps."""
        self._timers.stop()

    def ping_due(self) -> None:
        """Ping who is due, and cut who did not answer in time."""
        to_ping, silent = self._wheel.tick()
        for connection in silent:
            self.hub.counters.pings_cut += 1
            log.debug("subscriber did not answer a ping topic=%s", connection.topic.name)
            self.leave(connection)
            connection.cut()
        for connection in to_ping:
            connection.ping()

    def end_overdue_closes(self) -> None:
        """Close the transports of peers that don't finish the closing handshake."""
        now_s = self.now_s()
        for connection in list(self._closing):
            is_flushed = connection.transport.get_write_buffer_size() == 0
            if is_flushed:
                deadline_s = min(connection.close_deadline_s, now_s + CLOSE_TIMEOUT_S)
                connection.close_deadline_s = deadline_s
            if now_s < connection.close_deadline_s:
                continue
            if is_flushed:
                # What the kernel still holds, the close frame perhaps, is sent on without us.
                connection.transport.close()
            else:
                connection.cut()

    async def close_all(self, code: int, reason: str, timeout_s: float) -> None:
        """Say goodbye to everyone, wait for their answers, then cut those who gave none."""
        for count, connection in enumerate(list(self._open), start=1):
            connection.close(code, reason)
            if count % CLOSES_PER_BATCH == 0:
                await asyncio.sleep(0)
        deadline_s = self.now_s() + timeout_s
        while self._open and self.now_s() < deadline_s:  # noqa: ASYNC110  # once in a life
            await asyncio.sleep(_CLOSE_POLL_S)
        for connection in list(self._open):
            connection.cut()
