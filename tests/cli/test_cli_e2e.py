"""The command line against real daemons: what it does, and how it fails."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pty
import re
import shlex
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
from fake_server import message, subscribed

from clevrd import __version__
from clevrd.config import SETTINGS
from clevrd.errors import CannotStart, ConfigError

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
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


_ENDS = {"history": (), "subscribe": ("--count", "1")}


def test_history_prints_what_there_is_and_ends(daemon: DaemonProcess) -> None:
    """All of it, or from where it is told on; at its end it tells the position to go on behind."""
    at = ("--url", daemon.url)
    clevrd("publish", "had", "-", "--ttl", "3600", *at, given='1\n{"a":\t2}\n"x"\n')

    whole = clevrd("history", "had", *at)
    told = re.fullmatch(r"clevrd: printed 3 messages up to position=(\S+:3)\n", whole.stderr)
    assert told, whole.stderr
    clevrd("publish", "had", '"y"', *at)
    texts = clevrd("history", "had", "--last", "2", "--raw", *at)
    next_one = clevrd("history", "had", "--position", told[1], *at)
    limited = clevrd("history", "had", "--since", "all", "--limit", "2", *at)
    clevrd("publish", "had", '"z"', "--header", "ce-type: paid", "--header", "ce-id:a:1", *at)
    for command in ("history", "subscribe"):
        printed = clevrd(command, "had", "--last", "1", "--headers", *at, *_ENDS[command])
        (line,) = printed.stdout.splitlines()
        assert json.loads(line)["headers"] == {"ce-type": "paid", "ce-id": "a:1"}

    messages = [json.loads(line) for line in whole.stdout.splitlines()]
    assert [(each["data"], each["ttl_s"]) for each in messages] == [
        *((1, 3600), ({"a": 2}, 3600), ("x", 3600))
    ]
    assert texts.stdout == "x\ny\n"
    assert [json.loads(line)["offset"] for line in next_one.stdout.splitlines()] == [4]
    assert next_one.stderr.startswith("clevrd: printed 1 message up to position=")
    assert limited.stdout == "".join(whole.stdout.splitlines(keepends=True)[:2])
    assert {each.returncode for each in (whole, texts, next_one, limited)} == {0}
    assert_one_clear_line(clevrd("history", "none", *at), 1, "There is no such topic")


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


def test_lines_of_text_go_through_unchanged(daemon: DaemonProcess) -> None:
    """`publish --text` and `subscribe --raw` are a pipe over the network."""
    lines = ['say "hi"', "", "é \\ \t", "[1", "null", " x "]

    published = clevrd(
        "publish", "lines", "-", "--text", "--url", daemon.url, given="\n".join(lines)
    )
    one = clevrd("publish", "lines", "--text", "last\nline", "--url", daemon.url)
    clevrd("publish", "lines", '{"a":\n 1}', "--url", daemon.url)
    printed = clevrd("subscribe", "lines", "--raw", "--count", "8", "--url", daemon.url)

    assert (published.returncode, one.returncode) == (0, 0)
    assert printed.stdout.splitlines() == [*lines, "last", "line", '{"a":  1}']


def test_text_that_is_not_utf_8_is_a_bad_line(daemon: DaemonProcess) -> None:
    """It has the number of its line, and the rest is published."""
    finished = subprocess.run(
        [*(sys.executable, "-m", "clevrd", "publish", "odd", "-", "--text"), "--url", daemon.url],
        cwd=ROOT,
        input=b"a\n\xff\nb\r\n",
        capture_output=True,
        timeout=20,
    )
    printed = clevrd("subscribe", "odd", "--raw", "--count", "2", "--url", daemon.url)

    assert finished.returncode == 1
    assert b"line 2: Not UTF-8 at byte 0" in finished.stderr
    assert printed.stdout == "a\nb\n"


def test_terminal_hears_of_the_subscription_and_is_not_written_to_by_publishers(
    daemon: DaemonProcess,
) -> None:
    """Who waits sees that it is subscribed; escape sequences in a text are shown, not obeyed."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "clevrd", "subscribe", "shown", "--pattern", "shown.*"),
            *("--raw", "--count", "1", "--url", daemon.url),
        ],
        cwd=ROOT,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    try:
        while b"\n" not in seen:
            seen += os.read(controller, 1_000)
        clevrd("publish", "shown", '"\\u001b]0;x\\u0007 \\u009b1m\\té"', "--url", daemon.url)
        while seen.count(b"\n") < 2:
            seen += os.read(controller, 1_000)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)

    told, line = seen.decode().splitlines()
    assert told == "clevrd: subscribed to shown, shown.*"
    assert line.expandtabs() == "\\x1b]0;x\\x07 \\x9b1m\té".expandtabs()


