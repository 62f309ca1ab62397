"""The Python examples of the documents: each is run as it stands, and prints what is below it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from daemons import ROOT, DaemonProcess, daemon_process

URL = "http://127.0.0.1:8080"
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n^```\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """A block of Python, and the lines that it prints first."""

    code: str
    output: str


def examples_of(name: str) -> list[Example]:
    """Return the Python blocks of a document in their order."""
    text = (ROOT / name).read_text()
    return [Example(*found) for found in EXAMPLE.findall(text)]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """Return the daemon that the examples of a document speak to, one after the other."""
    with daemon_process() as started:
        yield started


def first_lines(example: Example, url: str, cwd: Path) -> str:
    """Run an example until it has printed as many lines as are expected of it."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", example.code.replace(URL, url)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in example.output.splitlines()]
        process.kill()
    return "".join(lines)


def test_examples_of_the_client_print_what_they_say(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A newcomer who pastes them one after the other sees what docs/python.md shows."""
    examples = examples_of("docs/python.md")

    printed = [first_lines(example, daemon.url, tmp_path) for example in examples]

    assert len(examples) == 11
    assert printed == [example.output for example in examples]


def test_example_of_the_readme_runs(daemon: DaemonProcess, tmp_path: Path) -> None:
    """The client's one there prints a publish's answer and then messages."""
    (example,) = [each for each in examples_of("README.md") if "clevrd.client" in each.code]

    printed = first_lines(example, daemon.url, tmp_path)

    assert printed == example.output != ""


def test_examples_of_testing_pass(tmp_path: Path) -> None:
    """The tests of docs/testing.md pass under pytest, and its program prints what it says."""
    conftest, *tests, program = examples_of("docs/testing.md")
    (tmp_path / "conftest.py").write_text(conftest.code)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    for number, test in enumerate(tests):
        (tmp_path / f"test_{number}.py").write_text(test.code)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=25,
    )

    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
    assert first_lines(program, "", tmp_path) == program.output
