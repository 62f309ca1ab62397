"""Readers: who reads which topic, and what each is given that is not up to date.

Who is up to date is written to by `rounds`. What a reader has lost, and which frames it is to
have, its topic knows.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from clevrd.core.control_frames import Ref, Subscribed
from clevrd.core.positions import Start
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic

# Bytes a lagging reader is handed at a time; its transport stops it after one or two of them.
CATCH_UP_BYTES: Final = 65_536

# Of these in one turn of the loop: half a MiB, a fraction of a millisecond on loopback.
CATCH_UP_CHUNKS: Final = 8


class Readers:
    """The readers of all topics."""

    __slots__ = ("_loop", "count", "suspended", "topics")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
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
        start: Start,
        pattern: str | msgspec.UnsetType,
        ref: Ref,
        now_s: float,
    ) -> None:
        """Add ``reader``, greet it where it wants that, and hand it what follows ``start``."""
        topic.join_after(reader, start.after, now_s)
        self.topics[topic] = None
        self.count += 1
        if reader.gaps is not None:
            reader.sink.write(_greeting(topic, reader, start, pattern, ref))
        self._catch_up(topic, reader)

    def leave(self, topic: Topic, reader: Subscriber) -> None:
        """Let ``reader`` go; what waited for it is discarded. Idempotent."""
        if not reader.is_joined:
            return
        self.suspended.pop(reader, None)
        topic.leave(reader, self._loop.time())
        self.count -= 1
        if topic.subscribers == 0:
            self.topics.pop(topic, None)

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

        Its transport stops it sooner as a rule; a reader as fast as we are is made to take turns.
        """
        if reader in self.suspended:
            # Its circuit opened between two of its turns.
            return
        now_s = self._loop.time()
        for _ in range(CATCH_UP_CHUNKS):
            if reader.is_blocked or reader.is_live or not reader.is_joined:
                return
            frames = topic.read(reader, CATCH_UP_BYTES, now_s)
            if not frames:
                topic.mark_live(reader)
                return
            reader.write(reader.spelling.joined(frames))
        self._loop.call_soon(self._catch_up, topic, reader)

    def settle(self, now_s: float) -> None:
        """Bring every reader's counters up to date."""
        for topic in self.topics:
            topic.settle(now_s)

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
    start: Start,
    pattern: str | msgspec.UnsetType,
    ref: Ref,
) -> bytes:
    """Return what a reader that asked for control frames gets first."""
    gap = start.gap
    # Before what is missing, where that is known: the gap is all that lies between.
    offset = gap.first - 1 if gap is not None and gap.first is not None else reader.position()
    window = reader.granted_window(topic.window_cap)
    greeting = Subscribed(topic.name, topic.epoch, offset, start.is_recovered, window, pattern, ref)
    spelling = reader.spelling
    if gap is None:
        return spelling.control(greeting, offset)
    # Who is cut between the two comes back from where it was, and is told again.
    return spelling.control(greeting) + spelling.control(gap, reader.position())
