"""Memory: what was given back to the allocator goes back to the machine.

Decides when, and asks Python's collector and glibc; nobody else's allocator needs it. Source:
malloc_trim(3).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

# Freed since the last time, and looks in a row for which it has to be: rings that are cut at their
# bound are full again by then. It is a pause of 0.15 ms for each MiB. The lock of glibc's allocator
# is held meanwhile, so a thread would not help.
WORTH_BYTES: Final = 8 << 20
PATIENT_LOOKS: Final = 3
# What is left over is worth it when nothing happens any more.
LITTLE_BYTES: Final = 1 << 20
LITTLE_LOOKS: Final = 10


def find_trim() -> Callable[[], object] | None:
    """Return what gives free memory back to the machine; None where the C library has no such call.

    That is glibc's alone: musl and macOS return memory by themselves.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    malloc_trim.argtypes, malloc_trim.restype = [ctypes.c_size_t], ctypes.c_int
    # What it leaves at the top of the heap.
    return lambda: malloc_trim(0)


class Memory:
    """Gives memory back once much of it was freed and is not used again at once."""

    __slots__ = ("_looks", "_now_s", "_peak_bytes", "_trim")

    def __init__(
        self, trim: Callable[[], object] | None, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._trim = trim
        self._now_s = now_s
        # The most that was held since the last time.
        self._peak_bytes = 0
        # Looks in a row at which enough was free.
        self._looks = 0

    def look(self, held_bytes: int, *, is_quiet: bool) -> bool:
        """Note what is held now; give back what was freed, and return whether that was done.

        Args:
            held_bytes: by what takes most of the memory, as far as it is counted.
            is_quiet: few connections are left, so that a collection takes no time. What those that
                have gone leave in cycles pins the memory around it: 30 MB after 2,000 readers.
        """
        self._peak_bytes = max(self._peak_bytes, held_bytes)
        freed_bytes = self._peak_bytes - held_bytes
        if freed_bytes < LITTLE_BYTES:
            self._looks = 0
            return False
        self._looks += 1
        patience = PATIENT_LOOKS if freed_bytes >= WORTH_BYTES else LITTLE_LOOKS
        if self._trim is None or self._looks < patience:
            return False
        self._looks = 0
        began_s = self._now_s()
        if is_quiet:
            gc.collect()
        self._trim()
        log.debug(
            "memory given back freed_bytes=%d took_s=%.4f",
            freed_bytes,
            self._now_s() - began_s,
        )
        self._peak_bytes = held_bytes
        return True
