"""Engines' libraries that are too old: the daemon says which, and what to do."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from daemons import ROOT

from clevrd.errors import ConfigError
from clevrd.journal.library_versions import LEAST, refuse_older


@pytest.mark.parametrize(
    ("version", "is_old"),
    [("1.9.2", True), ("2.15.9", True), ("2.16.0rc1", False), ("2.16", False), ("10.0", False)],
)
def test_version_is_judged(monkeypatch: pytest.MonkeyPatch, version: str, is_old: bool) -> None:
    """By its numbers, and not by its letters."""
    monkeypatch.setattr(metadata, "version", lambda _package: version)

    try:
        refuse_older("kafka")
        said = ""
    except ConfigError as error:
        said = str(error)

    assert bool(said) is is_old
    assert not is_old or f"confluent-kafka is {version}, and clevrd needs 2.16" in said


def test_versions_are_those_that_the_extras_ask_for() -> None:
    """Who installs an extra has libraries that are new enough."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    for extra, packages in LEAST.items():
        assert sorted(extras[extra]) == sorted(
            f"{name}>={least}" for name, least in packages.items()
        )


@pytest.mark.parametrize("extra", sorted(LEAST))
def test_daemon_with_an_old_library_does_not_start(extra: str) -> None:
    """It ends with one line, as with any other mistake of its configuration."""
    url = {"kafka": "kafka://h/t", "nats": "nats://h", "redis": "redis://h"}[extra]
    script = (
        "import sys; from importlib import metadata; metadata.version = lambda name: '0.1';"
        " from clevrd.entry import main;"
        f" sys.argv[1:] = ['serve', '--address', '127.0.0.1:0', '--journal', '{url}'];"
        " sys.exit(main())"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert f"is 0.1, and clevrd needs {next(iter(LEAST[extra].values()))}" in line
    assert f'pip install --upgrade "clevrd[{extra}]"' in line
