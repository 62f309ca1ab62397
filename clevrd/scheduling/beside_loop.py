"""Calls that may wait for a disk, each in a thread beside the loop that nobody has to wait for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar, cast

ResultT = TypeVar("ResultT")


def in_daemon_thread(
    call: Callable[[], ResultT], loop: asyncio.AbstractEventLoop, name: str
) -> Awaitable[ResultT]:
    """Run ``call`` in a thread that the process does not wait for, even if a disk hangs."""
    done: asyncio.Future[ResultT] = loop.create_future()

    def settle(result: ResultT | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(ResultT, result))

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except Exception as raised:
            error = raised
        # The loop may be closed by now; then no one waits for the result.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


class StillBusy(Exception):
    """The call before did not end in time, and has not ended since."""


class OneAtATime:
    """Calls beside the loop, each within a time; a thread that hangs is not joined by others.

    Args:
        timeout_s: the time of a call.
        name: of the thread.
    """

    def __init__(self, timeout_s: float, name: str) -> None:
        self.timeout_s = timeout_s
        self._name = name
        # A call is under way, or hangs; changed by its thread.
        self._is_busy = False

    async def run(self, call: Callable[[], ResultT]) -> ResultT:
        """Return what ``call`` returns, or raise what it raises.

        Raises:
            StillBusy: another call is under way, or hangs.
            TimeoutError: it has not ended in time; its result is dropped.
        """
        if self._is_busy:
            raise StillBusy
        self._is_busy = True

        def tracked() -> ResultT:
            try:
                return call()
            finally:
                self._is_busy = False

        done = in_daemon_thread(tracked, asyncio.get_running_loop(), self._name)
        return await asyncio.wait_for(done, self.timeout_s)
