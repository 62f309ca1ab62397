"""Deadlines: calls one function for each of many things when its time is up, from one timer.

The owner decides what a thing is and how it ends. Ten thousand idle connections are entries in a
few hundred buckets, not ten thousand timers. A thing that is given more time, as a connection is
with every request, costs nothing until its old time is up.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections.abc import Callable
from itertools import islice
from typing import Final, Generic, Protocol, TypeVar

log = logging.getLogger(__name__)

# Longest delay of an end, beside the loop's own delays: everything due within it ends together. A
# power of two, so that a bucket's number times this is its exact time.
GRAIN_S: Final = 1 / 16
# uvloop's timers have a resolution of 1 ms, and may fire half of one early.
_TIMER_SLACK_S: Final = 0.001

# Things looked at in one turn of the loop, at 0.5 us each; and things ended in it, at 20 us each.
LOOKS_PER_TURN: Final = 2_000
ENDS_PER_TURN: Final = 256

# A timer that fires so late was delayed with the whole process. Input that arrived meanwhile is
# read first, since it may be what a thing was waiting for.
HELD_UP_S: Final = 1.0


class Timed(Protocol):
    """Something whose time is up at ``deadline_s`` on the loop's clock.

    The owner may set a later time at any moment without a call; a sooner time needs
    `Deadlines.set`.
    """

    deadline_s: float


TimedT = TypeVar("TimedT", bound=Timed)


class Deadlines(Generic[TimedT]):
    """Things that end in time; each is removed before ``on_due`` is called with it."""

    __slots__ = (
        "_buckets",
        "_filed",
        "_is_stopped",
        "_loop",
        "_on_due",
        "_on_error",
        "_order",
        "_timer",
        "_timer_bucket",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_due: Callable[[TimedT], object],
        on_error: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._on_due = on_due
        self._on_error = on_error
        # Number of a bucket, in units of GRAIN_S on the loop's clock -> the things to be looked at
        # then.
        self._buckets: dict[int, dict[TimedT, None]] = {}
        # Each thing -> the number of its bucket; a thing is in one bucket only.
        self._filed: dict[TimedT, int] = {}
        # The numbers of all buckets, as a heap.
        self._order: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_bucket = 0
        self._is_stopped = False

    def __len__(self) -> int:
        """Return how many things there are."""
        return len(self._filed)

    def __contains__(self, thing: TimedT) -> bool:
        """Return whether ``thing`` has a deadline here."""
        return thing in self._filed

    def set(self, thing: TimedT, deadline_s: float) -> None:
        """End ``thing`` at ``deadline_s``; a thing that is new here is added."""
        thing.deadline_s = deadline_s
        bucket = math.ceil(deadline_s / GRAIN_S)
        filed = self._filed.get(thing)
        # A later deadline needs no move now: `run_due` moves the thing when its old bucket is due.
        if filed is None or bucket < filed:
            self._unfile(thing)
            self._file(thing, bucket)

    def remove(self, thing: TimedT) -> None:
        """Forget ``thing``, so that it does not end. A second call does nothing."""
        self._unfile(thing)

    def run_due(self) -> None:
        """End the things that are due, a bounded number now and the rest in the next turns."""
        now_s = self._loop.time()
        due_bucket = math.floor(now_s / GRAIN_S)
        looks, ends = LOOKS_PER_TURN, ENDS_PER_TURN
        while self._order and self._order[0] <= due_bucket and looks > 0 and ends > 0:
            number = self._order[0]
            bucket = self._buckets[number]
            for thing in list(islice(bucket, looks)):
                looks -= 1
                # The end of another thing may have removed this one.
                if thing not in bucket:
                    continue
                if thing.deadline_s > now_s:
                    del bucket[thing]
                    self._file(thing, max(math.ceil(thing.deadline_s / GRAIN_S), due_bucket + 1))
                    continue
                self._unfile(thing)
                ends -= 1
                self._end(thing)
                if ends == 0:
                    break
            # The end of a thing may have added a bucket that is due still sooner.
            if not bucket and self._order[0] == number:
                del self._buckets[heapq.heappop(self._order)]
        self._set_timer()

    def stop(self) -> None:
        """Cancel the timer; nothing ends after this."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, thing: TimedT) -> None:
        try:
            self._on_due(thing)
        except Exception:
            self._on_error()
            log.exception("ending what is overdue failed")

    def _file(self, thing: TimedT, number: int) -> None:
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            heapq.heappush(self._order, number)
        bucket[thing] = None
        self._filed[thing] = number
        if self._timer is None or number < self._timer_bucket:
            self._set_timer()

    def _unfile(self, thing: TimedT) -> None:
        number = self._filed.pop(thing, None)
        if number is not None:
            # A bucket that is empty now is removed when it is due.
            del self._buckets[number][thing]

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._order and not self._is_stopped:
            self._timer_bucket = self._order[0]
            due_s = self._timer_bucket * GRAIN_S + _TIMER_SLACK_S
            self._timer = self._loop.call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._loop.time() > self._timer_bucket * GRAIN_S + HELD_UP_S:
            self._timer = self._loop.call_later(GRAIN_S, self._run)
        else:
            self.run_due()

    def _run(self) -> None:
        self._timer = None
        self.run_due()
