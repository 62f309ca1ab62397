"""GapLog: the holes that a reader has not been told of yet, each at its place.

A *hole* is a run of messages that the reader lost. Only readers that asked for notices have a log.
A place is a number of deliveries: the hole lies right before the delivery after that many, which is
exact also where a policy keeps the oldest and new messages follow behind refused ones.
"""

from __future__ import annotations

from collections import deque

from clevrd.core.notices import SLOW_CONSUMER, Gap, GapReason


class Hole:
    """Offsets ``first`` to ``last``, lost right after delivery number ``place``."""

    __slots__ = ("first", "last", "place", "reason")

    def __init__(self, place: int, first: int, last: int, reason: GapReason) -> None:
        self.place = place
        self.first = first
        self.last = last
        self.reason = reason

    @property
    def count(self) -> int:
        """How many messages are missing."""
        return self.last - self.first + 1


class GapLog:
    """The holes of one reader, first to come first."""

    # Places differ and lie among the messages that wait for the reader, so there are never more
    # holes than its window has messages.
    __slots__ = ("_holes", "topic")

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self._holes: deque[Hole] = deque()

    def __len__(self) -> int:
        """Return how many holes wait to be told."""
        return len(self._holes)

    def note(self, place: int, first: int, last: int, reason: GapReason) -> None:
        """Take in that ``first`` to ``last``, which are the newest decided, are lost.

        Losses that meet at one place are one hole. Its reason is the reader's slowness where that
        was a part of the reason.
        """
        holes = self._holes
        if holes and holes[-1].place == place:
            holes[-1].last = last
            if reason == SLOW_CONSUMER:
                holes[-1].reason = reason
            return
        holes.append(Hole(place, first, last, reason))

    def refuse_newest(self, place: int, count: int, upto: int) -> None:
        """Take in that the ``count`` deliveries after number ``place`` won't be made after all.

        Args:
            upto: the highest offset decided; the last of these deliveries, or of a hole behind.
        """
        holes = self._holes
        while holes and holes[-1].place >= place:
            count += holes.pop().count
        holes.append(Hole(place, upto - count + 1, upto, SLOW_CONSUMER))

    def forget(self) -> None:
        """Forget all holes: their messages may yet be given."""
        self._holes.clear()

    def is_due(self, delivered: int) -> bool:
        """Whether a hole lies right before the next delivery."""
        return bool(self._holes) and self._holes[0].place == delivered

    def take(self) -> Gap:
        """Return the first hole as it is told, and forget it."""
        hole = self._holes.popleft()
        return Gap(self.topic, hole.first, hole.last, hole.count, hole.reason)

    def between(self, after: int, offset: int, reason: GapReason) -> Gap:
        """Return the gap between two offsets that are told one after the other."""
        return Gap(self.topic, after + 1, offset - 1, offset - after - 1, reason)

    def offset_before(self, delivered: int, decided: int, kept: int) -> int:
        """Return the offset up to which everything was delivered or told.

        Args:
            decided: the reader's cursor.
            kept: messages before it that it is still to be given.
        """
        if self._holes:
            hole = self._holes[0]
            return hole.first - 1 - (hole.place - delivered)
        return decided - kept
