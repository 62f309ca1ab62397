"""clevrd journal stat: how much a journal has, and since when."""

from __future__ import annotations

import argparse

import msgspec

from clevrd.cli.journal_common import add_directory, journal_failures
from clevrd.cli.lines import print_line
from clevrd.core.message_ids import rfc3339
from clevrd.plurals import noun_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the journal, and the form."""
    add_directory(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the figures, and return the exit code."""
    from clevrd.journal.sqlite.inspection import Inspection

    with journal_failures():
        found = Inspection(options.directory).summary()
    oldest, newest = (
        None if us is None else rfc3339(us) for us in (found.oldest_us, found.newest_us)
    )
    if options.json:
        figures = msgspec.to_builtins(found)
        del figures["oldest_us"], figures["newest_us"]
        print_line(msgspec.json.encode({**figures, "oldest": oldest, "newest": newest}).decode())
        return 0
    shown = {
        "directory": found.directory,
        "in use": "by a daemon" if found.is_open else "by nobody",
        "stamp": found.stamp or "none that can be read",
        "durability": found.durability or "unknown",
        "segments": f"{found.segments}",
        "bytes": f"{found.size_bytes:,}",
        "records": f"{found.records:,}",
        "messages": f"{found.messages:,}",
        "topics": f"{found.topics:,}",
        "oldest": oldest or "none",
        "newest": newest or "none",
    }
    if found.damaged_files:
        shown["damaged"] = (
            f"{found.damaged_files:,} {noun_for(found.damaged_files, 'file')}; see clevrd journal"
            " verify"
        )
    for name, text in shown.items():
        print_line(f"{name:<10}  {text}")
    return 0
