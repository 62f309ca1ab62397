"""WebSockets as a transport: frames in, pings, closing, and what a subscriber's may say.

No handshake here (handlers decide it), no timer per connection (`registry`), and nothing of topics:
what is written to a subscriber's WebSocket is its Subscription's. Rules: RFC 6455 §5.5 (control
frames), §7 (closing).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from clevrd.connections.many_subscriptions import (
    MemberSubscription,
    PatternSubscription,
    refusal_reason,
)
from clevrd.connections.one_subscription import OneSubscription, Subscription, frames_form
from clevrd.connections.registry import Connections
from clevrd.core import client_frames
from clevrd.core.client_frames import POLICY_VIOLATION, ClientFrames, FrameError, close_code_of
from clevrd.core.event_ids import EventIdSlot
from clevrd.core.notices import GoingAway, Notice, notice_frame
from clevrd.core.server_frames import close_frame, ping_frame, pong_frame
from clevrd.core.subscription import DeliveryOptions, SubscribeRequest
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.hub import Hub
from clevrd.progress import unsent_bytes_of
from clevrd.tenants import Tenant

log = logging.getLogger(__name__)

# Control frames of any kind within BUDGET_WINDOW_S, and all bytes a subscriber sends; beyond
# either it is closed with 1008.
BUDGET_FRAMES: Final = 100
BUDGET_WINDOW_S: Final = 10.0

# A subscriber has nothing to say but pongs, pings and a close; some libraries also send a text
# now and then to keep a proxy awake. Larger messages are closed with 1009.
MAX_CLIENT_MESSAGE_BYTES: Final = 4_096

# Bytes of any kind within the budget's window; beyond them, or too many frames, 1008.
BUDGET_BYTES: Final = 65_536

_PING: Final = ping_frame()
_CLOSE_WITHOUT_CODE: Final = b"\x88\x00"

TRY_AGAIN_LATER: Final = 1013


class WebSocketConnection(asyncio.Protocol):
    """One WebSocket after the handshake; subclasses say what its messages mean.

    It reads strictly, answers pings, and closes so that the peer can read why.
    """

    __slots__ = (
        "_budget_frames",
        "_budget_until_s",
        "_connections",
        "_frames",
        "_has_failed",
        "_held_bytes",
        "awaits_pong",
        "is_closing",
        "tenant",
        "transport",
        "wheel_slot",
        "write",
    )

    answers_pings: ClassVar[bool] = True
    kind: ClassVar[str] = "websocket"

    def __init__(
        self, connections: Connections, transport: asyncio.Transport, tenant: Tenant
    ) -> None:
        self._connections = connections
        self.transport = transport
        # The tenant of its client; changed by take_tenant.
        self.tenant = tenant
        # The transport's own method, with nothing in between.
        self.write: Callable[[bytes], None] = transport.write
        # The reader of frames, made when bytes come and dropped when none are held back: most peers
        # are silent.
        self._frames: ClientFrames | None = None
        self._budget_until_s = 0.0
        self._budget_frames = 0
        # Bytes in _frames that the budget of all connections knows of; changed by the registry.
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
        self._connections.budget.received_bytes += len(data)
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
                self._connections.settle_unfinished(self, 0, has_progress=True)
            self._frames = None
        elif not self._connections.settle_unfinished(
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
        self.stop_delivery()
        self._connections.remove(self)

    # --- what subclasses say ---------------------------------------------------------------------

    def stop_delivery(self) -> None:
        """Be no subscriber any more; called once or more, before the connection ends."""

    def readers(self) -> Sequence[OneSubscription]:
        """Return the reader of each topic that it is subscribed to; none, here."""
        return ()

    def take_tenant(self, tenant: Tenant) -> bool:
        """Go on as ``tenant``; return whether it may have all that it has."""
        self.tenant = tenant
        return True

    def may_leave(self) -> bool:
        """Whether it may be closed while publishers are served; a publisher is served, here."""
        return False

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
        now_s = self._connections.now_s()
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
        self._connections.note_close(self, code, reason)
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
        self._connections.settle_unfinished(self, 0, has_progress=True)
        self.close(code, reason)
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def _say_goodbye(self, frame: bytes) -> None:
        self._begin_to_end()
        self.write(frame)

    def _begin_to_end(self) -> None:
        self.is_closing = True
        self.stop_delivery()
        self._connections.await_close(self)

    def _receive(self, messages: list[tuple[int, bytes]]) -> None:
        for opcode, payload in messages:
            self._receive_one(opcode, payload)

    def _receive_one(self, opcode: int, payload: bytes) -> None:
        if opcode == client_frames.PONG:
            # The pong that answers a ping is not counted against the budget.
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


class DeliveringWebSocket(WebSocketConnection):
    """A WebSocket to which its Subscription writes; also the Sink of that Subscription."""

    __slots__ = ()

    subscription: Subscription

    # --- what the registry and the transport ask for ---------------------------------------------

    def stop_delivery(self) -> None:
        """End the subscription. Idempotent."""
        self.subscription.unsubscribe()

    def readers(self) -> Sequence[OneSubscription]:
        """Return the reader of each topic that it is subscribed to."""
        return self.subscription.readers()

    def take_tenant(self, tenant: Tenant) -> bool:
        """Go on as ``tenant``; return whether it may subscribe to all that it does."""
        return super().take_tenant(tenant) and self.subscription.take_tenant(tenant)

    def stall_allowed_s(self) -> float:
        """Return how long its circuits allow it to take nothing; 0 where there are none."""
        return self.subscription.stall_allowed_s()

    def may_leave(self) -> bool:
        """Whether its client has everything that was offered."""
        return not self.subscription.is_lagging

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Give a client with notices its positions, before a planned close."""
        positions = self.subscription.positions_to_tell()
        if positions is not None and not self.is_closing:
            self.write(notice_frame(GoingAway(reconnect_after_ms, positions)))

    def pause_writing(self) -> None:
        """The transport's buffer is over its high-water mark."""
        self._connections.stalled(self)
        self.subscription.pause_delivery()

    def resume_writing(self) -> None:
        """The transport's buffer is below its low-water mark."""
        self._connections.moved(self)
        self.subscription.resume_delivery()

    # --- what many subscriptions ask for ---------------------------------------------------------

    keeps_positions: ClassVar[bool] = False

    def topic_subscription(
        self,
        hub: Hub,
        topic: Topic,
        options: DeliveryOptions,
        pattern: PatternSubscription | None,
        slot: EventIdSlot | None,
    ) -> MemberSubscription:
        """Return a reader of ``topic`` that writes to this connection."""
        return MemberSubscription(hub, topic, self, options, pattern, frames_form(options))

    def tell(self, notice: Notice, event_id: bytes) -> None:
        """Write ``notice``."""
        self.write(notice_frame(notice))

    def refuse(self, error: ClevrdError) -> None:
        """Close: the client can't be told in any other way, and a missing topic is a loss."""
        self._connections.refusals.count(error)
        self.close(error.close_code, refusal_reason(error))

    def found_all(self) -> None:
        """Do nothing: what was found is delivered already."""


