"""clevrd publish: publishes one message, or one for each line of standard input."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import msgspec

from clevrd import logs
from clevrd.cli.failures import EXIT_FAILED, UsageError
from clevrd.cli.lines import print_line
from clevrd.cli.run_loop import run_until_signal
from clevrd.cli.server_options import add_server, client_failures, client_of
from clevrd.cli.values import header, seconds, ttl_seconds
from clevrd.client import RETRY_FOR_S, BadRecord, Client, Refused
from clevrd.config import MIB
from clevrd.core.names import check_key, check_topic
from clevrd.plurals import noun_for

# The largest body that a server can be configured to take; a longer line can't be published.
MAX_LINE_BYTES: Final = 64 * MIB
READ_BYTES: Final = 65_536
# Statuses that refuse only this record (not JSON, too large); any other would refuse the next
# record too.
RECORD_STATUSES: Final = frozenset({400, 413})
# Time between two progress lines: often enough to look alive, and no burden for a terminal at 3,000
# records/s.
PROGRESS_INTERVAL_S: Final = 0.1

_NO_FIELDS: Final[Mapping[str, Any]] = MappingProxyType({})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: topic, data, key and server."""
    parser.add_argument("topic", metavar="TOPIC")
    add_server(parser)
    parser.add_argument(
        "json",
        nargs="?",
        metavar="JSON",
        help="the message's data; a single - reads one JSON value per line from standard input,"
        " in order",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="the data is text as it is, without quotes; with - each line of standard input,"
        " empty ones too",
    )
    parser.add_argument(
        "--key",
        metavar="KEY",
        help="what the message is about, for readers with --policy latest; with - that of all"
        " messages",
    )
    parser.add_argument(
        "--ttl",
        type=ttl_seconds,
        metavar="SECONDS",
        help="for how long the message is worth reading; who comes later is told a gap instead",
    )
    parser.add_argument(
        "--header",
        action="append",
        type=header,
        default=[],
        dest="headers",
        metavar="'NAME: VALUE'",
        help="carry this to readers that ask for headers: traceparent, tracestate, ce-type and the"
        " like; may be given several times",
    )
    parser.add_argument(
        "--retry-for",
        type=seconds,
        default=RETRY_FOR_S,
        metavar="SECONDS",
        help="how long one message is tried again when the server is busy or restarts; it is"
        " there at least once, and may be there twice when a connection broke before the"
        " answer (default %(default)g)",
    )


def run(options: argparse.Namespace) -> int:
    """Publish the data given, and return the exit code."""
    check_topic(options.topic)
    if options.key is not None:
        check_key(options.key)
    if options.json is None:
        raise UsageError(
            "publish needs the data: give it as JSON, or with --text as text, or - to read one"
            " value per line from standard input"
        )
    logs.log_for_people()
    read_line = text_line if options.text else json_line
    with client_failures(options):
        client = client_of(options, retry_for_s=options.retry_for)
        if options.json == "-":
            return run_until_signal(_publish_stdin(client, options, read_line))
        try:
            data_json = read_line(os.fsencode(options.json)) or b""
        except BadRecord as error:
            raise UsageError(str(error)) from None
        return run_until_signal(_publish_one(client, options, data_json))


def json_line(line: bytes) -> bytes | None:
    """Return the JSON value on a line, None for a blank line."""
    # RFC 8259 §2 allows white space around a value; a file with CRLF line ends leaves its CR here.
    return line.strip(b" \t\r") or None


def text_line(line: bytes) -> bytes:
    """Return a line of text as a JSON string.

    Raises:
        BadRecord: the line is not UTF-8.
    """
    try:
        text = line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"Not UTF-8 at byte {error.start} of the line.") from None
    return msgspec.json.encode(text)


async def _publish_one(client: Client, options: argparse.Namespace, data_json: bytes) -> int:
    try:
        async with client:
            answer = await client.publish_raw(options.topic, data_json, **_fields_of(options))
    except BadRecord as error:
        raise UsageError(
            f"{error} The data is JSON; a text stands in quotes: '\"hello\"', or take --text"
        ) from None
    fields = msgspec.structs.asdict(answer).items()
    # Fields that are None (an older server does not send them) or False are left out; the client
    # logs warnings.
    told = {name: value for name, value in fields if value is not None and value is not False}
    del told["warnings"]
    print_line(msgspec.json.encode(told).decode())
    return 0


