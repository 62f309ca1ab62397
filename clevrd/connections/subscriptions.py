"""The subscriptions of one connection: by topic, by pattern, all on one sink.

What a full transport does to them it does to all at once; what each loses is counted by its topic.
Who asks and how is the handlers' business, what it looks like on the wire the connection's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

import msgspec

from clevrd.core.beginning import After, Beginning, check_beginning
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.event_ids import EventIds
from clevrd.core.gap_log import GapLog
from clevrd.core.notices import Forgotten, Position, Ref, Warnings, Watching
from clevrd.core.patterns import Words, matches, parse_pattern
from clevrd.core.stream_forms import StreamForm
from clevrd.core.subscriber import Sink, Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, InvalidRequest, TooManyTopics
from clevrd.hub import Hub
from clevrd.tenants import Tenant

# Of a pattern: everything that a topic ever had, since it began while nobody watched.
FROM_THE_START: Final = After(0)


class Manner(msgspec.Struct, frozen=True):
    """How a subscriber wants its messages, of whichever topic."""

    strategy: DropStrategy
    # Messages it may lag; None takes what is allowed.
    wanted_window: int | None
    has_control: bool


class Owner(Sink, Protocol):
    """The connection: where everything is written, and who hears of what can't be."""

    def refused(self, error: ClevrdError) -> None:
        """Hear that a topic which a pattern matches can't be joined."""

    def found_all(self, watching: Watching) -> None:
        """Hear that every topic which was there and matches a pattern is joined."""

    def forgotten(self, topic: Forgotten) -> None:
        """Hear that a topic which a pattern brought is gone."""


class Places(Protocol):
    """Gives each topic a sink of its own, where what is written of it depends on the others."""

    def sink_of(self, topic: Topic) -> Sink:
        """Return where the messages of ``topic``, which is joined now, are to be written.

        Raises:
            InvalidRequest: there is no room for one more.
        """

    def forget(self, name: str) -> None:
        """Note that a topic is no longer subscribed."""


class PatternWish(msgspec.Struct, frozen=True):
    """Where the subscriptions of a pattern begin."""

    # In topics that exist; those made later are read from their start.
    beginning: Beginning
    # By topic, where the subscriber had been; these count more.
    positions: Mapping[str, After] = MappingProxyType({})


class SubscribeOptions(msgspec.Struct, frozen=True):
    """What a subscriber asks for on a URL."""

    # Topic -> where to begin.
    topics: dict[str, Beginning]
    # Pattern -> where to begin.
    patterns: dict[str, PatternWish]
    manner: Manner
    # What its client is told with the first notice.
    warnings: Warnings = msgspec.UNSET


def ids_of(wanted: SubscribeOptions) -> EventIds:
    """Return the ids of events for a subscriber who begins with what is ``wanted``."""
    patterns = wanted.patterns.values()
    return EventIds(
        wanted.topics,
        {name: at for beginning in patterns for name, at in beginning.positions.items()},
        is_watching=bool(patterns)
        and all(beginning.beginning == FROM_THE_START for beginning in patterns),
    )


def is_resumed(wanted: SubscribeOptions) -> bool:
    """Whether a subscriber who wants that has said where it is, in any topic."""
    return any(
        beginning.beginning == FROM_THE_START or beginning.positions
        for beginning in wanted.patterns.values()
    ) or any(isinstance(beginning, After) for beginning in wanted.topics.values())


class Watch:
    """One pattern of one connection."""

    __slots__ = (
        "_positions",
        "_subscriptions",
        "_wish",
        "manner",
        "ref",
        "refused",
        "text",
        "warnings",
        "words",
    )

    def __init__(
        self,
        subscriptions: Subscriptions,
        text: str,
        manner: Manner,
        beginnings: PatternWish,
        ref: Ref,
        warnings: Warnings,
    ) -> None:
        self.text = text
        # What the command that asked for it is called.
        self.ref = ref
        # What its client is told when all has been found.
        self.warnings = warnings
        self.words: Words = parse_pattern(text)
        self.manner = manner
        # Told once for each kind of refusal that a topic is missing.
        self.refused: set[type[InvalidRequest]] = set()
        self._subscriptions = subscriptions
        self._wish = beginnings.beginning
        # Those that were not used yet: a topic may come back later, in a new life.
        self._positions = dict(beginnings.positions)

    def topic_made(self, topic: Topic) -> None:
        """Join a topic that has just been made, from its first message on."""
        self._subscriptions.join_match(self, topic, self._known(topic.name) or FROM_THE_START)

    def topic_found(self, topic: Topic) -> None:
        """Join a topic that was there before the pattern."""
        self._subscriptions.join_match(self, topic, self._known(topic.name) or self._wish)

    def found_all(self) -> None:
        """Note that all topics which were there have been found."""
        self._subscriptions.found_all(self)

    def topic_forgotten(self, topic: Topic) -> None:
        """Let go of a topic that nobody used."""
        self._subscriptions.let_go(topic)

    def _known(self, name: str) -> After | None:
        return self._positions.pop(name, None)


