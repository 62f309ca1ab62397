"""TurnQueue: work that comes in many small steps, done in several turns of the loop.

The owner keeps the work and its order; this class decides how much of it is done in one turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

# Units that a failed step counts for, so that steps which all fail end a turn as well.
_FAILED_COST: Final = 1


class TurnQueue:
    """Work of one kind, which may use so many units of each turn of the loop and no more.

    A unit is whatever the owner counts: bytes, messages, readers.
    """

    __slots__ = (
        "_has_turn",
        "_is_working",
        "_loop",
        "_on_error",
        "_spent",
        "_step",
        "units_per_turn",
    )

    def __init__(
        self,
        units_per_turn: int,
        step: Callable[[], int | None],
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[], None],
    ) -> None:
        """Make a queue that does nothing until `work_on`.

        Args:
            units_per_turn: a turn's work ends with the step that reaches this sum.
            step: does the next piece of work and returns its cost in units, which may be 0; returns
                None when no work waits.
            on_error: called for each step that raised; the exception is logged, work goes on.
        """
        self.units_per_turn = units_per_turn
        self._step = step
        self._loop = loop
        self._on_error = on_error
        # Units spent in this turn of the loop; and whether `_begin_turn` is scheduled.
        self._spent = 0
        self._has_turn = False
        # True within `work_on`: a step that brings new work leaves it to the call under way.
        self._is_working = False

    def work_on(self) -> None:
        """Do the work that waits, as far as this turn's units reach; the rest comes later.

        The work begins in this call, so that a little of it is done at once. The rest is done in
        the next turns of the loop.
        """
        if self._is_working:
            return
        self._is_working = True
        try:
            while self._spent < self.units_per_turn:
                cost = self._do_step()
                if cost is None:
                    break
                self._spent += cost
        finally:
            self._is_working = False
        if self._spent and not self._has_turn:
            self._loop.call_soon(self._begin_turn)
            self._has_turn = True

    def work_soon(self) -> None:
        """Begin in the next turn of the loop, and so do all work that comes in this one at once."""
        if not self._has_turn:
            self._loop.call_soon(self._begin_turn)
            self._has_turn = True

    def _do_step(self) -> int | None:
        try:
            return self._step()
        except Exception:
            self._on_error()
            log.exception("step failed step=%s", getattr(self._step, "__qualname__", self._step))
            return _FAILED_COST

    def _begin_turn(self) -> None:
        self._has_turn = False
        self._spent = 0
        self.work_on()
