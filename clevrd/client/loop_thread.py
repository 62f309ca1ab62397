"""LoopThread: an event loop in a thread of its own, for callers without one.

This module knows no clevrd. The thread is a daemon thread: an interpreter that exits does not wait
for it. After a fork the child has a copy of the loop, but no thread that runs it.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from selectors import DefaultSelector
from typing import Any, Final, TypeVar
from weakref import WeakSet

try:
    import ctypes
except ImportError:  # a Python that was built without libffi
    ctypes = None  # type: ignore[assignment]

T = TypeVar("T")

# Seconds in which connections are closed in order when the interpreter exits.
EXIT_TIMEOUT_S: Final = 1.0
# Windows does not interrupt a wait for a lock, so there the wait ends this often to notice Ctrl-C.
WAIT_SLICE_S: Final = 0.2 if sys.platform == "win32" else None
# Threads that look host names up; more than one, so that a lookup that hangs does not keep others
# back.
_RESOLVERS: Final = 4
# Rounds of cancelling all tasks at the end: a cancelled task may leave another one behind.
_ROUNDS: Final = 3

_running: WeakSet[LoopThread] = WeakSet()

# In a forked child: copies of the parent's objects, kept for ever. Only sever() adds to it.
_parents: list[object] = []


class Stopped(Exception):
    """The loop does not run, or stopped before the work was done."""

    def __init__(self, *, has_begun: bool) -> None:
        super().__init__()
        self.has_begun = has_begun


class LoopThread:
    """Runs an event loop from `start` to `stop`; its methods are for other threads.

    Args:
        name: the thread's name.
        at_end: run when the loop is stopped, before all other tasks are cancelled.
    """

    def __init__(self, name: str, at_end: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        self._selector = DefaultSelector()
        self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop(self._selector)
        self._resolvers = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix=f"{name}-resolver")
        self.loop.set_default_executor(self._resolvers)
        self._thread = threading.Thread(target=_run, args=(self.loop,), name=name, daemon=True)
        self._at_end = at_end
        # Guards _is_stopped, so that no work is given to a loop that never runs it. Reentrant,
        # since Python may free an object meanwhile, in the same thread, whose finalizer calls as
        # well.
        self._lock = threading.RLock()
        self._is_stopped = False
        # True in a forked child, where this object is only a copy of the parent's.
        self.is_forked = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        _running.add(self)

    @property
    def is_running(self) -> bool:
        """Whether the loop takes work."""
        return not (self._is_stopped or self.is_forked)

    @property
    def is_inside(self) -> bool:
        """Whether the caller is in this thread, and so must not wait for the loop."""
        return threading.current_thread() is self._thread

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``work`` in the loop; raises Stopped."""
        with self._lock:
            if self.is_running:
                return asyncio.run_coroutine_threadsafe(work, self.loop)
        work.close()
        raise Stopped(has_begun=False)

    def call_soon(self, call: Callable[..., object], *arguments: object) -> bool:
        """Let the loop call ``call``; return False where the loop does not run."""
        with self._lock:
            if not self.is_running:
                return False
            self.loop.call_soon_threadsafe(call, *arguments)
            return True

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Return what ``work`` returns, or raise what it raises.

        An interrupt ends the wait at once and cancels the work.

        Raises:
            Stopped: the loop does not run, or was stopped meanwhile.
            TimeoutError: ``work`` took longer than ``timeout_s``, and was cancelled.
        """
        future = self.submit(work)
        try:
            while True:
                try:
                    return future.result(WAIT_SLICE_S if timeout_s is None else timeout_s)
                except TimeoutError:
                    if future.done() or timeout_s is not None:
                        raise
        except CancelledError:
            raise Stopped(has_begun=True) from None
        finally:
            # An interrupt or a timeout leaves work that no one waits for; cancelling a future that
            # is done changes nothing.
            future.cancel()

    def stop(self, timeout_s: float | None = None) -> None:
        """Run ``at_end``, cancel all other tasks, and end the thread. A second call does nothing.

        Args:
            timeout_s: seconds to wait for the end, which goes on without the caller afterwards.
        """
        with self._lock:
            if self.is_running:
                self._is_stopped = True
                asyncio.run_coroutine_threadsafe(_end(self._at_end), self.loop)
        if self.is_forked or self.is_inside or timeout_s == 0:
            return
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            _running.discard(self)
            # Idle resolver threads end at once; a thread that waits for a name server is not waited
            # for.
            ending = threading.Thread(target=self._resolvers.shutdown, daemon=True)
            ending.start()
            ending.join(EXIT_TIMEOUT_S)

    def sever(self) -> None:
        """Cut a forked child's copy off from the parent's connections.

        The copy's descriptors are replaced by /dev/null. Otherwise the child, when it frees the
        copy, would take the sockets out of the parent's epoll and end the parent's TLS sessions.
        """
        self.is_forked = True
        self._lock = threading.RLock()
        _never_free(self)
        with suppress(RuntimeError):
            # Some tasks wait for an event that only they themselves refer to.
            _never_free(asyncio.all_tasks(self.loop))
        with suppress(OSError, RuntimeError):
            null = os.open(os.devnull, os.O_RDWR)
            watched = [key.fd for key in self._selector.get_map().values()]
            for descriptor in (self._selector.fileno(), *watched):
                os.dup2(null, descriptor, inheritable=False)
            os.close(null)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _end(at_end: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    """Run ``at_end``, cancel all other tasks, and stop the loop."""
    loop = asyncio.get_running_loop()
    try:
        if at_end is not None:
            with suppress(Exception):
                await at_end()
        # A task that ends may leave another one behind, to close its connection.
        for _ in range(_ROUNDS):
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if not others:
                break
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        await loop.shutdown_asyncgens()
    finally:
        # The loop stops one turn later, so that futures of other threads are told of their tasks'
        # ends.
        loop.call_soon(loop.stop)


def _never_free(copy: object) -> None:
    """Keep ``copy``, and all objects that it refers to, even at the interpreter's end.

    An open session, connection or task that is freed closes itself, and writes a warning to
    standard error. These belong to the parent, which still uses them.
    """
    _parents.append(copy)
    # Modules lose their globals at the end; a reference that is never given back stays.
    with suppress(AttributeError):  # there is no such function in PyPy, nor without ctypes
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(copy))


def _stop_all() -> None:
    """Stop the loops that still run, at the interpreter's exit."""
    for each in list(_running):
        each.stop(timeout_s=EXIT_TIMEOUT_S)


def _sever_all() -> None:
    for each in list(_running):
        each.sever()
    _running.clear()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_sever_all)