def test_bash_completes_commands_and_options() -> None:
    """The script works in a real shell."""
    script = clevrd("completion", "bash").stdout
    asked = "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_clevrd; echo ${COMPREPLY[@]}"

    def completed(*words: str) -> list[str]:
        text = f"{script}\nCOMP_WORDS=({shlex.join(words)}); {asked}"
        bash = ["bash", "--norc", "-c", text]
        return subprocess.run(bash, capture_output=True, text=True, timeout=20).stdout.split()

    assert completed("clevrd", "sub") == ["subscribe"]
    assert completed("clevrd", "publish", "--t") == ["--tenant", "--text", "--ttl"]
    assert completed("clevrd", "subscribe", "--policy", "l") == ["latest"]
    assert completed("clevrd", "serve", "--log-level", "w") == ["warning"]
    assert completed("clevrd", "serve", "--raw-paths", "f") == ["false"]
    assert completed("clevrd", "--v") == ["--version"]
    assert completed("clevrd", "help", "sub") == ["subscribe"]


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
    """The first lines on a terminal name its address and three commands that work."""
    controller, terminal = pty.openpty()
    daemon = subprocess.Popen(
        [sys.executable, "-m", "clevrd", "serve", "--address", "127.0.0.1:0"],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    try:
        while seen.count(b"\n") < 4:
            seen += os.read(controller, 1_000)
    finally:
        daemon.terminate()
        daemon.wait(timeout=20)
        os.close(controller)

    lines = seen.decode().splitlines()
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
        (["publish", "t", "hello"], "take --text"),
        (["publish", "t", "\udcff", "--text"], "Not UTF-8"),
        (["serve", "--nonsense"], "unrecognized arguments: --nonsense (try: clevrd serve --help)"),
        (["serve", "--port", "9000"], "did you mean --address HOST:PORT?"),
        (["--port=9000"], "did you mean --address HOST:PORT?"),
        (["serve", "--ring-mesages", "300"], "did you mean --ring-messages?"),
        (["subscribe", "t", "--host", "x"], "did you mean --url?"),
        (["subscribe", "--topic", "t"], "a topic stands without a flag"),
        (["publish", "t", "1", "--ttl", "0"], "a number of seconds from 0.001 to 100000000"),
        (["publish", "t", "1", "--header", "ce-type"], "is no header; it is like 'ce-type: paid'"),
        (["publish", "t", "1", "--header", "X-A: b"], "The header 'X-A' can't be carried; trace"),
        (["publish", "t", "1", "--expires", "5"], "did you mean --ttl?"),
        (["subscribe", "t", "--id", "a\n"], "The subscriber_id holds a control character"),
        (["subscribe", "t", "--client-id", "a"], "did you mean --id?"),
        (["history", "t", "--last", "1", "--since", "5m"], "give one of them"),
        (["history", "t", "--position", "41"], "'41' is no position; it is like f7502dc3:41"),
        (["history", "t", "--follow"], "clevrd subscribe follows a topic"),
        (["subscribe", "t", "--follow"], "did you mean --last?"),
        (["history", "t", "--limit", "0"], "whole number of 1 or more"),
        (["history", ".."], "can be no part of a URL"),
        (["help", "nonsense"], "invalid choice"),
        (["completion", "cmd"], "invalid choice"),
    ],
)
def test_bad_usage_is_one_clear_line(argv: list[str], words: str) -> None:
    """Exit code 2, and a line that says what is meant."""
    assert_one_clear_line(clevrd(*argv), 2, words)


@pytest.mark.parametrize("argv", [["help"], ["serve", "--help"], ["version"], ["checkconfig"]])
def test_full_disk_is_told_of_everything_that_is_printed(argv: list[str]) -> None:
    """Also of help, which argparse gives up silently."""
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "clevrd", *argv],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=20,
        )

    assert finished.returncode == 1
    assert finished.stderr == (
        "clevrd: Standard input or output failed: No space left on device.\n"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["help"], "usage: clevrd "),
        (["help", "subscribe"], "usage: clevrd subscribe "),
        (["help", "health"], "usage: clevrd health "),
        (["--version"], "clevrd 0."),
        (["-V"], "clevrd 0."),
    ],
)
def test_help_and_version_are_where_people_look(argv: list[str], words: str) -> None:
    """Each is on standard output, and no failure."""
    finished = clevrd(*argv)

    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(words)


