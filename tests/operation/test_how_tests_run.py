"""What every test relies on: a time limit that ends it, and the same examples in every run.

Each runs a file of tests of its own with this project's settings, in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import ROOT
from hypothesis.internal.conjecture import engine

# The bound on all of it, should a time limit not work; what is asserted is how each test ended.
pytestmark = pytest.mark.timeout(120)


def run_tests(*files: Path, limit_s: float = 30.0, is_shown: bool = False) -> str:
    """Run these files of tests; return what pytest says, and with ``is_shown`` what they print."""
    environ = {name: text for name, text in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-v", f"--timeout={limit_s}"]
    if is_shown:
        options.append("--capture=no")
    done = subprocess.run(
        [*command, *options, *map(str, files)],
        cwd=files[0].parent,
        env={**environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    return done.stdout


def outcomes(output: str) -> dict[str, set[str]]:
    """Return how each test ended, by its name; one can fail and then have an error."""
    found: dict[str, set[str]] = {}
    for name, outcome in re.findall(r"^\S*::(\w+)\S* (PASSED|FAILED|ERROR)", output, re.MULTILINE):
        found.setdefault(name, set()).add(outcome)
    return found


ENDLESS = """
import asyncio, contextlib, threading, time
import pytest, time_limit
from hypothesis import given, settings, strategies as st
from hypothesis.internal.conjecture import engine
from time_limit import EndableLoop

time_limit.GRACE_S = 0.2
engine.MAX_SHRINKING_SECONDS = 0.5

async def test_idle():
    await asyncio.Event().wait()

async def test_idle_beside_a_busy_task():
    async def spin():
        while True:
            await asyncio.sleep(0)
    task = asyncio.create_task(spin())
    await asyncio.Event().wait()

async def test_idle_although_cancelled():
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

async def test_returns_when_cancelled():
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()

async def test_waits_for_a_task_that_is_never_done():
    await asyncio.shield(asyncio.create_task(asyncio.Event().wait()))

@pytest.mark.holds_loop("on purpose")
async def test_callback_that_blocks():
    asyncio.get_running_loop().call_soon(time.sleep, 3600)
    await asyncio.Event().wait()

@pytest.mark.holds_loop("on purpose")
async def test_task_that_blocks():
    time.sleep(3600)

def test_blocks():
    threading.Event().wait()

@pytest.fixture
async def idle():
    await asyncio.Event().wait()

async def test_idle_fixture(idle):
    pass

@pytest.fixture
async def idle_end():
    yield
    await asyncio.Event().wait()

async def test_idle_end_of_a_fixture(idle_end):
    pass

@settings(max_examples=3)
@given(st.integers())
def test_idle_example(number):
    with asyncio.Runner(loop_factory=EndableLoop) as runner:
        runner.run(asyncio.Event().wait())

async def test_good():
    await asyncio.sleep(0)
"""


@pytest.mark.long
def test_time_limit_ends_every_kind_of_wait_and_nothing_else(tmp_path: Path) -> None:
    """Each fails alone, with where it stood, and the tests behind it are run."""
    (tmp_path / "test_endless.py").write_text(ENDLESS)

    output = run_tests(tmp_path / "test_endless.py", limit_s=1.0)

    names = re.findall(r"def (test_\w+)", ENDLESS)
    expected = {name: {"FAILED"} for name in names}
    expected |= {
        # The loop is closed in its teardown, where it is cancelled once more.
        "test_idle_although_cancelled": {"FAILED", "ERROR"},
        "test_idle_fixture": {"ERROR"},
        "test_idle_end_of_a_fixture": {"PASSED", "ERROR"},
        "test_good": {"PASSED"},
    }
    assert outcomes(output) == expected, output
    assert output.count("Failed: Timeout (>1.0s) from pytest-timeout.") >= len(names) - 1
    assert re.search(r"^> +await asyncio\.Event\(\)\.wait\(\)$", output, re.MULTILINE), output
    assert "Failing test case: test_idle_example(" in output, output


def test_what_never_comes_back_to_python_ends_the_run(tmp_path: Path) -> None:
    """The last resort: everybody's stack, and an end that CI sees."""
    (tmp_path / "test_stuck.py").write_text(
        "import signal\n"
        "def test_stuck():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "    signal.sigwait([signal.SIGUSR2])\n"
    )
    text = (ROOT / "pyproject.toml").read_text()
    timeout_s = int(re.findall(r"^faulthandler_timeout = (\d+)$", text, re.MULTILINE)[0])
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\ntimeout = 0.2\nfaulthandler_timeout = 1\nfaulthandler_exit_on_timeout = true\n"
    )

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert "faulthandler_exit_on_timeout = true" in text
    assert timeout_s > 120, "above the limit of any test"
    assert done.returncode == 1
    assert "in test_stuck" in done.stderr


# --- examples ------------------------------------------------------------------------------------

EXAMPLES = """
from hypothesis import given, strategies as st

@given(st.lists(st.integers()), st.binary())
def test_examples(numbers, data):
    print("drawn", (numbers, data))
"""
MANY_CONSTANTS = "".join(f"N{number} = {number * 7919}, 'word {number}'\n" for number in range(400))


@pytest.mark.long
def test_examples_do_not_depend_on_what_else_is_collected(tmp_path: Path) -> None:
    """hypothesis would take constants from each module of ours that a file of tests imports."""
    examples, others = tmp_path / "test_examples.py", tmp_path / "test_others.py"
    examples.write_text(EXAMPLES)
    (tmp_path / "constants.py").write_text(MANY_CONSTANTS)
    others.write_text("import constants\n\ndef test_other():\n    pass\n")

    alone = re.findall(r"^drawn .*", run_tests(examples, is_shown=True), re.MULTILINE)
    together = re.findall(r"^drawn .*", run_tests(others, examples, is_shown=True), re.MULTILINE)

    assert len(alone) > 50
    assert together == alone


SLOW_TO_SHRINK = """
import time
from hypothesis import given, strategies as st
from hypothesis.internal.conjecture import engine

engine.MAX_SHRINKING_SECONDS = {shrinking_s}

@given(st.lists(st.integers(), min_size=5))
def test_slow(numbers):
    if sum(numbers) > 1000:
        time.sleep(0.05)
        assert sum(numbers) == 0, "the bug"
"""


@pytest.mark.long
@pytest.mark.parametrize(("shrinking_s", "limit_s"), [(0.5, 30.0), (60, 4.0)])
def test_example_is_shown_though_it_takes_long_to_make_it_small(
    tmp_path: Path, shrinking_s: float, limit_s: float
) -> None:
    """Whether that has its own limit or comes to the test's, the fault is not only "Timeout"."""
    slow = tmp_path / "test_slow.py"
    slow.write_text(SLOW_TO_SHRINK.format(shrinking_s=shrinking_s))

    output = run_tests(slow, limit_s=limit_s)

    assert outcomes(output) == {"test_slow": {"FAILED"}}, output
    assert re.search(r"^FAILED .* - AssertionError: the bug$", output, re.MULTILINE), output
    assert re.search(r"Failing test case: test_slow\(\n.* numbers=\[0, 0", output), output


def test_there_is_time_to_show_an_example() -> None:
    """Making it small takes a part of a test's time at most."""
    assert engine.MAX_SHRINKING_SECONDS <= 10
