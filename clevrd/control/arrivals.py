"""Arrivals: how many clients a second may connect, by how late the loop comes to its timers.

A daemon that is not late takes all that come. No clock here, and no randomness: both are arguments.
"""

from __future__ import annotations

import math
from typing import Final

from clevrd.errors import Unavailable

# The loop is late when it comes so late to a timer, twice in a row: a fan-out to 10,000 readers, a
# storm of 10,000 handshakes and a garbage collection stay far below it.
LATE_S: Final = 0.3
# The loop is in time again below this.
IN_TIME_S: Final = 0.05
# Handshakes a second when the loop is first late: what a core takes beside its other work. The rate
# is halved at each look that finds the loop late, and never below the least.
FIRST_RATE_PER_S: Final = 1_000.0
LEAST_RATE_PER_S: Final = 50.0
# By what the rate grows at each look that finds the loop in time. There is no bound any more once
# it has passed twice the first rate, which takes 4 to 18 looks.
GROWTH: Final = 1.25
# The same while the loop is between the two: its rate is found by trying, and a daemon that is
# steadily a little late does not stay at the least.
SLOW_GROWTH: Final = 1.05
# Tokens that are there at once, as a share of a second's.
_BURST: Final = 0.25
# Within how many seconds, drawn for each, those come back that are refused.
SPREAD_S: Final = 5.0


class TooManyArrive(Unavailable):
    """The loop is late, and as many clients as it takes have connected within this second."""

    def __init__(self, retry_after_s: float, rate_per_s: float) -> None:
        """Args: rate_per_s: handshakes that are taken in a second."""
        super().__init__(
            "The daemon is busy, and many connect at once; come back in a moment.",
            retry_after_s,
            bound="arrivals",
            thresholds={"handshakes_per_s": rate_per_s, "late_s": LATE_S},
        )


class Arrivals:
    """The bound on handshakes, which is there only while the loop is late."""

    __slots__ = ("_level", "_level_at_s", "_times_late", "is_limited", "rate_per_s", "refused")

    def __init__(self) -> None:
        # Read for each handshake; `look` changes it.
        self.is_limited = False
        # Handshakes a second; inf while there is no bound.
        self.rate_per_s = math.inf
        # Handshakes that were refused since the loop was last in time.
        self.refused = 0
        # Looks in a row that have found the loop late.
        self._times_late = 0
        # Handshakes that may come at once, and when that was so.
        self._level = 0.0
        self._level_at_s = 0.0

    def look(self, late_s: float, now_s: float) -> bool:
        """Take one look into account; return whether a bound has begun, or ended."""
        was_limited = self.is_limited
        if late_s >= LATE_S:
            self._times_late += 1
            if was_limited:
                self.rate_per_s = max(LEAST_RATE_PER_S, self.rate_per_s / 2)
            elif self._times_late >= 2:
                self.is_limited, self.rate_per_s, self.refused = True, FIRST_RATE_PER_S, 0
                self._level, self._level_at_s = FIRST_RATE_PER_S * _BURST, now_s
        else:
            self._times_late = 0
            if was_limited:
                self.rate_per_s *= GROWTH if late_s < IN_TIME_S else SLOW_GROWTH
                if self.rate_per_s > 2 * FIRST_RATE_PER_S:
                    self.is_limited, self.rate_per_s = False, math.inf
        return self.is_limited != was_limited

    def check(self, now_s: float, share: float) -> None:
        """Raise TooManyArrive unless one more client may connect; called while there is a bound.

        Args:
            share: from 0 to 1, drawn for this client.
        """
        most = self.rate_per_s * _BURST
        grown = self._level + (now_s - self._level_at_s) * self.rate_per_s
        self._level, self._level_at_s = min(most, grown), now_s
        if self._level < 1.0:
            self.refused += 1
            raise TooManyArrive(1.0 + SPREAD_S * share, self.rate_per_s)
        self._level -= 1.0
