"""Repeating timers, and tasks whose failures are counted and logged. Owners decide what they do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)


async def pause(seconds: float, stopping: asyncio.Event) -> None:
    """Wait so long, but not beyond a stop."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()


class Timers:
    """A set of repeating actions on one loop; a failing one is logged, counted, and goes on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_error: Callable[[], None]) -> None:
        self._loop = loop
        self._on_error = on_error
        # One handle for each action, replaced every time it runs.
        self._handles: dict[Callable[[], object], asyncio.TimerHandle] = {}

    def every(self, interval_s: float, action: Callable[[], object]) -> None:
        """Call ``action`` every ``interval_s``, the first time after one interval, until `stop`.

        Delays do not add up, and calls that were missed altogether are not made up for.
        """

        def run(due_s: float) -> None:
            now_s = self._loop.time()
            schedule(due_s if due_s + interval_s > now_s else now_s)
            try:
                action()
            except Exception:
                self._on_error()
                log.exception("timer failed action=%s", action.__name__)

        def schedule(last_s: float) -> None:
            due_s = last_s + interval_s
            self._handles[action] = self._loop.call_at(due_s, run, due_s)

        schedule(self._loop.time())

    def stop(self) -> None:
        """Cancel all actions."""
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()


class Tasks:
    """Tasks that run beside requests; held here, so that none is collected while it waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_error: Callable[[], None]) -> None:
        self._loop = loop
        self._on_error = on_error
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Return how many tasks are running."""
        return len(self._running)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run ``coroutine``; its failure is logged and counted."""
        task = self._loop.create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._on_error()
            log.error("task failed", exc_info=task.exception())
