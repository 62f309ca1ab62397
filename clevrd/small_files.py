"""Small files that a configuration names: read within a bound of size, and no pipe waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_small(path: str | Path, max_bytes: int) -> bytes:
    """Return the content of a file, of a larger one ``max_bytes`` and one more.

    A pipe would be waited for until somebody writes to it, and is empty at the next reading.

    Raises:
        OSError: it can't be read, or is a pipe.
        ValueError: its name has a zero byte.
    """
    # The open waits neither for a pipe's other end nor for a terminal.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(descriptor, "rb") as file:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise OSError(errno.ESPIPE, "it is a pipe, and not a file")
        return file.read(max_bytes + 1)
