"""Readers: joins readers to topics, and hands lagging readers their messages in turns.

Live readers are written to by `rounds`. The topic decides what a lagging reader has lost and which
frames it reads next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from clevrd.core.beginning import Beginning, ResolvedBeginning
from clevrd.core.notices import Ref, Subscribed, Warnings
from clevrd.core.portions import Portion
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub.subscriber_ids import SubscriberIds
from clevrd.metrics.counters import Counters
from clevrd.scheduling.turn_queue import TurnQueue

log = logging.getLogger(__name__)

# Bytes that a lagging reader is handed in one write; its transport is full after one or two such
# writes.
CATCH_UP_BYTES: Final = 65_536

# Bytes that all lagging readers together are handed in one turn of the loop: about 1 ms of writes
# on loopback. Bytes of events and lines count eight times, since each message may have to be
# rendered first, at 4 us. The readers take turns because one reader with 50 topics of 10,000
# messages held the loop for 0.7 s.
CATCH_UP_TURN_BYTES: Final = 1_048_576
_SPELLED_COSTS: Final = 8


class Asked(msgspec.Struct, frozen=True):
    """The part of a joining reader's request that its first notices are made of."""

    beginning: Beginning
    pattern: str | msgspec.UnsetType
    ref: Ref
    warnings: Warnings


class ReadsHistory(Protocol):
    """The readers that read a history, and have not reached the ring of their topic."""

    def read_once(self, topic: Topic, reader: Subscriber, /) -> int:
        """Hand ``reader`` its next messages; return the bytes, 0 if it can go on only later."""

    def pause(self, reader: Subscriber, /) -> None:
        """Note that the reader's transport is full."""

    def forget(self, reader: Subscriber, /) -> None:
        """Know no more of a reader, which has left. Idempotent."""


class NotesReaders(Protocol):
    """An object that wants to know who comes and goes; it keeps `SubscriberIds` as well."""

    def joined(self, topic: Topic, reader: Subscriber, /) -> None:
        """Note that ``reader`` has joined ``topic``."""

    def left(self, topic: Topic, reader: Subscriber, /) -> None:
        """Note that ``reader`` has left ``topic``."""


class Holdings:
    """Readers, and messages in the rings, that one portion has in topics that are read."""

    __slots__ = ("messages", "size_bytes", "subscribers")

    def __init__(self) -> None:
        self.subscribers = 0
        self.messages = 0
        self.size_bytes = 0


