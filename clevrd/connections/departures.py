"""Departures: at what pace connections are closed at a planned end, and when clients come back.

Decisions only: the registry closes, and randomness and time are arguments. A reader that comes back
costs about 0.5 ms of a daemon's core, so what counts is how many come in a second.
"""

from __future__ import annotations

from typing import Final

import msgspec

# Connections that are closed in a second, and come back elsewhere in the next: half of what one
# core takes, so that its other clients don't notice. There are more where the drain is shorter.
CLOSES_PER_S: Final = 1_000.0
# When clients are asked to come back, each at a time of its own: not before a process could have
# been replaced, and at 2,000 a second where all have to wait for the same moment. A process takes
# up to two seconds to start, in which the first of many would pile up; few may try before.
RECONNECT_FIRST_MS: Final = 200
START_MS: Final = 2_000
CLIENTS_PER_START_MS: Final = 4
RECONNECT_SPREAD_MS: Final = 1_000
RECONNECTS_PER_MS: Final = 2


def pace_s(count: int, at_most_s: float) -> float:
    """Return over how many seconds ``count`` connections are closed."""
    return max(0.0, min(at_most_s, count / CLOSES_PER_S))


def closed_by(elapsed_s: float, count: int, over_s: float) -> int:
    """Return how many of ``count`` connections are to be closed after ``elapsed_s``."""
    if elapsed_s >= over_s:
        return count
    return min(count, int(count * elapsed_s / over_s) + 1)


class Returns(msgspec.Struct, frozen=True):
    """When the clients of ``count`` connections come back, which are closed over ``over_s``."""

    count: int
    over_s: float
    # No other daemon has their topics, so that nobody can come back before this one has ended.
    is_alone: bool

    @property
    def spread_ms(self) -> int:
        """The width of the time within which a client comes back, in ms, at least a second."""
        needed_ms = self.count // RECONNECTS_PER_MS
        if not self.is_alone:
            # They come one after the other already, as they are closed.
            needed_ms -= int(1000 * self.over_s)
        return max(RECONNECT_SPREAD_MS, needed_ms)

    def delay_ms(self, elapsed_s: float, share: float) -> int:
        """Return after how many ms a client comes back that is closed now.

        Args:
            elapsed_s: since the first one was closed.
            share: from 0 to 1, drawn for this client.
        """
        wait_ms = 0
        if self.is_alone:
            wait_ms = max(0, int(1000 * (self.over_s - elapsed_s)))
            wait_ms += min(START_MS, self.count // CLIENTS_PER_START_MS)
        return RECONNECT_FIRST_MS + wait_ms + int(self.spread_ms * share)
