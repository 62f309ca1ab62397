"""The command line: serve, publish, subscribe, checkconfig, version. No protocol here.

Exit codes: 0 fine; 1 the operation failed; 2 bad usage; 69 can't start, or no server there;
78 bad configuration (the last two as in sysexits.h); 130 interrupted. What went wrong is one line
on standard error (one for each wrong setting), never a traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Final, NoReturn, TextIO

import msgspec

from clevrd import __version__
from clevrd.client import (
    RETRY_FOR_S,
    BadRecord,
    BadUrl,
    Client,
    ClientError,
    Gap,
    Message,
    Refused,
    Subscription,
    Unreachable,
)
from clevrd.config import MIB, SETTINGS, Loaded, load
from clevrd.core.message import check_key, check_topic
from clevrd.core.patterns import parse_pattern
from clevrd.core.subscriber import DropStrategy
from clevrd.errors import CannotStart, ConfigError, InvalidRequest

log = logging.getLogger(__name__)

DEFAULT_URL: Final = "http://127.0.0.1:8080"

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 69
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells say it


class UsageError(Exception):
    """The command line can't be understood; the message says how it is meant."""


# The first class that fits decides.
_EXIT_CODES: Final[tuple[tuple[type[Exception], int], ...]] = (
    (ConfigError, ConfigError.exit_code),
    (CannotStart, CannotStart.exit_code),
    (UsageError, EXIT_USAGE),
    (BadUrl, EXIT_USAGE),
    (InvalidRequest, EXIT_USAGE),  # a topic that no server would take
    (Unreachable, EXIT_UNAVAILABLE),
    (ClientError, EXIT_FAILED),
    (OSError, EXIT_FAILED),  # standard input or output
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    """
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who read standard output (head, say) has what it wanted.
        _discard_stdout()
        return 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except tuple(kind for kind, _ in _EXIT_CODES) as error:
        if isinstance(error, OSError):
            _discard_stdout()
        _say(_sentence(error))
        return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


def _run(argv: Sequence[str]) -> int:
    try:
        options = _parser().parse_args(_with_command(argv))
    except SystemExit as finished:  # --help
        return int(finished.code or 0)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _with_command(argv: Sequence[str]) -> list[str]:
    """Put in ``serve``, the default command, where none is named."""
    if list(argv) == ["--version"]:
        return ["version"]
    if argv and (not argv[0].startswith("-") or argv[0] in ("-h", "--help")):
        return list(argv)
    return ["serve", *argv]


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"Standard input or output failed: {error.strerror}."
    return str(error)


def _discard_stdout() -> None:
    """Send what is left in the buffer nowhere: Python flushes again at exit, and would complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- what can be typed ---------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage: one line is what scripts and people read."""
        raise UsageError(f"{message} (try: {self.prog} --help)")


class _CommandParser(_Parser):
    """Of one command, whose options may stand between its arguments: publish t --key k 1.

    argparse takes what may be left out for left out as soon as an option comes, unless it is asked
    to parse intermixed, which it does by parsing twice.
    """

    _is_asked = False

    def parse_known_args(  # type: ignore[override]  # its overloads differ in the namespace alone
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse ``args``; the second time, from within the first, as argparse does."""
        if self._is_asked:
            return super().parse_known_args(args, namespace)
        self._is_asked = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_asked = False


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clevrd",
        description="A real-time event streaming daemon and its client.",
        epilog="Without a command, clevrd serves; see clevrd serve --help for its settings.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_CommandParser)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> _Parser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(command=run)
        return command

    _add_settings(add("serve", _serve, "Run the daemon (the default)."))
    _add_publish(add("publish", _publish, "Publish one message, or one for each line."))
    _add_subscribe(add("subscribe", _subscribe, "Print topics' messages, one JSON line each."))
    _add_settings(add("checkconfig", _checkconfig, "Print every setting and its source."))
    add("version", _version, "Print the version.")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (CLEVRD_CONFIG)")
    for setting in SETTINGS:
        parser.add_argument(
            setting.flag,
            dest=setting.field,
            default=argparse.SUPPRESS,  # so that what was given can be told from what was not
            metavar="VALUE",
            help=f"{setting.help} {setting.allowed.capitalize()};"
            f" default {_value(setting.default) or 'none'}; {setting.env}",
        )


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=os.environ.get("CLEVRD_URL") or DEFAULT_URL,
        # The fixed default, not the variable's value, which may hold a password.
        help="the server: http://host:port, host:port, https://host or unix:/path (CLEVRD_URL;"
        f" default {DEFAULT_URL})",
    )
    parser.add_argument(
        "--tenant",
        default=os.environ.get("CLEVRD_TENANT") or None,
        metavar="NAME",
        help="sent as X-Tenant-ID (CLEVRD_TENANT)",
    )


