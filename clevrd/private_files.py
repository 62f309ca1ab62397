"""Files that hold a secret: nobody but their owner and group may read them."""

from __future__ import annotations

import stat
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
