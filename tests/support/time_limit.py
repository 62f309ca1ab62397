"""The time limit of a test, such that it ends async tests as well, and only the one test.

pytest-timeout raises from the handler of a signal. uvloop calls that in a callback of its own while
it waits, and gives what it raises to the loop's exception handler; where a task of the daemon runs
just then, the task gets it. Either way the test waits on. So here the loop is asked: its test is
cancelled first, and where that is not enough the loop is stopped. What blocks in a C function can't
be ended like that: pytest's faulthandler_timeout ends the run then, with everybody's stack.
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

# Between the limit and the next try to end the test, and the one after that. A fixture may take so
# long to end.
GRACE_S = 5.0
# When to look again whether an example runs.
_NEXT_EXAMPLE_S = 0.01
_HYPOTHESIS = str(Path(core.__file__).parent)


class EndableLoop(uvloop.Loop):
    """uvloop that ends what it runs when a test's time is up."""

    # The one that runs; None while none does.
    running: ClassVar[EndableLoop | None] = None

    def run_until_complete(self, future: Any) -> Any:
        """Run ``future``; fail when its time is up, though it should return after all."""
        self._main = asyncio.ensure_future(future, loop=self)
        # How often it was asked to end.
        self._asked = 0
        self._message = ""
        EndableLoop.running = self
        try:
            value = super().run_until_complete(self._main)
        # The second: stopped before the future completed.
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
        """End what runs; where it was asked to before, also by raising from where Python is now."""
        self._message = message
        self._asked += 1
        self._main.cancel()
        if self._asked > 1:
            self.stop()
            pytest.fail(message)


class _Limit:
    """The limit of one test, of which each step begins with what is left."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Within setup, call or teardown: nothing may hit pytest between them.
        self._is_in_step = False
        self._is_late = False
        self._is_armed = False

    def arm(self) -> None:
        """Let the time run, if it does not run: pytest-timeout stops it when a test has failed."""
        if not self._is_armed:
            first_s = GRACE_S if self._is_late else self._settings.timeout
            signal.signal(signal.SIGALRM, self._time_is_up)
            signal.setitimer(signal.ITIMER_REAL, first_s, GRACE_S)
            self._is_armed = True

    def cancel(self) -> None:
        """Let the time run no more."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._is_armed = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let what runs in it be ended; after a first time it has GRACE_S."""
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
    """Return whether a test that tries examples ends by itself, as it knows which one fails.

    Where it makes one smaller it is told to show what it has. Otherwise the example that runs is
    what fails, which hypothesis finds out where it is hit within it, and shows as any other.
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
            # It does not stand being hit while it draws what the example is.
            is_in_example = innermost == core.__file__
            if not is_in_example:
                signal.setitimer(signal.ITIMER_REAL, _NEXT_EXAMPLE_S, GRACE_S)
            return not is_in_example
        frame = frame.f_back
    return False


_LIMIT = pytest.StashKey[_Limit]()


def pytest_timeout_set_timer(item: pytest.Item, settings: Settings) -> bool | None:
    """Have the test ended at its limit, and again and again until it has; None for a thread."""
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
    """Let the setup be ended."""
    with _steps_of(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Let the test be ended."""
    with _steps_of(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Let the teardown be ended."""
    with _steps_of(item):
        return (yield)
