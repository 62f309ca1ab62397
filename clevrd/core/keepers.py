"""Keepers: a topic's lagging readers that keep the oldest, and frames that are kept in time.

A *keeper* is a lagging reader with the policy `drop_newest` or `circuit_breaker`. It needs frames
that the ring is about to give up; core/kept_frames holds these for all keepers together.
"""

from __future__ import annotations

from typing import Final

from clevrd.core.policies.keep_oldest import give_back, keep, refuse
from clevrd.core.policies.policy import TopicView
from clevrd.core.subscriber import Subscriber

_NOTHING_NEEDED: Final = 1 << 62

# While the ring is filled once, keepers are asked for their frames so many times, each time the
# keepers that are next: of 10,000 that stalled one message apart all at once would take 30 ms.
_CAPTURES: Final = 8


class Keepers:
    """The keepers of one topic."""

    __slots__ = ("_readers", "first_needed")

    def __init__(self) -> None:
        # A dict as an ordered set, in the order in which the readers began to lag.
        self._readers: dict[Subscriber, None] = {}
        # Lowest offset that a keeper still reads from the ring, or a lower one; the ring may give
        # up all that precedes it. Changes in add and capture only.
        self.first_needed = _NOTHING_NEEDED

    def add(self, reader: Subscriber) -> None:
        """Note that ``reader`` has begun to lag; it is settled."""
        self._readers[reader] = None
        self.first_needed = min(self.first_needed, reader.cursor + 1)

    def __len__(self) -> int:
        """Return how many keepers there are."""
        return len(self._readers)

    def remove(self, reader: Subscriber) -> None:
        """Note that ``reader`` lags no more."""
        del self._readers[reader]

    def give_back(self, view: TopicView, last: int, now_s: float) -> None:
        """Keep nothing behind offset ``last`` for any keeper any more: about 1 us for each."""
        alike: dict[tuple[tuple[int, int], ...], list[Subscriber]] = {}
        for reader in self._readers:
            if reader.kept:
                alike.setdefault(reader.kept, []).append(reader)
        for readers in alike.values():
            give_back(readers, view, last, now_s)

    def capture(self, view: TopicView, first: int, ring_messages: int, now_s: float) -> None:
        """Keep the frames that keepers need, before the ring gives up those before ``first``.

        Messages that follow soon are kept as well, so that the next time is some way off. Keepers
        that lack the same messages, as most do that stall together, are served together. Messages
        beyond a keeper's window are lost when the keeper is settled, and cost nothing here.
        """
        horizon = first + ring_messages // _CAPTURES
        for (after, upto), readers in self._needs(view, horizon).items():
            paid = view.kept.hold(view, after, upto, len(readers))
            if paid > after:
                run = (after, paid)
                for reader in readers:
                    keep(reader, run)
            if paid < upto:
                for reader in readers:
                    refuse(reader, view, upto - paid, now_s)

    def _needs(self, view: TopicView, horizon: int) -> dict[tuple[int, int], list[Subscriber]]:
        """Return runs of the ring, each with the keepers that need it and read before ``horizon``.

        The lowest offset that the other keepers read from is noted.
        """
        edge, cap = view.edge, view.window_cap
        needs: dict[tuple[int, int], list[Subscriber]] = {}
        others = edge
        for reader in self._readers:
            after = reader.cursor
            if after >= horizon:
                others = min(others, after)
                continue
            upto = min(edge, after + reader.room(cap))
            if upto > after:
                needs.setdefault((after, upto), []).append(reader)
        self.first_needed = others + 1 if self._readers else _NOTHING_NEEDED
        return needs
