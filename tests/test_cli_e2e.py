"""The command line against real daemons: what it does, and how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from daemons import ROOT, DaemonProcess, daemon_process

from clevrd import __version__
from clevrd.config import SETTINGS
from clevrd.errors import CannotStart, ConfigError

Finished = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """Return a daemon that all tests of this module share, each with topics of its own."""
    with daemon_process() as started:
        yield started


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings from the commands."""
    for name in [name for name in os.environ if name.startswith("CLEVRD_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("ADDRESS", raising=False)
    monkeypatch.delenv("CLEVRD_ADDRESS", raising=False)
    monkeypatch.delenv("MAX_MEMORY_MB", raising=False)


def clevrd(*argv: str, given: str = "", **variables: str) -> Finished:
    """Run a command to its end, with ``given`` on standard input."""
    return subprocess.run(
        [sys.executable, "-m", "clevrd", *argv],
        cwd=ROOT,
        env={**os.environ, **variables},
        input=given,
        capture_output=True,
        text=True,
        timeout=20,
    )


@contextmanager
def started(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command in the background, and kill it if it is still there in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clevrd", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=5)


def line_of(process: subprocess.Popen[str]) -> dict[str, object]:
    """Return the next line that the command prints, which is JSON."""
    assert process.stdout is not None
    message: dict[str, object] = json.loads(process.stdout.readline())
    return message


def assert_one_clear_line(finished: Finished, code: int, *words: str) -> None:
    """Fail unless the command ended with ``code`` and one line that holds all the words."""
    assert finished.returncode == code, finished.stderr
    assert finished.stdout == ""
    assert finished.stderr.startswith("clevrd: ")
    assert finished.stderr.count("\n") == 1, finished.stderr
    for word in words:
        assert word in finished.stderr


# --- it works ------------------------------------------------------------------------------------


def test_published_message_is_printed_by_subscribe(daemon: DaemonProcess) -> None:
    """Two terminals: what one publishes, the other prints, one JSON line for each message."""
    at = ("--url", daemon.url)
    with started("subscribe", "greetings", "--count", "3", *at) as subscriber:
        first = clevrd("publish", "greetings", '{"hello": "wörld"}', *at)
        rest = clevrd("publish", "greetings", "-", *at, given='"two"\n[3,\t3]\n')
        messages = [line_of(subscriber) for _ in range(3)]
        code = subscriber.wait(10)

    assert (first.returncode, rest.returncode, code) == (0, 0, 0)
    assert json.loads(first.stdout)["offset"] == 1
    assert "published 2 of 2 records in " in rest.stderr
    assert [message["data"] for message in messages] == [{"hello": "wörld"}, "two", [3, 3]]
    assert [message["offset"] for message in messages] == [1, 2, 3]


def test_subscribe_takes_the_past_it_asks_for(daemon: DaemonProcess) -> None:
    """--last chooses where it begins, --count where it ends."""
    at = ("--url", daemon.url)
    clevrd("publish", "past", "-", *at, given="1\n2\n3\n4\n5\n")

    printed = clevrd("subscribe", "past", "--last", "3", "--count", "2", *at)

    assert [json.loads(line)["data"] for line in printed.stdout.splitlines()] == [3, 4]
    assert (printed.returncode, printed.stderr) == (0, "")


def test_topics_and_patterns_are_followed_by_one_command(daemon: DaemonProcess) -> None:
    """What is published to any of them is printed, with its key; what no pattern matches is not."""
    at = ("--url", daemon.url)
    clevrd("publish", "many.eu", '"old"', *at)
    wanted = ("many", "more", "--pattern", "many.*", "--count", "4")
    with started("subscribe", *wanted, *at) as subscriber:
        messages = [line_of(subscriber)]
        clevrd("publish", "many.eu.paid", "0", *at)
        for topic in ("many", "more", "many.us"):
            clevrd("publish", topic, f'"{topic}"', "--key", "EUR", *at)
            messages.append(line_of(subscriber))
        code = subscriber.wait(10)

    assert code == 0
    assert [(each["topic"], each["data"], each.get("key")) for each in messages] == [
        ("many.eu", "old", None),
        *((topic, topic, "EUR") for topic in ("many", "more", "many.us")),
    ]


def test_tenants_are_apart(daemon: DaemonProcess) -> None:
    """--tenant and CLEVRD_TENANT name whose topic it is."""
    at = ("--url", daemon.url)
    clevrd("publish", "shared", '"for a"', "--tenant", "a", *at)
    clevrd("publish", "shared", '"for b"', *at, CLEVRD_TENANT="b")

    printed = [
        clevrd("subscribe", "shared", "--count", "1", "--tenant", name, *at).stdout
        for name in ("a", "b")
    ]

    assert [json.loads(line)["data"] for line in printed] == ["for a", "for b"]
    assert [json.loads(line)["tenant_id"] for line in printed] == ["a", "b"]


def test_options_of_subscribe_are_understood_by_the_daemon(daemon: DaemonProcess) -> None:
    """Policy and buffer go through as the daemon spells them."""
    at = ("--url", daemon.url, "--count", "1")
    clevrd("publish", "options", "1", "--url", daemon.url)

    codes = [
        clevrd("subscribe", "options", "--policy", policy, "--buffer", "10", *at).returncode
        for policy in ("drop_oldest", "drop_newest", "circuit_breaker", "latest")
    ]

    assert codes == [0, 0, 0, 0]


def test_subscribe_survives_a_restart_of_the_daemon() -> None:
    """It reconnects by itself, and says that the topic began anew."""
    with daemon_process() as first:
        port, at = str(first.port), ("--url", first.url)
        with started("subscribe", "restarts", *at) as subscriber:
            clevrd("publish", "restarts", '"before"', *at)
            before = line_of(subscriber)
            assert first.stop() == 0

            with daemon_process(ADDRESS=f"127.0.0.1:{port}"):
                clevrd("publish", "restarts", '"after"', *at)
                after = line_of(subscriber)
                subscriber.send_signal(signal.SIGINT)
                _, told = subscriber.communicate(timeout=10)

    assert (before["data"], after["data"]) == ("before", "after")
    assert subscriber.returncode == 130
    assert "Traceback" not in told


def test_warnings_of_the_server_are_on_standard_error(daemon: DaemonProcess) -> None:
    """A topic that looks like a pattern is subscribed as it is, and told; the output is as ever."""
    at = ("--url", daemon.url)
    published = clevrd("publish", "warned.*", "1", *at)
    printed = clevrd("subscribe", "warned.*", "--count", "1", *at)

    assert "warnings" not in json.loads(published.stdout)
    assert json.loads(printed.stdout)["data"] == 1
    assert printed.stderr.startswith("clevrd: The topic 'warned.*' is taken as a name")
    assert printed.stderr.count("\n") == 1


def test_everything_works_over_a_unix_socket(tmp_path: Path) -> None:
    """The same commands with unix: as the URL; the socket of a killed daemon is no obstacle."""
    url = f"unix:{tmp_path / 'clevrd.sock'}"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "clevrd.sock"))

    with started("serve", "--address", url) as daemon:
        published = clevrd("publish", "t", "1", "--url", url, "--retry-for", "0")
        while published.returncode == 69 and daemon.poll() is None:
            published = clevrd("publish", "t", "1", "--url", url, "--retry-for", "0")
        printed = clevrd("subscribe", "t", "--count", "1", "--url", url)
        second = clevrd("serve", "--address", url)
        daemon.send_signal(signal.SIGTERM)
        code = daemon.wait(15)

    assert published.returncode == 0
    assert json.loads(printed.stdout)["data"] == 1
    assert_one_clear_line(second, CannotStart.exit_code, str(tmp_path), "in use")
    assert code == 0
    assert list(tmp_path.iterdir()) == []


def test_checkconfig_shows_what_serve_would_use(tmp_path: Path) -> None:
    """Every setting with its value and where that came from; the strongest source wins."""
    file = tmp_path / "clevrd.toml"
    file.write_text("ring_messages = 500\nlog_level = 'debug'\n")

    shown = clevrd(
        *("checkconfig", "--config", str(file), "--log-level", "error"), MAX_MEMORY_MB="512"
    )

    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in shown.stdout.splitlines()}
    assert shown.returncode == 0
    assert rows["ring_messages"] == ["500", f"file {file}"]
    assert rows["max_memory_mb"] == ["512", "environment MAX_MEMORY_MB"]
    assert rows["log_level"] == ["error", "flag --log-level"]
    assert rows["address"] == [":8080", "default"]
    assert set(rows) == {"setting", *(setting.field for setting in SETTINGS)}


