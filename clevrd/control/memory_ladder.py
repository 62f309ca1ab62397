"""The memory ladder: what is given up, and in which order, while memory runs out. Decides only.

The rule, by the used share of the tightest limit: from 85 % on rings give up messages that no
subscriber waits for; from 92 % on new subscribers are refused; from 95 % on publishes are refused
too. So publishers are shed before subscribers lose what they were promised. A rung is left again
two points below where it begins, so that none is entered and left at each look.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec

from clevrd.control.system_stats import HeldMemory

# Used share of the limit at which each rung begins.
SHRINK_AT: Final = 0.85
REFUSE_SUBSCRIBERS_AT: Final = 0.92
REFUSE_PUBLISHES_AT: Final = 0.95
# A rung is left when the share is so much less than where the rung begins.
HYSTERESIS: Final = 0.02

# How often the timer's owner looks; and the part of the limit by which all rings may grow before it
# looks again. A flood of 400 MB/s would go through half a small limit within one interval.
INTERVAL_S: Final = 0.1
GROWTH_PART: Final = 64

# Bytes that rings give up at one look. The allocator is asked to give them back at once, which is a
# pause of 0.15 ms for each MiB.
MAX_SHRINK_BYTES: Final = 16 << 20

# When refused clients come back. Rings give way within some looks, so a publisher waits less than
# a subscriber, whose connection would take memory for long.
PUBLISHER_RETRY_S: Final = 2.0
SUBSCRIBER_RETRY_S: Final = 10.0


class Rung(IntEnum):
    """How far up the ladder the daemon is; each rung includes those below it."""

    WELL = 0
    RINGS_SHRINK = 1
    NO_NEW_SUBSCRIBERS = 2
    NO_PUBLISHES = 3

    @property
    def word(self) -> str:
        """The rung as /health, /metrics and the log name it."""
        return self.name.lower()


# Each rung above the first, the highest first, and the used share at which it begins.
BEGINS_AT: Final = {
    Rung.NO_PUBLISHES: REFUSE_PUBLISHES_AT,
    Rung.NO_NEW_SUBSCRIBERS: REFUSE_SUBSCRIBERS_AT,
    Rung.RINGS_SHRINK: SHRINK_AT,
}


class LadderDecision(msgspec.Struct, frozen=True):
    """The rung, how many bytes the rings give up now, and what both were decided from."""

    rung: Rung
    shrink_bytes: int
    held: HeldMemory


def rung_for(share: float, before: Rung) -> Rung:
    """Return the rung for a used ``share`` of the limit, 0..1, where it was ``before``."""
    for rung, begins_at in BEGINS_AT.items():
        if share >= begins_at - (HYSTERESIS if rung <= before else 0.0):
            return rung
    return Rung.WELL


def decide(held: HeldMemory, before: Rung) -> LadderDecision:
    """Return what is done at this look, where the rung was ``before``.

    Rings give up what lies above the share at which they need not shrink any more.
    """
    rung = rung_for(held.share, before)
    if rung is Rung.WELL:
        return LadderDecision(rung, 0, held)
    excess_bytes = held.used_bytes - int(held.limit_bytes * (SHRINK_AT - HYSTERESIS))
    return LadderDecision(rung, max(0, min(excess_bytes, MAX_SHRINK_BYTES)), held)


def describe(held: HeldMemory) -> str:
    """Return the use and the limit for people: "248 of 256 MiB (CLEVRD_MAX_MEMORY_MB)"."""
    return f"{held.used_bytes >> 20} of {held.limit_bytes >> 20} MiB ({held.limit})"