def _fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `Client.publish_raw` is given beside topic and data."""
    return {"key": options.key, "ttl_s": options.ttl, "headers": dict(options.headers)}


async def _publish_stdin(
    client: Client, options: argparse.Namespace, read_line: Callable[[bytes], bytes | None]
) -> int:
    draw = logs.stderr.draw if sys.stderr.isatty() else None
    progress = Progress(draw, time.monotonic)
    async with client:
        return await publish_records(
            client,
            options.topic,
            _read_stdin,
            progress,
            read_line,
            _fields_of(options),
        )


def _read_stdin() -> bytes:
    # sys.stdin is not used: a thread that waits in it holds its lock, and Python aborts at exit.
    return os.read(0, READ_BYTES)


async def publish_records(
    client: Client,
    topic: str,
    read: Callable[[], bytes],
    progress: Progress,
    read_line: Callable[[bytes], bytes | None] = json_line,
    fields: Mapping[str, Any] = _NO_FIELDS,
) -> int:
    """Publish each line that ``read`` brings as one message, in order, and return the exit code.

    One line is published at a time. A bad line is reported and counted, and the next one follows;
    an error that would refuse every line ends the command.

    Args:
        read: returns the next bytes, b"" at the end; it may block, since it is called in a thread.
        read_line: returns the JSON on a line, None for a blank one; may raise BadRecord.
        fields: what `Client.publish_raw` is given of every message, beside topic and data.

    Raises:
        Refused, Unreachable, BadAnswer: as from `Client.publish_raw`, for an error that ends the
            command.
    """
    try:
        publish = partial(client.publish_raw, topic, **fields)
        async with aclosing(_numbered_lines(read)) as lines:
            async for number, line in lines:
                try:
                    record = _record_of(line, read_line)
                except BadRecord as error:
                    progress.begin(number)
                    progress.refuse(error)
                    continue
                if record is not None:
                    progress.begin(number)
                    await _publish_record(publish, record, progress)
    finally:
        progress.finish(client.repeated_messages)
    return EXIT_FAILED if progress.refused else 0


def _record_of(line: bytes, read_line: Callable[[bytes], bytes | None]) -> bytes | None:
    if len(line) > MAX_LINE_BYTES:
        raise BadRecord(f"Longer than {MAX_LINE_BYTES} bytes.")
    return read_line(line)


async def _publish_record(
    publish: Callable[[bytes], Awaitable[object]], record: bytes, progress: Progress
) -> None:
    try:
        await publish(record)
    except BadRecord as error:
        progress.refuse(error)
    except Refused as error:
        if error.status not in RECORD_STATUSES:
            raise
        progress.refuse(error)
    else:
        progress.accept()


async def _numbered_lines(read: Callable[[], bytes]) -> AsyncGenerator[tuple[int, bytes]]:
    """Yield (number from 1, line without its newline) for each line."""
    splitter = LineSplitter()
    number = 0
    while chunk := await _in_thread(read):
        for line in splitter.feed(chunk):
            number += 1
            yield number, line
    # The last line may lack its newline.
    if splitter.is_mid_line:
        yield number + 1, next(splitter.feed(b"\n"))


class LineSplitter:
    """Cuts a stream into lines; a line is cut off one byte beyond MAX_LINE_BYTES."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def is_mid_line(self) -> bool:
        """Whether a line has begun and not ended."""
        return bool(self._held)

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
    """Return ``call()``, run in a thread that the process does not wait for at exit.

    The process would wait for asyncio.to_thread(), so Ctrl-C would do nothing until the next line
    is typed.
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
    """Counts records and shows the counts: as a progress line on a terminal, and at the end."""

    def __init__(self, draw: Callable[[str], object] | None, clock: Callable[[], float]) -> None:
        """Start the clock; ``draw`` writes to the terminal, and is None without one."""
        self._draw = draw
        self._clock = clock
        self._started = clock()
        self._next_show = self._started
        # Number of the line being published, or of the last one published; set by begin.
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
        if self._draw and now >= self._next_show:
            self._next_show = now + PROGRESS_INTERVAL_S
            rate = self.published / max(now - self._started, 1e-3)
            self._draw(f"\r\x1b[K{self.published} published, {rate:.0f}/s")

    def refuse(self, why: Exception) -> None:
        """Count the record as refused and report why."""
        self.refused += 1
        self._clear()
        logs.say(f"line {self.line}: {why}")

    def finish(self, repeated_messages: int) -> None:
        """Report the sums."""
        self._clear()
        elapsed_s = self._clock() - self._started
        records = noun_for(self.records, "record")
        text = f"published {self.published} of {self.records} {records} in {elapsed_s:.1f} s"
        if self.published + self.refused < self.records:
            text += f", stopped at line {self.line}"
        if repeated_messages:
            text += (
                f"; {repeated_messages} sent again because an answer was lost,"
                " so as many may be there twice"
            )
        logs.say(text)

    def _clear(self) -> None:
        if self._draw:
            self._draw("\r\x1b[K")
