"""How much of a log is kept. Pure."""

from __future__ import annotations

# An append itself keeps the log within so many times of what `kept_entries` allows; the rest is
# cut by a question apart from appends.
OVERSHOOT = 2
# Entries that each log may have, whatever they take: a measure of few entries is worth nothing.
LEAST = 1_000
# A bound where there is none.
UNBOUNDED = 1 << 53


def kept_entries(max_bytes: int, entries: int, size_bytes: int) -> int:
    """Return how many entries a log may have.

    Args:
        max_bytes: what the log may take; 0 for no bound.
        entries: what it has now, and what that takes.
    """
    if not max_bytes or not entries or not size_bytes:
        return UNBOUNDED
    return max(LEAST, max_bytes * entries // size_bytes)
