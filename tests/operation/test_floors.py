"""A module imports only from lower floors. The sources are read, not run, so that imports inside
functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "clevrd"
# A row of the table of modules: its floor, and the modules on it.
FLOOR_ROW = re.compile(r"^\| (\d+) \| ((?:`[\w/]+`(?:, )?)+) \|", re.MULTILINE)


def read_floors(document: str) -> dict[str, int]:
    """Return the floor of each module that stands alone, and of each folder.

    Fails if the modules of a folder are on different floors.
    """
    floors = {"": -1}  # the package itself: its version, nothing else
    for floor, modules in FLOOR_ROW.findall(document):
        for module in re.findall(r"`([\w/]+)`", modules):
            place = module.partition("/")[0]
            assert floors.setdefault(place, int(floor)) == int(floor), place
    return {**floors, "__main__": max(floors.values()) + 1}


FLOORS = read_floors((PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8"))
# The only steps sideways that leave a folder: a wrong setting or address is one of the errors, an
# address is a setting, and the command line is a user of the client.
SIDEWAYS = {
    ("journal", "metrics"),
    ("config", "errors"),
    ("addresses", "errors"),
    ("config", "addresses"),
    ("config", "small_files"),
    ("cli", "client"),
}
# The core is pure: it has no loop, no socket, no clock and no environment.
NOT_FOR_CORE = {"aiohttp", "asyncio", "os", "socket", "threading", "time", "uvloop"}
IMPORT_EACH_ALONE = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [key for key in sys.modules if key.split(".")[0] == "clevrd"]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""


def module_name(path: Path) -> str:
    """Return the dotted name of the module in ``path``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that ``path`` imports; `from a import b` gives a and a.b."""
    here = path.relative_to(PACKAGE.parent).parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # One dot is the module's own folder: its path less the file name.
            base = ".".join([*here[: -node.level or 0], *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


IMPORTS = {module_name(path): imports_of(path) for path in sorted(PACKAGE.rglob("*.py"))}


def place_of(module: str) -> str:
    """Return what the map calls ``module``: its own name, or its folder's."""
    return module.split(".")[1] if "." in module else ""


def may_import(importer: str, imported: str) -> bool:
    """Say whether the floors allow this import."""
    here, there = place_of(importer), place_of(imported)
    share_folder = here == there and (PACKAGE / here).is_dir()
    return FLOORS[there] < FLOORS[here] or share_folder or (here, there) in SIDEWAYS


def test_every_module_is_on_the_map() -> None:
    """A new module gets its floor before it gets importers."""
    assert {place_of(module) for module in IMPORTS} <= FLOORS.keys()


def test_imports_lead_to_lower_floors() -> None:
    """No import leads up, and sideways only within a folder."""
    wrong = [
        f"{importer} imports {imported}"
        for importer, names in IMPORTS.items()
        for imported in sorted(names & IMPORTS.keys())
        if not may_import(importer, imported)
    ]

    assert wrong == []


def test_imports_have_no_cycle() -> None:
    """Every module can be understood, and loaded, after the ones it imports."""
    inside = {name: names & IMPORTS.keys() for name, names in IMPORTS.items()}

    try:
        TopologicalSorter(inside).prepare()
        cycle = None
    except CycleError as error:
        cycle = error.args[1]

    assert cycle is None


def test_core_is_pure() -> None:
    """Nothing in the core can block, wait, or ask what time it is."""
    impure = {
        module: banned
        for module, names in IMPORTS.items()
        if place_of(module) == "core"
        if (banned := {name.split(".")[0] for name in names} & NOT_FOR_CORE)
    }

    assert impure == {}


# Each module takes up to 0.1 s of CPU.
@pytest.mark.long
@pytest.mark.timeout(300)
def test_each_module_can_be_imported_first(tmp_path: Path) -> None:
    """No module relies on another having been imported before it."""
    # Compiled once, not for each import, whatever the environment says about bytecode.
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_ALONE, *IMPORTS],
        cwd=PACKAGE.parent,
        env={**os.environ, **bytecode},
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stderr


def test_messages_are_read_by_offset_in_one_place() -> None:
    """A topic alone asks its ring for messages, so that a log can stand behind it.

    What a planned restart saves is the ring itself.
    """
    reads = re.compile(r"\bring\.(?:frames|take|last_before)\(")

    places = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if reads.search(path.read_text(encoding="utf-8"))
    }

    assert places == {"core/topic.py", "restart/format.py"}