def _add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topic", metavar="TOPIC")
    _add_server(parser)
    parser.add_argument(
        "json",
        nargs="?",
        metavar="JSON",
        help="the message's data; a single - reads one JSON value per line from standard input,"
        " in order",
    )
    parser.add_argument(
        "--key",
        metavar="KEY",
        help="what the message is about, for readers with --policy latest; with - that of all"
        " messages",
    )
    parser.add_argument(
        "--retry-for",
        type=_seconds,
        default=RETRY_FOR_S,
        metavar="SECONDS",
        help="how long one message is tried again when the server is busy or restarts; it is"
        " there at least once, and may be there twice when a connection broke before the"
        " answer (default %(default)g)",
    )


def _add_subscribe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "topics", nargs="*", metavar="TOPIC", help="one or more, side by side, and --pattern"
    )
    _add_server(parser)
    parser.add_argument(
        "--pattern",
        action="append",
        default=[],
        dest="patterns",
        metavar="PATTERN",
        help="all topics that it matches, now and later: 'orders.*' one word, 'orders.**' one or"
        " more; may be given several times",
    )
    parser.add_argument(
        "--policy",
        choices=[strategy.value for strategy in DropStrategy],
        help="what is dropped when this reader is too slow (default: the server's)",
    )
    parser.add_argument(
        "--buffer", type=_count, metavar="N", help="messages this reader may lag behind"
    )
    parser.add_argument(
        "--last", type=_count_or_zero, metavar="N", help="recent messages wanted first"
    )
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="begin in the past: 90s, 5m, 2h, a time (RFC 3339 or unix), a message's id, or all",
    )
    parser.add_argument("--count", type=_count, metavar="N", help="stop after N messages")
    parser.add_argument(
        "--no-reconnect", action="store_true", help="stop when the connection is lost"
    )


def _count(text: str) -> int:
    return _whole_number(text, at_least=1)


def _count_or_zero(text: str) -> int:
    return _whole_number(text, at_least=0)


def _whole_number(text: str, at_least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= at_least):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {at_least} or more")
    return int(text)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")


# --- serve, checkconfig, version -----------------------------------------------------------------


def _load(options: argparse.Namespace) -> Loaded:
    given = vars(options)
    overrides = {s.field: given[s.field] for s in SETTINGS if s.field in given}
    return load(overrides, os.environ, options.config)


def _serve(options: argparse.Namespace) -> int:
    loaded = _load(options)
    set_up_logging(loaded.config.log_level, for_journal=is_journal(os.environ))
    for warning in loaded.warnings:
        log.warning("setting ignored why=%s", warning)
    # Here, not above: publish and subscribe start faster without the server's modules.
    from clevrd.server import run

    return run(loaded.config)


def _checkconfig(options: argparse.Namespace) -> int:
    loaded = _load(options)
    rows = [("setting", "value", "source")]
    for field, source in loaded.sources.items():
        rows.append((field, _value(getattr(loaded.config, field)), source))
    for line in _columns(rows):
        _print(line)
    for warning in loaded.warnings:
        _say(warning)
    return 0


