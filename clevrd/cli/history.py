"""clevrd history: prints the messages that a topic has had, one JSON line each, and ends."""

from __future__ import annotations

import argparse
from functools import partial

from clevrd import logs
from clevrd.cli.failures import UsageError
from clevrd.cli.message_lines import add_printing, print_items, until_gone
from clevrd.cli.output import Output
from clevrd.cli.run_loop import run_until_signal
from clevrd.cli.server_options import add_server, client_failures, client_of
from clevrd.cli.values import count, count_or_zero
from clevrd.client import Client, History, Position
from clevrd.core.names import check_topic
from clevrd.plurals import noun_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: the topic, and which of its messages."""
    parser.add_argument("topic", metavar="TOPIC")
    add_server(parser)
    parser.add_argument("--last", type=count_or_zero, metavar="N", help="the last N messages alone")
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="begin there: 90s, 5m, 2h, a time (RFC 3339 or unix), a message's id; default: all",
    )
    parser.add_argument(
        "--position",
        type=position,
        metavar="EPOCH:OFFSET",
        help="begin behind this position, as this command tells it at its end",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="end after N messages")
    add_printing(parser)


def position(text: str) -> Position:
    """Return a position that is given as text."""
    try:
        return Position.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    """Print messages up to the newest one, and return the exit code."""
    check_topic(options.topic)
    if sum(each is not None for each in (options.last, options.since, options.position)) > 1:
        raise UsageError("--last, --since and --position each say where to begin; give one of them")
    logs.log_for_people()
    with client_failures(options):
        client = client_of(options)
        items = _history(client, options)
        return run_until_signal(until_gone(partial(_print, client, items, options)))


def _history(client: Client, options: argparse.Namespace) -> History:
    try:
        return client.history(
            options.topic,
            last=options.last,
            since=options.since,
            position=options.position,
            limit=options.limit,
            headers=options.headers,
        )
    except ValueError as error:  # a topic that can't stand in a URL, or an empty --since
        raise UsageError(str(error)) from None


async def _print(
    client: Client, items: History, options: argparse.Namespace, output: Output
) -> int:
    async with client:
        printed = await print_items(items, output, is_raw=options.raw)
    messages = noun_for(printed, "message")
    logs.say(f"printed {printed} {messages} up to position={items.position}")
    return 0
