"""KernelFiles: reads small files of /proc and of cgroups, each opened only once.

`system_stats` interprets them. The load matters most in a daemon that has run out of descriptors,
and reading an open file needs no new one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

# Bytes read of a file at most. /proc/stat is longer on a machine with many cores, and only its
# first line is needed.
MAX_BYTES: Final = 16_384


class KernelFiles:
    """Open files by path; each is opened when it is first read, and kept open."""

    __slots__ = ("_descriptors",)

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __del__(self) -> None:
        self.close()

    def text(self, path: Path) -> str | None:
        """Return a file's text; None if it is missing or can't be read."""
        try:
            descriptor = self._descriptors.get(path)
            if descriptor is not None:
                if os.fstat(descriptor).st_nlink:
                    return os.pread(descriptor, MAX_BYTES, 0).decode(errors="replace")
                # The file was removed; another one may be in its place.
                self._forget(path)
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(descriptor, MAX_BYTES, 0).decode(errors="replace")
        except OSError:
            # A missing file is no error: kernel, controllers and permissions decide which files
            # exist.
            self._forget(path)
            return None

    def close(self) -> None:
        """Close all files."""
        for path in list(self._descriptors):
            self._forget(path)

    def _forget(self, path: Path) -> None:
        descriptor = self._descriptors.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)
