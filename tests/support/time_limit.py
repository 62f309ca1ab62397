"""The time limit of a test: ends async tests as well, and only the test that is too slow.

pytest-timeout raises from a signal handler. uvloop calls the handler in a callback of its own while
it waits, and gives the exception to the loop's exception handler; or a task of the daemon that
happens to run gets it. Either way the test waits on. So here the loop ends the test: it cancels the
test's task first, and stops if that is not enough. A call that blocks in a C function can't be
ended like this: then pytest's faulthandler_timeout ends the run, with the stacks of all threads.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest
import uvloop
from hypothesis import core
from hypothesis.internal.conjecture import engine
from pytest_timeout import (  # type: ignore[import-untyped]
    PYTEST_FAILURE_MESSAGE,
    Settings,
    is_debugging,
)

# Seconds between two attempts to end the test, the first of which is at the limit. A fixture may
# take so long to end.
GRACE_S = 5.0
# Seconds until the next look whether an example runs.
_NEXT_EXAMPLE_S = 0.01
_HYPOTHESIS = str(Path(core.__file__).parent)


class EndableLoop(uvloop.Loop):
    """uvloop's loop, which ends its run when a test's time is up."""

    # The loop that runs now; None while none does.
    running: ClassVar[EndableLoop | None] = None

    def run_until_complete(self, future: Any) -> Any:
        """Run ``future``; fail when its time is up, even if it returns after all."""
        self._main = asyncio.ensure_future(future, loop=self)
        # Number of times that the run was asked to end.
        self._asked = 0
        self._message = ""
        EndableLoop.running = self
        try:
            value = super().run_until_complete(self._main)
        # A RuntimeError means that the loop was stopped before the future completed.
        except (asyncio.CancelledError, RuntimeError) as ended:
            if self._asked:
                raise pytest.fail.Exception(self._message) from ended
            raise
        finally:
            EndableLoop.running = None
        if self._asked:
            pytest.fail(self._message)
        return value

    def end(self, message: str) -> None:
        """End the run; if it was asked before, also raise in the code that runs now."""
        self._message = message
        self._asked += 1
        self._main.cancel()
        if self._asked > 1:
            self.stop()
            pytest.fail(message)


class _Limit:
    """The time limit of one test; each of its steps has the time that is left."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # True within setup, call or teardown; between them pytest must not be interrupted.
        self._is_in_step = False
        self._is_late = False
        self._is_armed = False

    def arm(self) -> None:
        """Start the timer, if it does not run: pytest-timeout stops it when a test has failed."""
        if not self._is_armed:
            first_s = GRACE_S if self._is_late else self._settings.timeout
            signal.signal(signal.SIGALRM, self._time_is_up)
            signal.setitimer(signal.ITIMER_REAL, first_s, GRACE_S)
            self._is_armed = True

    def cancel(self) -> None:
        """Stop the timer."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._is_armed = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Allow the step within the block to be ended; after a first time it has GRACE_S."""
        if self._is_late:
            self.cancel()
        self.arm()
        self._is_in_step = True
        try:
            yield
        finally:
            self._is_in_step = False

    def _time_is_up(self, _: int, frame: FrameType | None) -> None:
        if is_debugging() and not self._settings.disable_debugger_detection:
            return
        self._is_late = True
        if not self._is_in_step or _is_left_to_hypothesis(frame):
            return
        message = PYTEST_FAILURE_MESSAGE % self._settings.timeout
        if EndableLoop.running is None:
            pytest.fail(message)
        EndableLoop.running.end(message)


def _is_left_to_hypothesis(frame: FrameType | None) -> bool:
    """Return whether a test of hypothesis ends by itself, as it knows the failing example.

    While hypothesis shrinks an example, it is told to stop and show the one it has. Otherwise the
    running example has failed: hypothesis notices an exception raised within it, and shows it as
    any other.
    """
    innermost = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not innermost and file.startswith(_HYPOTHESIS):
            innermost = file
        runner = frame.f_locals.get("self") if file == engine.__file__ else None
        if isinstance(runner, engine.ConjectureRunner):
            if runner.finish_shrinking_deadline:
                runner.finish_shrinking_deadline = 0.0
                return True
            # hypothesis can't be interrupted while it draws an example.
            is_in_example = innermost == core.__file__
            if not is_in_example:
                signal.setitimer(signal.ITIMER_REAL, _NEXT_EXAMPLE_S, GRACE_S)
            return not is_in_example
        frame = frame.f_back
    return False


_LIMIT = pytest.StashKey[_Limit]()


def pytest_timeout_set_timer(item: pytest.Item, settings: Settings) -> bool | None:
    """End the test at its limit, and again until it has ended; do nothing for a thread."""
    if settings.method != "signal":
        return None
    limit = item.stash[_LIMIT] = _Limit(settings)
    item.cancel_timeout = limit.cancel  # type: ignore[attr-defined]
    limit.arm()
    return True


def _steps_of(item: pytest.Item) -> AbstractContextManager[None]:
    limit = item.stash.get(_LIMIT, None)
    return nullcontext() if limit is None else limit.step()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Allow the setup to be ended."""
    with _steps_of(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Allow the test to be ended."""
    with _steps_of(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Allow the teardown to be ended."""
    with _steps_of(item):
        return (yield)
