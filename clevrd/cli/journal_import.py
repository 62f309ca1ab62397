"""clevrd journal import: appends messages, one line each, to a journal that no daemon has open."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, Final

from clevrd import logs
from clevrd.cli.failures import EXIT_FAILED, CommandFailed
from clevrd.cli.journal_common import add_directory, journal_failures
from clevrd.cli.lines import print_line
from clevrd.errors import InvalidRequest
from clevrd.plurals import noun_for

if TYPE_CHECKING:
    from clevrd.journal.importing import Imported

# Lines that are read at once.
_LINES: Final = 1_000
# Wrong lines that are told one by one.
_TOLD: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the journal, and the file."""
    add_directory(parser)
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="lines as clevrd journal export prints them; topic and data are enough (default:"
        " standard input, which - stands for too)",
    )


def run(options: argparse.Namespace) -> int:
    """Append the messages, say how many, and return 1 if some lines are no messages."""
    logs.log_for_people()
    try:
        is_piped = options.file in (None, "-")
        file = sys.stdin.buffer if is_piped else open(options.file, "rb")  # noqa: SIM115  # it is closed below
    except OSError as error:
        raise CommandFailed(f"Can't read {options.file}: {error.strerror}.") from error
    lines = _Lines(file)
    with file, journal_failures():
        count = asyncio.run(_import(options.directory, lines))
    are = "is" if count == 1 else "are"
    print_line(f"{count:,} {noun_for(count, 'message')} {are} in the journal {options.directory}.")
    if lines.wrong == 1:
        logs.say("1 line is no message, and was left out.")
    elif lines.wrong:
        logs.say(f"{lines.wrong:,} lines are no messages, and were left out.")
    return EXIT_FAILED if lines.wrong else 0


class _Lines:
    """The messages on a file's lines, and how many lines are none."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.wrong = 0

    def messages(self) -> Iterator[Imported]:
        """Yield the messages; say which lines are none."""
        from clevrd.cli.journal_lines import read_line

        now_us = time.time_ns() // 1000
        for number, line in enumerate(self._file, 1):
            text = line.strip()
            if not text:
                continue
            try:
                yield read_line(text, now_us)
            except InvalidRequest as error:
                self.wrong += 1
                if self.wrong <= _TOLD:
                    logs.say(f"Line {number}: {error}")


async def _import(directory: str, lines: _Lines) -> int:
    from clevrd.journal.importing import Importer
    from clevrd.journal.sqlite.engine import SqliteEngine
    from clevrd.journal.sqlite.settings import SqliteSettings

    # All is on the disk when the journal is closed, which is soon enough here.
    engine = SqliteEngine(SqliteSettings(directory, durability="os"))
    await engine.open()
    try:
        importer = Importer(engine)
        messages = lines.messages()
        while some := list(islice(messages, _LINES)):
            await importer.add(some)
        await importer.finish()
    finally:
        await engine.close()
    return importer.count
