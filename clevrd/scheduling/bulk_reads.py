"""BulkReads: connections that are sending something large are read one after the other.

The loop reads a socket many times in one turn while there is more to read: 256 KiB each time, and 8
MiB in all. So a connection in the middle of a large request is not read on before this says so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from clevrd.scheduling.turn_queue import TurnQueue

# A read of so many bytes or more counts as a large one: there is likely to be more.
BULK_BYTES: Final = 65_536

# Large reads in one turn of the loop, of all connections together: a MiB, which takes 1 to 3 ms to
# receive and to put behind what is there.
_READS_PER_TURN: Final = 4


class BulkReads:
    """The connections that wait for their next large read, in the order in which they came."""

    __slots__ = ("_queue", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_error: Callable[[], None]) -> None:
        # The callback that lets each read on; a connection has one at most, since it is not read.
        self._waiting: deque[Callable[[], None]] = deque()
        self._queue = TurnQueue(_READS_PER_TURN, self._read_one, loop, on_error)

    def wait(self, read_on: Callable[[], None]) -> None:
        """Call ``read_on`` in one of the next turns of the loop."""
        self._waiting.append(read_on)
        self._queue.work_soon()

    def _read_one(self) -> int | None:
        if not self._waiting:
            return None
        self._waiting.popleft()()
        return 1
