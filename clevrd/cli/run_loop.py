"""Runs the coroutine of a command until it ends, or until a signal asks the command to.

The first signal cancels it, so that connections are closed and sums are printed. A second one ends
the process at once: what is left of a loop that is interrupted while it closes would be reported
as warnings, which say nothing to people.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

from clevrd import signals

T = TypeVar("T")


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Return the outcome of ``work``, which is run in a new loop.

    Raises:
        KeyboardInterrupt: a signal came; it holds the signal's number.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(work)
    stop = _Stop()
    before = {number: signal.getsignal(number) for number in signals.STOPS}
    for number in signals.STOPS:
        signals.handle(number, stop.ask)
    try:
        return asyncio.run(stop.watch(work))
    except asyncio.CancelledError:
        if stop.number is None:
            raise
        raise KeyboardInterrupt(stop.number) from None
    finally:
        # A signal that follows another one ends the process, however far it has come by then.
        if stop.number is None:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Stop:
    """The signals that come while the loop runs."""

    def __init__(self) -> None:
        # The signal that came first; None before.
        self.number: int | None = None
        self._cancel: Callable[[], object] = _do_nothing

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` so that a signal cancels it."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if self.number is not None:
            task.cancel()
        return await task

    def ask(self, number: int, _: FrameType | None) -> None:
        """Cancel the work, or end the process where that was asked for before."""
        if self.number is not None:
            os._exit(128 + self.number)
        self.number = number
        self._cancel()


def _do_nothing() -> None:
    """Do nothing before the loop runs, which then looks whether a signal has come."""
