"""The C modules of the load generator call each other in one direction."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.build import PROGRAMS, SOURCES

# A function that a header declares: its name before a bracket, at the beginning of a line.
DECLARED = re.compile(r"^(?!static|#|/| |\})[\w ]+[ *](\w+)\(", re.MULTILINE)
DEFINED = re.compile(r"^(?!static|#|/| |\})[\w ]+[ *](\w+)\([^;]*?\) \{", re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def code_of(path: Path) -> str:
    return COMMENT.sub("", path.read_text())


@pytest.mark.parametrize("program", PROGRAMS)
def test_modules_call_only_those_behind_them(program: str) -> None:
    """The list of a program's modules is their order; none asks one before it."""
    modules = PROGRAMS[program]
    defined = {name: set(DEFINED.findall(code_of(SOURCES / f"{name}.c"))) for name in modules}

    upward = [
        f"{module} calls {name} of {above}"
        for at, module in enumerate(modules)
        for above in modules[:at]
        for name in defined[above]
        if re.search(rf"\b{name}\(", code_of(SOURCES / f"{module}.c"))
    ]

    assert sum(map(len, defined.values())) > len(modules), "the functions are found"
    assert upward == []


def test_functions_are_declared_in_the_header_of_their_module() -> None:
    """So that what a module includes is what it asks."""
    for module in PROGRAMS["load"]:
        header = SOURCES / f"{module}.h"
        if header.exists():
            defined = set(DEFINED.findall(code_of(SOURCES / f"{module}.c")))
            assert set(DECLARED.findall(code_of(header))) == defined, module
