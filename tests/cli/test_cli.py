"""The commands, against a server that does what each test tells it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import completions
import pytest
from conftest import FakeClock
from fake_server import (
    Answer,
    FakePause,
    FakeServer,
    Feed,
    gap,
    message,
    refusal,
    subscribed,
    watching,
)
from hypothesis import given
from hypothesis import strategies as st

from clevrd import __version__, logs
from clevrd.cli import main, publish
from clevrd.cli.completion import SHELLS
from clevrd.cli.publish import LineSplitter, Progress, publish_records
from clevrd.client import Client, Refused, Unreachable
from clevrd.client.backoff import RETRY_AFTER_CAP_S
from clevrd.config import SETTINGS
from clevrd.errors import CannotStart
from clevrd.logs import EventFormatter, TerminalFormatter, is_journal

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("own_logging", "no_settings")


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Put pytest's log handlers back, which a command replaces with its own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    yield

    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings from the commands."""
    for name in [name for name in os.environ if name.startswith("CLEVRD_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("ADDRESS", raising=False)
    monkeypatch.delenv("CLEVRD_ADDRESS", raising=False)
    monkeypatch.delenv("MAX_MEMORY_MB", raising=False)


def chunks(*parts: bytes) -> Callable[[], bytes]:
    """Return what reads ``parts`` one after the other, and then the end."""
    left = [*parts, b""]
    return lambda: left.pop(0)


async def publish_lines(client: Client, *parts: bytes) -> int:
    """Publish the lines in ``parts`` to topic t and return the exit code."""
    progress = Progress(None, lambda: 0.0)
    try:
        async with client:
            return await publish_records(client, "t", chunks(*parts), progress)
    finally:
        # What it said is read by the test next.
        await asyncio.to_thread(logs.stderr.flush, 5.0)


async def run(*argv: str) -> int:
    """Run a command as the shell would, but in a thread of this process."""
    return await asyncio.to_thread(main, argv)


async def start(*argv: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a command in a process of its own, its streams piped unless told otherwise."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # Unbuffered output would hide a missing flush, and what is complained of at exit.
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "clevrd", *argv, cwd=ROOT, env=environ, **{**pipes, **options}
    )


# --- usage ---


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["nonsense"], 2, "invalid choice: 'nonsense'"),
        (["serv"], 2, "did you mean serve? (try"),
        (["journal", "stats"], 2, "did you mean stat? (try"),
        (["--adress", ":9000"], 2, "unrecognized arguments: --adress"),
        (["--addr", ":9000"], 2, "unrecognized arguments: --addr"),
        (["serve", "--address"], 2, "expected one argument"),
        (["publish"], 2, "required: TOPIC"),
        (["publish", "t"], 2, "give it as JSON, or with --text as text, or - to read"),
        (["publish", "t", "hello"], 2, "a text stands in quotes"),
        (["publish", "t", "{} {}"], 2, "Not JSON"),
        (["publish", "", "1"], 2, "The topic is empty"),
        (["publish", "a\nb", "1"], 2, "control character"),
        (["publish", "t" * 256, "1"], 2, "256 bytes"),
        (["publish", "t", "1", "--key", ""], 2, "The key is empty"),
        (["publish", "t", "-", "--key", "a\nb"], 2, "control character"),
        (["publish", "t", "1", "--url", "ftp://x"], 2, "The URL must be like"),
        (["publish", "t", "1", "--tenant", "a\nb"], 2, "printable ASCII"),
        (["publish", "t", "1", "--retry-for", "inf"], 2, "not a number of seconds"),
        (["publish", "t", "1", "--retry-for", "-1"], 2, "not a number of seconds"),
        (["publish", "t", "1", "--url", "http://127.0.0.1:1"], 69, "connection refused"),
        (["publish", "t", "1", "--url", "unix:/nowhere"], 69, "no such file"),
        (["publish", "t", "1", "--url", "http://u:s3cret@127.0.0.1:1"], 69, "//127.0.0.1:1:"),
        (["subscribe"], 2, "required: TOPIC"),
        (["subscribe", "a", "b\n"], 2, "control character"),
        (["subscribe", "a", "b", "a"], 2, "topic 'a' is named twice"),
        (["subscribe", "a", "--last", "5", "a"], 2, "topic 'a' is named twice"),
        (["subscribe", "--pattern", "a.*", "--pattern", "a.*"], 2, "'a.*' is named twice"),
        (["subscribe", "t", "--pattern", "ord*"], 2, "a star stands for a whole word"),
        (["subscribe", "t", "--policy", "drop_all"], 2, "invalid choice: 'drop_all'"),
        (["subscribe", "t", "--buffer", "0"], 2, "whole number of 1 or more"),
        (["subscribe", "t", "--last", "-1"], 2, "whole number of 0 or more"),
        (["subscribe", "t", "--count", "x"], 2, "whole number of 1 or more"),
        (["subscribe", "t", "--url", "http://127.0.0.1:1"], 69, "connection refused. Start the"),
        (["serve", "--config", "/nowhere"], 78, "Can't read the configuration file /nowhere"),
        (["--address", "nowhere"], 78, "(flag --address) is not allowed"),
        (["checkconfig", "--ring-messages", "5"], 78, "(flag --ring-messages) is not allowed"),
        (["checkconfig", "--allowed-origins", "a.example"], 78, "'a.example' is no origin"),
    ],
)
def test_failure_is_one_line_and_its_own_exit_code(
    argv: list[str], code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Scripts tell failures by the code and people by the line; nobody sees a traceback."""
    result = main(argv)

    output = capfd.readouterr()
    assert (result, output.out) == (code, "")
    assert output.err.startswith("clevrd: ")
    assert output.err.count("\n") == 1
    assert words in output.err
    assert "s3cret" not in output.err


@pytest.mark.parametrize("argv", [["version"], ["--version"]])
def test_version_is_printed(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The version is that of the package."""
    assert main(argv) == 0

    assert capfd.readouterr().out == f"clevrd {__version__}\n"


def test_help_lists_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    """Help is no failure, and goes to standard output."""
    assert main(["--help"]) == 0

    assert {"serve", "publish", "subscribe", "checkconfig", "version"} <= set(
        capfd.readouterr().out.split()
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_are_of_this_command_line(shell: str) -> None:
    """After a change of a command or an option: make completions."""
    kept = (completions.SCRIPTS / f"clevrd.{shell}").read_text(encoding="utf-8")

    assert completions.script(shell) == kept


def test_help_of_serve_lists_every_setting(capfd: pytest.CaptureFixture[str]) -> None:
    """Each setting is there with its flag and its variable."""
    assert main(["serve", "--help"]) == 0

    words = set(capfd.readouterr().out.split())
    assert {setting.flag for setting in SETTINGS} <= words
    assert {setting.env for setting in SETTINGS} <= words


# --- checkconfig ---


def test_checkconfig_prints_every_value_and_its_source(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each setting has a line of three columns, in the order of the settings."""
    monkeypatch.setenv("CLEVRD_PUBLISH_RATE", "2.50")

    code = main(["checkconfig", "--raw-paths", "no"])

    rows = [line.split(None, 2) for line in capfd.readouterr().out.splitlines()]
    assert code == 0
    assert [row[0] for row in rows] == ["setting", *(setting.field for setting in SETTINGS)]
    assert ["address", ":8080", "default"] in rows
    assert ["publish_rate", "2.5", "environment CLEVRD_PUBLISH_RATE"] in rows
    assert ["raw_paths", "false", "flag --raw-paths"] in rows


@pytest.mark.parametrize(
    ("table", "flags", "shown"),
    [
        ('allowed_origins = ["https://a.example", "null"]', [], "https://a.example, null"),
        ("", ["--allowed-origins", "https://b.example,*"], "https://b.example, *"),
        ("", [], "only its own"),
    ],
)
def test_checkconfig_shows_the_pages_that_are_let_in(
    table: str, flags: list[str], shown: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wherever the list stands: in the table, or as the setting beside it."""
    file = tmp_path / "clevrd.toml"
    file.write_text(f'[auth]\nmode = "open"\n{table}\n')

    code = main(["checkconfig", "--config", str(file), *flags])

    assert code == 0
    assert f"\nallowed origins  {shown}\n" in capfd.readouterr().out


def test_checkconfig_warns_of_unknown_variables(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings go to standard error and don't fail the check."""
    monkeypatch.setenv("CLEVRD_RING_MESAGES", "5")

    code = main(["checkconfig"])

    assert code == 0
    assert "did you mean CLEVRD_RING_MESSAGES?" in capfd.readouterr().err


def test_checkconfig_reports_each_wrong_setting(capfd: pytest.CaptureFixture[str]) -> None:
    """All mistakes are shown at once, one line each."""
    code = main(["checkconfig", "--ring-messages", "5", "--log-level", "loud"])

    lines = capfd.readouterr().err.splitlines()
    assert code == 78
    assert [line.split()[1] for line in lines] == ["ring_messages", "log_level"]


# --- serve ---


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put a server in place that only keeps the configuration it was started with."""
    configs: list[Any] = []

    def run_server(loaded: Any, load: Any) -> int:
        configs.append(loaded.config)
        return 0

    monkeypatch.setitem(sys.modules, "clevrd.server.process", SimpleNamespace(run=run_server))
    return configs


@pytest.mark.parametrize("argv", [["--address", ":9000"], ["serve", "--address=:9000"]])
def test_serve_is_the_default_command(argv: list[str], served: list[Any]) -> None:
    """Flags reach the server whether the command is named or not."""
    assert main(argv) == 0

    assert [config.address for config in served] == [":9000"]


def test_nothing_at_all_serves(served: list[Any]) -> None:
    """The bare command starts the daemon with its defaults."""
    assert main([]) == 0

    assert [config.address for config in served] == [":8080"]


@pytest.mark.parametrize(
    ("error", "code"), [(CannotStart("Port 80 is in use."), 69), (KeyboardInterrupt(), 130)]
)
def test_server_that_fails_ends_with_its_code(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A port in use is no configuration error, and neither leaves a traceback."""

    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setitem(sys.modules, "clevrd.server.process", SimpleNamespace(run=fail))

    assert main(["serve"]) == code
    assert "Traceback" not in capfd.readouterr().err


def test_serve_logs_ignored_variables(
    served: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A misspelt variable is seen in the log of the daemon that ignores it."""
    monkeypatch.setenv("CLEVRD_RING_MESAGES", "5")

    main(["serve"])

    assert "WARNING setting ignored why='CLEVRD_RING_MESAGES'" in capfd.readouterr().err
    assert len(served) == 1


# --- logs ---


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this machine's clock show another zone's time."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XYZ+5")
        time.tzset()
        yield
    time.tzset()


def log_line(text: str, *, for_journal: bool, **fields: Any) -> str:
    """Return ``text`` as a log line of the server at WARNING, written at time 0."""
    record = logging.makeLogRecord(
        {"msg": text, "name": "clevrd.hub", "levelname": "WARNING", "created": 0.25, **fields}
        | {"msecs": 250.0, "levelno": logging.WARNING}
    )
    return EventFormatter(for_journal=for_journal).format(record)


@pytest.mark.usefixtures("far_from_utc")
def test_log_line_is_time_level_event() -> None:
    """Times are RFC 3339 in UTC, and the values follow the event."""
    line = log_line("listening port=1", for_journal=False)

    assert line == "1970-01-01T00:00:00.250Z WARNING listening port=1"


def test_log_line_of_a_library_names_it() -> None:
    """Its words alone would not say who speaks."""
    line = log_line("Unclosed connection", for_journal=True, name="asyncio")

    assert line == "<4>Unclosed connection logger=asyncio"


def test_log_line_for_the_journal_has_its_priority_and_no_time() -> None:
    """Journald stamps each line itself and takes the severity from the prefix."""
    assert log_line("listening", for_journal=True) == "<4>listening"


def test_log_event_stays_on_one_line() -> None:
    """Neither a client's words nor a traceback can make a second line or move a cursor."""
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        fields = {"exc_info": sys.exc_info()}

    line = log_line("failed why=a\r\nforged \x1b[2J\x9b", for_journal=False, **fields)

    assert line.isprintable()
    assert "a\\r\\nforged \\x1b[2J\\x9b" in line
    assert "Traceback (most recent call last):\\n" in line


@pytest.mark.usefixtures("far_from_utc")
def test_log_line_on_a_terminal_is_for_people() -> None:
    """The time of their clock, the level in colour where they want that, and no client's escape."""
    fields = {"msg": "slow why=\x1b[2J", "name": "clevrd.hub", "created": 0.25}
    record = logging.makeLogRecord(fields | {"levelno": 30, "levelname": "WARNING"})

    plain = TerminalFormatter(has_colour=False).format(record)
    coloured = TerminalFormatter(has_colour=True).format(record)

    assert plain == "19:00:00 WARNING slow why=\\x1b[2J"
    assert coloured == "19:00:00 \x1b[33mWARNING\x1b[0m slow why=\\x1b[2J"


def test_traceback_on_a_terminal_has_its_lines() -> None:
    """It stands below its event; a line break in an error is one, and no cursor moves."""
    try:
        raise ValueError("first\nsecond\x9b")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "name": "x", "exc_info": sys.exc_info()})

    first, *below = TerminalFormatter(has_colour=True).format(record).split("\n")

    assert first.endswith("failed logger=x")
    assert below[-2:] == ["    ValueError: first", "    second\\x9b"]
    assert below[0] == "    Traceback (most recent call last):"


def test_journal_is_known_by_device_and_inode() -> None:
    """A terminal started by a service inherits the variable but not the stream."""
    stat = os.fstat(2)

    assert is_journal({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"})
    assert not is_journal({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino + 1}"})
    assert not is_journal({})


# --- publish: one message ---


async def test_publish_prints_where_the_message_is(
    server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """The answer is one JSON line for scripts, and nothing else is said."""
    code = await run("publish", "t", '{"n": 1}', "--url", server.url, "--tenant", "acme")

    output = capfd.readouterr()
    assert (code, output.err) == (0, "")
    assert json.loads(output.out) == {
        "message_id": "msg-1",
        "offset": 1,
        "epoch": "e",
        "subscribers": 0,
    }
    assert server.data == [b'{"n": 1}']
    assert server.requests[0].headers["X-Tenant-ID"] == "acme"
    assert server.requests[0].content_type == "application/json"


def test_full_disk_is_one_clear_line() -> None:
    """Output that can't be written is a failure, told once and not again at exit."""
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "clevrd", "version"],
            cwd=ROOT,
            env=environ,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert (done.returncode, done.stderr) == (
        1,
        "clevrd: Standard input or output failed: No space left on device.\n",
    )


async def test_key_and_ttl_go_with_every_message(server: FakeServer) -> None:
    """The only one, and each of those that are read from standard input."""
    code = await run("publish", "t", "1", "--key", "EUR", "--ttl", "60", "--url", server.url)
    given = ("--key", "USD", "--ttl", "0.5")
    process = await start("publish", "t", "-", *given, "--url", server.url)
    await process.communicate(b"2\n3\n")

    sent = [json.loads(body) for body in server.bodies]
    assert (code, process.returncode) == (0, 0)
    assert [(each["data"], each["key"], each["ttl_s"]) for each in sent] == [
        *((1, "EUR", 60), (2, "USD", 0.5), (3, "USD", 0.5))
    ]
    assert b'"ttl_s":60,' in server.bodies[0]


@pytest.mark.parametrize(
    "argv", [["t", "--key", "EUR", "-5"], ["--key", "EUR", "t", "-5"], ["t", "-5", "--key", "EUR"]]
)
async def test_options_may_stand_between_what_is_published(
    server: FakeServer, argv: list[str]
) -> None:
    """Before, between and behind: wherever somebody thinks of them."""
    code = await run("publish", *argv, "--url", server.url)

    (sent,) = (json.loads(body) for body in server.bodies)
    assert (code, sent["topic"], sent["data"], sent["key"]) == (0, "t", -5, "EUR")


async def test_server_and_tenant_come_from_the_environment(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A shell that names them once need not repeat them."""
    monkeypatch.setenv("CLEVRD_URL", server.url)
    monkeypatch.setenv("CLEVRD_TENANT", "acme")

    code = await run("publish", "t", "-5")

    assert (code, capfd.readouterr().err) == (0, "")
    assert server.data == [b"-5"]
    assert server.requests[0].headers["X-Tenant-ID"] == "acme"


async def test_refusal_is_told_in_the_servers_words(
    server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server knows best what was wrong; its control characters are not passed on."""
    server.answers.append(refusal(403, "Not\x1b[2J your topic."))

    code = await run("publish", "t", "1", "--url", server.url)

    assert (code, capfd.readouterr().err) == (1, "clevrd: Not\\x1b[2J your topic.\n")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            Answer(404, b"<html>nothing here</html>"),
            "answered 404 Not Found, but not as clevrd does",
        ),
        (Answer(500, b'{"error": 5}'), "answered 500 Internal Server Error, but not as"),
        (Answer(403, b'{"error":"\xff"}'), "answered 403 Forbidden; check the credentials."),
        (Answer(200, b"<html>welcome</html>"), "answered 200, but not as clevrd does"),
        (Answer(302, b"", {"Location": "http://elsewhere/"}), "answered 302 and points to"),
        (Answer(200, b'{"x":' + b"[" * 200_000), "answered 200, but not as clevrd does"),
    ],
)
async def test_answer_of_another_service_is_one_clear_line(
    answer: Answer, words: str, server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """A wrong URL or a proxy in between is recognised as that."""
    server.answers.append(answer)

    code = await run("publish", "t", "1", "--url", server.url)

    error = capfd.readouterr().err
    assert code == 1
    assert words in error
    assert error.count("\n") == 1


async def test_lost_answer_to_the_only_message_is_not_hidden(
    server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody knows whether it arrived, and it is not sent twice behind the user's back."""
    server.answers.append(Answer(0))

    code = await run("publish", "t", "1", "--url", server.url)

    assert code == 69
    assert "broke before the answer" in capfd.readouterr().err
    assert len(server.bodies) == 1


# --- publish: a stream ---

RECORDS = [
    b'{"name": "adduser",  "size" : 1.0e2}',
    b'"\\u00e9 is \xc3\xa9"',
    b'{"a":1,"a":2}',
    b"-0.0",
    b"[1 ,2, 3]",
    b'{"topic":"other","data":null}',
]


async def test_records_arrive_byte_for_byte_and_in_order(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Nothing is parsed and written again, so spaces, escapes, numbers and doubled keys stay."""
    code = await publish_lines(new_client(), b"\n".join(RECORDS))

    assert code == 0
    assert server.data == RECORDS


@pytest.mark.parametrize(
    "parts",
    [
        (b"1\n2\n",),
        (b"1\n2",),
        (b"1\r\n2\r\n",),
        (b"\n\n1\n \t\n2\n\n",),
        (b"1", b"\n", b"2"),
        (b" 1 \n\t2\t\n",),
    ],
)
async def test_lines_may_be_blank_unfinished_or_from_windows(
    parts: tuple[bytes, ...], server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """What stands around a value is no part of it."""
    code = await publish_lines(new_client(), *parts)

    assert (code, server.data) == (0, [b"1", b"2"])


async def test_bad_line_is_reported_and_the_rest_goes_on(
    server: FakeServer,
    new_client: Callable[..., Client],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each bad line has its number as an editor counts it, and the exit code tells of them."""
    bad = [b"{", b'"\xff"', b"[" * 100_000, b'1,"topic":"other"', b"nan"]

    code = await publish_lines(new_client(), b"1\n\n", b"\n".join(bad), b"\n2\n")

    lines = capfd.readouterr().err.splitlines()
    assert (code, server.data) == (1, [b"1", b"2"])
    assert [line.split(":")[1] for line in lines[:-1]] == [f" line {n}" for n in range(3, 8)]
    assert lines[-1] == "clevrd: published 2 of 7 records in 0.0 s"


async def test_overlong_line_is_refused_and_not_collected(
    server: FakeServer,
    new_client: Callable[..., Client],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream without newlines can't fill the memory."""
    monkeypatch.setattr(publish, "MAX_LINE_BYTES", 10)

    code = await publish_lines(new_client(), *[b"1234567"] * 3, b"\n1234567890\n")

    assert (code, server.data) == (1, [b"1234567890"])
    assert "line 1: Longer than 10 bytes." in capfd.readouterr().err


@given(st.lists(st.binary(max_size=5) | st.just(b"\n"), max_size=20))
def test_lines_do_not_depend_on_where_reads_end(parts: list[bytes]) -> None:
    """However the kernel cuts a stream, its lines are the same."""
    splitter = LineSplitter()

    lines = [line for part in [*parts, b"\n"] for line in splitter.feed(part)]

    assert lines == b"".join(parts).split(b"\n")


def test_unfinished_line_is_held_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte more than may be, so that it is seen to be too long."""
    monkeypatch.setattr(publish, "MAX_LINE_BYTES", 10)
    splitter = LineSplitter()

    lines = [line for part in (b"x" * 8, b"y" * 8, b"z\n") for line in splitter.feed(part)]

    assert lines == [b"xxxxxxxxyyy"]


@pytest.mark.parametrize("status", [400, 413])
async def test_record_that_the_server_refuses_is_counted(
    status: int,
    server: FakeServer,
    new_client: Callable[..., Client],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A record too large for this server is no reason to stop."""
    server.answers.extend([Answer(200, server.success()), refusal(status, "Not this one.")])

    code = await publish_lines(new_client(), b"1\n2\n3\n")

    assert (code, server.data) == (1, [b"1", b"2", b"3"])
    assert "line 2: Not this one." in capfd.readouterr().err


async def test_refusal_of_everything_ends_the_stream(
    server: FakeServer,
    new_client: Callable[..., Client],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A million lines don't get the same refusal a million times; the count says where it ended."""
    server.answers.extend([Answer(200, server.success()), refusal(403, "Not your topic.")])

    with pytest.raises(Refused, match="Not your topic"):
        await publish_lines(new_client(), b"1\n2\n3\n")

    assert server.data == [b"1", b"2"]
    assert "published 1 of 2 records in 0.0 s, stopped at line 2" in capfd.readouterr().err


async def test_busy_server_gets_each_record_once_and_in_order(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """A refused record is offered again, before the next, not sooner than the server asks."""
    server.answers.extend(
        [
            refusal(429, "Slow down.", Retry_After="3"),
            refusal(503, "Restarting."),
            Answer(502, b"<html>"),
            Answer(200, server.success()),
        ]
    )

    code = await publish_lines(new_client(), b"1\n2\n")

    assert (code, server.data) == (0, [b"1", b"1", b"1", b"1", b"2"])
    assert pause.slept_s == [3 + 0.125, 0.25, 0.5]


@pytest.mark.parametrize(
    ("header", "least_s"),
    [("7", 7), ("0", 0), ("soon", 0), ("-5", 0), ("9" * 30, 0), ("86400", RETRY_AFTER_CAP_S)],
)
async def test_retry_after_is_honoured_within_reason(
    header: str,
    least_s: float,
    server: FakeServer,
    new_client: Callable[..., Client],
    pause: FakePause,
) -> None:
    """What can't be read is ignored, and a day is taken for a mistake."""
    server.answers.append(refusal(503, "Later.", Retry_After=header))

    await publish_lines(new_client(retry_for_s=1000), b"1\n")

    assert pause.slept_s == [least_s + 0.125]


async def test_server_that_stays_busy_is_given_up(
    server: FakeServer, new_client: Callable[..., Client], pause: FakePause
) -> None:
    """One message is offered for as long as was asked, then the reason is told."""
    server.answers.extend([refusal(503, "Draining.", Retry_After="10")] * 9)

    with pytest.raises(Refused, match="Draining"):
        await publish_lines(new_client(retry_for_s=25), b"1\n")

    assert len(pause.slept_s) == 2


@pytest.mark.parametrize("answer", [Answer(0), Answer(502), Answer(504)])
async def test_lost_connection_loses_no_record(
    answer: Answer,
    server: FakeServer,
    new_client: Callable[..., Client],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A record whose answer was lost is sent again, and the count says it may be there twice."""
    server.answers.extend([Answer(200, server.success()), answer])

    code = await publish_lines(new_client(), b"1\n2\n3\n")

    assert (code, server.data) == (0, [b"1", b"2", b"2", b"3"])
    assert "published 3 of 3 records in 0.0 s; 1 sent again" in capfd.readouterr().err


async def test_server_that_was_never_there_is_not_waited_for(
    clock: FakeClock, pause: FakePause
) -> None:
    """A wrong port is told at once; waiting is for servers that come back."""
    client = Client("http://127.0.0.1:1", sleep=pause, clock=clock)

    with pytest.raises(Unreachable) as caught:
        await publish_lines(client, b"1\n")

    assert pause.slept_s == []
    assert not caught.value.may_have_arrived


async def test_reading_that_fails_ends_the_stream(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """An error from the reading thread reaches the command."""

    def fail() -> bytes:
        raise IsADirectoryError(21, "Is a directory")

    with pytest.raises(IsADirectoryError):
        await publish_records(new_client(), "t", fail, Progress(None, lambda: 0.0))

    assert server.bodies == []


async def test_standard_input_is_published_and_counted(server: FakeServer) -> None:
    """The whole command, in a process of its own."""
    process = await start("publish", "t", "-", "--url", server.url)

    out, err = await process.communicate(b'{"n":1}\n{"n":2}\nx\n')

    assert (process.returncode, out) == (1, b"")
    assert server.data == [b'{"n":1}', b'{"n":2}']
    assert err.splitlines()[0].startswith(b"clevrd: line 3: Not JSON")
    assert err.splitlines()[-1].startswith(b"clevrd: published 2 of 3 records in ")


async def test_interrupted_stream_is_counted(server: FakeServer) -> None:
    """Ctrl-C ends the command with its own code, and what was published is still told."""
    process = await start("publish", "t", "-", "--url", server.url)
    assert process.stdin is not None
    process.stdin.write(b"1\n")
    await server.first_publish.wait()

    process.send_signal(signal.SIGINT)
    code = await process.wait()

    assert process.stderr is not None
    error = await process.stderr.read()
    process.stdin.close()
    assert code == 130
    assert error.startswith(b"clevrd: published ")
    assert error.count(b"\n") == 1


class BlockedRead:
    """A read that lasts until the test lets it return, as one from a silent terminal would."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.has_begun = asyncio.Event()
        self.may_return = threading.Event()
        self.thread = threading.current_thread()

    def __call__(self) -> bytes:
        """Say that it has begun, and block."""
        self.thread = threading.current_thread()
        self._loop.call_soon_threadsafe(self.has_begun.set)
        self.may_return.wait()
        return b"1"


async def interrupt_in(read: BlockedRead) -> None:
    """Start to publish what ``read`` brings, and cancel that while it blocks."""
    client = Client("http://127.0.0.1:1")
    progress = Progress(None, lambda: 0.0)
    command = asyncio.create_task(publish_records(client, "t", read, progress))
    await read.has_begun.wait()
    command.cancel()
    with suppress(asyncio.CancelledError):
        await command


def test_interrupt_does_not_wait_for_input() -> None:
    """A command whose standard input is silent ends all the same, its event loop included."""
    reads: list[BlockedRead] = []

    async def session() -> None:
        reads.append(BlockedRead())
        await interrupt_in(reads[0])

    thread = threading.Thread(target=lambda: asyncio.run(session()), daemon=True)
    thread.start()
    thread.join(10)
    has_ended = not thread.is_alive()
    reads[0].may_return.set()

    assert has_ended


async def test_input_after_the_interrupt_is_ignored() -> None:
    """A read that returns when nobody waits for it any more breaks nothing."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    read = BlockedRead()
    await interrupt_in(read)

    read.may_return.set()
    await asyncio.to_thread(read.thread.join)
    await asyncio.sleep(0)

    assert complaints == []


def test_terminal_sees_a_moving_line(clock: FakeClock, capfd: pytest.CaptureFixture[str]) -> None:
    """The line is redrawn at most ten times a second, and gone when something else is said."""

    drawn: list[str] = []
    progress = Progress(drawn.append, clock)
    for line in range(1, 1001):
        progress.begin(line)
        clock.advance(0.001)
        progress.accept()
    progress.finish(0)

    logs.stderr.flush(5)

    assert 8 <= len(drawn) - 1 <= 12
    assert all(text.startswith("\r\x1b[K") for text in drawn)
    assert drawn[-2].endswith(" published, 1000/s")
    assert drawn[-1] == "\r\x1b[K"
    assert capfd.readouterr().err == "clevrd: published 1000 of 1000 records in 1.0 s\n"


# --- subscribe ---


async def test_subscribe_prints_one_line_for_each_message(
    server: FakeServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Newlines between a message's tokens don't break the line; what is in its strings stays."""
    first = b'{"id":"msg-1",\r\n"data":"a\\nb",\n"offset":1}'
    server.feeds.append(Feed([first, message(2), message(3)]))

    code = await run("subscribe", "t", "--url", server.url, "--count", "2")

    output = capfdbinary.readouterr()
    assert (code, output.err) == (0, b"")
    assert output.out == b'{"id":"msg-1",  "data":"a\\nb", "offset":1}\n' + message(2) + b"\n"


async def test_message_is_printed_when_it_comes(server: FakeServer) -> None:
    """A pipe gets each message at once, not when some buffer is full; Ctrl-C ends it quietly."""
    server.feeds.append(Feed([message(1)]))
    process = await start("subscribe", "t", "--url", server.url)
    assert process.stdout is not None

    line = await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest = await process.communicate()

    assert line == message(1) + b"\n"
    assert (*rest, process.returncode) == (b"", b"", 130)


async def test_options_reach_the_server(server: FakeServer) -> None:
    """What is not given is left to the server."""
    server.feeds.extend([Feed([message(1)]), Feed([message(1)])])

    await run("subscribe", "a b&c", "--url", server.url, "--count", "1")
    options = ["--policy", "drop_newest", "--buffer", "200", "--last", "0", "--tenant", "acme"]
    options += ["--id", "ann", "--headers"]
    await run("subscribe", "t", "--url", server.url, "--count", "1", *options)

    plain, full = server.requests
    assert dict(plain.query) == {"topic": "a b&c"}
    assert dict(full.query) == {
        "topic": "t",
        "policy": "drop_newest",
        "buffer": "200",
        "last": "0",
        "subscriber_id": "ann",
        "headers": "true",
    }
    assert "X-Tenant-ID" not in plain.headers
    assert full.headers["X-Tenant-ID"] == "acme"


async def test_several_topics_and_patterns_are_printed_as_they_come(
    server: FakeServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """One line for each message, which names its topic; a gap on standard error names it too."""
    messages = [message(1, topic="a"), message(9, topic="p.x")]
    server.feeds.append(
        Feed(
            [
                *(subscribed("e", 0, topic="a", ref=1), subscribed("e", 0, topic="b", ref=2)),
                *(watching("p.*", 3), watching("q.**", 4)),
                subscribed("e", 4, topic="p.x", pattern="p.*"),
                *(messages[0], gap(5, 8, "slow_consumer", "p.x"), messages[1]),
            ],
            has_control=True,
            commands=4,
        )
    )
    patterns = ("--pattern", "p.*", "--pattern", "q.**")

    code = await run("subscribe", "a", "b", *patterns, "--url", server.url, "--count", "2")

    output = capfdbinary.readouterr()
    assert (code, output.out) == (0, b"".join(each + b"\n" for each in messages))
    assert output.err.splitlines() == [
        b"clevrd: messages missed topic=p.x from=5 to=8 count=4 reason=slow_consumer"
    ]
    assert [each.get("topic") or each.get("pattern") for each in server.commands[0]] == [
        *("a", "b", "p.*", "q.**")
    ]


async def test_options_reach_the_server_with_each_topic(server: FakeServer) -> None:
    """Wherever they stand; a pattern needs no topic beside it."""
    feed = Feed([watching("p.*", 1), message(1, topic="p.x")], has_control=True, commands=1)
    server.feeds.append(feed)
    options = ["--policy", "latest", "--buffer", "200", "--since", "5m", "--tenant", "acme"]
    options += ["--id", "ann"]

    code = await run("subscribe", *options, "--pattern", "p.*", "--url", server.url, "--count", "1")

    assert code == 0
    assert server.commands == [
        [
            {
                **{"type": "subscribe", "ref": 1, "pattern": "p.*"},
                **{"policy": "latest", "buffer": 200, "since": "5m", "subscriber_id": "ann"},
            }
        ]
    ]
    assert server.requests[0].headers["X-Tenant-ID"] == "acme"


async def test_gaps_are_warned_of_on_standard_error(
    server: FakeServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """`clevrd subscribe` prints messages byte for byte, and what is missing beside them."""
    server.feeds.append(
        Feed(
            [subscribed("e", 0), gap(None, None, "epoch"), gap(1, 3, "retention"), message(4)],
            has_control=True,
        )
    )

    code = await run("subscribe", "t", "--url", server.url, "--count", "1")

    output = capfdbinary.readouterr()
    assert (code, output.out) == (0, message(4) + b"\n")
    assert output.err.splitlines() == [
        b"clevrd: messages may be missing: the topic began anew, or later than asked topic=t",
        b"clevrd: messages missed topic=t from=1 to=3 count=3 reason=retention",
    ]


async def test_no_reconnect_ends_with_the_connection(
    server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """A script that wants to know of every cut is told."""
    server.feeds.append(Feed([message(1)], 1012, b"restarting"))

    code = await run("subscribe", "t", "--url", server.url, "--no-reconnect")

    output = capfd.readouterr()
    assert (code, output.out) == (1, message(1).decode() + "\n")
    assert output.err == "clevrd: The connection was closed with 1012 (restarting).\n"


async def test_reader_that_leaves_is_a_quiet_end(server: FakeServer) -> None:
    """`clevrd subscribe t | head -1` ends without a complaint when head has its line."""
    server.feeds.append(Feed([message(n) for n in range(1, 20_000)]))
    reading_end, writing_end = os.pipe()
    process = await start("subscribe", "t", "--url", server.url, stdout=writing_end)
    os.close(writing_end)

    line = await asyncio.to_thread(os.read, reading_end, len(message(1)) + 1)
    os.close(reading_end)
    _, error = await process.communicate()

    assert (line, error, process.returncode) == (message(1) + b"\n", b"", 0)
