"""clevrd journal backup: copies a journal, which a daemon may have open."""

from __future__ import annotations

import argparse

from clevrd import logs
from clevrd.cli.failures import EXIT_FAILED
from clevrd.cli.journal_common import add_directory, journal_failures
from clevrd.cli.lines import print_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the journal, and where the copy goes."""
    add_directory(parser)
    parser.add_argument("destination", metavar="DEST", help="the copy, a directory to be made")


def run(options: argparse.Namespace) -> int:
    """Make the copy, and return 1 if something of the journal is not in it."""
    from clevrd.journal.sqlite.backup import back_up
    from clevrd.journal.sqlite.inspection import Inspection

    left_out: list[str] = []
    with journal_failures():
        inspection = Inspection(options.directory)
        missing = list(inspection.missing())
        size_bytes = back_up(inspection, options.destination, left_out.append)
    for each in missing:
        # The copy has all that the journal has, so this is no failure of the copy.
        logs.say(f"The journal is not whole: {each}")
    for each in left_out:
        logs.say(each.capitalize())
    print_line(
        f"{options.destination} has {size_bytes:,} bytes. A daemon that is started with it begins a"
        " new epoch of all topics."
    )
    return EXIT_FAILED if left_out else 0
