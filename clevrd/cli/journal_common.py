"""Parts of all commands of `clevrd journal`: the directory, and failures as one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from clevrd.cli.failures import CommandFailed
from clevrd.errors import JournalFull, JournalUnavailable


def add_directory(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the journal."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=_directory,
        help="the journal's directory, as in clevrd serve --journal",
    )


def _directory(text: str) -> str:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            "it is a URL, and these commands are for a journal in a directory; docs/journal.md"
            " (Moving to another engine) says how messages are read from the servers"
        )
    return text


@contextmanager
def journal_failures() -> Iterator[None]:
    """Let the journal's errors be the command's failure."""
    import apsw

    try:
        yield
    except (JournalUnavailable, JournalFull) as error:
        raise CommandFailed(str(error)) from error
    except (apsw.Error, UnicodeDecodeError) as error:
        raise CommandFailed(f"The journal can't be read: {error}.") from error