class SubscriberWebSocket(DeliveringWebSocket):
    """A WebSocket whose peer only receives: what it may send is little."""

    __slots__ = ("_budget_bytes", "subscription")

    def __init__(
        self, connections: Connections, transport: asyncio.Transport, tenant: Tenant
    ) -> None:
        super().__init__(connections, transport, tenant)
        self._budget_bytes = 0

    def subscribe(
        self, subscription: Subscription, request: SubscribeRequest, early_data: bytes
    ) -> None:
        """Take over the transport, and subscribe to what is asked for, which was checked.

        Args:
            subscription: what writes to this connection from now on.
            early_data: what was received behind the handshake.
        """
        self.subscription = subscription
        self._connections.add(self)
        subscription.subscribe(request)
        if early_data:
            self.data_received(early_data)

    def new_frames(self) -> ClientFrames:
        """Return a reader of frames with a subscriber's bounds."""
        return ClientFrames(MAX_CLIENT_MESSAGE_BYTES)

    def renew_budget(self) -> None:
        """Begin a new budget window."""
        super().renew_budget()
        self._budget_bytes = 0

    def over_budget(self) -> None:
        """Close because the peer sends more than a subscriber has to say."""
        self._fail(POLICY_VIOLATION, "subscribers_only_receive")

    def _affords(self, size: int, frames: int, messages: int) -> bool:
        # All that a subscriber sends is spent from the budget; texts within it mean nothing.
        is_within = self.spend_frames(frames, BUDGET_FRAMES)
        self._budget_bytes += size
        return is_within and self._budget_bytes <= BUDGET_BYTES


def echo_of_close(payload: bytes) -> bytes:
    """Return the close frame that answers a peer's close: its own code, or none if it gave none.

    RFC 6455 §5.5.1: an endpoint typically echoes the status code it received.
    """
    code = close_code_of(payload)
    return _CLOSE_WITHOUT_CODE if code is None else close_frame(code)
