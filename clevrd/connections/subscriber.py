"""Subscriber connections: a WebSocket and the Subscriber that is written to it."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from clevrd.connections.websocket import (
    BUDGET_FRAMES,
    WebSocketConnection,
    WebSockets,
)
from clevrd.core.beginning import Beginning
from clevrd.core.client_frames import POLICY_VIOLATION, ClientFrames
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.gap_log import GapLog
from clevrd.core.notices import GoingAway, Position, Warnings, notice_frame
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub import Hub

# A subscriber has nothing to say but pongs, pings and a close; some libraries also send a text
# now and then to keep a proxy awake. Larger messages are closed with 1009.
MAX_CLIENT_MESSAGE_BYTES: Final = 4_096

# Bytes of any kind within the budget's window; beyond them, or too many frames, 1008.
BUDGET_BYTES: Final = 65_536


class ReceivingConnection(WebSocketConnection):
    """A WebSocket whose peer only receives: what it may send is little."""

    __slots__ = ("_budget_bytes",)

    def __init__(self, sockets: WebSockets, transport: asyncio.Transport) -> None:
        super().__init__(sockets, transport)
        self._budget_bytes = 0

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


class SubscriberConnection(ReceivingConnection):
    """One subscriber of one topic; also the Sink that its Subscriber writes to."""

    __slots__ = ("_hub", "reader", "topic")

    def __init__(
        self,
        sockets: WebSockets,
        transport: asyncio.Transport,
        hub: Hub,
        topic: Topic,
        strategy: DropStrategy,
        wanted_window: int | None,
        *,
        has_control: bool,
    ) -> None:
        super().__init__(sockets, transport)
        self._hub = hub
        self.topic = topic
        gaps = GapLog(topic.name) if has_control else None
        self.reader = Subscriber(self, strategy, wanted_window, gaps)

    def begin(
        self, beginning: Beginning, early_data: bytes, warnings: Warnings = msgspec.UNSET
    ) -> None:
        """Take over the transport, deliver what is wished of the past and then what comes.

        Args:
            beginning: where to begin.
            early_data: what was received behind the handshake.
            warnings: what its client is told with where it begins.
        """
        self._sockets.add(self)
        self._hub.subscribe(self.topic, self.reader, beginning, warnings=warnings)
        if early_data:
            self.data_received(early_data)

    def leave(self) -> None:
        """Stop delivering. Idempotent."""
        self._hub.unsubscribe(self.topic, self.reader)

    def stall_allowed_s(self) -> float:
        """Return how long its circuit allows it to take nothing; 0 where there is none."""
        return self._hub.stall_allowed_s(self.reader)

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Give who asked for control frames its position, before a planned close."""
        reader = self.reader
        if reader.gaps is None or not reader.is_joined:
            return
        position = Position(self.topic.epoch, reader.position())
        self.write(notice_frame(GoingAway(reconnect_after_ms, {self.topic.name: position})))

    def pause_writing(self) -> None:
        """The transport's buffer is over its high-water mark."""
        self._sockets.stalled(self)
        self._hub.paused(self.topic, self.reader)

    def resume_writing(self) -> None:
        """The transport's buffer is below its low-water mark."""
        self._sockets.moved(self)
        self._hub.resumed(self.topic, self.reader)
