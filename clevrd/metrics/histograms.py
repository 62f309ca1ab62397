"""Histograms with fixed bounds: 0.2 us for each value, and 0.3 us for all that a round records.

A histogram's owner decides when a value is measured.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, repeat
from operator import add
from typing import Final

import msgspec

# The bounds of a round's times double from 16 us to 1 s, in nanoseconds; those of its messages are
# all ones in binary. A round has 256 KiB at most, so a few thousand of the shortest messages.
_TIMES_NS: Final = tuple(1_000 << bits for bits in range(4, 21))
_MESSAGES: Final = tuple((1 << bits) - 1 for bits in range(1, 13))
# Rounds that are noted before they are counted together, in 0.1 ms. A value that is sorted among
# others costs half of a search of its own.
_NOTED_ROUNDS: Final = 256


# The buckets of `times_view` that are told apart: from 16 us to 1 s.
_FIRST_BITS: Final = 4
_LAST_BITS: Final = 20


class HistogramView(msgspec.Struct, frozen=True):
    """A histogram at one moment, as Prometheus counts: each bucket with all below it."""

    # Upper bounds, which belong to their buckets; the last bucket, without a bound, is beyond.
    bounds: tuple[float, ...]
    # One more than bounds; the last one is the number of all values.
    counts: tuple[int, ...]
    sum: float


class Histogram:
    """Values counted by the bucket that they fall into, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Args: bounds: upper bounds of the buckets, rising."""
        self._bounds = tuple(bounds)
        # Values of each bucket alone; the last is for what exceeds all bounds.
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def record(self, value: float) -> None:
        """Count ``value``."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def record_many(self, value: float, count: int) -> None:
        """Count ``value`` as often as ``count`` says."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def view(self, zeros: int = 0) -> HistogramView:
        """Return what was recorded, and ``zeros`` that were not recorded one by one."""
        first, *others = self._counts
        return HistogramView(
            self._bounds, tuple(accumulate(others, initial=first + zeros)), self._sum
        )

    @property
    def count(self) -> int:
        """How many values were recorded."""
        return sum(self._counts)


class RoundHistograms:
    """Times and sizes of all rounds that carried messages."""

    __slots__ = ("_durations_ns", "_messages", "_noted", "_to_socket_ns")

    def __init__(self) -> None:
        # Figures of rounds that are not counted yet, one after the other: messages, duration and
        # age in nanoseconds. Appended to by record, emptied by _count.
        self._noted: list[int] = []
        self._messages = _WholeNumbers(_MESSAGES)
        self._durations_ns = _WholeNumbers(_TIMES_NS)
        self._to_socket_ns = _WholeNumbers(_TIMES_NS)

    def record(self, messages: int, oldest_ns: int, began_ns: int, ended_ns: int) -> None:
        """Count a round.

        Args:
            messages: how many it carried.
            oldest_ns: when the oldest of them was appended.
            began_ns: when it began.
            ended_ns: when it was written to all its readers.
        """
        noted = self._noted
        noted += (messages, ended_ns - began_ns, ended_ns - oldest_ns)
        if len(noted) >= 3 * _NOTED_ROUNDS:
            self._count()

    def durations_s(self) -> HistogramView:
        """Return how long rounds took."""
        self._count()
        return self._durations_ns.view(1e9)

    def to_socket_s(self) -> HistogramView:
        """Return how old each round's oldest message was when it was written to all readers."""
        self._count()
        return self._to_socket_ns.view(1e9)

    def messages(self) -> HistogramView:
        """Return how many messages rounds carried."""
        self._count()
        return self._messages.view(1.0)

    def _count(self) -> None:
        """Count the rounds that were noted."""
        noted = self._noted
        self._messages.record_all(noted[0::3])
        self._durations_ns.record_all(noted[1::3])
        self._to_socket_ns.record_all(noted[2::3])
        noted.clear()


class _WholeNumbers:
    """A histogram of whole numbers that are recorded many at a time."""

    __slots__ = ("_below", "_bounds", "_count", "_sum")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        """Args: bounds: upper bounds of the buckets, rising."""
        self._bounds = bounds
        # How many values are no larger than each bound; and all that there are.
        self._below = [0] * len(bounds)
        self._count = 0
        self._sum = 0

    def record_all(self, values: list[int]) -> None:
        """Count ``values``, which are sorted here."""
        values.sort()
        below = map(bisect_right, repeat(values), self._bounds)
        self._below = list(map(add, self._below, below))
        self._count += len(values)
        self._sum += sum(values)

    def view(self, parts: float) -> HistogramView:
        """Return what was recorded, in a unit that has so many ``parts`` of the values' own."""
        bounds = tuple(bound / parts for bound in self._bounds)
        return HistogramView(bounds, (*self._below, self._count), self._sum / parts)


def times_view(buckets: Sequence[int], sum_ns: int) -> HistogramView:
    """Return times that are counted by the bits of their microseconds, in seconds."""
    bounds = tuple((1 << bits) / 1e6 for bits in range(_FIRST_BITS, _LAST_BITS + 1))
    below = tuple(accumulate(buckets))
    return HistogramView(bounds, (*below[_FIRST_BITS : _LAST_BITS + 1], below[-1]), sum_ns / 1e9)
