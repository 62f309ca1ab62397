"""Mutation tests: puts a seeded sample of small faults into a copy, and runs the tests there.

`make mutants`, or `python -m bench.mutants --seed 2 --count 40`. Each fault changes one place of a
module: a comparison, a constant, a condition, a call that is left out. The module's nearest tests
(mutants.toml) are run on it. If all of them pass, the fault has survived: either a test is missing,
or the change has no effect. Changes without an effect are listed in mutants.toml with a reason. The
tree itself is never written to.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import fnmatch
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Final, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
LISTS = HERE / "mutants.toml"

# Modules that get faults: decisions and the ways of requests; not the command line, the clients,
# the pages.
MODULES: Final = (
    "clevrd/core/*.py",
    "clevrd/hub/*.py",
    "clevrd/restart/*.py",
    "clevrd/journal/cleared_topics.py",
    "clevrd/journal/draft.py",
    "clevrd/journal/epoch_checkpoint.py",
    "clevrd/journal/epoch_names.py",
    "clevrd/journal/fold.py",
    "clevrd/journal/foreign_records.py",
    "clevrd/journal/partition_epoch.py",
    "clevrd/journal/record_chain.py",
    "clevrd/journal/topic_heads.py",
    "clevrd/journal/writer_sequences.py",
    "clevrd/journal/records.py",
    "clevrd/journal/logged_keys.py",
    "clevrd/journal/read_again.py",
    "clevrd/journal/checkpoints.py",
    "clevrd/raw_http/*.py",
    "clevrd/connections/*.py",
    "clevrd/aiohttp_front/*.py",
    "clevrd/tenants/*.py",
    "clevrd/access/*.py",
    "clevrd/tls/*.py",
    "clevrd/address_limit.py",
    "clevrd/admission.py",
    "clevrd/client_addresses.py",
    "clevrd/client_certificates.py",
    "clevrd/local_requests.py",
    "clevrd/page_check.py",
    "clevrd/proxy_protocol.py",
    "clevrd/scheduling/beside_loop.py",
    "clevrd/small_files.py",
)
# Parts of the tree that are copied: the modules, and everything that the tests need.
COPIED: Final = (
    *("clevrd", "tests", "bench", "docs", "systemd", ".ci", "pyproject.toml", "README.md"),
    *("Makefile", "Dockerfile", "CHANGELOG.md", "docker-compose.yml", "LICENSE"),
)

# Operator -> its text, and the text that replaces it.
_COMPARISONS: Final[dict[type[ast.cmpop], tuple[str, str]]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_OPERATORS: Final[dict[type[ast.operator], tuple[str, str]]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
_CALLS: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Edit(NamedTuple):
    """Replaces the bytes of a module between two positions by ``text``."""

    start: int
    end: int
    text: str
    kind: str

    def applied(self, source: bytes) -> str:
        """Return the module with this edit."""
        return (source[: self.start] + self.text.encode() + source[self.end :]).decode()


class Mutant(NamedTuple):
    """One fault: its module, its place, and the first line that it changes."""

    # The module's path from the root of the tree.
    path: str
    line: int
    was: str
    becomes: str
    edit: Edit

    @property
    def name(self) -> str:
        """The fault's place and kind."""
        return f"{self.path}:{self.line} {self.edit.kind}"


class Lists(NamedTuple):
    """The content of mutants.toml."""

    # Pattern of modules -> their nearest tests, with folders, the quickest first.
    nearest: dict[str, list[str]]
    # (path, was, becomes) -> the reason why the change has no effect.
    equivalent: dict[tuple[str, str, str], str]

    def tests_of(self, path: str) -> list[str]:
        """Return the files of tests for a module, by the first pattern that it matches."""
        for pattern, names in self.nearest.items():
            if fnmatch.fnmatch(path, pattern):
                places = [name.rpartition("/") for name in names]
                return [f"tests/{folder}/test_{name}.py" for folder, _, name in places]
        return []


def read_lists(path: Path = LISTS) -> Lists:
    """Read the lists in ``path``."""
    content = tomllib.loads(path.read_text())
    equivalent = {
        (each["module"], each["was"], each["becomes"]): each["why"]
        for each in content.get("equivalent", [])
    }
    return Lists(content["nearest"], equivalent)


# --- making them ---------------------------------------------------------------------------------


