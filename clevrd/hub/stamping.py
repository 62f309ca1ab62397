"""Stamping: each accepted message gets its id and its time, here and nowhere else.

A message's offset is not decided here, and nothing is encoded: both come with its place in the
order of its topic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clevrd.core.message import MessageIds
from clevrd.errors import ShuttingDown

# A message's id and its timestamp (RFC 3339).
Stamp = tuple[str, str]


class Stamping:
    """The ids of all messages, the clock they are made from, and whether any are made still."""

    __slots__ = ("_ids", "_is_sealed", "_wall_ns")

    def __init__(self, wall_ns: Callable[[], int]) -> None:
        self._wall_ns = wall_ns
        self._ids = MessageIds()
        # Nothing is stamped any more; set by seal, for good.
        self._is_sealed = False

    def wall_us(self) -> int:
        """Return the wall clock, microseconds since 1970."""
        return self._wall_ns() // 1000

    @property
    def last_id_us(self) -> int:
        """The last message's id, in microseconds since 1970; 0 before the first."""
        return max(0, self._ids.last_us)

    def go_on_after(self, last_id_us: int) -> None:
        """Make only ids after ``last_id_us``: an earlier process made ids up to it."""
        self._ids.go_on_after(last_id_us)

    def seal(self) -> None:
        """Stamp nothing more."""
        self._is_sealed = True

    def stamp(self, count: int) -> Sequence[Stamp]:
        """Return the stamps of ``count`` messages that are accepted now, in their order.

        Raises:
            Unavailable: after `seal`.
        """
        if self._is_sealed:
            raise ShuttingDown
        if count == 1:
            # Half of the time that a list of one takes: 0.7 us instead of 1.3.
            return (self._ids.next(self._wall_ns() // 1000),)
        next_id, wall_us = self._ids.next, self._wall_ns() // 1000
        return [next_id(wall_us) for _ in range(count)]
