"""LoopLag: how late the loop comes to a timer, which is how long anything may wait for its turn.

The timer is the hub's. Time is an argument, so that a test sets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

# A pause of 100 ms is seen in two of five cases then. A look takes about 3 us, and four wakes a
# second are nothing beside what a daemon without clients does anyway.
LOOK_S: Final = 0.25


class LoopLag:
    """Measures each look against the time at which it was due."""

    __slots__ = ("_clock_s", "_due_s", "_record")

    def __init__(self, record: Callable[[float], object], clock_s: Callable[[], float]) -> None:
        """Args: clock_s: never stands still within a turn, as a loop's own clock does."""
        self._record = record
        self._clock_s = clock_s
        # When the next look is due; None before the first.
        self._due_s: float | None = None

    def look(self) -> float:
        """Record how late this look is, and return it; the next is due LOOK_S after this one was.

        Where a pause was longer than that the next look is due LOOK_S from now, as timers are.
        """
        now_s = self._clock_s()
        due_s = now_s if self._due_s is None else self._due_s
        late_s = max(0.0, now_s - due_s)
        self._record(late_s)
        self._due_s = (due_s if due_s + LOOK_S > now_s else now_s) + LOOK_S
        return late_s