class _Finder(ast.NodeVisitor):
    """Finds the edits in functions; code outside of functions is figures and declarations."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.edits: list[Edit] = []
        self._is_in_function = False
        self._is_in_init = False
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self._starts = starts

    def place(self, line: int, column: int) -> int:
        """Return a position of the tree as a position in the source's bytes."""
        return self._starts[line - 1] + column

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Return where ``node`` begins and ends."""
        start = self.place(node.lineno, node.col_offset)
        # Every node that was parsed has an end.
        return start, self.place(node.end_lineno or 0, node.end_col_offset or 0)

    def text(self, node: ast.expr | ast.stmt) -> str:
        """Return the source of ``node``."""
        start, end = self.span(node)
        return self.source[start:end].decode()

    def replace(self, node: ast.expr | ast.stmt, text: str, kind: str) -> None:
        """Put ``text`` in the place of ``node``."""
        self.edits.append(Edit(*self.span(node), text, kind))

    def between(self, left: ast.expr, right: ast.expr, old: str, new: str, kind: str) -> None:
        """Put ``new`` in the place of the operator ``old`` between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[start:end].decode()
        if gap.count(old) == 1:
            self.edits.append(Edit(start, end, gap.replace(old, new), kind))

    # --- where to look ---

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        was, self._is_in_function = self._is_in_function, True
        self._is_in_init = node.name == "__init__"
        first = node.body[0]
        is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        for statement in node.body[is_docstring:]:
            self.visit(statement)
        self._is_in_function = was

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Skip it: the text of an error is for people."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """Skip it: an assertion holds in any case."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skip it: it is text, and before Python 3.12 its parts have no positions."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        was, self._is_in_function = self._is_in_function, False
        for statement in node.body:
            self.visit(statement)
        self._is_in_function = was

    # --- what is found ---

    def visit(self, node: ast.AST) -> None:
        """Note the edits of ``node`` and of all below it."""
        if self._is_in_function:
            self._note(node)
        super().visit(node)

    def _note(self, node: ast.AST) -> None:
        match node:
            case ast.Compare():
                operands = [node.left, *node.comparators]
                for index, operator in enumerate(node.ops):
                    sides = operands[index], operands[index + 1]
                    self.between(*sides, *_COMPARISONS[type(operator)], "comparison")
            case ast.BoolOp():
                old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:], strict=False):
                    self.between(left, right, old, new, "and/or")
            case ast.BinOp() if type(node.op) in _OPERATORS and not _is_text(node):
                self.between(node.left, node.right, *_OPERATORS[type(node.op)], "operator")
            case ast.UnaryOp(op=ast.Not()):
                self.replace(node, self.text(node.operand), "condition")
            case ast.If() | ast.While() | ast.IfExp():
                self.replace(node.test, f"(not ({self.text(node.test)}))", "condition")
            case ast.Constant(value=bool()):
                self.replace(node, str(not node.value), "constant")
            case ast.Constant(value=int()):
                self.replace(node, str(int(str(node.value)) + 1), "constant")
            case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
                self.replace(node.func, _CALLS[name], "call")
            case ast.Return(value=ast.Constant(value=bool() | None)):
                # The other boolean is tried as a constant, and None would act like False.
                pass
            case ast.Return(value=ast.expr() as value):
                self.replace(value, "None", "return")
            case ast.AugAssign(op=ast.Add() | ast.Sub()):
                old, new = _OPERATORS[type(node.op)]
                self.between(node.target, node.value, f"{old}=", f"{new}=", "operator")
                self.replace(node, "pass", "left out")
            case ast.Break():
                self.replace(node, "pass", "left out")
            case ast.Continue():
                self.replace(node, "break", "left out")
            case ast.Assign(targets=[ast.Attribute()]) if self._is_in_init:
                # Without this statement the attribute is missing, which any test notices.
                pass
            case ast.Delete() | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                self.replace(node, "pass", "left out")
            case ast.Expr(value=ast.Call()) if not self.text(node).startswith("log."):
                self.replace(node, "pass", "left out")
            case _:
                pass


def _is_text(node: ast.BinOp) -> bool:
    """Whether the operands are text: another operator would only be an error."""
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) for side in sides) or any(
        isinstance(side, ast.Constant) and isinstance(side.value, str | bytes) for side in sides
    )


def mutants_of(path: str, text: str) -> list[Mutant]:
    """Return all faults that can be put into a module, in the order of their places."""
    source = text.encode()
    finder = _Finder(source)
    finder.visit(ast.parse(text))
    found: list[Mutant] = []
    for edit in sorted(set(finder.edits)):
        first = source.rfind(b"\n", 0, edit.start) + 1
        last = source.find(b"\n", edit.end)
        before = source[first:last].decode()
        after = source[first : edit.start].decode() + edit.text + source[edit.end : last].decode()
        number = source.count(b"\n", 0, first) + 1
        lines = zip_longest(before.splitlines(), after.splitlines(), fillvalue="")
        for line, (was, becomes) in enumerate(lines, number):
            if was != becomes:
                found.append(Mutant(path, line, was.strip(), becomes.strip(), edit))
                break
    return found


def all_mutants(root: Path, only: str) -> list[Mutant]:
    """Return all faults of MODULES, or of the modules among them that ``only`` matches."""
    paths = sorted(path for pattern in MODULES for path in root.glob(pattern))
    names = [str(path.relative_to(root)) for path in paths]
    return [
        mutant
        for name in names
        if fnmatch.fnmatch(name, only)
        for mutant in mutants_of(name, (root / name).read_text())
    ]


# --- testing them --------------------------------------------------------------------------------


