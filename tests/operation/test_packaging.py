"""What is published: the source distribution, the wheel, and the page on an index."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from daemons import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make both, as `make dist` does but from files of this process alone."""
    folder = tmp_path_factory.mktemp("dist")
    # Not from the tree itself: setuptools would leave build/ behind, and take from it.
    source = folder / "source"
    for name in _tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    # With the setuptools of the tests: fetching another one takes longer than all the rest.
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def _tracked() -> list[str]:
    """Return the files of a clone, or of an unpacked source distribution."""
    if not (ROOT / ".git").exists():
        sources = (ROOT / "clevrd.egg-info" / "SOURCES.txt").read_text().splitlines()
        return [name for name in sources if not name.startswith("clevrd.egg-info/")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def _sdist(folder: Path) -> tarfile.TarFile:
    (path,) = folder.glob("clevrd-*.tar.gz")
    return tarfile.open(path)


def _wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob("clevrd-*.whl")
    return zipfile.ZipFile(path)


def _metadata(folder: Path) -> Message:
    with _wheel(folder) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(wheel.read(name))


def _imported() -> set[str]:
    """Return the modules that clevrd imports and that are neither Python's nor its own."""
    modules: set[str] = set()
    for path in (ROOT / "clevrd").rglob("*.py"):
        # The fixtures are a plug-in of pytest's, which is there when it loads them.
        if path.match("clevrd/testing/fixtures.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules.update(each.name for each in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                modules.add(node.module)
    own = {*sys.stdlib_module_names, "clevrd"}
    return {each for each in modules if each.partition(".")[0] not in own}


def _distribution_of(module: str) -> str:
    """Return the name of what is installed and has ``module``; several share a top package."""
    found = set(packages_distributions()[module.partition(".")[0]])
    if len(found) > 1:
        spec = find_spec(module)
        assert spec is not None
        origin = str(spec.origin)
        found = {
            name
            for name in found
            if any(str(each.locate()) == origin for each in distribution(name).files or ())
        }
    (name,) = found
    return name.lower().replace("_", "-")


def test_each_library_that_is_imported_is_named() -> None:
    """In the dependencies or an extra: what another library needs today it may not tomorrow."""
    extras = dict(PROJECT["optional-dependencies"])
    of_dev = set(map(_name_of, extras.pop("dev")))
    of_extras = {_name_of(each) for extra in extras.values() for each in extra}
    needed = set(map(_name_of, PROJECT["dependencies"]))

    imported = {_distribution_of(module) for module in _imported()}

    assert imported - needed - of_extras == set()
    # The tests run with all extras.
    assert of_extras <= of_dev


def _name_of(requirement: str) -> str:
    return re.split(r"[\[<>=;~ ]", requirement)[0].lower()


@pytest.mark.long
@pytest.mark.timeout(150)
def test_source_distribution_is_what_a_clone_has(dist: Path, tmp_path: Path) -> None:
    """So its tests run: those that look at service files and use helpers do so here."""
    with _sdist(dist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if name.count("/")}
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    tests = ["operation/test_service_files.py", "cli/test_config.py", "http/test_framing.py"]

    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(f"tests/{name}" for name in tests)],
        cwd=unpacked,
        capture_output=True,
        text=True,
        check=False,
    )

    assert set(_tracked()) <= names
    assert finished.returncode == 0, finished.stdout[-3_000:]


def test_wheel_has_the_package_and_nothing_else(dist: Path) -> None:
    """With what is no module: the pages' files, the completion scripts, the mark of types."""
    with _wheel(dist) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}

    package = {name for name in _tracked() if name.startswith("clevrd/")}
    assert names == package


def test_metadata_says_what_it_is_and_where_it_runs(dist: Path) -> None:
    """Every Python that the workflow tests on, from the oldest that installs; and where to look."""
    metadata = _metadata(dist)
    versions = re.findall(r'"(3\.\d+)"', re.findall(r"python: \[(.*)\]", WORKFLOW.read_text())[0])
    classifiers = metadata.get_all("Classifier") or []
    prefix = "Programming Language :: Python :: 3."

    assert [f"{prefix}{v[2:]}" for v in versions] == [c for c in classifiers if prefix in c]
    assert metadata["Requires-Python"] == f">={versions[0]}"
    assert "Typing :: Typed" in classifiers
    links = dict(url.split(", ") for url in metadata.get_all("Project-URL") or [])
    assert set(links) == {"Source", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(links["Source"]) for url in links.values())


def test_links_of_the_page_lead_to_files_of_the_repository(dist: Path) -> None:
    """On an index there is no docs/ beside the page, so a relative link would lead nowhere."""
    page = _metadata(dist).get_payload()
    assert isinstance(page, str)
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    base = re.escape(PROJECT["urls"]["Source"])

    own = [match for link in links if (match := re.fullmatch(rf"{base}/(\w+)/main/(.+)", link))]
    assert all(re.match(r"https?://|#", link) for link in links)
    assert len(own) > 10
    for match in own:
        name = match[2].partition("#")[0]
        assert (ROOT / name).exists(), name
        assert match[1] == ("raw" if name.endswith((".svg", ".png")) else "blob")


def test_workflow_runs_what_a_developer_runs() -> None:
    """Nothing is installed, tested or built there in a way of its own."""
    commands = re.findall(r"run: (.*)", WORKFLOW.read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert commands[:2] == ["make check", "make test"]
    assert {command.removeprefix("make ") for command in commands} <= targets
