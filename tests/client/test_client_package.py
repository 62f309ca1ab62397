"""The client as it is installed: typed, without the daemon, and where the daemon can't run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from daemons import ROOT
from packaging.requirements import Requirement

SCRIPT = """
import asyncio
from clevrd.client import Client, Gap, Message, Position, Published
from clevrd.client import sync


async def read() -> None:
    async with Client("127.0.0.1:8080") as client:
        answer: Published = await client.publish("t", {"n": 1})
        async for item in client.subscribe("t", last=1):
            match item:
                case Message(offset=offset):
                    number: int = offset
                    numbers: list[int] = item.decode(list[int])
                case Gap(count=count):
                    missing: int | None = count
        past = client.history("t", since="5m")
        async for each in past:
            behind: Position | None = past.position
        cleared: Position = await client.clear("t")


def main() -> None:
    with sync.Client("127.0.0.1:8080") as client, client.subscribe("t") as items:
        published: sync.Published = client.publish("t", 1)
        for item in items:
            place: Position | None = items.position
            taken: sync.Message | sync.Gap = item
        with client.publisher() as publisher:
            offset: int = publisher.publish("t", 1, ttl_s=60).result(timeout_s=1).offset
        names: list[str] = [listed.topic for listed in client.topics()]
    wrong: int = client.publish("t", 1)


asyncio.run(read())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, as `pip wheel` builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools builds within the sources and takes in what earlier builds left.
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "clevrd", folder / "clevrd")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("clevrd-*.whl")
    return built


@pytest.mark.long
@pytest.mark.timeout(150)
def test_installed_client_is_typed(wheel: Path, tmp_path: Path) -> None:
    """mypy takes the types of both clients from the package, and finds the one mistake."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(packages)
    # The libraries underneath are those of the tests.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "script.py").write_text(SCRIPT)

    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")),
            *("--python-executable", str(environment / "bin" / "python"), "script.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.stdout.splitlines()[:-1] == [
        "script.py:32: error: Incompatible types in assignment (expression has type"
        ' "Published", variable has type "int")  [assignment]'
    ]


def test_import_loads_nothing_of_the_daemon() -> None:
    """A client is imported where the daemon's parts can't be, and where time counts."""
    code = "import clevrd.client.sync, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout))

    ours = {name for name in loaded if name.split(".")[0] == "clevrd"}
    rest = {name for name in ours if not name.startswith("clevrd.client")}
    # Names of topics and patterns, and times to live, which the daemon and its clients check alike.
    assert rest == {
        *("clevrd", "clevrd.errors", "clevrd.core", "clevrd.core.patterns", "clevrd.core.names"),
        "clevrd.core.ttl",
    }
    assert not {"uvloop", "psutil", "aiohttp.web", "aiohttp.web_app", "resource"} & loaded


@pytest.mark.parametrize(
    ("system", "python", "is_wanted"),
    [
        ("linux", "CPython", True),
        ("darwin", "CPython", True),
        ("win32", "CPython", False),
        ("linux", "PyPy", False),
    ],
)
def test_uvloop_is_asked_for_only_where_it_has_a_wheel(
    system: str, python: str, is_wanted: bool
) -> None:
    """Elsewhere the installation would fail for a client that does not need it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = (
        requirement
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "uvloop"
    )

    assert wanted.marker is not None
    place = {"sys_platform": system, "platform_python_implementation": python}
    assert wanted.marker.evaluate(place) is is_wanted


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        ("sys.modules['uvloop'] = None", "clevrd: The daemon needs uvloop, which is not installed"),
        ("os.name = 'nt'", "clevrd: the daemon and its commands need Linux or macOS"),
    ],
)
def test_daemon_that_can_not_run_here_says_so(before: str, sentence: str) -> None:
    """In one line, with the exit code of what can't start, and says that the client can."""
    code = f"import os, sys; {before}; sys.argv[1:] = ['serve', '--address', '127.0.0.1:0']; "
    done = subprocess.run(
        [sys.executable, "-c", code + "from clevrd.entry import main; sys.exit(main())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=25,
    )

    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
    assert done.stderr.startswith(sentence)
    assert "clevrd.client, works" in done.stderr


def test_client_is_imported_without_uvloop() -> None:
    """As on Windows, where there is no fork and no epoll either."""
    code = (
        "import os, sys; sys.modules['uvloop'] = sys.modules['psutil'] = None;"
        " del os.fork, os.register_at_fork; import clevrd.client.sync"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
