"""Expiring: which messages of a topic are worth nothing any more, by their offsets. No clock here.

Only messages that were published with a time to live are in it, so a topic without any has none of
these, and pays one comparison for each read of a lagging reader.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from typing import Final

# Entries of messages that the ring has given up are let go of when there are so many: together, so
# that each costs little.
_PRUNED_AT: Final = 256


class Expiring:
    """The messages of one topic that expire, as long as its ring may have them.

    It takes 16 bytes for each, and has twice as many at most as the ring has, and 256.
    """

    __slots__ = ("_offsets", "_until_s", "now_s")

    def __init__(self) -> None:
        # Rising, and as many as ``_until_s``: on the caller's clock, when each expires.
        self._offsets = array("q")
        self._until_s = array("d")
        # The time by which it is judged; set by the caller before it asks.
        self.now_s = 0.0

    def __len__(self) -> int:
        """Return how many messages are in it."""
        return len(self._offsets)

    def note(self, offset: int, until_s: float, first: int) -> None:
        """Note that message ``offset``, the newest, expires at ``until_s``.

        Args:
            first: the oldest message in the ring.
        """
        offsets = self._offsets
        if len(offsets) >= _PRUNED_AT:
            gone = bisect_left(offsets, first)
            if gone * 2 >= len(offsets):
                del offsets[:gone], self._until_s[:gone]
        offsets.append(offset)
        self._until_s.append(until_s)

    def next_expired(self, after: int, upto: int) -> int:
        """Return the first expired offset behind ``after``, up to ``upto``; 0 without one.

        Each message that expires later is looked at, at 50 ns.
        """
        offsets, until_s, now_s = self._offsets, self._until_s, self.now_s
        for place in range(bisect_right(offsets, after), len(offsets)):
            if offsets[place] > upto:
                return 0
            if until_s[place] <= now_s:
                return offsets[place]
        return 0

    def end_of_expired(self, after: int, upto: int) -> int:
        """Return the last of the expired offsets that follow ``after`` without a hole.

        ``after`` itself where the next message has not expired, and none beyond ``upto``.
        """
        offsets, until_s, now_s = self._offsets, self._until_s, self.now_s
        for place in range(bisect_right(offsets, after), len(offsets)):
            if offsets[place] != after + 1 or after >= upto or until_s[place] > now_s:
                break
            after += 1
        return after

    def has_expired(self, offset: int) -> bool:
        """Return whether message ``offset`` has expired."""
        offsets = self._offsets
        place = bisect_left(offsets, offset)
        if place == len(offsets) or offsets[place] != offset:
            return False
        return self._until_s[place] <= self.now_s
