"""Memory: gives memory that the allocator holds free back to the machine.

Decides when, and calls Python's collector and glibc's malloc_trim(3); other C libraries need no
such call.
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

# Memory is given back once at least WORTH_BYTES were freed since the last time, as seen by
# PATIENT_LOOKS looks in a row: rings that are cut at their bound are full again by then. Giving
# back pauses the process 0.15 ms for each MiB. glibc's allocator is locked meanwhile, so a thread
# would not help.
WORTH_BYTES: Final = 8 << 20
PATIENT_LOOKS: Final = 3
# A smaller amount is given back after more looks, when the daemon is idle.
LITTLE_BYTES: Final = 1 << 20
LITTLE_LOOKS: Final = 10


def find_trim() -> Callable[[], object] | None:
    """Return a function that gives free memory back; None if the C library has none.

    Only glibc needs one: musl and macOS give memory back by themselves.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    malloc_trim.argtypes, malloc_trim.restype = [ctypes.c_size_t], ctypes.c_int
    # The argument 0 is the number of bytes to keep free at the top of the heap.
    return lambda: malloc_trim(0)


class Memory:
    """Gives memory back once much was freed and was not used again at once."""

    __slots__ = ("_looks", "_now_s", "_peak_bytes", "_trim")

    def __init__(
        self, trim: Callable[[], object] | None, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._trim = trim
        self._now_s = now_s
        # Most bytes held since memory was last given back.
        self._peak_bytes = 0
        # Looks in a row that found at least LITTLE_BYTES freed.
        self._looks = 0

    def look(self, held_bytes: int, *, is_quiet: bool) -> bool:
        """Note the bytes held now; give freed memory back if it is time, and return whether.

        Args:
            held_bytes: bytes held by the rings and the readers, which take most of the memory.
            is_quiet: few connections are left, so that a full collection is short. Objects of
                closed connections in reference cycles keep the memory around them: 30 MB after
                2,000 readers.
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
        if is_quiet:
            gc.collect()
        self.give_back(held_bytes)
        return True

    def trim(self) -> None:
        """Have what the allocator holds free given back now; later looks find what they would."""
        if self._trim is not None:
            self._trim()

    def give_back(self, held_bytes: int) -> None:
        """Give freed memory back now, with ``held_bytes`` as the bytes still held."""
        freed_bytes = self._peak_bytes - held_bytes
        self._looks = 0
        began_s = self._now_s()
        self.trim()
        log.debug(
            "memory given back freed_bytes=%d took_s=%.4f",
            freed_bytes,
            self._now_s() - began_s,
        )
        self._peak_bytes = held_bytes
