"""KernelFiles: small files of /proc and of cgroups, opened once and read again and again.

What they mean is decided elsewhere (`system_stats`). The load matters most of a daemon that is out
of descriptors, and to read a file that is open takes none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

# What is read of a file; /proc/stat is longer where there are many cores, and of use is its first
# line.
MAX_BYTES: Final = 16_384


class KernelFiles:
    """Files by path; each is opened when it is first asked for, and kept."""

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
                # It was removed; there may be another one in its place.
                self._forget(path)
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(descriptor, MAX_BYTES, 0).decode(errors="replace")
        except OSError:
            # Not an error: which files there are depends on kernel, controllers and permissions.
            self._forget(path)
            return None

    def close(self) -> None:
        """Let go of all files."""
        for path in list(self._descriptors):
            self._forget(path)

    def _forget(self, path: Path) -> None:
        descriptor = self._descriptors.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)
