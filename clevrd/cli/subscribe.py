"""clevrd subscribe: prints topics' messages, one JSON line each, and gaps on standard error."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from typing import Final

import msgspec

from clevrd import logs
from clevrd.cli.failures import UsageError
from clevrd.cli.output import Output
from clevrd.cli.run_loop import run_until_signal
from clevrd.cli.server_options import add_server, client_failures, client_of
from clevrd.cli.values import count, count_or_zero
from clevrd.client import Client, Gap, Subscription
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.names import check_topic
from clevrd.core.patterns import parse_pattern

# A newline between a message's JSON tokens would break its line, so it becomes a space. JSON
# strings have no newlines, since JSON escapes them (RFC 8259 §7).
_NEWLINES_TO_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")

# On a terminal, control characters of a text, except tab and newline, become Python's escapes.
# Otherwise a publisher could write over the screen, or into the terminal's own input (ECMA-48).
_SHOWN: Final = {
    number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160)) if number not in (9, 10)
}


class _WithData(msgspec.Struct, frozen=True):
    """The field of a message that `--raw` prints."""

    data: msgspec.Raw


_decode_data = msgspec.json.Decoder(_WithData).decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: topics and patterns, and how to read them."""
    parser.add_argument(
        "topics", nargs="*", metavar="TOPIC", help="one or more, side by side, and --pattern"
    )
    add_server(parser)
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
        "--buffer", type=count, metavar="N", help="messages this reader may lag behind"
    )
    parser.add_argument(
        "--last", type=count_or_zero, metavar="N", help="recent messages wanted first"
    )
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="begin in the past: 90s, 5m, 2h, a time (RFC 3339 or unix), a message's id, or all",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="print each message's data alone: a text as it is, without quotes, anything else as"
        " JSON on one line",
    )
    parser.add_argument("--count", type=count, metavar="N", help="stop after N messages")
    parser.add_argument(
        "--no-reconnect", action="store_true", help="stop when the connection is lost"
    )


def run(options: argparse.Namespace) -> int:
    """Print messages until a signal or `--count` ends it, and return the exit code."""
    for topic in options.topics:
        check_topic(topic)
    for pattern in options.patterns:
        parse_pattern(pattern)
    if not (options.topics or options.patterns):
        raise UsageError("the following arguments are required: TOPIC or --pattern PATTERN")
    if options.last is not None and options.since is not None:
        raise UsageError("--last and --since each say where to begin; give one of them")
    logs.log_for_people()
    with client_failures():
        client = client_of(options)
        return run_until_signal(_print_until_gone(client, _subscription(client, options), options))


def _subscription(client: Client, options: argparse.Namespace) -> Subscription:
    try:
        return client.subscribe(
            *options.topics,
            patterns=options.patterns,
            policy=options.policy,
            buffer=options.buffer,
            last=options.last,
            since=options.since,
            reconnect=not options.no_reconnect,
        )
    except ValueError as error:  # a topic or pattern is named twice
        raise UsageError(str(error)) from None


async def _print_until_gone(
    client: Client, items: Subscription, options: argparse.Namespace
) -> int:
    """Print messages, and end as soon as no program reads them any more."""
    output = Output()
    printing = asyncio.ensure_future(_print_messages(client, items, output, options))
    output.watch(printing.cancel)
    try:
        return await printing
    except asyncio.CancelledError:
        if output.is_gone:
            return 0
        raise


async def _print_messages(
    client: Client, items: Subscription, output: Output, options: argparse.Namespace
) -> int:
    printed = 0
    line_of = _raw_line(is_shown=sys.stdout.isatty()) if options.raw else _json_line
    async with client, items:
        if sys.stderr.isatty():
            logs.say(f"subscribed to {', '.join((*options.topics, *options.patterns))}")
        async for item in items:
            if isinstance(item, Gap):
                logs.say(_gap_sentence(item))
                continue
            await output.write(line_of(item.json))
            printed += 1
            if printed == options.count:
                break
    await output.finish()
    return 0


def _json_line(message_json: bytes) -> bytes:
    return message_json.translate(_NEWLINES_TO_SPACES) + b"\n"


def _raw_line(*, is_shown: bool) -> Callable[[bytes], bytes]:
    """Return a function that makes a line of a message's data; ``is_shown`` on a terminal."""

    def line_of(message_json: bytes) -> bytes:
        data = bytes(_decode_data(message_json).data)
        if not data.startswith(b'"'):
            return _json_line(data)
        text: str = msgspec.json.decode(data)
        if is_shown:
            text = text.translate(_SHOWN)
        return text.encode() + b"\n"

    return line_of


def _gap_sentence(gap: Gap) -> str:
    """Return a line about the gap, for people and for grep."""
    if gap.reason == "epoch":
        return f"topic restarted, some messages may be missing topic={gap.topic}"
    values = {"from": gap.first, "to": gap.last, "count": gap.count, "reason": gap.reason}
    told = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return f"messages missed topic={gap.topic} {told}"
