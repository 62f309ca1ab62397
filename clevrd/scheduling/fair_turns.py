"""FairTurns: how long each connection, and all of them together, may work in one turn of the loop.

Bytes arrive faster than they can be parsed, and a socket with much to read is read many times in
one turn of the loop. So a connection's input is worked off in shares of SHARE_S. The rest waits in
a queue for the next turns, and the connection is not read meanwhile. Input that has just arrived
has its own part of a turn. Small new work that does not fit waits in a second queue, and the first
requests of connections in a third one. The queues are served in turns, so a quiet connection's
request does not wait behind the requests of busy ones, nor behind thousands that connect at once.

Time is measured, not bytes or requests: a client whose input is expensive to parse pays for it
itself.
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

# Time that one connection gets before others get their turn: some 60 HTTP publishes, or 300
# messages on a socket.
SHARE_S: Final = 0.001
# Time in one turn of the loop for all connections that have just sent something (FRESH_S), and for
# all work that waits (QUEUE_S). FRESH_S is the time of 256 connections with a publish each: with
# less, most of them wait, which costs a publish 5 us. FRESH_BESIDE_QUEUE_S replaces FRESH_S while
# the queue of begun work is not empty: other work waits for two or three turns then, so these are
# kept short.
FRESH_S: Final = 0.010
FRESH_BESIDE_QUEUE_S: Final = 0.003
QUEUE_S: Final = 0.004
# New work's time in a turn from which on what has begun, such as a batch, goes on in the next one.
# With FRESH_S here others waited 5 ms at p50 and 11 at p99 beside batches of 10,000. With this they
# wait 1 and 5, and as many messages are taken.
BEGUN_S: Final = 0.002
# The sum of new work's time from which on a turn is asked for.
_ASKING_S: Final = FRESH_BESIDE_QUEUE_S / 2

# Most bytes that a quiet client sends at once: a request with its body. Larger input may take long
# to work off, and waits in the queue of begun work even if it has just arrived.
QUIET_BYTES: Final = 4_096

# A body of more bytes may take several milliseconds, since it is decoded in one go: 7 for a MiB of
# brackets. One of these is worked off in a turn, behind a wait, and none as new work.
LARGE_BYTES: Final = 131_072


ResultT = TypeVar("ResultT")


class FairTurns:
    """Shares out the turns of one loop.

    New work runs between `begin` and `end`; work that waited is a callback given to `wait`. Both
    ask `is_spent` after each piece, which should take less than a millisecond, and give what is
    left over to `wait`.
    """

    __slots__ = (
        "_arrivals",
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
        # A clock other than the loop's, which stands still within a turn.
        self._clock_s = clock_s
        # When the share under way began, on _clock_s; set when new work begins, when a coroutine is
        # woken, and for each waiting callback.
        self._began_s = 0.0
        # Seconds that new work has taken since a turn was last known to begin; rises in end, and
        # set anew by _next_turn.
        self._fresh_s = 0.0
        # True while `_next_turn` is scheduled.
        self._has_turn = False
        # Work that has begun, or is large, and waits; small work that has not begun; and the same
        # of connections that have not been served yet. Each callback stands in one of the three,
        # once.
        self._queue: deque[Callable[[], None]] = deque()
        self._newcomers: deque[Callable[[], None]] = deque()
        self._arrivals: deque[Callable[[], None]] = deque()
        # When the queues' part of the turn under way ends, on _clock_s; set by _next_turn, and
        # moved to an earlier time by _wake.
        self._queue_until_s = 0.0

    def __len__(self) -> int:
        """Return how many callbacks wait for a turn."""
        return len(self._queue) + len(self._newcomers) + len(self._arrivals)

    # --- fresh work ------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Begin a share of new work; return whether the turn has time left for one.

        After True the caller has to call `end`, whatever happens; after False it has to call
        `wait`.
        """
        if self._fresh_s >= (FRESH_BESIDE_QUEUE_S if self._queue else FRESH_S):
            return False
        self._began_s = self._clock_s()
        return True

    def end(self) -> None:
        """End the share that `begin` began, and count what it took."""
        fresh_s = self._fresh_s = self._fresh_s + self._clock_s() - self._began_s
        # Most turns are short, and a callback at the end of each would cost 1 us. So the time of
        # several turns adds up here, until the sum could matter in the turn under way.
        if fresh_s >= _ASKING_S:
            self._ask_for_turn()

    def is_spent(self) -> bool:
        """Whether the share under way is used up."""
        return self._clock_s() - self._began_s >= SHARE_S

    # --- waiting ---------------------------------------------------------------------------------

    def wait(
        self,
        work: Callable[[], None],
        size_bytes: int = 0,
        *,
        has_begun: bool = True,
        is_first: bool = False,
    ) -> None:
        """Call ``work`` with a share in one of the next turns.

        Args:
            size_bytes: bytes of input to work off; used only where ``has_begun`` is false.
            has_begun: the work has had a share already. Small work that has had none comes sooner.
            is_first: the work is a connection's first; used only where ``has_begun`` is false.
        """
        if has_begun or size_bytes > QUIET_BYTES:
            self._queue.append(work)
        else:
            (self._arrivals if is_first else self._newcomers).append(work)
        self._ask_for_turn()

    async def turn(
        self, size_bytes: int = 0, *, has_begun: bool = False, is_first: bool = False
    ) -> None:
        """Wait until a coroutine may work for a share, not at all where the turn has time left.

        The work runs between this call and `end`, without an await. A coroutine that was woken
        works after the queues' part of the turn, so it takes a whole share off that part, or all
        of it where the input is large.

        Args:
            size_bytes: bytes of input to work off.
            has_begun: the work has had a share already.
            is_first: the work is a connection's first.
        """
        is_large = size_bytes > LARGE_BYTES
        has_to_wait = is_large or (has_begun and (self._queue or self._fresh_s >= BEGUN_S))
        if not has_to_wait and self.begin():
            return
        woken: asyncio.Future[None] = self._loop.create_future()
        wake = partial(self._wake, woken, QUEUE_S if is_large else SHARE_S)
        self.wait(wake, size_bytes, has_begun=has_begun, is_first=is_first)
        await woken
        self._began_s = self._clock_s()

    async def carry_out(self, steps: Generator[None, None, ResultT]) -> ResultT:
        """Run ``steps`` in as many shares as they need, one a turn; return what they return.

        A step should take less than half a millisecond. The work takes no second share of a turn,
        though one may be left, so that it holds the loop no longer than that.
        """
        has_begun = False
        while True:
            await self.turn(has_begun=has_begun)
            has_begun = True
            try:
                # At least one step runs, so that the work ends however short of time the process
                # is.
                next(steps)
                while not self.is_spent():
                    next(steps)
            except StopIteration as end:
                result: ResultT = end.value
                return result
            finally:
                self.end()
            await asyncio.sleep(0)

    def _wake(self, woken: asyncio.Future[None], taken_s: float) -> None:
        if not woken.done():
            self._queue_until_s -= taken_s
            woken.set_result(None)

    # --- turns -----------------------------------------------------------------------------------

    def _ask_for_turn(self) -> None:
        if not self._has_turn:
            self._loop.call_soon(self._next_turn)
            self._has_turn = True

    def _next_turn(self) -> None:
        """Begin a turn: call the work that waits, as long as the queues' part of the turn lasts.

        Time that a piece of work took beyond its part of a turn is taken off the next parts.
        """
        self._has_turn = False
        overdrawn_s = max(0.0, self._fresh_s - FRESH_S)
        self._queue_until_s = self._clock_s() + QUEUE_S - overdrawn_s
        first, second, third = self._newcomers, self._queue, self._arrivals
        while (first or second or third) and (now_s := self._clock_s()) < self._queue_until_s:
            self._began_s = now_s
            # The queue that is served goes behind the others, and an empty one stays.
            if first:
                served, first, second, third = first, second, third, first
            elif second:
                served, second, third = second, third, second
            else:
                served = third
            work = served.popleft()
            try:
                work()
            except Exception:
                self._on_error()
                log.exception("work failed in its turn")
        overdrawn_s = max(0.0, self._clock_s() - self._queue_until_s)
        self._fresh_s = overdrawn_s
        if first or second or third or overdrawn_s >= FRESH_BESIDE_QUEUE_S:
            self._ask_for_turn()