def test_exit_codes_tell_failures_apart() -> None:
    """Usage, configuration, and a machine that refuses have three codes, and none is 1."""
    assert len({1, 2, ConfigError.exit_code, CannotStart.exit_code}) == 4


@pytest.mark.parametrize("command", [["publish", "t", "1"], ["subscribe", "t"], ["history", "t"]])
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


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_a_subscriber_at_once_and_quietly(first: signal.Signals) -> None:
    """The server takes the goodbye and does not answer it; the exit code is the first signal's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with started("subscribe", "t", "--url", url) as subscriber:
            connection, _ = listener.accept()
            with connection:
                accept_websocket(connection)
                line_of(subscriber)
                subscriber.send_signal(first)
                assert connection.recv(4096)
                subscriber.send_signal(signal.SIGTERM)
                _, told = subscriber.communicate(timeout=10)

    # Python takes its handlers away at the very end.
    assert subscriber.returncode in (128 + first, -signal.SIGTERM)
    assert told == ""


def test_second_signal_ends_a_publisher_at_once_and_quietly() -> None:
    """It waits for an answer that does not come, and would have waited for a while longer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with started("publish", "t", "1", "--url", url) as publisher:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(4096)
                publisher.send_signal(signal.SIGTERM)
                publisher.send_signal(signal.SIGTERM)
                _, told = publisher.communicate(timeout=10)

    # Python takes its handlers away at the very end.
    assert publisher.returncode in (143, -signal.SIGTERM)
    assert told == ""


def accept_websocket(connection: socket.socket) -> None:
    """Answer a handshake, say that the subscription stands, and send a message."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(4096)
    match = re.search(rb"(?i)sec-websocket-key: (\S+)", head)
    assert match is not None
    digest = hashlib.sha1(match[1] + GUID).digest()  # noqa: S324  # RFC 6455 §4.2.2
    connection.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Protocol: clevrd.v1\r\nSec-WebSocket-Accept: %b\r\n\r\n"
        % base64.b64encode(digest)
    )
    for text in (subscribed("0a", 0), message(1)):
        connection.sendall(b"\x81%c%b" % (len(text), text))


def test_reader_of_a_quiet_topic_may_leave(daemon: DaemonProcess) -> None:
    """What head has left is noticed without another message to write."""
    with started("subscribe", "left", "--last", "1", "--url", daemon.url) as subscriber:
        clevrd("publish", "left", "1", "--url", daemon.url)
        line_of(subscriber)
        assert subscriber.stdout is not None
        assert subscriber.stderr is not None

        subscriber.stdout.close()

        assert subscriber.wait(timeout=10) == 0
        assert subscriber.stderr.read() == ""


def test_reader_may_leave_while_the_daemon_is_away() -> None:
    """Also where all there is to do is to wait for the next attempt."""
    with daemon_process() as own, started("subscribe", "away", "--url", own.url) as subscriber:
        clevrd("publish", "away", "1", "--url", own.url)
        line_of(subscriber)
        assert subscriber.stdout is not None
        assert subscriber.stderr is not None
        own.process.send_signal(signal.SIGKILL)
        own.process.wait(timeout=10)

        subscriber.stdout.close()

        assert subscriber.wait(timeout=10) == 0
        assert subscriber.stderr.read() == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["version"],
        ["--help"],
        ["help", "subscribe"],
        ["checkconfig"],
        ["completion", "bash"],
        ["publish", "closed", "1"],
        ["subscribe", "closed", "--last", "1", "--count", "1"],
    ],
)
@pytest.mark.parametrize("closing", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(
    argv: list[str], closing: str, daemon: DaemonProcess
) -> None:
    """A failure is one line where it can be said, and always an exit code."""
    if argv[0] == "subscribe":
        clevrd("publish", "closed", "1", "--url", daemon.url)
    url = ["--url", daemon.url] if argv[0] in ("publish", "subscribe") else []
    command = shlex.join([sys.executable, "-m", "clevrd", *argv, *url])

    finished = subprocess.run(  # noqa: S602  # only a shell closes streams
        f"{command} {closing}", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=20
    )

    assert finished.returncode == 1
    if "2>&-" not in closing:
        assert finished.stderr.startswith("clevrd: ") or "broken" in finished.stderr
        assert finished.stderr.count("\n") == 1


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