def test_version_is_the_one_that_health_tells(daemon: DaemonProcess) -> None:
    """The command and the daemon are of the same release."""
    told = clevrd("version").stdout

    with urlopen(f"{daemon.url}/health", timeout=5) as answer:  # noqa: S310  # it is http
        health = json.load(answer)

    assert told == f"clevrd {__version__}\n"
    assert health["version"] == __version__


def test_daemon_says_where_it_listens_and_what_to_try() -> None:
    """The first lines of a new daemon name its address and three commands that work."""
    with started("serve", "--address", "127.0.0.1:0") as daemon:
        assert daemon.stderr is not None
        lines = [daemon.stderr.readline() for _ in range(4)]

    url = re.search(r"address=(\S+)", lines[0])
    assert url is not None
    assert f"clevrd subscribe demo --url {url[1]}" in lines[1]
    assert f"clevrd publish demo '{{\"hello\":1}}' --url {url[1]}" in lines[2]
    assert f"curl {url[1]}/metrics" in lines[3]


# --- it fails well -------------------------------------------------------------------------------


def test_port_in_use_is_one_clear_line(daemon: DaemonProcess) -> None:
    """The second daemon on a port says which port, why, and what to do."""
    second = clevrd("serve", ADDRESS=f"127.0.0.1:{daemon.port}")

    assert_one_clear_line(
        second, CannotStart.exit_code, f"127.0.0.1:{daemon.port}", "in use", "ADDRESS"
    )


