"""An event loop in a thread of its own, for callers without one. No clevrd in here.

The thread is a daemon thread: an interpreter that exits does not wait for it. After a fork the
child has the loop, but no thread that runs it.
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

# The time that all connections together have to be closed in order at an interpreter's exit.
EXIT_TIMEOUT_S: Final = 1.0
# Windows interrupts no wait for a lock, so Ctrl-C is looked for this often.
WAIT_SLICE_S: Final = 0.2 if sys.platform == "win32" else None
# Names are looked up here; one that never comes back must not keep others from it.
_RESOLVERS: Final = 4
# The end cancels all tasks this many times: a task that is cancelled may leave another one behind.
_ROUNDS: Final = 3

_running: WeakSet[LoopThread] = WeakSet()

# Copies, in a forked child, of what is its parent's. Only sever() adds to it.
_parents: list[object] = []


class Stopped(Exception):
    """The loop does not run, or stopped before it was done."""

    def __init__(self, *, has_begun: bool) -> None:
        super().__init__()
        self.has_begun = has_begun


class LoopThread:
    """Runs an event loop from `start` to `stop`; its methods are for other threads.

    Args:
        name: of the thread.
        at_end: run when it is stopped, before everything else is cancelled.
    """

    def __init__(self, name: str, at_end: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        self._selector = DefaultSelector()
        self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop(self._selector)
        self._resolvers = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix=f"{name}-resolver")
        self.loop.set_default_executor(self._resolvers)
        self._thread = threading.Thread(target=_run, args=(self.loop,), name=name, daemon=True)
        self._at_end = at_end
        # Guards _is_stopped, so that nothing is given to a loop that never runs it. Reentrant:
        # what Python frees meanwhile, in the same thread, may call as well.
        self._lock = threading.RLock()
        self._is_stopped = False
        # This is a child's copy of its parent's.
        self.is_forked = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        _running.add(self)

    @property
    def is_running(self) -> bool:
        """Whether work can be given to it."""
        return not (self._is_stopped or self.is_forked)

    @property
    def is_inside(self) -> bool:
        """Whether the caller is in this thread, and so must not wait for it."""
        return threading.current_thread() is self._thread

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin with ``work``; raises Stopped."""
        with self._lock:
            if self.is_running:
                return asyncio.run_coroutine_threadsafe(work, self.loop)
        work.close()
        raise Stopped(has_begun=False)

    def call_soon(self, call: Callable[..., object], *arguments: object) -> bool:
        """Let the loop call it; return whether it runs and will."""
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
            TimeoutError: it takes longer than ``timeout_s``, and is cancelled.
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
            # An interrupt or a timeout leaves work that nobody waits for; a future that is done
            # stays done.
            future.cancel()

    def stop(self, timeout_s: float | None = None) -> None:
        """Run ``at_end``, cancel everything else, and end the thread; idempotent.

        Args:
            timeout_s: how long to wait for that; it goes on without.
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
            # Idle ones end at once; one that waits for a name server is not waited for.
            ending = threading.Thread(target=self._resolvers.shutdown, daemon=True)
            ending.start()
            ending.join(EXIT_TIMEOUT_S)

    def sever(self) -> None:
        """Keep a forked child from its parent's connections, whatever it does with its copy.

        Its descriptors become those of nothing: the child would else take them out of the parent's
        epoll, and end its TLS sessions, when it frees them.
        """
        self.is_forked = True
        self._lock = threading.RLock()
        _never_free(self)
        with suppress(RuntimeError):
            # Some tasks wait for an event that nothing but they themselves hold.
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
    """Do what is to be done last, cancel the rest, and stop the loop."""
    loop = asyncio.get_running_loop()
    try:
        if at_end is not None:
            with suppress(Exception):
                await at_end()
        # A task that ends may leave another one behind, which closes what it had.
        for _ in range(_ROUNDS):
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if not others:
                break
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        await loop.shutdown_asyncgens()
    finally:
        # Futures of other threads are told of their tasks' ends first.
        loop.call_soon(loop.stop)


def _never_free(copy: object) -> None:
    """Keep ``copy`` and all it holds, also beyond the interpreter's end.

    Sessions, connections and tasks that are freed while they are open close themselves, and say on
    standard error that nobody did. They are the parent's, which goes on with them.
    """
    _parents.append(copy)
    # Modules lose what they hold at the end; a reference that nothing gives back stays.
    with suppress(AttributeError):  # there is no such function in PyPy, nor without ctypes
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(copy))


def _stop_all() -> None:
    """Close what nobody has closed, at the interpreter's exit."""
    for each in list(_running):
        each.stop(timeout_s=EXIT_TIMEOUT_S)


def _sever_all() -> None:
    for each in list(_running):
        each.sever()
    _running.clear()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_sever_all)
