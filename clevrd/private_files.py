"""Files that hold a secret: read by nobody but their owner and group, and written new."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from clevrd.errors import ConfigError


def check_private(path: Path) -> None:
    """Raise ConfigError where others than its owner and group may read or change a file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"Can't read {str(path)!a}: its name has a zero byte.") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        raise ConfigError(
            f"Others may read or change {path}, which holds a secret; forbid it: chmod 640 {path}"
        )


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that was not there, and has its mode from the beginning on.

    Raises:
        FileExistsError: something is there.
        OSError: it can't be written; nothing is left of it.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
