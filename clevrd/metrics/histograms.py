"""Histograms with fixed bounds: 0.2 us for each value, and 0.3 us for all that a round records.

A histogram's owner decides when a value is measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import msgspec

# A round's times are counted by the bits of their microseconds, which costs a third of a search. As
# many buckets as a month needs are counted, and those from 16 us to 1 s are told apart.
_BUCKETS: Final = 48
_FIRST_BITS: Final = 4
_LAST_BITS: Final = 20
# A round's messages alike. It has 256 KiB at most, so a few thousand of the shortest.
_LAST_MESSAGE_BITS: Final = 12


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

    __slots__ = (
        "_durations",
        "_durations_ns",
        "_messages",
        "_messages_sum",
        "_to_socket",
        "_to_socket_ns",
    )

    def __init__(self) -> None:
        # By the bits of the microseconds, or of the messages: values of each bucket alone.
        self._durations = [0] * _BUCKETS
        self._to_socket = [0] * _BUCKETS
        self._messages = [0] * _BUCKETS
        self._durations_ns = 0
        self._to_socket_ns = 0
        self._messages_sum = 0

    def record(self, messages: int, oldest_ns: int, began_ns: int, ended_ns: int) -> None:
        """Count a round.

        Args:
            messages: how many it carried.
            oldest_ns: when the oldest of them was appended.
            began_ns: when it began.
            ended_ns: when it was written to all its readers.
        """
        duration_ns, to_socket_ns = ended_ns - began_ns, ended_ns - oldest_ns
        self._durations[(duration_ns // 1000).bit_length()] += 1
        self._to_socket[(to_socket_ns // 1000).bit_length()] += 1
        self._messages[messages.bit_length()] += 1
        self._durations_ns += duration_ns
        self._to_socket_ns += to_socket_ns
        self._messages_sum += messages

    def durations_s(self) -> HistogramView:
        """Return how long rounds took."""
        return times_view(self._durations, self._durations_ns)

    def to_socket_s(self) -> HistogramView:
        """Return how old each round's oldest message was when it was written to all readers."""
        return times_view(self._to_socket, self._to_socket_ns)

    def messages(self) -> HistogramView:
        """Return how many messages rounds carried."""
        bounds = tuple(float((1 << bits) - 1) for bits in range(1, _LAST_MESSAGE_BITS + 1))
        below = tuple(accumulate(self._messages))
        counts = (*below[1 : _LAST_MESSAGE_BITS + 1], below[-1])
        return HistogramView(bounds, counts, float(self._messages_sum))


def times_view(buckets: Sequence[int], sum_ns: int) -> HistogramView:
    """Return times that are counted by the bits of their microseconds, in seconds."""
    bounds = tuple((1 << bits) / 1e6 for bits in range(_FIRST_BITS, _LAST_BITS + 1))
    below = tuple(accumulate(buckets))
    return HistogramView(bounds, (*below[_FIRST_BITS : _LAST_BITS + 1], below[-1]), sum_ns / 1e9)
