"""Farewells: connections that say goodbye, and the time that takes at most.

The last word is the connection's own. Rules: RFC 6455 §7.1 (closing).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from clevrd.progress import Progress, progress_of, reset
from clevrd.scheduling.deadlines import Deadlines

# Once the peer's kernel has our last word, how long the peer may take to answer it.
CLOSE_TIMEOUT_S: Final = 5.0
# How long the last word may wait behind what a slow peer has not taken: a ping and its timeout. A
# peer that takes nothing has the time that any stall has, and CLOSE_TIMEOUT_S at least.
CLOSE_FLUSH_TIMEOUT_S: Final = 35.0
# How often a peer that has not taken all is looked at, at 2.5 us.
CLOSE_LOOK_S: Final = 0.5


class Leaving(Protocol):
    """A connection that says goodbye."""

    transport: asyncio.Transport


class _Farewell:
    """One connection, until its transport is gone."""

    __slots__ = ("connection", "deadline_s", "ends_s", "has_all", "moved_s", "taken_bytes")

    def __init__(
        self, connection: Leaving, progress: Progress, moved_s: float, now_s: float
    ) -> None:
        self.connection = connection
        # Loop time at which it is looked at next, or is over.
        self.deadline_s = 0.0
        # Loop time at which it is over, whatever the peer takes.
        self.ends_s = now_s + CLOSE_FLUSH_TIMEOUT_S
        # When the peer was last seen to take anything, and how much of it by then.
        self.moved_s = moved_s
        self.taken_bytes = progress.taken_bytes
        # The peer's kernel has the last word: what is left is the peer's answer.
        self.has_all = False


class Farewells:
    """All connections that say goodbye."""

    def __init__(
        self, stall_s: float, on_error: Callable[[], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        # How long a peer may take nothing.
        self._stall_s = stall_s
        self._loop = loop
        self._deadlines: Deadlines[_Farewell] = Deadlines(loop, self._look_at, on_error)
        self._open: dict[Leaving, _Farewell] = {}

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._open)

    def begin_farewell(self, connection: Leaving, silent_s: float) -> None:
        """Give ``connection`` the time that a goodbye takes, before it is written.

        Args:
            silent_s: for how long its peer is known to have taken nothing.
        """
        now_s = self._loop.time()
        progress = progress_of(connection.transport)
        farewell = _Farewell(connection, progress, now_s - silent_s, now_s)
        # The last word arrives at once where nothing waits before it.
        farewell.has_all = not progress.is_behind
        self._open[connection] = farewell
        wait_s = CLOSE_TIMEOUT_S if farewell.has_all else CLOSE_LOOK_S
        self._deadlines.set(farewell, now_s + wait_s)

    def remove(self, connection: Leaving) -> None:
        """Forget ``connection``, whose transport is gone. Idempotent."""
        farewell = self._open.pop(connection, None)
        if farewell is not None:
            self._deadlines.remove(farewell)

    def stop(self) -> None:
        """Look at no connection any more."""
        self._deadlines.stop()

    def _look_at(self, farewell: _Farewell) -> None:
        now_s = self._loop.time()
        if farewell.has_all:
            farewell.connection.transport.close()
            return
        if now_s >= farewell.ends_s:
            reset(farewell.connection.transport)
            return
        progress = progress_of(farewell.connection.transport)
        if progress.taken_bytes > farewell.taken_bytes:
            farewell.taken_bytes = progress.taken_bytes
            farewell.moved_s = now_s
        if not progress.is_behind:
            farewell.has_all = True
            self._deadlines.set(farewell, now_s + CLOSE_TIMEOUT_S)
            return
        begun_s = farewell.ends_s - CLOSE_FLUSH_TIMEOUT_S
        over_s = max(farewell.moved_s + self._stall_s, begun_s + CLOSE_TIMEOUT_S)
        if now_s >= over_s:
            reset(farewell.connection.transport)
            return
        self._deadlines.set(farewell, min(now_s + CLOSE_LOOK_S, over_s, farewell.ends_s))