class Readers:
    """The readers of all topics."""

    __slots__ = (
        "_catching_up",
        "_counters",
        "_loop",
        "_note_left",
        "count",
        "history",
        "lifecycle",
        "queue",
        "subscriber_ids",
        "suspended",
        "topics",
    )

    def __init__(
        self,
        counters: Counters,
        note_left: Callable[[Topic], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Args: note_left: called with each topic whose last reader has left."""
        self._counters = counters
        self._note_left = note_left
        self._loop = loop
        # The ids that some of the readers gave.
        self.subscriber_ids = SubscriberIds()
        # Tells who comes and goes; None where nobody wants to be told.
        self.lifecycle: NotesReaders | None = None
        # None where no topic has a history.
        self.history: ReadsHistory | None = None
        # Readers that are catching up, and their topics, by portion. Each portion in here has some,
        # and the portion that has waited longest is first, as is its reader that has.
        self._catching_up: dict[Portion, dict[Subscriber, Topic]] = {}
        # Hands messages to the readers above; a unit is one byte.
        self.queue = TurnQueue(
            CATCH_UP_TURN_BYTES, self._read_next, loop, counters.count_background_error
        )
        # Readers that are joined, over all topics; changed by join and leave alone.
        self.count = 0
        # Topics with readers, so that a periodic decision does not walk through all topics; changed
        # by join and leave alone.
        self.topics: dict[Topic, None] = {}
        # Suspended readers and their topics, the longest suspended first; changed by leave, suspend
        # and resume alone.
        self.suspended: dict[Subscriber, Topic] = {}

    def join(
        self,
        topic: Topic,
        reader: Subscriber,
        start: ResolvedBeginning,
        pattern: str | msgspec.UnsetType,
        ref: Ref,
        warnings: Warnings,
        now_s: float,
    ) -> None:
        """Add ``reader``, send its first notices where it wants any, and let it read on."""
        topic.join_after(reader, start.after, now_s)
        self._note_joined(topic, reader)
        if reader.gaps is not None:
            try:
                reader.sink.write(_first_notices(topic, reader, start, pattern, ref, warnings))
            except Exception:
                # The reader would wait for ever, since nothing lets it read on.
                self.write_failed(topic, reader)
                return
        self._catch_up(topic, reader)

    def join_in_history(self, topic: Topic, reader: Subscriber) -> None:
        """Add ``reader``, which `history` hands messages until it has reached the ring."""
        topic.join_in_history(reader, self._loop.time())
        self._note_joined(topic, reader)
        self._catch_up(topic, reader)

    def _note_joined(self, topic: Topic, reader: Subscriber) -> None:
        self.topics[topic] = None
        self.count += 1
        if self.lifecycle is not None:
            self.lifecycle.joined(topic, reader)
        elif self.subscriber_ids.given:
            self.subscriber_ids.joined(topic, reader)

    def greet(
        self, topic: Topic, reader: Subscriber, start: ResolvedBeginning, asked: Asked
    ) -> None:
        """Send a reader that wants notices its first ones."""
        if reader.gaps is not None:
            reader.sink.write(
                _first_notices(topic, reader, start, asked.pattern, asked.ref, asked.warnings)
            )

    def catch_up_soon(self, topic: Topic, reader: Subscriber) -> None:
        """Give ``reader`` a turn, as all that come in this turn of the loop."""
        self._take_turns(topic, reader)
        self.queue.work_soon()

    def count_written(self, size_bytes: int) -> None:
        """Count bytes that a reader was handed from a history."""
        self._counters.delivered_bytes += size_bytes

    def leave(self, topic: Topic, reader: Subscriber) -> None:
        """Remove ``reader``; what waited for it is discarded. A second call does nothing."""
        if reader.is_joined:
            self._remove(topic, reader, topic.leave)
        if self.subscriber_ids.given:
            self.subscriber_ids.forget(reader)

    def let_go(self, topic: Topic, reader: Subscriber) -> None:
        """Remove ``reader`` as `leave` does, so that it can join the topic's next epoch."""
        self._remove(topic, reader, topic.let_go)

    def _remove(
        self, topic: Topic, reader: Subscriber, leave: Callable[[Subscriber, float], None]
    ) -> None:
        self.suspended.pop(reader, None)
        if self.history is not None:
            self.history.forget(reader)
        leave(reader, self._loop.time())
        self.count -= 1
        if self.lifecycle is not None:
            self.lifecycle.left(topic, reader)
        elif self.subscriber_ids.given:
            self.subscriber_ids.left(topic, reader)
        if topic.subscribers == 0:
            self.topics.pop(topic, None)
            self._note_left(topic)

    def suspend(self, topic: Topic, reader: Subscriber) -> None:
        """Offer ``reader`` nothing until `resume`; it keeps its position."""
        topic.suspend(reader)
        self.suspended[reader] = topic

    def pause(self, topic: Topic, reader: Subscriber) -> None:
        """Note that the reader's transport is full; nothing is written to it until `resume`."""
        reader.is_blocked = True
        if reader.is_joined:
            topic.mark_lagging(reader)
            if self.history is not None:
                self.history.pause(reader)

    def resume(self, topic: Topic, reader: Subscriber) -> None:
        """Note that the reader's transport takes more, and let it read on by its policy."""
        reader.is_blocked = False
        if not reader.is_joined:
            return
        if self.suspended.pop(reader, None) is not None:
            topic.resume(reader, self._loop.time())
        self._catch_up(topic, reader)

    def read_on(self, topic: Topic) -> None:
        """Let live readers that a failed round has left behind the edge read on by themselves."""
        for reader in [reader for reader in topic.live if reader.cursor != topic.edge]:
            topic.mark_lagging(reader)
            self._take_turns(topic, reader)
        self.queue.work_soon()

    def _catch_up(self, topic: Topic, reader: Subscriber) -> None:
        """Let a lagging reader read up to the edge, where it becomes live.

        Reading begins at once and usually ends sooner, when the transport is full. Where the
        readers need more than one turn of the loop allows, they take turns.
        """
        self._take_turns(topic, reader)
        self.queue.work_on()

    def _take_turns(self, topic: Topic, reader: Subscriber) -> None:
        """Put ``reader`` behind the others of its portion that are catching up."""
        waiting = self._catching_up.get(topic.portion)
        if waiting is None:
            waiting = self._catching_up[topic.portion] = {}
        waiting[reader] = topic

    def _read_next(self) -> int | None:
        """Let the next reader read once; return the cost, None without one.

        Portions take turns, and so do the readers of each. A tenant with thousands of readers that
        lag thus delays no other tenant's reader by more than the work for one.
        """
        catching_up = self._catching_up
        if not catching_up:
            return None
        portion = next(iter(catching_up))
        waiting = catching_up.pop(portion)
        reader = next(iter(waiting))
        topic = waiting.pop(reader)
        if waiting:
            catching_up[portion] = waiting
        try:
            taken_bytes = self._read_once(topic, reader)
        except Exception:
            self.write_failed(topic, reader)
            return 0
        # The reader may have left during the write.
        if taken_bytes and reader.is_joined:
            self._take_turns(topic, reader)
        return taken_bytes

    def _read_once(self, topic: Topic, reader: Subscriber) -> int:
        """Hand ``reader`` its next messages; return the cost in bytes, 0 if it takes no more."""
        # The reader's circuit may have opened between two of its turns, or it may have left.
        if not reader.is_joined or reader.is_blocked or reader.is_live or reader in self.suspended:
            return 0
        if topic.history is not None and reader in topic.history.readers:
            taken_bytes = self.history.read_once(topic, reader) if self.history else 0
            return taken_bytes if reader.form is None else taken_bytes * _SPELLED_COSTS
        texts = topic.read(reader, CATCH_UP_BYTES, self._loop.time())
        if not texts:
            topic.mark_live(reader)
            return 0
        data = reader.spelling.joined(texts)
        reader.write(data)
        self._counters.delivered_bytes += len(data)
        return len(data) if reader.form is None else len(data) * _SPELLED_COSTS

    def write_failed(self, topic: Topic, reader: Subscriber) -> None:
        """Remove ``reader``, whose write has raised; the others are written to all the same."""
        self._counters.count_background_error()
        self.leave(topic, reader)
        log.exception("write to subscriber failed topic=%s", topic.name)
        reader.sink.close(1011, "write_failed")

    def slow_count(self, now_s: float) -> tuple[int, list[Topic]]:
        """Return how many readers are slow, over all topics, and the topics that have such."""
        with_slow = [topic for topic in self.topics if topic.slow_count(now_s)]
        return sum(topic.slow for topic in with_slow), with_slow

    def set_windows(self, window_of: Callable[[str], int], now_s: float) -> None:
        """Set the window of every reader, in messages, to that of its portion."""
        for topic in self.topics:
            topic.set_window(window_of(topic.portion.name), now_s)

    def holdings(self) -> dict[Portion, Holdings]:
        """Return what each portion has in topics that are read."""
        found: dict[Portion, Holdings] = {}
        for topic in self.topics:
            own = found.get(topic.portion)
            if own is None:
                own = found[topic.portion] = Holdings()
            own.subscribers += topic.subscribers
            own.messages += topic.held_messages
            own.size_bytes += topic.held_bytes
        return found


def _first_notices(
    topic: Topic,
    reader: Subscriber,
    start: ResolvedBeginning,
    pattern: str | msgspec.UnsetType,
    ref: Ref,
    warnings: Warnings,
) -> bytes:
    """Return a joining reader's first notices: `subscribed`, and `gap` where it lost messages."""
    gap = start.gap
    # Where the missing offsets are known, this is the offset before them, so that the gap is all
    # that lies between this position and the reader's own.
    offset = gap.first - 1 if gap is not None and gap.first is not None else reader.position()
    window = reader.granted_window(topic.window_cap)
    greeting = Subscribed(
        *(topic.name, topic.epoch, offset, start.is_recovered, window),
        pattern,
        ref,
        warnings,
    )
    spelling = reader.spelling
    if gap is None:
        return spelling.notice(greeting, offset)
    # A client whose connection ends between the two notices comes back with the earlier position,
    # and is told of the gap again.
    return spelling.notice(greeting) + spelling.notice(gap, reader.position())
