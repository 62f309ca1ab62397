"""Many topics and patterns of one connection: what is subscribed, and where its client is in each.

A full transport pauses all of them at once; losses are counted by each topic. Handlers read what is
asked for, and transports decide what it looks like on the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar, Final, Generic, Protocol, TypeVar

import msgspec

from clevrd.connections.one_subscription import OneSubscription
from clevrd.core.beginning import After, Beginning, check_beginning
from clevrd.core.event_ids import EventIds, EventIdSlot
from clevrd.core.notices import (
    Forgotten,
    Notice,
    Position,
    Ref,
    Warnings,
    Watching,
    unknown_gap,
)
from clevrd.core.patterns import Words, matches, parse_pattern
from clevrd.core.stream_forms import StreamForm
from clevrd.core.subscriber import NOT_BEGUN, Sink, Subscriber
from clevrd.core.subscription import (
    FROM_THE_START,
    DeliveryOptions,
    PatternBeginning,
    SubscribeRequest,
)
from clevrd.core.topic import Topic, newest_epoch_of
from clevrd.errors import ClevrdError, InvalidRequest, TooManyTopics
from clevrd.hub import Hub
from clevrd.tenants import Tenant

# Seconds between two looks whether a journal has said where all topics of a pattern begin.
_LOOK_AGAIN_S: Final = 0.01


class TopicSubscription(Protocol):
    """One topic of many, as it is delivered by one transport."""

    @property
    def topic(self) -> Topic:
        """The topic that is read."""

    @property
    def is_lagging(self) -> bool:
        """Whether the client lacks anything that others have."""

    # The pattern that brought it; None where it was named.
    pattern: PatternSubscription | None

    def join(self, beginning: Beginning, ref: Ref = ..., warnings: Warnings = ..., /) -> None:
        """Read from ``beginning`` on."""

    def unsubscribe(self) -> None:
        """Read no more. Idempotent."""

    def topic_position(self) -> Position:
        """Return up to where everything was delivered, or told as lost."""

    @property
    def has_begun(self) -> bool:
        """Whether it is known where it begins, and its first notices are written."""

    def pause_delivery(self) -> None:
        """The transport is full."""

    def resume_delivery(self) -> None:
        """The transport takes more."""

    def stall_allowed_s(self) -> float:
        """Return how long its circuit allows the client to take nothing; 0 for no promise."""


TopicT_co = TypeVar("TopicT_co", bound=TopicSubscription, covariant=True)


class ManyTransport(Protocol[TopicT_co]):
    """A transport, as many subscriptions see it."""

    # Whether a position counts again when its topic comes back in another epoch, because the client
    # was not told where the first one ended. If not, it is used up as the topic is joined.
    keeps_positions: ClassVar[bool]

    def topic_subscription(
        self,
        hub: Hub,
        topic: Topic,
        options: DeliveryOptions,
        pattern: PatternSubscription | None,
        slot: EventIdSlot | None,
    ) -> TopicT_co:
        """Return what delivers ``topic`` when it is joined, with ``slot`` for ids of events."""

    def tell(self, notice: Notice, event_id: bytes, /) -> None:
        """Tell what belongs to no one topic's messages, with an id of the client's positions."""

    def refuse(self, error: ClevrdError, /) -> None:
        """End for want of a topic that a pattern matches: the client takes no notices."""

    def found_all(self) -> None:
        """Note that every topic that was there and was asked for on the URL is joined."""


class PatternSubscription:
    """One pattern of one connection."""

    __slots__ = (
        "_beginning",
        "_subscriptions",
        "options",
        "positions",
        "ref",
        "refused",
        "text",
        "warnings",
        "words",
    )

    def __init__(
        self,
        subscriptions: ManySubscriptions[TopicSubscription],
        text: str,
        options: DeliveryOptions,
        beginning: PatternBeginning,
        ref: Ref,
        warnings: Warnings,
    ) -> None:
        self.text = text
        # The name of the command that asked for it.
        self.ref = ref
        # The client is told these when all has been found.
        self.warnings = warnings
        self.words: Words = parse_pattern(text)
        self.options = options
        # Told once for each kind of refusal that a topic is missing.
        self.refused: set[type[InvalidRequest]] = set()
        self._subscriptions = subscriptions
        # Where topics begin that were there before the pattern.
        self._beginning = beginning.beginning
        # Topic -> where its client had been. An entry goes when it is used up.
        self.positions = dict(beginning.positions)

    def topic_made(self, topic: Topic) -> None:
        """Join a topic that has just been made, from its first message on."""
        # A topic that goes on in this process has had messages elsewhere, or long ago.
        start = FROM_THE_START if topic.first == 1 else After(topic.first - 1, topic.epoch)
        self._subscriptions.join_match(self, topic, start)

    def topic_found(self, topic: Topic) -> None:
        """Join a topic that was there before the pattern."""
        self._subscriptions.join_match(self, topic, self._beginning)

    def found_all(self) -> None:
        """Note that all topics which were there have been found."""
        self._subscriptions.pattern_found_all(self)

    def topic_forgotten(self, topic: Topic) -> None:
        """Let go of a topic that nobody used."""
        self._subscriptions.topic_forgotten(topic)


class MemberSubscription(OneSubscription):
    """One of the many topics that are read over one connection."""

    __slots__ = ("pattern",)

    def __init__(
        self,
        hub: Hub,
        topic: Topic,
        sink: Sink,
        options: DeliveryOptions,
        pattern: PatternSubscription | None,
        form: StreamForm | None = None,
    ) -> None:
        super().__init__(hub, topic, sink, options, form, came_by_pattern=pattern is not None)
        self.pattern = pattern

    @property
    def has_begun(self) -> bool:
        """Whether it is known where it begins, and its first notices are written."""
        return self.cursor != NOT_BEGUN

    def join(
        self,
        beginning: Beginning,
        ref: Ref = msgspec.UNSET,
        warnings: Warnings = msgspec.UNSET,
        pattern: str | msgspec.UnsetType = msgspec.UNSET,
    ) -> None:
        """Read from ``beginning`` on; the first notice says which pattern brought it."""
        brought_by = msgspec.UNSET if self.pattern is None else self.pattern.text
        super().join(beginning, ref, warnings, brought_by)


class ManySubscriptions(Generic[TopicT_co]):
    """All subscriptions of one connection.

    Args:
        limit: topics and patterns that the connection may have.
        has_notices: the client is told what happens to patterns and their topics.
        ids: where the client is, as the ids of its events spell it; None where events have no ids.
    """

    __slots__ = (
        "_has_left",
        "_hub",
        "_ids",
        "_limit",
        "_patterns",
        "_tenant",
        "_transport",
        "_unfound",
        "has_notices",
        "is_paused",
        "topics",
    )

    def __init__(
        self,
        hub: Hub,
        tenant: Tenant,
        transport: ManyTransport[TopicT_co],
        limit: int,
        *,
        has_notices: bool,
        ids: EventIds | None = None,
    ) -> None:
        self._hub = hub
        self._tenant = tenant
        self._transport = transport
        self._limit = limit
        self.has_notices = has_notices
        self._ids = ids
        # By name, in the order in which they get their turns after a pause. Changes here alone.
        self.topics: dict[str, TopicT_co] = {}
        # By the pattern's text.
        self._patterns: dict[str, PatternSubscription] = {}
        # Patterns of the URL that have not found all topics there were.
        self._unfound = 0
        # The transport is full: all of them are blocked.
        self.is_paused = False
        # The connection ends, or has ended: nothing more is subscribed.
        self._has_left = False

    def __len__(self) -> int:
        """Return how many topics are subscribed."""
        return len(self.topics)

    def subscribe(self, request: SubscribeRequest, /) -> None:
        """Subscribe to what was asked for on a URL, which was checked."""
        warnings = request.warnings
        self._unfound = len(request.patterns)
        for name, beginning in request.topics.items():
            self.subscribe_topic(name, request.options, beginning, warnings=warnings)
            warnings = msgspec.UNSET
        for text, pattern in request.patterns.items():
            self.subscribe_pattern(text, request.options, pattern, warnings=warnings)
            warnings = msgspec.UNSET
        if not request.patterns:
            self._transport.found_all()

    # --- topics ----------------------------------------------------------------------------------

    def subscribe_topic(
        self,
        name: str,
        options: DeliveryOptions,
        beginning: Beginning,
        ref: Ref = msgspec.UNSET,
        warnings: Warnings = msgspec.UNSET,
    ) -> None:
        """Subscribe to the topic ``name``, made now if it is missing.

        Does nothing for a connection that has ended, as a reader of it would stay for ever.

        Raises:
            InvalidRequest: it is subscribed already, by name or by a pattern; there are as many as
                there may be; the position is none of the topic's; it is no name.
            Unavailable: the daemon, or the tenant, has as many topics as it may have.
        """
        if self._has_left:
            return
        self._check_new(name)
        self._join_named(name, options, beginning, ref, warnings)

    def unsubscribe_topic(self, name: str) -> dict[str, Position]:
        """End the subscription of a topic that was named; return where it was.

        Raises:
            InvalidRequest: there is none, or a pattern brought it.
        """
        each = self.topics.get(name)
        if each is None:
            raise InvalidRequest("That topic is not subscribed on this connection.")
        if each.pattern is not None:
            raise InvalidRequest(
                f"That topic came by the pattern {each.pattern.text}; unsubscribe the pattern."
            )
        return _begun({name: self._drop(name)})

    def replace_topic(self, name: str, options: DeliveryOptions, beginning: Beginning) -> None:
        """Make and join a topic anew that is gone, and of which nobody has told.

        One that a pattern brought is let go: the pattern tells of it when it comes back.

        Raises:
            ClevrdError: as `subscribe_topic`.
        """
        gone = self.topics.pop(name)
        if gone.pattern is None:
            self._join_named(name, options, beginning, msgspec.UNSET, msgspec.UNSET)

    def _join_named(
        self,
        name: str,
        options: DeliveryOptions,
        beginning: Beginning,
        ref: Ref,
        warnings: Warnings,
    ) -> None:
        self._check_room()
        topic = self._hub.topic_to_read(self._tenant, name)
        check_beginning(topic, beginning)
        self._join(topic, options, beginning, None, ref, warnings)

    def _check_new(self, name: str) -> None:
        if name in self.topics:
            raise InvalidRequest("That topic is subscribed already; unsubscribe it first.")
        for pattern in self._patterns.values():
            if matches(pattern.words, name):
                raise InvalidRequest(f"That topic comes by the pattern {pattern.text} already.")

    def _check_room(self) -> None:
        check_room(len(self.topics) + len(self._patterns), self._limit, self._tenant)

    # --- patterns --------------------------------------------------------------------------------

    def subscribe_pattern(
        self,
        text: str,
        options: DeliveryOptions,
        beginning: PatternBeginning,
        ref: Ref = msgspec.UNSET,
        warnings: Warnings = msgspec.UNSET,
    ) -> None:
        """Subscribe to every topic that the pattern matches, now and later.

        Topics that were subscribed before stay as they are. Does nothing for a connection that has
        ended.

        Raises:
            InvalidRequest: it is no pattern, or subscribed already; there are as many as may be.
            Forbidden: the tenant may subscribe to no topic that it matches.
        """
        if self._has_left:
            return
        if text in self._patterns:
            raise InvalidRequest("That pattern is subscribed already; unsubscribe it first.")
        self._check_room()
        pattern = PatternSubscription(self, text, options, beginning, ref, warnings)
        self._tenant.check_pattern(text, pattern.words)
        self._patterns[text] = pattern
        self._hub.patterns.add(self._tenant.name, pattern.words, pattern)

    def unsubscribe_pattern(self, text: str) -> dict[str, Position]:
        """End a pattern and the subscriptions it brought; return where they were, by topic.

        Topics that another pattern of the connection matches go on by that one.

        Raises:
            InvalidRequest: it is not subscribed.
        """
        pattern = self._patterns.pop(text, None)
        if pattern is None:
            raise InvalidRequest("That pattern is not subscribed on this connection.")
        self._hub.patterns.remove(self._tenant.name, pattern.words, pattern)
        left: dict[str, Position] = {}
        for name, each in list(self.topics.items()):
            if each.pattern is pattern:
                each.pattern = self._other_pattern(name)
                if each.pattern is None:
                    left[name] = self._drop(name)
        return _begun(left)

    def join_match(self, pattern: PatternSubscription, topic: Topic, otherwise: Beginning) -> None:
        """Join a topic that ``pattern`` matches, unless it is joined or the pattern has ended.

        A topic to which the tenant may not subscribe is none for it, and nothing is told of it. One
        that is joined begins where the client says that it had been; ``otherwise`` where it says
        nothing.
        """
        topic = newest_epoch_of(topic)
        beginning = pattern.positions.get(topic.name, otherwise)
        if not self._transport.keeps_positions:
            pattern.positions.pop(topic.name, None)
        if self._patterns.get(pattern.text) is not pattern:
            return
        permitted = self._tenant.subscribe
        if not permitted.is_all and not permitted.allows(topic.name):
            return
        each = self.topics.get(topic.name)
        if each is not None:
            if newest_epoch_of(each.topic) is topic:
                # The topic's reader is in this epoch, or goes over to it soon.
                return
            # The topic that is joined is an earlier epoch of this name.
            self._drop(topic.name)
        try:
            self._check_room()
            check_beginning(topic, beginning)
            self._join(topic, pattern.options, beginning, pattern, msgspec.UNSET, msgspec.UNSET)
        except InvalidRequest as error:
            self._refuse_match(pattern, error)

    def pattern_found_all(self, pattern: PatternSubscription) -> None:
        """Tell that every topic which was there and matches is joined, unless it has ended.

        When all patterns have found theirs, ids of events from here on have all topics.
        """
        if self._patterns.get(pattern.text) is not pattern:
            return
        if any(each.pattern is pattern and not each.has_begun for each in self.topics.values()):
            # A journal is asked where some of them begin, and their notices come first.
            later = asyncio.get_running_loop().call_later
            later(_LOOK_AGAIN_S, self.pattern_found_all, pattern)
            return
        self._unfound -= 1
        has_found_all = not self._unfound
        if self._ids is not None and has_found_all:
            self._ids.note_all_found()
        self._tell(Watching(pattern.text, pattern.ref, pattern.warnings))
        if has_found_all:
            self._transport.found_all()

    def topic_forgotten(self, topic: Topic) -> None:
        """Drop the subscription of a topic that is forgotten."""
        each = self.topics.get(topic.name)
        if each is not None and each.topic is topic:
            at = self._drop(topic.name)
            self._tell(Forgotten(topic.name, at.epoch, at.offset))

    def _other_pattern(self, name: str) -> PatternSubscription | None:
        return next((each for each in self._patterns.values() if matches(each.words, name)), None)

    def _refuse_match(self, pattern: PatternSubscription, error: InvalidRequest) -> None:
        """Say once for each pattern, and each reason, that something it matches is missing."""
        if type(error) in pattern.refused:
            return
        pattern.refused.add(type(error))
        error.blame(self._tenant.name, self._tenant.credential_id)
        if self.has_notices:
            self._tell(self._hub.refusals.notice(error))
        else:
            self._transport.refuse(error)

    def _tell(self, notice: Notice) -> None:
        if self.has_notices:
            self._transport.tell(notice, b"" if self._ids is None else self._ids.whole())

    # --- the connection --------------------------------------------------------------------------

    def pause_delivery(self) -> None:
        """The transport is full: all wait, each at its place."""
        self.is_paused = True
        for each in self.topics.values():
            each.pause_delivery()

    def resume_delivery(self) -> None:
        """The transport takes more: each reads on, first the topic that has waited longest."""
        self.is_paused = False
        for name in list(self.topics):
            if self.is_paused:
                return
            each = self.topics.pop(name, None)
            if each is not None:
                self.topics[name] = each
                each.resume_delivery()

    @property
    def is_lagging(self) -> bool:
        """Whether the client lacks anything that others have, in any topic."""
        return any(each.is_lagging for each in self.topics.values())

    def stall_allowed_s(self) -> float:
        """Return how long the connection may take nothing: what the most patient circuit allows."""
        return max((each.stall_allowed_s() for each in self.topics.values()), default=0.0)

    def unsubscribe(self) -> None:
        """End all of them. Idempotent."""
        self._has_left = True
        for pattern in self._patterns.values():
            self._hub.patterns.remove(self._tenant.name, pattern.words, pattern)
        self._patterns.clear()
        for each in self.topics.values():
            each.unsubscribe()
        self.topics.clear()

    def take_tenant(self, tenant: Tenant, /) -> bool:
        """Go on as ``tenant``; return whether its topics stay as they are.

        With other permissions a pattern has other topics. Its client comes back for these, since a
        search for them would be told as the first one was.
        """
        is_same = tenant.subscribe == self._tenant.subscribe
        self._tenant = tenant
        if is_same:
            return True
        return not self._patterns and all(map(tenant.subscribe.allows, self.topics))

    def readers(self) -> Sequence[OneSubscription]:
        """Return the reader of each topic; none for a poll."""
        return [each for each in self.topics.values() if isinstance(each, MemberSubscription)]

    def positions(self) -> dict[str, Position]:
        """Return by topic up to where everything was handed to the transport, or told as lost."""
        found = {name: each.topic_position() for name, each in self.topics.items()}
        return _begun(found)

    def positions_to_tell(self) -> dict[str, Position] | None:
        """Return by topic where a client with notices is; None for any other."""
        return self.positions() if self.has_notices else None

    def _join(
        self,
        topic: Topic,
        options: DeliveryOptions,
        beginning: Beginning,
        pattern: PatternSubscription | None,
        ref: Ref,
        warnings: Warnings,
    ) -> None:
        each = self._transport.topic_subscription(
            self._hub, topic, options, pattern, self._slot_of(topic)
        )
        if self.is_paused:
            # The reader begins as blocked as the others are.
            each.pause_delivery()
        # The topic is noted before it is joined: the transport may pause while the reader catches
        # up.
        self.topics[topic.name] = each
        if options.subscriber_id is not None and isinstance(each, Subscriber):
            self._hub.subscriber_ids.introduce(each, options.subscriber_id)
        each.join(beginning, ref, warnings)

    def _slot_of(self, topic: Topic) -> EventIdSlot | None:
        """Return the topic's slot in the ids of events.

        Raises:
            TooManyTopics: one more position would make the ids too long.
        """
        ids = self._ids
        if ids is None:
            return None
        slot = ids.add(topic.name, topic.epoch)
        for name in ids.given_way():
            self._transport.tell(unknown_gap(name), ids.whole())
        return slot

    def _drop(self, name: str) -> Position:
        each = self.topics.pop(name)
        position = each.topic_position()
        each.unsubscribe()
        if self._ids is not None:
            self._ids.forget(name)
        return position


def _begun(positions: dict[str, Position]) -> dict[str, Position]:
    """Return ``positions`` without those of topics that have not begun for the client."""
    if any(at.offset == NOT_BEGUN for at in positions.values()):
        return {name: at for name, at in positions.items() if at.offset != NOT_BEGUN}
    return positions


def refusal_reason(error: ClevrdError) -> str:
    """Return the short word for why a connection ends that can't have all it asked for."""
    return "too_many_topics" if isinstance(error, TooManyTopics) else error.code


def check_room(subscriptions: int, limit: int, tenant: Tenant) -> None:
    """Raise TooManyTopics where a connection with so many subscriptions may not have one more.

    Args:
        limit: subscriptions that any connection may have; the tenant's may have fewer.
    """
    setting = "CLEVRD_MAX_TOPICS_PER_CONNECTION"
    own = tenant.limits.max_subscriptions_per_connection
    if own is not None and own < limit:
        limit, setting = own, f"max_subscriptions_per_connection of tenant {tenant.name}"
    if subscriptions >= limit:
        raise TooManyTopics(
            f"A connection may have {limit} subscriptions ({setting}), and this one would have"
            f" {subscriptions + 1}; open another one, or raise the limit.",
            subscriptions + 1,
            limit,
        )
