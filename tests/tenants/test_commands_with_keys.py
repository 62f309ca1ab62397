"""clevrd publish and clevrd subscribe against a daemon that asks for a credential."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import DaemonProcess, daemon_process

from clevrd.cli import main
from clevrd.tenants.keys import new_key

KEY = new_key()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Return a daemon that takes one key."""
    path = tmp_path_factory.mktemp("config") / "clevrd.toml"
    path.write_text(
        '[auth]\nmode = "required"\n[[tenants]]\nname = "acme"\n[[tenants.keys]]\nid = "web"\n'
        f'sha256 = "{KEY.sha256}"\npublish = ["orders"]\nsubscribe = ["**"]\n'
    )
    with daemon_process(CLEVRD_CONFIG=str(path)) as started:
        yield started


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings from the commands."""
    for name in [name for name in os.environ if name.startswith("CLEVRD_")]:
        monkeypatch.delenv(name)


def in_variable(secret: str, monkeypatch: pytest.MonkeyPatch, _: Path) -> list[str]:
    monkeypatch.setenv("CLEVRD_KEY", secret)
    return []


def in_file(secret: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    # The file is stronger than the variable.
    monkeypatch.setenv("CLEVRD_KEY", new_key().secret)
    path = folder / "web.key"
    path.write_text(secret + "\n")
    path.chmod(0o600)
    return ["--key-file", str(path)]


@pytest.mark.parametrize("give", [in_variable, in_file])
def test_key_is_sent_by_the_commands(
    give: Callable[[str, pytest.MonkeyPatch, Path], list[str]],
    daemon: DaemonProcess,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """From a file or from a variable, and the messages are the key's tenant's."""
    more = ["--url", daemon.url, *give(KEY.secret, monkeypatch, tmp_path)]

    published = main(["publish", "orders", '"hello"', *more])
    capfd.readouterr()
    subscribed = main(["subscribe", "orders", "--last", "1", "--count", "1", *more])

    message = json.loads(capfd.readouterr().out)
    assert (published, subscribed) == (0, 0)
    assert (message["tenant_id"], message["data"]) == ("acme", "hello")


@pytest.mark.parametrize("argv", [["publish", "orders", "1"], ["subscribe", "orders"]])
def test_refused_key_is_one_line_without_the_key(
    argv: list[str],
    daemon: DaemonProcess,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With and without one."""
    wrong = new_key().secret
    for secret, words in ((wrong, "ask the operator for another.\n"), ("", "by --key-file")):
        monkeypatch.setenv("CLEVRD_KEY", secret)

        code = main([*argv, "--url", daemon.url])

        printed, errors = capfd.readouterr()
        assert (code, printed) == (1, "")
        assert words in errors
        assert wrong not in errors


def test_file_that_others_may_read_is_refused(
    daemon: DaemonProcess, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before it is sent anywhere."""
    path = tmp_path / "web.key"
    path.write_text(KEY.secret)
    path.chmod(0o644)

    code = main(["publish", "orders", "1", "--url", daemon.url, "--key-file", str(path)])

    assert code == 78
    assert f"chmod 640 {path}" in capfd.readouterr().err


def test_no_option_takes_the_secret_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """All users of a machine can see what its processes were started with."""
    for words in (["--token", KEY.secret], [f"--api-key={KEY.secret}"], ["--bearer", KEY.secret]):
        assert main(["subscribe", "orders", *words]) == 2

        errors = capfd.readouterr().err
        assert "take --key-file FILE or the variable CLEVRD_KEY" in errors
        assert KEY.secret not in errors
