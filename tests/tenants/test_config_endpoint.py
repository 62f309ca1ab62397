"""GET /config, and clevrd checkconfig --url, which compares its answer with the file."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from daemons import DaemonProcess, daemon_process, running
from keys import ADMIN, WEB, access, bearer
from tls import make_pair

from clevrd.cli import main
from clevrd.config import SETTINGS, Config, Loaded
from clevrd.fingerprints import fingerprint
from clevrd.tenants.keys import NewKey, new_key

KEY = new_key()


# --- the endpoint ---


@pytest.mark.parametrize("raw_paths", [True, False])
async def test_operator_sees_every_setting_and_no_digest(raw_paths: bool) -> None:
    """And nobody else does, where credentials are required."""
    async with running(access=access(), raw_paths=raw_paths, max_topics=77) as daemon:
        url = f"{daemon.url}/config"
        answers = []
        for headers in ({}, bearer(WEB), bearer(ADMIN)):
            async with daemon.http.get(url, headers=headers) as answer:
                answers.append((answer.status, await answer.text(), answer.headers))

    (none, _, _), (web, refusal, _), (admin, text, fields) = answers
    shown = json.loads(text)
    assert (none, web, admin) == (401, 403, 200)
    assert "lacks the permission admin" in refusal
    assert fields["Cache-Control"] == "no-store"
    assert shown["settings"].keys() == {setting.field for setting in SETTINGS}
    assert shown["settings"]["max_topics"] == {
        "value": 77,
        "source": "default",
        "needs_restart": True,
    }
    assert shown["reloads"] == 0
    assert shown["tls"] == {
        "certificates": [],
        "client_ca_file": "",
        "client_certificates": "none",
    }
    assert [tenant["name"] for tenant in shown["tenants"]] == ["acme", "other"]
    assert shown["tenants"][0]["keys"][0]["publish"] == ["orders.*"]
    assert WEB.sha256 not in text


async def test_answer_tells_of_the_rules_that_came_last() -> None:
    """As they are in force, not as they were at the start."""
    async with running(access=access()) as daemon:
        now = Config(allowed_origins="https://a.example", tls_cert_file="/b.pem", max_topics=1)
        sources = {setting.field: "file /c.toml" for setting in SETTINGS}
        loaded = Loaded(now, sources, [])
        await daemon.server.access.apply(access("open"), Path(), loaded)
        shown = await daemon.get_json("/config")

    assert shown["auth"]["mode"] == "open"
    assert shown["settings"]["allowed_origins"]["value"] == "https://a.example"
    assert shown["settings"]["allowed_origins"]["needs_restart"] is False
    assert shown["settings"]["allowed_origins"]["source"] == "file /c.toml"
    assert shown["settings"]["tls_cert_file"]["value"] == "/b.pem"
    assert shown["settings"]["max_topics"]["value"] == Config().max_topics
    assert shown["reloads"] == 1


# --- clevrd checkconfig --url ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "clevrd.toml"
    write(path)
    return path


def write(path: Path, made: NewKey = KEY, more: str = "", settings: str = "") -> None:
    """Write a configuration with one key, which may operate the daemon."""
    path.write_text(
        f'{settings}\n[auth]\nmode = "required"\n[[tenants]]\nname = "acme"\n[[tenants.keys]]\n'
        f'id = "ops"\nsha256 = "{made.sha256}"\nadmin = true\n{more}'
    )


@pytest.fixture
def daemon(file: Path) -> Iterator[DaemonProcess]:
    """Return a daemon in a process of its own, with a variable and the file."""
    with daemon_process(CLEVRD_CONFIG=str(file), CLEVRD_MAX_TOPICS="500") as started:
        yield started


class Compared(NamedTuple):
    """What the command left: its exit code, and what it printed."""

    code: int
    printed: str
    errors: str


Compare = Callable[..., Compared]


@pytest.fixture
def compare(
    daemon: DaemonProcess, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Compare:
    """Return what runs clevrd checkconfig --url, with a key in its environment."""
    for name in [name for name in os.environ if name.startswith("CLEVRD_")]:
        monkeypatch.delenv(name)

    def compare(*argv: str, key: str | None = KEY.secret) -> Compared:
        monkeypatch.delenv("CLEVRD_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("CLEVRD_KEY", key)
        capfd.readouterr()
        code = main(["checkconfig", "--url", daemon.url, *argv])
        return Compared(code, *capfd.readouterr())

    return compare


def test_checkconfig_shows_what_a_reload_and_a_restart_would_change(
    daemon: DaemonProcess, compare: Compare, file: Path
) -> None:
    """Exit code 1 until the file is in force; settings of the environment are no difference."""
    same = compare()
    write(file, more='publish = ["a"]\n', settings="ring_messages = 600\nmax_topics = 9")
    differs = compare()
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.process.stderr is not None
    while "INFO reloaded" not in daemon.process.stderr.readline():
        pass
    reloaded = compare()

    assert (same.code, same.printed) == (0, f"The daemon works with what {file} has.\n")
    assert (differs.code, differs.printed.splitlines()) == (
        1,
        [
            "ring_messages: running 10000, file 600 (restart)",
            'tenants.acme.keys.ops.publish: running [], file ["a"] (reload)',
        ],
    )
    assert (reloaded.code, reloaded.printed.splitlines()) == (
        1,
        ["ring_messages: running 10000, file 600 (restart)"],
    )


def test_checkconfig_takes_another_file_and_a_key_from_a_file(
    compare: Compare, tmp_path: Path
) -> None:
    """A new file can be tried before it is in its place."""
    other, secret = tmp_path / "other.toml", tmp_path / "ops.key"
    write(other, made=new_key())
    secret.write_text(KEY.secret + "\n")
    secret.chmod(0o600)

    finished = compare("--config", str(other), "--key-file", str(secret), key=None)

    assert finished.code == 1
    assert finished.printed == "tenants.acme.keys.ops: the secret differs (reload)\n"


def test_what_can_not_be_compared_is_one_clear_line(compare: Compare, tmp_path: Path) -> None:
    """With an exit code that is not the one of a difference, and no secret."""
    wrong, shared = new_key().secret, tmp_path / "shared.key"
    shared.write_text(KEY.secret)
    shared.chmod(0o644)
    bad = tmp_path / "bad.toml"
    bad.write_text("ring_mesages = 1\n")
    cases = [
        (compare(key=None), 69, "Authorization: Bearer or X-API-Key. Give a key"),
        (compare(key=wrong), 69, "(401): The credential is not known here"),
        (compare(key="two words"), 78, "The variable CLEVRD_KEY has no key and no token"),
        (compare("--key-file", str(shared)), 78, "chmod 640"),
        (compare("--key-file", str(tmp_path / "no")), 78, "No such file"),
        (compare("--config", str(bad)), 78, "did you mean ring_messages?"),
        (compare("--max-topics", "5"), 2, "leave --max-topics out"),
        (compare("--ca-file", str(tmp_path / "no")), 2, "No such file"),
        (compare("--ca-file", str(bad)), 2, "holds no certificate in PEM"),
        (compare("--url", "nonsense"), 2, "The URL must be like"),
        (compare("--url", "127.0.0.1:1"), 69, "Nobody answers at http://127.0.0.1:1"),
    ]
    for finished, code, words in cases:
        assert (finished.code, finished.printed) == (code, "")
        assert finished.errors.count("\n") == 1
        assert words in finished.errors
        assert KEY.secret not in finished.errors
        assert wrong not in finished.errors
        assert "two words" not in finished.errors


def test_checkconfig_asks_over_tls_and_compares_webhooks(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that the system does not trust is named; nobody is shown a webhook's path."""
    pair = make_pair(tmp_path)
    secret = tmp_path / "hook.key"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    hook = (
        '[[webhooks]]\nid = "billing"\nurl = "https://b.example/hidden"\n'
        'secret_file = "hook.key"\ntenant = "acme"\n'
    )
    write(file, more=hook)
    for name in [name for name in os.environ if name.startswith("CLEVRD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CLEVRD_KEY", KEY.secret)
    variables = {
        "CLEVRD_CONFIG": str(file),
        "CLEVRD_TLS_CERT_FILE": str(pair.cert),
        "CLEVRD_TLS_KEY_FILE": str(pair.key),
    }
    with daemon_process(**variables) as daemon:
        asks = ["checkconfig", "--url", f"https://localhost:{daemon.port}"]
        codes = [main(asks), main([*asks, "--ca-file", str(pair.cert)])]
        untrusted = capfd.readouterr()
        write(file, more=f'{hook}events = ["vacated"]\n{hook.replace("billing", "new")}')
        codes.append(main([*asks, "--ca-file", str(pair.cert)]))
        differs = capfd.readouterr()
    plain = [main(["checkconfig", *more]) for more in (["--config", str(file)], ["--ca-file", "x"])]
    shown = capfd.readouterr()

    assert codes == [69, 0, 1]
    assert "certificate" in untrusted.err
    assert differs.out.splitlines() == [
        'webhooks.billing.events: running ["joined", "left", "occupied", "vacated"], file'
        ' ["vacated"] (restart)',
        "webhooks.new: only in the file (restart)",
    ]
    assert plain == [0, 2]
    mark = fingerprint("https://b.example/hidden")
    assert f"webhook          billing (https://b.example#{mark}, events of tenant" in shown.out
    assert "name the daemon by --url, too" in shown.err
    assert "hidden" not in shown.out + differs.out + untrusted.out
