"""clevrd journal export: prints a journal's messages in the order of the log, one line each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress

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
    from clevrd.journal.clear_points import ClearPoints
    from clevrd.journal.records import BadRecord, decode_header
    from clevrd.journal.sqlite.inspection import Inspection, is_sound
    from clevrd.journal.sqlite.library import DAMAGE, words_of

    is_wanted = _wanted(options.topic)
    damage: list[str] = []
    # Topics' newest offsets so far. A record that was sent again has the same messages.
    heads: dict[tuple[str, str, str], int] = {}
    write = sys.stdout.buffer.write
    with journal_failures():
        inspection = Inspection(options.directory)
        damage += [f"{bad.path}: {bad.why}" for bad in inspection.bad]
        damage += inspection.missing()
        points = ClearPoints(*inspection.cleared())
        for segment in inspection.segments:
            path = segment.path

            def note(what: str, path: str = path) -> None:
                damage.append(f"{path}: {what}")

            connection = inspection.connect(segment)
            try:
                topics = inspection.topics(connection)
                for record in inspection.records(segment, connection, note):
                    for run_row in record.runs:
                        names = topics.get(run_row[0])
                        if names is None or not is_sound(run_row, names, record):
                            note(f"a run of the record at position {record.position} is damaged")
                            continue
                        if run_row[1] <= heads.get(names, 0):
                            continue
                        heads[names] = run_row[1] + run_row[2] - 1
                        epoch = points.epoch_of(names, run_row[1])
                        if options.tenant in (None, names[1]) and is_wanted(names[2]):
                            at_bytes, size_bytes = run_row[4:6]
                            lines = record.record[at_bytes : at_bytes + size_bytes].split(b"\n")
                            for line in lines_of(run_row, names, epoch, record.time_us, lines):
                                write(line)
                    with suppress(BadRecord):
                        points.note(decode_header(record.record)[0])
            except (*DAMAGE, msgspec.MsgspecError) as error:
                note(words_of(error))
            finally:
                connection.close(True)
    for each in damage:
        logs.say(f"Left out: {each}")
    return EXIT_FAILED if damage else 0


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
