"""`make mutants`: which faults it puts where, what it makes of the tests, and its lists."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import ROOT

from bench import mutants
from bench.mutants import (
    Copy,
    Edit,
    Lists,
    Mutant,
    all_mutants,
    difference,
    failing_files,
    measure,
    mutants_of,
    read_lists,
)

# A pytest for each fault takes seconds to start.
pytestmark = pytest.mark.timeout(120)

SOURCE = '''"""Says nothing about 1 < 2."""

LIMIT = 3
NAME: str = "a" + "b"


def take(count: int, upto: int = 9) -> int:
    """Take 1 or 2 and not 3."""
    if count < upto and not count == 0:
        count += 1
    while upto:
        log.info("taken %d", 4)
        print(count)
        break
    assert count > 0
    if count is None:
        raise ValueError(f"{count} + 1 is too few")
    return min(count, upto) << 2


class Taker:
    limit = 5

    def __init__(self) -> None:
        self.taken = False

    def take(self) -> None:
        self.taken = True
        del self.last
'''


def test_faults_are_where_something_is_decided_or_done() -> None:
    """Not in docstrings, declarations, assertions, what errors say, or logs of what was done."""
    found = [(each.line, each.edit.kind, each.becomes) for each in mutants_of("m.py", SOURCE)]

    assert found == [
        (9, "condition", "if (not (count < upto and not count == 0)):"),
        (9, "comparison", "if count <= upto and not count == 0:"),
        (9, "and/or", "if count < upto or not count == 0:"),
        (9, "condition", "if count < upto and count == 0:"),
        (9, "comparison", "if count < upto and not count != 0:"),
        (9, "constant", "if count < upto and not count == 1:"),
        (10, "left out", "pass"),
        (10, "operator", "count -= 1"),
        (10, "constant", "count += 2"),
        (11, "condition", "while (not (upto)):"),
        (12, "constant", 'log.info("taken %d", 5)'),
        (13, "left out", "pass"),
        (14, "left out", "pass"),
        (16, "condition", "if (not (count is None)):"),
        (16, "comparison", "if count is not None:"),
        (18, "call", "return max(count, upto) << 2"),
        (18, "return", "return None"),
        (18, "operator", "return min(count, upto) >> 2"),
        (18, "constant", "return min(count, upto) << 3"),
        (25, "constant", "self.taken = True"),
        (28, "left out", "pass"),
        (28, "constant", "self.taken = False"),
        (29, "left out", "pass"),
    ]


def test_each_fault_changes_one_place_and_is_still_python() -> None:
    """All of them, of every module that is asked about, in the same order each time."""
    found = all_mutants(ROOT, "clevrd/core/*")
    few = random.Random(1).sample(found, 100)  # noqa: S311  # a sample

    assert len(found) > 1_000
    assert found == all_mutants(ROOT, "clevrd/core/*")
    for mutant in few:
        before = (ROOT / mutant.path).read_text()
        after = mutant.edit.applied(before.encode())
        compile(after, mutant.path, "exec")
        changes = difference(before, after)
        assert {mutant.was, mutant.becomes} <= {line[1:].strip() for line in changes} | {""}


def test_every_module_has_tests_that_are_there() -> None:
    """A module or a file of tests that is renamed is renamed in the list as well."""
    lists = read_lists()
    modules = {mutant.path for mutant in all_mutants(ROOT, "*")}

    assert {module for module in modules if not lists.tests_of(module)} == set()
    for pattern in lists.nearest:
        assert list(ROOT.glob(pattern)), pattern
        for path in lists.tests_of(pattern):
            assert (ROOT / path).exists(), path


def test_listed_equivalents_are_faults_that_are_made() -> None:
    """One whose line has changed since is to be looked at again."""
    lists = read_lists()
    made = {(each.path, each.was, each.becomes) for each in all_mutants(ROOT, "*")}

    assert set(lists.equivalent) - made == set()
    assert all(why.endswith(".") for why in lists.equivalent.values())


TESTED = """
def test_it():
    from clevrd.m import is_over
    assert is_over(3)
    assert not is_over(1)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a tree with one module and its tests, which don't say what happens at the limit."""
    (tmp_path / "clevrd").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "clevrd/__init__.py").touch()
    (tmp_path / "clevrd/m.py").write_text("def is_over(count):\n    return count > 2\n")
    (tmp_path / "tests/test_m.py").write_text(TESTED)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


@pytest.mark.long
def test_faults_are_told_by_what_became_of_them(tree: Path) -> None:
    """Survivors with their diff; the module is as it was afterwards."""
    lines: list[str] = []
    path, before = "clevrd/m.py", (tree / "clevrd/m.py").read_text()
    chosen = mutants_of(path, before)
    lists = Lists({"clevrd/*": ["m"]}, {(path, "return count > 2", "return count > 3"): "Why."})

    found = measure(Copy(tree), chosen, lists, 60.0, lines.append)

    kinds = {outcome: [each.edit.kind for each in chosen] for outcome, chosen in found.items()}
    assert kinds == {
        "killed": ["return"],
        "equivalent": ["constant"],
        "survived": ["comparison"],
    }
    assert [line for line in lines if "return" in line] == [
        *(line for line in lines if " killed " in line),
        "      -    return count > 2",
        "      +    return count >= 2",
    ]
    assert (tree / path).read_text() == before


@pytest.mark.long
def test_tests_that_never_end_notice_the_fault(tree: Path) -> None:
    """An endless loop is a fault that is seen; the processes of its tests are ended."""
    edit = Edit(0, 0, "while True: pass\n", "condition")
    endless = Mutant("clevrd/m.py", 1, "", "while True: pass", edit)
    lines: list[str] = []

    found = measure(Copy(tree), [endless], Lists({"*": ["m"]}, {}), 3.0, lines.append)

    assert found["killed"] == [endless]
    assert lines[0].endswith("took too long")


@pytest.mark.long
def test_tests_that_fail_without_a_fault_are_named(tree: Path) -> None:
    """They would pass for tests that noticed it."""
    good, bad = "tests/test_m.py", "tests/test_bad.py"
    (tree / bad).write_text("def test_bad():\n    assert False\n")

    assert failing_files(Copy(tree), [good], 60.0) == []
    assert failing_files(Copy(tree), [bad, good], 60.0) == [bad]


def test_command_says_what_can_not_be_measured() -> None:
    """No module by that name: exit code 2, and nothing is copied."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.mutants", "--only", "clevrd/nothing/*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=25,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert "No module matches" in done.stderr
    assert mutants.LISTS.exists()
