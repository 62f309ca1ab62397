"""Secrets on standard input: one line, which is never shown."""

from __future__ import annotations

import getpass
import re
import sys
from typing import Final

from clevrd.cli.failures import UsageError

# More than a key or a token can have; a wrong file is not read to its end.
_MAX_BYTES: Final = 65_536
_VISIBLE: Final = re.compile(rb"[\x21-\x7e]+")


def read_secret(what: str) -> str:
    """Return the one line of standard input; on a terminal it is asked for, and not echoed.

    Args:
        what: what it is, for the question and for errors.

    Raises:
        UsageError: it is no credential: visible ASCII characters without spaces.
    """
    if sys.stdin.isatty():
        content = getpass.getpass(f"The {what}: ").encode(errors="surrogateescape")
    else:
        content = sys.stdin.buffer.read(_MAX_BYTES + 1)
    line = content.strip(b"\r\n")
    if not line:
        raise UsageError(f"the {what} is read from standard input, which has none")
    if len(line) > _MAX_BYTES or not _VISIBLE.fullmatch(line):
        raise UsageError(
            f"standard input has no {what}: one line of visible ASCII characters without spaces"
        )
    return line.decode("ascii")