def _value(value: object) -> str:
    """Return a setting's value as the environment and the flags spell it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _version(_: argparse.Namespace) -> int:
    _print(f"clevrd {__version__}")
    return 0


# --- publish -------------------------------------------------------------------------------------

# The largest body that a server can be configured to take; a longer line can't be a record.
MAX_LINE_BYTES: Final = 64 * MIB
READ_BYTES: Final = 65_536
# Refusals of this one record (not JSON, too large); any other would meet the next record too.
RECORD_STATUSES: Final = frozenset({400, 413})
# Often enough to look alive, and at 3,000 records/s no burden for a terminal.
PROGRESS_INTERVAL_S: Final = 0.1


def _publish(options: argparse.Namespace) -> int:
    check_topic(options.topic)
    if options.key is not None:
        check_key(options.key)
    if options.json is None:
        raise UsageError(
            "publish needs the data: give it as JSON, or - to read one JSON value per line from"
            " standard input"
        )
    _log_for_people()
    client = Client(options.url, options.tenant, retry_for_s=options.retry_for)
    if options.json == "-":
        return asyncio.run(_publish_stdin(client, options.topic, options.key))
    data_json = os.fsencode(options.json)
    return asyncio.run(_publish_one(client, options.topic, data_json, options.key))


async def _publish_one(client: Client, topic: str, data_json: bytes, key: str | None) -> int:
    try:
        async with client:
            answer = await client.publish_raw(topic, data_json, key=key)
    except BadRecord as error:
        raise UsageError(
            f"{error} The data is JSON; a text stands in quotes: '\"hello\"'"
        ) from None
    fields = msgspec.structs.asdict(answer).items()
    # What an older server does not tell, and what is not so, is left out; warnings are logged.
    told = {name: value for name, value in fields if value is not None and value is not False}
    del told["warnings"]
    _print(msgspec.json.encode(told).decode())
    return 0


async def _publish_stdin(client: Client, topic: str, key: str | None) -> int:
    progress = Progress(sys.stderr, time.monotonic)
    async with client:
        return await publish_records(client, topic, _read_stdin, progress, key)


def _read_stdin() -> bytes:
    # Not sys.stdin: a thread that waits in it holds its lock, and Python aborts at exit.
    return os.read(0, READ_BYTES)


async def publish_records(
    client: Client,
    topic: str,
    read: Callable[[], bytes],
    progress: Progress,
    key: str | None = None,
) -> int:
    """Publish each line that ``read`` brings as one message, in order, and return the exit code.

    One line is on its way at a time. A bad one is reported and counted, and the rest goes on;
    what would refuse every line ends it.

    Args:
        read: returns the next bytes, b"" at the end; may block, since it is called in a thread.
        key: of every message.

    Raises:
        Refused, Unreachable, BadAnswer: as `Client.publish_raw`, for what ends it.
    """
    try:
        async with aclosing(_numbered_records(read)) as records:
            async for number, record in records:
                progress.begin(number)
                await _publish_record(client, topic, record, progress, key)
    finally:
        progress.finish(client.repeated_messages)
    return EXIT_FAILED if progress.refused else 0


async def _publish_record(
    client: Client, topic: str, record: bytes, progress: Progress, key: str | None
) -> None:
    try:
        if len(record) > MAX_LINE_BYTES:
            raise BadRecord(f"Longer than {MAX_LINE_BYTES} bytes.")
        await client.publish_raw(topic, record, key=key)
    except BadRecord as error:
        progress.refuse(error)
    except Refused as error:
        if error.status not in RECORD_STATUSES:
            raise
        progress.refuse(error)
    else:
        progress.accept()


async def _numbered_records(read: Callable[[], bytes]) -> AsyncGenerator[tuple[int, bytes]]:
    """Yield (line number from 1, line) for each line that is not blank."""
    splitter = LineSplitter()
    number = 0
    chunk = b"more"
    while chunk:
        chunk = await _in_thread(read)
        for line in splitter.feed(chunk or b"\n"):  # the last line may lack its newline
            number += 1
            # What may stand around a JSON value (RFC 8259 §2), the CR of a CRLF file among it.
            record = line.strip(b" \t\r")
            if record:
                yield number, record


class LineSplitter:
    """Cuts a stream into lines; of a line it keeps MAX_LINE_BYTES and one more, to show it."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the lines that end in ``chunk``, without their newline."""
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._hold(end)
            line = bytes(self._held)
            self._held.clear()
            yield line
        self._hold(rest)

    def _hold(self, piece: bytes) -> None:
        self._held += piece[: MAX_LINE_BYTES + 1 - len(self._held)]


async def _in_thread(call: Callable[[], bytes]) -> bytes:
    """Return ``call()`` from a thread that nobody waits for at exit.

    asyncio.to_thread() would be waited for: Ctrl-C did nothing until the next line was typed.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[bytes] = loop.create_future()

    def settle(result: bytes | OSError) -> None:
        if outcome.cancelled():
            return
        if isinstance(result, OSError):
            outcome.set_exception(result)
        else:
            outcome.set_result(result)

    def work() -> None:
        result: bytes | OSError
        try:
            result = call()
        except OSError as error:
            result = error
        with suppress(RuntimeError):  # the loop is closed: interrupted meanwhile
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=work, name="stdin", daemon=True).start()
    return await outcome


class Progress:
    """Counts records and shows it: as a moving line on a terminal, and as a sum at the end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._clock = clock
        self._started = clock()
        self._next_show = self._started
        # The line being published, or the last one that was.
        self.line = 0
        self.records = 0
        self.published = 0
        self.refused = 0

    def begin(self, line: int) -> None:
        """Count a record, found on ``line``."""
        self.line = line
        self.records += 1

    def accept(self) -> None:
        """Count the record as published."""
        self.published += 1
        now = self._clock()
        if self._is_terminal and now >= self._next_show:
            self._next_show = now + PROGRESS_INTERVAL_S
            rate = self.published / max(now - self._started, 1e-3)
            self._stream.write(f"\r\x1b[K{self.published} published, {rate:.0f}/s")
            self._stream.flush()

    def refuse(self, why: Exception) -> None:
        """Count the record as refused and report it."""
        self.refused += 1
        self._clear()
        _say(f"line {self.line}: {why}")

    def finish(self, repeated_messages: int) -> None:
        """Report the sum."""
        self._clear()
        elapsed_s = self._clock() - self._started
        text = f"published {self.published} of {self.records} records in {elapsed_s:.1f} s"
        if self.published + self.refused < self.records:
            text += f", stopped at line {self.line}"
        if repeated_messages:
            text += (
                f"; {repeated_messages} sent again because an answer was lost,"
                " so as many may be there twice"
            )
        _say(text)

    def _clear(self) -> None:
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


