"""clevrd subscribe: prints topics' messages, one JSON line each, and gaps on standard error."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from clevrd import logs
from clevrd.cli.failures import UsageError
from clevrd.cli.message_lines import add_printing, print_items, until_gone
from clevrd.cli.output import Output
from clevrd.cli.run_loop import run_until_signal
from clevrd.cli.server_options import add_server, client_failures, client_of
from clevrd.cli.values import count, count_or_zero
from clevrd.client import Client, Subscription
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.names import check_subscriber_id, check_topic
from clevrd.core.patterns import parse_pattern


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
        "--id",
        dest="subscriber_id",
        metavar="ID",
        help="the name by which others see this reader among those of its topics",
    )
    add_printing(parser)
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
    if options.subscriber_id is not None:
        check_subscriber_id(options.subscriber_id)
    if not (options.topics or options.patterns):
        raise UsageError("the following arguments are required: TOPIC or --pattern PATTERN")
    if options.last is not None and options.since is not None:
        raise UsageError("--last and --since each say where to begin; give one of them")
    logs.log_for_people()
    with client_failures(options):
        client = client_of(options)
        items = _subscription(client, options)
        return run_until_signal(until_gone(partial(_print, client, items, options)))


def _subscription(client: Client, options: argparse.Namespace) -> Subscription:
    try:
        return client.subscribe(
            *options.topics,
            patterns=options.patterns,
            policy=options.policy,
            buffer=options.buffer,
            last=options.last,
            since=options.since,
            subscriber_id=options.subscriber_id,
            headers=options.headers,
            reconnect=not options.no_reconnect,
        )
    except ValueError as error:  # a topic or pattern is named twice
        raise UsageError(str(error)) from None


async def _print(
    client: Client, items: Subscription, options: argparse.Namespace, output: Output
) -> int:
    async with client, items:
        if sys.stderr.isatty():
            logs.say(f"subscribed to {', '.join((*options.topics, *options.patterns))}")
        await print_items(items, output, is_raw=options.raw, at_most=options.count)
    return 0