class Copy:
    """A copy of the tree, whose modules are changed and put back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # A time later than any compiled file's, whatever second that has.
        self._stamp_s = time.time()

    def put(self, path: str, text: str) -> None:
        """Write a module in such a way that Python compiles it again."""
        file = self.root / path
        file.write_text(text)
        self._stamp_s += 2
        os.utime(file, (self._stamp_s, self._stamp_s))

    def passes(self, tests: list[str], limit_s: float, *, is_cut_short: bool = True) -> bool | None:
        """Return whether all tests pass; None when they take longer than ``limit_s``.

        The first failure ends the run if it ``is_cut_short``.
        """
        options = ["-q", "-p", "no:cacheprovider", "--no-header", *(["-x"] if is_cut_short else [])]
        environ = {name: text for name, text in os.environ.items() if name != "PYTEST_ADDOPTS"}
        with (self.root / "pytest.log").open("w") as log:
            process = subprocess.Popen(  # noqa: S603  # our own tests
                [sys.executable, "-m", "pytest", *options, *tests],
                cwd=self.root,
                env={**environ, "PYTHONPATH": str(self.root)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(limit_s) == 0
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end_group(process)

    def failures(self) -> list[str]:
        """Return the names of the tests that failed in the last run."""
        log = (self.root / "pytest.log").read_text(errors="replace")
        return re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the tests, and the daemons and browsers that they started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def copied(root: Path, into: Path) -> Copy:
    """Return a copy of the parts of the tree at ``root`` that are in COPIED."""
    skipped = shutil.ignore_patterns("__pycache__", ".build", "results", "*.egg-info")
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, into / name, ignore=skipped)
        elif source.exists():
            shutil.copy2(source, into / name)
    return Copy(into)


def difference(before: str, after: str) -> list[str]:
    """Return the change as a diff, without its head."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def failing_files(copy: Copy, tests: list[str], limit_s: float) -> list[str]:
    """Return the files whose tests fail twice without a fault; one failure may be the load's."""
    for _ in range(2):
        if copy.passes(tests, 20 * limit_s, is_cut_short=False):
            return []
        tests = sorted({name.partition("::")[0] for name in copy.failures()}) or tests
    return tests


def measure(
    copy: Copy, chosen: list[Mutant], lists: Lists, limit_s: float, say: Callable[[str], None]
) -> dict[str, list[Mutant]]:
    """Test each fault in the copy; return the faults by their outcome."""
    found: dict[str, list[Mutant]] = {"killed": [], "equivalent": [], "survived": []}
    for number, mutant in enumerate(chosen, 1):
        began_s = time.monotonic()
        before = (copy.root / mutant.path).read_text()
        after = mutant.edit.applied(before.encode())
        why = lists.equivalent.get((mutant.path, mutant.was, mutant.becomes))
        if why is not None:
            outcome, note = "equivalent", why
        else:
            copy.put(mutant.path, after)
            try:
                passes = copy.passes(lists.tests_of(mutant.path), limit_s)
            finally:
                copy.put(mutant.path, before)
            outcome = "survived" if passes else "killed"
            note = "took too long" if passes is None else " ".join(copy.failures()[:1])
        found[outcome].append(mutant)
        took_s = time.monotonic() - began_s
        say(f"{number:3} {outcome:10} {mutant.name} {took_s:.0f} s {note}".rstrip())
        if outcome == "survived":
            for line in difference(before, after):
                say(f"      {line}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure; return 0 if every fault was noticed, 1 if one was not, 2 if no run was possible."""
    parser = argparse.ArgumentParser(prog="python -m bench.mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the sample (1)")
    parser.add_argument("--count", type=int, default=40, help="faults to try (40)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="modules, as clevrd/core/*")
    parser.add_argument("--limit-s", type=float, default=180.0, help="for the tests of one (180)")
    parser.add_argument(
        "--known-good", action="store_true", help="don't run the tests without a fault first"
    )
    options = parser.parse_args(arguments)

    lists = read_lists()
    mutants = all_mutants(ROOT, options.only)
    count = min(options.count, len(mutants))
    chosen = random.Random(options.seed).sample(mutants, count)  # noqa: S311  # a sample, no secret
    tests = sorted({test for mutant in chosen for test in lists.tests_of(mutant.path)})
    if not tests:
        print(f"No module matches {options.only!r}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="clevrd-mutants-") as folder:
        copy = copied(ROOT, Path(folder))
        print(f"{len(chosen)} of {len(mutants)} mutants, seed {options.seed}", flush=True)
        # Tests that fail without a fault would be taken for tests that noticed one.
        failing = [] if options.known_good else failing_files(copy, tests, options.limit_s)
        if failing:
            print(f"These fail without a fault: {' '.join(failing)}", file=sys.stderr)
            return 2
        found = measure(copy, chosen, lists, options.limit_s, lambda line: print(line, flush=True))
    killed, survived = len(found["killed"]), len(found["survived"])
    rate = 100 * killed / (killed + survived) if killed + survived else 100.0
    counts = ", ".join(f"{len(each)} {outcome}" for outcome, each in found.items())
    print(f"{counts}: {rate:.0f} % of those that mean something else were noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
