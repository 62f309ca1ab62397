"""clevrd journal export: prints a journal's messages in the order of the log, one line each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from clevrd import logs
from clevrd.cli.failures import EXIT_FAILED
from clevrd.cli.journal_common import add_directory, journal_failures
from clevrd.core.names import check_topic
from clevrd.core.patterns import matches, parse_pattern


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the journal, and which messages are wanted."""
    add_directory(parser)
    parser.add_argument(
        "--topic", metavar="PATTERN", help="a topic, or a pattern such as orders.* (default: all)"
    )
    parser.add_argument("--tenant", metavar="NAME", help="one tenant's messages (default: all)")


def run(options: argparse.Namespace) -> int:
    """Print the messages, and return 1 if some can't be read."""
    import msgspec

    from clevrd.cli.journal_lines import lines_of
    from clevrd.journal.sqlite.exporting import Export
    from clevrd.journal.sqlite.inspection import Inspection

    is_wanted = _wanted(options.topic)
    write = sys.stdout.buffer.write
    with journal_failures():
        export = Export(Inspection(options.directory))
        for run in export.runs():
            _, tenant, topic = run.names
            if options.tenant not in (None, tenant) or not is_wanted(topic):
                continue
            try:
                lines = lines_of(run.row, run.names, run.epoch, run.time_us, run.lines)
            except msgspec.MsgspecError as error:
                export.leave_out(run.path, f"the record at position {run.position}: {error}")
                continue
            for line in lines:
                write(line)
    left_out = export.left_out()
    for each in left_out:
        logs.say(f"Left out: {each}")
    return EXIT_FAILED if left_out else 0


def _wanted(topic: str | None) -> Callable[[str], bool]:
    """Return a function that says whether a topic is asked for.

    Raises:
        InvalidRequest: it is no topic, and no pattern.
    """
    if topic is None:
        return lambda _: True
    if "*" in topic:
        words = parse_pattern(topic)
        return lambda name: matches(words, name)
    check_topic(topic)
    return lambda name: name == topic
