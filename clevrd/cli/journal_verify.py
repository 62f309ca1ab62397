"""clevrd journal verify: compares all that a journal has with its checksums."""

from __future__ import annotations

import argparse

from clevrd.cli.failures import EXIT_FAILED
from clevrd.cli.journal_common import add_directory, journal_failures
from clevrd.cli.lines import print_line
from clevrd.plurals import noun_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the journal."""
    add_directory(parser)


def run(options: argparse.Namespace) -> int:
    """Print a line for each damage, and return 1 if there is any."""
    from clevrd.journal.sqlite.inspection import Inspection
    from clevrd.journal.sqlite.verifying import damage_in

    count = 0
    with journal_failures():
        inspection = Inspection(options.directory)
        for line in damage_in(inspection):
            count += 1
            print_line(line)
    if count:
        return EXIT_FAILED
    records = sum(each.last_position - each.info.after_position for each in inspection.segments)
    segments = len(inspection.segments)
    print_line(
        f"All is well: {records:,} {noun_for(records, 'record')} in {segments:,}"
        f" {noun_for(segments, 'segment')}."
    )
    return 0
