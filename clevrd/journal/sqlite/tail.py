"""Tail: the newest records of the log, which are read without its files. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

# Bytes of records that are kept at most; older ones are read from the file.
TAIL_BYTES: Final = 16 << 20


class Tail:
    """Records that were committed and not read yet."""

    __slots__ = ("_bytes", "_records", "floor")

    def __init__(self) -> None:
        self._records: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        # All records behind this position are here.
        self.floor = 0

    def add(self, position: int, record: bytes) -> None:
        """Add the newest record, and let go of the oldest ones beyond the bound."""
        self._records.append((position, record))
        self._bytes += len(record)
        while self._bytes > TAIL_BYTES and len(self._records) > 1:
            self._drop_oldest()

    def has_any(self, after: int) -> bool:
        """Return whether there is a record behind ``after``."""
        return bool(self._records) and self._records[-1][0] > after

    def take(self, after: int) -> list[tuple[int, bytes]]:
        """Return all records behind ``after``, of which there is one, and let go of the others."""
        while self._records[0][0] <= after:
            self._drop_oldest()
        return list(self._records)

    def _drop_oldest(self) -> None:
        position, record = self._records.popleft()
        self._bytes -= len(record)
        self.floor = position
