"""Secrets as their holders keep them: one line, which is never shown."""

from __future__ import annotations

import getpass
import re
import sys
from typing import Final

from clevrd.cli.failures import UsageError

# More than a key or a token can have; a wrong file is not read to its end.
MAX_BYTES: Final = 65_536
_VISIBLE: Final = re.compile(rb"[\x21-\x7e]+")


class NotASecret(Exception):
    """This is no key and no token; the text says why, and holds nothing of it."""


def as_secret(content: bytes) -> str:
    """Return the secret on a line, without the line's end.

    Raises:
        NotASecret: it is not visible ASCII characters without spaces, which clients can send.
    """
    line = content.strip(b"\r\n")
    if not line:
        raise NotASecret("it is empty")
    if len(line) > MAX_BYTES or not _VISIBLE.fullmatch(line):
        raise NotASecret("it is not one line of visible ASCII characters without spaces")
    return line.decode("ascii")


def read_secret(what: str) -> str:
    """Return the secret on standard input; on a terminal it is asked for, and not echoed.

    Args:
        what: what it is, for the question and for errors.

    Raises:
        UsageError: there is none.
    """
    if sys.stdin.isatty():
        content = getpass.getpass(f"The {what}: ").encode(errors="surrogateescape")
    else:
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
    try:
        return as_secret(content)
    except NotASecret as error:
        raise UsageError(f"standard input has no {what}: {error}") from None
