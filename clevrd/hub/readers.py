"""Readers: who reads which topic, and what each is given that is not up to date.

Who is up to date is written to by `rounds`. What a reader has lost, and which frames it is to
have, its topic knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from clevrd.core.beginning import ResolvedBeginning
from clevrd.core.notices import Ref, Subscribed, Warnings
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.metrics.counters import Counters
from clevrd.scheduling.turn_queue import TurnQueue

log = logging.getLogger(__name__)

# Bytes a lagging reader is handed at a time; its transport stops it after one or two of them.
CATCH_UP_BYTES: Final = 65_536

# Bytes that all lagging readers together are handed in one turn of the loop: about 1 ms of writes
# on loopback. Events and lines count eight times, since each message may have to be spelled first,
# at 4 us. The readers take turns: one with 50 topics of 10,000 messages held the loop for 0.7 s.
CATCH_UP_TURN_BYTES: Final = 1_048_576
_SPELLED_COSTS: Final = 8


class Readers:
    """The readers of all topics."""

    __slots__ = (
        "_behind",
        "_counters",
        "_has_turn",
        "_loop",
        "_note_left",
        "count",
        "queue",
        "suspended",
        "topics",
    )

    def __init__(
        self,
        counters: Counters,
        note_left: Callable[[Topic], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Args: note_left: told of each topic that its last reader has left."""
        self._counters = counters
        self._note_left = note_left
        self._loop = loop
        # Readers that would take more, and their topics; who has waited longest first.
        self._behind: dict[Subscriber, Topic] = {}
        # Its units are bytes.
        self.queue = TurnQueue(
            CATCH_UP_TURN_BYTES, self._read_next, loop, counters.count_background_error
        )
        # All three change in join, leave, suspend and resume alone.
        self.count = 0
        # Topics with readers, so that the loops that control don't walk through all topics.
        self.topics: dict[Topic, None] = {}
        # Readers to which nothing is offered, who was suspended first first, and their topics.
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
        """Add ``reader``, greet it where it wants that, and hand it what follows ``start``."""
        topic.join_after(reader, start.after, now_s)
        self.topics[topic] = None
        self.count += 1
        if reader.gaps is not None:
            reader.sink.write(_greeting(topic, reader, start, pattern, ref, warnings))
        self._catch_up(topic, reader)

    def leave(self, topic: Topic, reader: Subscriber) -> None:
        """Let ``reader`` go; what waited for it is discarded. Idempotent."""
        if not reader.is_joined:
            return
        self.suspended.pop(reader, None)
        self._behind.pop(reader, None)
        topic.leave(reader, self._loop.time())
        self.count -= 1
        if topic.subscribers == 0:
            self.topics.pop(topic, None)
            self._note_left(topic)

    def suspend(self, topic: Topic, reader: Subscriber) -> None:
        """Offer ``reader`` nothing until it is resumed; it keeps its place."""
        topic.suspend(reader)
        self.suspended[reader] = topic

    def pause(self, topic: Topic, reader: Subscriber) -> None:
        """Note that the reader's transport is full: nothing is done for it until `resume`."""
        reader.is_blocked = True
        if reader.is_joined:
            topic.mark_lagging(reader)

    def resume(self, topic: Topic, reader: Subscriber) -> None:
        """Note that the reader's transport takes more: it reads on where its policy puts it."""
        reader.is_blocked = False
        if not reader.is_joined:
            return
        if self.suspended.pop(reader, None) is not None:
            topic.resume(reader, self._loop.time())
        self._catch_up(topic, reader)

    def _catch_up(self, topic: Topic, reader: Subscriber) -> None:
        """Let a lagging reader read up to the edge, and join the live ones when it is there.

        Its transport stops it sooner as a rule. It begins at once; where it, or others, take more
        than a turn has, they take turns.
        """
        self._behind[reader] = topic
        self.queue.work_on()

    def _read_next(self) -> int | None:
        """Let the reader that has waited longest read once; return its cost, None if none waits."""
        behind = self._behind
        if not behind:
            return None
        reader = next(iter(behind))
        topic = behind.pop(reader)
        try:
            taken_bytes = self._read_once(topic, reader)
        except Exception:
            self.write_failed(topic, reader)
            return 0
        # Unless it has left in the write.
        if taken_bytes and reader.is_joined:
            behind[reader] = topic
        return taken_bytes

    def _read_once(self, topic: Topic, reader: Subscriber) -> int:
        """Hand ``reader`` its next messages; return what that cost, 0 when it takes no more."""
        # Its circuit may have opened between two of its turns.
        if reader.is_blocked or reader.is_live or reader in self.suspended:
            return 0
        texts = topic.read(reader, CATCH_UP_BYTES, self._loop.time())
        if not texts:
            topic.mark_live(reader)
            return 0
        data = reader.spelling.joined(texts)
        reader.write(data)
        self._counters.delivered_bytes += len(data)
        return len(data) if reader.form is None else len(data) * _SPELLED_COSTS

    def write_failed(self, topic: Topic, reader: Subscriber) -> None:
        """Let go of ``reader``, whose write has just raised: it must not stop it for the others."""
        log.exception("write to subscriber failed topic=%s", topic.name)
        self._counters.count_background_error()
        self.leave(topic, reader)
        reader.sink.close(1011, "write_failed")

    def slow_count(self, now_s: float) -> int:
        """Return how many are slow, over all topics."""
        return sum(topic.slow_count(now_s) for topic in self.topics)

    def set_window(self, window_messages: int, now_s: float) -> None:
        """Let every reader lag so far and no further."""
        for topic in self.topics:
            topic.set_window(window_messages, now_s)

    def mean_message_bytes(self) -> float:
        """Return the mean size of the recent messages that anybody reads, 0.0 for none."""
        messages = sum(len(topic.ring) for topic in self.topics)
        held_bytes = sum(topic.ring.size_bytes for topic in self.topics)
        return held_bytes / messages if messages else 0.0


def _greeting(
    topic: Topic,
    reader: Subscriber,
    start: ResolvedBeginning,
    pattern: str | msgspec.UnsetType,
    ref: Ref,
    warnings: Warnings,
) -> bytes:
    """Return what a reader that asked for control frames gets first."""
    gap = start.gap
    # Before what is missing, where that is known: the gap is all that lies between.
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
        return spelling.control(greeting, offset)
    # Who is cut between the two comes back from where it was, and is told again.
    return spelling.control(greeting) + spelling.control(gap, reader.position())