class _Entry:
    """One topic, its reader, and the pattern that brought it; None for who named it."""

    __slots__ = ("reader", "topic", "watch")

    def __init__(self, topic: Topic, reader: Subscriber, watch: Watch | None) -> None:
        self.topic = topic
        self.reader = reader
        self.watch = watch


class Subscriptions:
    """All subscriptions of one connection, at most ``limit``."""

    __slots__ = (
        "_by_name",
        "_form",
        "_has_left",
        "_hub",
        "_limit",
        "_owner",
        "_places",
        "_tenant",
        "_watches",
        "is_paused",
    )

    def __init__(
        self,
        hub: Hub,
        tenant: Tenant,
        owner: Owner,
        limit: int,
        *,
        form: StreamForm | None = None,
        places: Places | None = None,
    ) -> None:
        self._hub = hub
        self._tenant = tenant
        self._owner = owner
        self._limit = limit
        # What the connection speaks; None for WebSocket.
        self._form = form
        # None where all is written to the owner itself.
        self._places = places
        # In the order in which they get their turns after a pause.
        self._by_name: dict[str, _Entry] = {}
        # By the pattern's text.
        self._watches: dict[str, Watch] = {}
        # The transport is full: all of them are blocked.
        self.is_paused = False
        # The connection ends, or has ended: nothing more is subscribed.
        self._has_left = False

    def begin(self, wanted: SubscribeOptions) -> None:
        """Subscribe to what was asked for on a URL, which was checked."""
        warnings = wanted.warnings
        for name, beginning in wanted.topics.items():
            self.subscribe(name, wanted.manner, beginning, warnings=warnings)
            warnings = msgspec.UNSET
        for text, beginnings in wanted.patterns.items():
            self.watch(text, wanted.manner, beginnings, warnings=warnings)
            warnings = msgspec.UNSET

    # --- topics ----------------------------------------------------------------------------------

    def subscribe(
        self,
        name: str,
        manner: Manner,
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
        self._check_room()
        topic = self._hub.topic(self._tenant, name)
        check_beginning(topic, beginning)
        self._join(topic, manner, beginning, None, ref, warnings)

    def unsubscribe(self, name: str) -> dict[str, Position]:
        """End the subscription of a topic that was named; return where it was.

        Raises:
            InvalidRequest: there is none, or a pattern brought it.
        """
        entry = self._by_name.get(name)
        if entry is None:
            raise InvalidRequest("That topic is not subscribed on this connection.")
        if entry.watch is not None:
            raise InvalidRequest(
                f"That topic came by the pattern {entry.watch.text}; unsubscribe the pattern."
            )
        return {name: self._drop(name)}

    def _check_new(self, name: str) -> None:
        if name in self._by_name:
            raise InvalidRequest("That topic is subscribed already; unsubscribe it first.")
        for watch in self._watches.values():
            if matches(watch.words, name):
                raise InvalidRequest(f"That topic comes by the pattern {watch.text} already.")

    def _check_room(self) -> None:
        check_room(len(self._by_name) + len(self._watches), self._limit)

    # --- patterns --------------------------------------------------------------------------------

    def watch(
        self,
        text: str,
        manner: Manner,
        beginnings: PatternWish,
        ref: Ref = msgspec.UNSET,
        warnings: Warnings = msgspec.UNSET,
    ) -> None:
        """Subscribe to every topic that the pattern matches, now and later.

        Topics that were subscribed before stay as they are. Does nothing for a connection that has
        ended.

        Raises:
            InvalidRequest: it is no pattern, or watched already; there are as many as may be.
        """
        if self._has_left:
            return
        if text in self._watches:
            raise InvalidRequest("That pattern is subscribed already; unsubscribe it first.")
        self._check_room()
        watch = Watch(self, text, manner, beginnings, ref, warnings)
        self._watches[text] = watch
        self._hub.patterns.add(self._tenant.name, watch.words, watch)

    def unwatch(self, text: str) -> dict[str, Position]:
        """End a pattern and the subscriptions it brought; return where they were, by topic.

        Those that another pattern of the connection matches go on by that one.

        Raises:
            InvalidRequest: it is not watched.
        """
        watch = self._watches.pop(text, None)
        if watch is None:
            raise InvalidRequest("That pattern is not subscribed on this connection.")
        self._hub.patterns.remove(self._tenant.name, watch.words, watch)
        left: dict[str, Position] = {}
        for name, entry in list(self._by_name.items()):
            if entry.watch is watch:
                entry.watch = self._other_watch(name)
                if entry.watch is None:
                    left[name] = self._drop(name)
        return left

    def join_match(self, watch: Watch, topic: Topic, beginning: Beginning) -> None:
        """Join a topic that ``watch`` matches, unless it is joined or the watch has ended."""
        if self._watches.get(watch.text) is not watch:
            return
        entry = self._by_name.get(topic.name)
        if entry is not None:
            if entry.topic is topic:
                return
            # The same name in a life before this one.
            self._drop(topic.name)
        try:
            self._check_room()
            check_beginning(topic, beginning)
            self._join(topic, watch.manner, beginning, watch, msgspec.UNSET, msgspec.UNSET)
        except InvalidRequest as error:
            self._refuse_match(watch, error)

    def found_all(self, watch: Watch) -> None:
        """Pass on that all topics which ``watch`` matches have been found, unless it has ended."""
        if self._watches.get(watch.text) is watch:
            self._owner.found_all(Watching(watch.text, watch.ref, watch.warnings))

    def let_go(self, topic: Topic) -> None:
        """Drop the subscription of a topic that is forgotten."""
        entry = self._by_name.get(topic.name)
        if entry is not None and entry.topic is topic:
            at = self._drop(topic.name)
            self._owner.forgotten(Forgotten(topic.name, at.epoch, at.offset))

    def _other_watch(self, name: str) -> Watch | None:
        return next((each for each in self._watches.values() if matches(each.words, name)), None)

    def _refuse_match(self, watch: Watch, error: InvalidRequest) -> None:
        """Say once for each pattern, and each reason, that something it matches is missing."""
        if type(error) not in watch.refused:
            watch.refused.add(type(error))
            self._owner.refused(error)

    # --- the connection --------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return how many topics are subscribed."""
        return len(self._by_name)

    def pause(self) -> None:
        """The transport is full: all wait, each at its place."""
        self.is_paused = True
        for entry in self._by_name.values():
            self._hub.paused(entry.topic, entry.reader)

    def resume(self) -> None:
        """The transport takes more: each reads on, those first that waited longest."""
        self.is_paused = False
        for name in list(self._by_name):
            if self.is_paused:
                return
            entry = self._by_name.pop(name, None)
            if entry is not None:
                self._by_name[name] = entry
                self._hub.resumed(entry.topic, entry.reader)

    def stall_allowed_s(self) -> float:
        """Return how long the connection may take nothing: what the most patient circuit allows."""
        readers = (entry.reader for entry in self._by_name.values())
        return max(map(self._hub.stall_allowed_s, readers), default=0.0)

    def leave(self) -> None:
        """End all of them. Idempotent."""
        self._has_left = True
        for watch in self._watches.values():
            self._hub.patterns.remove(self._tenant.name, watch.words, watch)
        self._watches.clear()
        for entry in self._by_name.values():
            self._hub.unsubscribe(entry.topic, entry.reader)
        self._by_name.clear()

    def positions(self) -> dict[str, Position]:
        """Return by topic up to where everything was handed to the transport, or told as lost."""
        return {name: _position_of(entry) for name, entry in self._by_name.items()}

    def _join(
        self,
        topic: Topic,
        manner: Manner,
        beginning: Beginning,
        watch: Watch | None,
        ref: Ref,
        warnings: Warnings,
    ) -> None:
        gaps = GapLog(topic.name) if manner.has_control else None
        reader = Subscriber(
            self._owner if self._places is None else self._places.sink_of(topic),
            manner.strategy,
            manner.wanted_window,
            gaps,
            came_by_pattern=watch is not None,
            form=self._form,
        )
        # It begins as blocked as the others are.
        reader.is_blocked = self.is_paused
        # Before it is joined: the transport may pause while it catches up.
        self._by_name[topic.name] = _Entry(topic, reader, watch)
        pattern = msgspec.UNSET if watch is None else watch.text
        self._hub.subscribe(topic, reader, beginning, pattern=pattern, ref=ref, warnings=warnings)

    def _drop(self, name: str) -> Position:
        entry = self._by_name.pop(name)
        position = _position_of(entry)
        self._hub.unsubscribe(entry.topic, entry.reader)
        if self._places is not None:
            self._places.forget(name)
        return position


def refusal_reason(error: ClevrdError) -> str:
    """Return the short word for why a connection ends that can't have all it asked for."""
    return "too_many_topics" if isinstance(error, TooManyTopics) else error.code


def check_room(subscriptions: int, limit: int) -> None:
    """Raise TooManyTopics where a connection with so many subscriptions may not have one more."""
    if subscriptions >= limit:
        raise TooManyTopics(
            f"A connection may have {limit} subscriptions"
            " (CLEVRD_MAX_TOPICS_PER_CONNECTION); open another one, or raise the limit."
        )


def _position_of(entry: _Entry) -> Position:
    return Position(entry.topic.epoch, entry.reader.position())
