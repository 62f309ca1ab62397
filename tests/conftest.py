"""What every test shares: uvloop, a watch on who holds the loop, and a clock that is set by hand.

Import the fakes by the module's plain name: `from conftest import FakeClock`.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fakes  # noqa: F401  # registers the hypothesis profiles
import pytest
from fake_server import new_client, pause, server  # noqa: F401  # fixtures
from time_limit import (  # noqa: F401  # hooks
    EndableLoop,
    pytest_runtest_call,
    pytest_runtest_setup,
    pytest_runtest_teardown,
    pytest_timeout_set_timer,
)

from clevrd import logs

# The daemon's own limit is 10 ms. This one only has to catch what blocks (a sleep, a file, a
# subprocess), with room for a debug build, a garbage collection and a virtual machine's hiccups.
# More processes than two start servers and browsers on the same cores, which takes from a loop what
# the kernel does not count as waiting.
HOLD_LIMIT_S = 0.25 if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) <= 2 else 1.0
# A hold is measured from the next beat that was due: up to one beat of it goes unseen.
BEAT_S = 0.02
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def waited_for_cpu_s() -> float:
    """Return how long this thread has been ready to run without getting a CPU, 0 if unknown.

    Source: the kernel's Documentation/scheduler/sched-stats.rst, second field, nanoseconds.
    """
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


class WatchedLoop(EndableLoop):
    """uvloop that notes by how much its beat comes late, while it runs.

    Waiting for a CPU that other processes have is not held against the test.
    """

    # Longest hold since the fixture loop_stays_free last reset it; tests have one loop at a time.
    longest_hold_s = 0.0

    def run_until_complete(self, future: Any) -> Any:
        """Run ``future`` with the beat on, and judge also the stretch after the last beat."""
        self._beat()
        try:
            return super().run_until_complete(future)
        finally:
            self._next.cancel()
            self._note()

    def _beat(self) -> None:
        self._due_s = time.monotonic() + BEAT_S
        self._waited_s = waited_for_cpu_s()
        self._next = self.call_later(BEAT_S, self._late_beat)

    def _late_beat(self) -> None:
        self._note()
        self._beat()

    def _note(self) -> None:
        late_s = time.monotonic() - self._due_s - (waited_for_cpu_s() - self._waited_s)
        WatchedLoop.longest_hold_s = max(WatchedLoop.longest_hold_s, late_s)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave long tests out of a usual run, which has to stay short."""
    if os.environ.get("LONG_TESTS"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="LONG_TESTS is not set"))


def pytest_collection_finish() -> None:
    """Keep the collector off what was imported and collected, as the daemon does with its own.

    A full collection of it takes 0.1 s, on a busy machine three times that, and would pass for a
    test that held the loop.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Take the log of a command that ran in this process away again, before the next test."""
    root = logging.getLogger()
    level = root.level
    yield
    for handler in list(root.handlers):
        if isinstance(handler, logs.LinesHandler):
            root.removeHandler(handler)
            root.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    """Keep the collector off what the modules before this one have left, for the same reason.

    Towards the end of a whole run that is so much that a collection takes 0.3 s.
    """
    gc.collect()
    gc.freeze()


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], WatchedLoop]]:
    """Tell pytest-asyncio to run every async test and fixture on uvloop, as the daemon does."""
    return {"uvloop": WatchedLoop}


@pytest.fixture(autouse=True)
def loop_stays_free(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test whose code, or whose fixtures' code, held the loop; @holds_loop excuses it."""
    WatchedLoop.longest_hold_s = 0.0

    yield

    if WatchedLoop.longest_hold_s > HOLD_LIMIT_S and not request.node.get_closest_marker(
        "holds_loop"
    ):
        pytest.fail(
            f"The event loop was held for {WatchedLoop.longest_hold_s:.3f} s (limit"
            f" {HOLD_LIMIT_S} s). pytest --asyncio-debug names the callback.",
            pytrace=False,
        )


class FakeClock:
    """A clock for code that takes one as `Callable[[], float]`; it stands until it is moved."""

    def __init__(self, now_s: float = 1000.0) -> None:
        # Public: set it to make a clock jump, back as well as forth.
        self.now_s = now_s

    def __call__(self) -> float:
        """Return the time it was set to, in seconds."""
        return self.now_s

    def advance(self, seconds: float) -> float:
        """Let ``seconds`` pass and return the new time."""
        self.now_s += seconds
        return self.now_s


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that the test moves by hand."""
    return FakeClock()