@pytest.mark.parametrize(
    "address",
    ["192.0.2.1:9000", "unix:/nowhere/clevrd.sock", f"unix:{__file__}"],
)
def test_address_that_cannot_be_listened_on_is_one_clear_line(address: str) -> None:
    """An address of another machine, a missing directory, a file in the way."""
    refused = clevrd("serve", "--address", address)

    assert_one_clear_line(refused, CannotStart.exit_code, "Can't listen on", address[5:20])
    assert Path(__file__).is_file()


@pytest.mark.parametrize("command", ["serve", "checkconfig"])
def test_bad_configuration_is_a_clear_line_for_each_setting(command: str) -> None:
    """Each line names the setting, its source and what is allowed; nothing is started."""
    refused = clevrd(command, "--ping-interval-s", "-1", MAX_MEMORY_MB="lots", ADDRESS="8080")

    lines = refused.stderr.splitlines()
    assert refused.returncode == ConfigError.exit_code
    assert refused.stdout == ""
    assert len(lines) == 3
    assert all(line.startswith("clevrd: ") and "is not allowed: must" in line for line in lines)
    for words in ("flag --ping-interval-s", "environment MAX_MEMORY_MB", "environment ADDRESS"):
        assert words in refused.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], "invalid choice"),
        (["publish", "t"], "needs the data"),
        (["publish", "t", "{"], "Not JSON"),
        (["subscribe", "t", "--last", "-1"], "whole number"),
        (["serve", "--nonsense"], "unrecognized"),
    ],
)
def test_bad_usage_is_one_clear_line(argv: list[str], words: str) -> None:
    """Exit code 2, and a line that says what is meant."""
    assert_one_clear_line(clevrd(*argv), 2, words)


def test_exit_codes_tell_failures_apart() -> None:
    """Usage, configuration, and a machine that refuses have three codes, and none is 1."""
    assert len({1, 2, ConfigError.exit_code, CannotStart.exit_code}) == 4


@pytest.mark.parametrize("command", [["publish", "t", "1"], ["subscribe", "t"]])
def test_missing_daemon_is_one_clear_line(command: list[str]) -> None:
    """Nobody there: the line says who was not reached and why."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"

    assert_one_clear_line(clevrd(*command, "--url", url), 69, url, "refused")


def test_refusal_of_the_daemon_is_told_in_its_words(daemon: DaemonProcess) -> None:
    """What the daemon refuses is exit code 1 and its own sentence."""
    at = ("--url", daemon.url)

    assert_one_clear_line(clevrd("publish", "t", "null", *at), 1, "missing or null")
    assert_one_clear_line(clevrd("subscribe", "t", "--tenant", "a/b", *at), 1, "tenant's name")


def test_bad_records_are_counted_and_the_rest_is_published(daemon: DaemonProcess) -> None:
    """A stream with broken lines ends with 1, a line for each, and a true sum."""
    finished = clevrd("publish", "mixed", "-", "--url", daemon.url, given="1\n{\nnull\n4\n")

    told = finished.stderr.splitlines()
    assert finished.returncode == 1
    assert told[0].startswith("clevrd: line 2: Not JSON")
    assert told[1].startswith("clevrd: line 3: ")
    assert told[2].startswith("clevrd: published 2 of 4 records in ")


def test_interrupted_subscriber_ends_quietly(daemon: DaemonProcess) -> None:
    """Ctrl-C is no failure to be explained."""
    with started("subscribe", "quiet", "--url", daemon.url) as subscriber:
        clevrd("publish", "quiet", "1", "--url", daemon.url)
        line_of(subscriber)

        subscriber.send_signal(signal.SIGINT)
        _, told = subscriber.communicate(timeout=10)

    assert (subscriber.returncode, told) == (130, "")


def test_reader_of_the_output_may_leave(daemon: DaemonProcess) -> None:
    """`clevrd subscribe | head -1` ends when head does, without a word."""
    clevrd("publish", "head", "-", "--url", daemon.url, given="1\n2\n3\n")

    piped = subprocess.run(  # noqa: S602  # a pipe is what this is about
        f"{sys.executable} -m clevrd subscribe head --count 3 --url {daemon.url} | head -1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert json.loads(piped.stdout)["data"] == 1
    assert piped.stderr == ""
