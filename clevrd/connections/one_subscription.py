"""One topic of one connection: its reader, which is the connection's whole subscription as well.

Writing is the transport's business; many topics are many_subscriptions.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from clevrd.core.beginning import Beginning
from clevrd.core.gap_log import GapLog
from clevrd.core.notices import Position, Ref, Warnings
from clevrd.core.stream_forms import FRAMES_WITH_HEADERS, StreamForm
from clevrd.core.subscriber import NOT_BEGUN, Sink, Subscriber
from clevrd.core.subscription import DeliveryOptions, SubscribeRequest
from clevrd.core.topic import Topic, newest_epoch_of
from clevrd.hub import Hub
from clevrd.tenants import Tenant


class Subscription(Protocol):
    """A connection's subscription, as its transport sees it: to one topic, or to many."""

    @property
    def is_paused(self) -> bool:
        """Whether the transport is full, and nothing is written to it."""

    @property
    def is_lagging(self) -> bool:
        """Whether the client lacks anything that others have."""

    def subscribe(self, request: SubscribeRequest, /) -> None:
        """Deliver what ``request`` asks for of the past, and then what comes."""

    def unsubscribe(self) -> None:
        """Deliver nothing more. Idempotent."""

    def pause_delivery(self) -> None:
        """The transport is full: all that comes waits, or is lost as the policy says."""

    def resume_delivery(self) -> None:
        """The transport takes more."""

    def stall_allowed_s(self) -> float:
        """Return how long a circuit allows the client to take nothing; 0 where there is none."""

    def positions_to_tell(self) -> dict[str, Position] | None:
        """Return by topic where the client is; None for a client that is not told."""

    def take_tenant(self, tenant: Tenant, /) -> bool:
        """Go on as ``tenant``; return whether it may subscribe to all that was asked for."""

    def readers(self) -> Sequence[OneSubscription]:
        """Return the reader of each of its topics."""


def frames_form(options: DeliveryOptions) -> StreamForm | None:
    """Return the form in which a WebSocket reads messages; None for the ring's own frames."""
    return FRAMES_WITH_HEADERS if options.has_headers else None


class OneSubscription(Subscriber):
    """A reader that knows its topic and its hub.

    It is a Subscriber, and has none: an object more would be 64 bytes for each connection.
    """

    __slots__ = ("_hub", "topic")

    def __init__(
        self,
        hub: Hub,
        topic: Topic,
        sink: Sink,
        options: DeliveryOptions,
        form: StreamForm | None = None,
        *,
        came_by_pattern: bool = False,
    ) -> None:
        super().__init__(
            sink,
            options.strategy,
            options.wanted_window,
            GapLog(topic.name) if options.has_notices else None,
            came_by_pattern=came_by_pattern,
            form=form,
        )
        self._hub = hub
        self.topic = topic

    @property
    def is_paused(self) -> bool:
        """Whether the transport is full."""
        return self.is_blocked

    @property
    def is_lagging(self) -> bool:
        """Whether the client lacks anything that others have."""
        return self.is_joined and not self.is_live

    def subscribe(self, request: SubscribeRequest, /) -> None:
        """Join the topic where ``request`` says."""
        if request.options.subscriber_id is not None:
            self._hub.subscriber_ids.introduce(self, request.options.subscriber_id)
        self.join(request.topics[self.topic.name], warnings=request.warnings)

    def join(
        self,
        beginning: Beginning,
        ref: Ref = msgspec.UNSET,
        warnings: Warnings = msgspec.UNSET,
        pattern: str | msgspec.UnsetType = msgspec.UNSET,
    ) -> None:
        """Read from ``beginning`` on; the first notice holds the other arguments."""
        # The topic may have been found before its name began a new epoch.
        self.topic = newest_epoch_of(self.topic)
        self._hub.subscribe(
            self.topic, self, beginning, pattern=pattern, ref=ref, warnings=warnings
        )

    def follow(self, topic: Topic, beginning: Beginning, ref: Ref, warnings: Warnings, /) -> None:
        """Go over to ``topic``, the next epoch of the topic that it was in."""
        self.topic = topic
        self.join(beginning, ref, warnings)

    def unsubscribe(self) -> None:
        """Leave the topic. Idempotent."""
        self._hub.unsubscribe(self.topic, self)

    def pause_delivery(self) -> None:
        """The transport is full."""
        self._hub.paused(self.topic, self)

    def resume_delivery(self) -> None:
        """The transport takes more."""
        self._hub.resumed(self.topic, self)

    def stall_allowed_s(self) -> float:
        """Return how long its circuit allows the client to take nothing; 0 where there is none."""
        return self._hub.stall_allowed_s(self)

    def take_tenant(self, tenant: Tenant, /) -> bool:
        """Return whether ``tenant`` may subscribe to the topic."""
        return tenant.subscribe.allows(self.topic.name)

    def readers(self) -> Sequence[OneSubscription]:
        """Return the reader of the topic: this object."""
        return (self,)

    def topic_position(self) -> Position:
        """Return up to where everything was handed to the transport, or told as lost.

        Its offset is NOT_BEGUN as long as the client was not told where it begins.
        """
        return Position(self.topic.epoch, self.position())

    def positions_to_tell(self) -> dict[str, Position] | None:
        """Return where a client with notices is; None for any other, and for one that has left."""
        if self.gaps is None or not self.is_joined:
            return None
        at = self.topic_position()
        return {} if at.offset == NOT_BEGUN else {self.topic.name: at}