# --- subscribe -----------------------------------------------------------------------------------

# Newlines between a message's tokens would break one line per message; within its strings there
# are none, since JSON escapes them (RFC 8259 §7).
_NEWLINES_TO_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")


def _subscribe(options: argparse.Namespace) -> int:
    for topic in options.topics:
        check_topic(topic)
    for pattern in options.patterns:
        parse_pattern(pattern)
    if not (options.topics or options.patterns):
        raise UsageError("the following arguments are required: TOPIC or --pattern PATTERN")
    if options.last is not None and options.since is not None:
        raise UsageError("--last and --since each say where to begin; give one of them")
    _log_for_people()
    client = Client(options.url, options.tenant)
    try:
        items = client.subscribe(
            *options.topics,
            patterns=options.patterns,
            policy=options.policy,
            buffer=options.buffer,
            last=options.last,
            since=options.since,
            reconnect=not options.no_reconnect,
        )
    except ValueError as error:  # one of them is named twice
        raise UsageError(str(error)) from None
    return asyncio.run(_print_messages(client, items, options.count))


async def _print_messages(client: Client, items: Subscription, count: int | None) -> int:
    printed = 0
    async with client, items:
        async for item in items:
            if isinstance(item, Gap):
                _say(_gap_sentence(item))
                continue
            _print_message(item)
            printed += 1
            if printed == count:
                break
    return 0


def _print_message(message: Message) -> None:
    sys.stdout.buffer.write(message.json.translate(_NEWLINES_TO_SPACES) + b"\n")
    sys.stdout.buffer.flush()  # who reads a live stream wants the message, not a block


def _gap_sentence(gap: Gap) -> str:
    """Return what is missing, for people and for who greps."""
    if gap.reason == "epoch":
        return f"topic restarted, some messages may be missing topic={gap.topic}"
    values = {"from": gap.first, "to": gap.last, "count": gap.count, "reason": gap.reason}
    told = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return f"messages missed topic={gap.topic} {told}"


# --- what is said --------------------------------------------------------------------------------

# Control characters from a server, a file or a client would move a terminal's cursor or forge a
# second log line.
_ESCAPES: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0))} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): " ",
}

# RFC 5424 §6.2.1 severities, which journald reads from a <N> in front: sd-daemon(3).
_SEVERITIES: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


class EventFormatter(logging.Formatter):
    """One line per event, whatever is in it: time, level, the event, its values."""

    def __init__(self, *, for_journal: bool) -> None:
        stamp = "" if for_journal else "%(asctime)s.%(msecs)03dZ %(levelname)s "
        super().__init__(f"{stamp}%(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback is in it with its newlines escaped."""
        line = super().format(record).translate(_ESCAPES)
        if not self._for_journal:
            return line
        return f"<{_SEVERITIES.get(record.levelno, 6)}>{line}"

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without a traceback; what a library says is marked as its own."""
        line = super().formatMessage(record)
        return line if record.name.startswith("clevrd.") else f"{line} logger={record.name}"


def set_up_logging(level: str, *, for_journal: bool) -> None:
    """Log events of ``level`` and above to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(EventFormatter(for_journal=for_journal))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def is_journal(environ: Mapping[str, str]) -> bool:
    """Say whether standard error goes to journald, which has its own timestamps.

    The variable alone does not say so, since children inherit it: systemd.exec(5) tells to compare
    device and inode.
    """
    with suppress(OSError):
        stat = os.fstat(2)
        return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
    return False


def _log_for_people() -> None:
    """Show what the client warns of, as lines like the other ones of a command."""
    logging.basicConfig(level=logging.WARNING, format="clevrd: %(message)s", force=True)


def _print(line: str) -> None:
    sys.stdout.buffer.write(line.encode(errors="backslashreplace") + b"\n")


def _say(text: str) -> None:
    """Write each line of ``text`` to standard error."""
    with suppress(BrokenPipeError):  # nobody is there to be told
        for line in text.split("\n"):
            print(f"clevrd: {line.translate(_ESCAPES)}", file=sys.stderr)
