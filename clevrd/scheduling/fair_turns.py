"""FairTurns: how long each connection, and all of them together, may work in one turn of the loop.

Bytes arrive faster than they can be understood, and a socket with much to read is read many times
in a turn. So what a connection sent is worked off in shares of SHARE_S; what is left of it waits in
a queue for the next turns, and is not read on meanwhile. What has just arrived has a part of the
turn of its own; what does not fit waits in a second queue, and the two are served in turns. So a
request of a quiet connection does not wait behind those of loud ones.

Time is measured, not bytes or requests: a body that is hard to read costs its sender what it costs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import Final, TypeVar

log = logging.getLogger(__name__)

# What one connection gets before others get their turn: some 60 HTTP publishes, or 300 messages.
SHARE_S: Final = 0.001
# What all get that have just sent something, and what all get that wait, in one turn of the loop.
# The first is what 256 connections with a publish each take: less makes most of them wait, which
# costs a publish 5 us. It is less where somebody has sent more than a share can take: others wait
# for two or three turns, so these are kept short then.
FRESH_S: Final = 0.010
FRESH_BESIDE_QUEUE_S: Final = 0.003
QUEUE_S: Final = 0.004

# What a quiet client sends at once, at most: a request with its body. More may take long to work
# off, even if it has only just arrived, and waits with what is left of others.
QUIET_BYTES: Final = 4_096


ResultT = TypeVar("ResultT")


class FairTurns:
    """Shares out the turns of one loop.

    Work on what has just arrived stands between `begin` and `end`; work that waited is a callback
    given to `wait`. Both look at `is_spent` after each piece of work, of which
    none should take more than a millisecond, and give what is left over to `wait`.
    """

    __slots__ = (
        "_began_s",
        "_clock_s",
        "_fresh_s",
        "_has_turn",
        "_loop",
        "_newcomers",
        "_on_error",
        "_queue",
        "_queue_until_s",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[], None],
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loop = loop
        self._on_error = on_error
        # Not the loop's clock, which stands still within a turn.
        self._clock_s = clock_s
        # When the share being worked off began.
        self._began_s = 0.0
        # What fresh work has taken since a turn was last known to begin.
        self._fresh_s = 0.0
        # `_next_turn` is scheduled.
        self._has_turn = False
        # Those that wait to go on, and those that wait to begin, each once.
        self._queue: deque[Callable[[], None]] = deque()
        self._newcomers: deque[Callable[[], None]] = deque()
        # When their part of the turn under way ends.
        self._queue_until_s = 0.0

    def __len__(self) -> int:
        """Return how many wait for a turn."""
        return len(self._queue) + len(self._newcomers)

    # --- fresh work ------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Begin a share of work on what has just arrived; return whether the turn has one left.

        After True `end` has to follow, whatever happens; after False the work has to `wait`.
        """
        if self._fresh_s >= (FRESH_BESIDE_QUEUE_S if self._queue else FRESH_S):
            return False
        self._began_s = self._clock_s()
        return True

    def end(self) -> None:
        """End the share that `begin` began, and count what it took."""
        self._fresh_s += self._clock_s() - self._began_s
        # Most turns are short, and a callback to see where they end would cost each of them 1 us.
        # So time adds up over some turns, until it could matter in the one under way.
        if self._fresh_s >= FRESH_BESIDE_QUEUE_S / 2:
            self._ask_for_turn()

    def is_spent(self) -> bool:
        """Whether the share under way is used up."""
        return self._clock_s() - self._began_s >= SHARE_S

    # --- waiting ---------------------------------------------------------------------------------

    def wait(
        self, work: Callable[[], None], size_bytes: int = 0, *, has_begun: bool = True
    ) -> None:
        """Call ``work`` with a share in one of the next turns.

        Args:
            size_bytes: what there is to work off; looked at where it has not begun.
            has_begun: it has had a share already. What is small and has had none comes sooner.
        """
        is_newcomer = not has_begun and size_bytes <= QUIET_BYTES
        (self._newcomers if is_newcomer else self._queue).append(work)
        self._ask_for_turn()

    async def turn(self, size_bytes: int = 0, *, has_begun: bool = False) -> None:
        """Wait until a coroutine may work off a share, at once where the turn has one left.

        Its work stands between this and `end`, without an await. Coroutines that are woken work
        after the queues' part of the turn, so each takes a whole share of that part.

        Args:
            size_bytes: what there is to work off.
            has_begun: this is not the first share of its work.
        """
        if not (has_begun and self._queue) and self.begin():
            return
        woken: asyncio.Future[None] = self._loop.create_future()
        self.wait(partial(self._wake, woken), size_bytes, has_begun=has_begun)
        await woken
        self._began_s = self._clock_s()

    async def carry_out(self, steps: Generator[None, None, ResultT]) -> ResultT:
        """Run ``steps`` in as many shares as they need, one a turn; return what they return.

        Each step should take less than half a millisecond. It is nothing that anybody waits for
        with a message, so it takes no second share of a turn that has one left.
        """
        has_begun = False
        while True:
            await self.turn(has_begun=has_begun)
            has_begun = True
            try:
                # One at least, so that work ends however short of time the process is.
                next(steps)
                while not self.is_spent():
                    next(steps)
            except StopIteration as end:
                result: ResultT = end.value
                return result
            finally:
                self.end()
            await asyncio.sleep(0)

    def _wake(self, woken: asyncio.Future[None]) -> None:
        if not woken.done():
            self._queue_until_s -= SHARE_S
            woken.set_result(None)

    # --- turns -----------------------------------------------------------------------------------

    def _ask_for_turn(self) -> None:
        if not self._has_turn:
            self._has_turn = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        """Begin a turn: let those work that wait, as long as their part of it lasts.

        A piece of work that took longer than its part of a turn is made up for by the next parts.
        """
        self._has_turn = False
        overdrawn_s = max(0.0, self._fresh_s - FRESH_S)
        self._queue_until_s = self._clock_s() + QUEUE_S - overdrawn_s
        first, second = self._newcomers, self._queue
        while (first or second) and (now_s := self._clock_s()) < self._queue_until_s:
            self._began_s = now_s
            work = (first or second).popleft()
            first, second = second, first
            try:
                work()
            except Exception:
                self._on_error()
                log.exception("work failed in its turn")
        overdrawn_s = max(0.0, self._clock_s() - self._queue_until_s)
        self._fresh_s = overdrawn_s
        if first or second or overdrawn_s >= FRESH_BESIDE_QUEUE_S:
            self._ask_for_turn()
