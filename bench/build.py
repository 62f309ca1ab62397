"""Compiles the C programs of bench/load when a source is newer than the program."""

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "load"
BUILD = HERE / ".build"
CFLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Wconversion")

# Program -> its modules; each module is a .c file and includes only modules behind it.
PROGRAMS = {
    "load": (
        *("main", "report", "turn", "pub", "sub", "nats", "conn"),
        *("options", "payload", "stream", "http", "wsframe", "hist"),
    ),
    "floor": ("floor", "http"),
}


class CannotBuild(Exception):
    """There is no compiler, or it reported an error; the message is one line."""


def newest_source_ns() -> int:
    """Return the time of the last change to any source or header."""
    return max(path.stat().st_mtime_ns for path in SOURCES.iterdir())


def is_fresh(program: Path) -> bool:
    """True when the program exists and is newer than all its sources."""
    return program.exists() and program.stat().st_mtime_ns > newest_source_ns()


def compile_program(name: str, target: Path) -> None:
    """Compile one program to `target`."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotBuild(
            "the load generator is C: install a compiler (apt-get install gcc libc6-dev)"
        )
    BUILD.mkdir(exist_ok=True)
    (BUILD / ".gitignore").write_text("*\n")
    sources = [str(SOURCES / f"{module}.c") for module in PROGRAMS[name]]
    done = subprocess.run(  # noqa: S603 - our own sources, the system's compiler
        [compiler, *CFLAGS, "-o", str(target), *sources],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBuild(f"{name} does not compile: {done.stderr.strip().splitlines()[0]}")


def build_all() -> None:
    """Compile programs that are out of date, so that no measurement waits for a compiler."""
    for name in PROGRAMS:
        program(name)


def program(name: str) -> Path:
    """Return the path of a program of PROGRAMS; compile it if it is out of date."""
    target = BUILD / name
    if not is_fresh(target):
        compile_program(name, target)
    return target
