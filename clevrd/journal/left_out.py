"""LeftOut: tells the log of records that can't be read: some by themselves, of others their number.

The number is told with the next record behind the while; `/metrics` has it at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

# Lines of one partition within a while. Another program may write as many records as it likes.
LINES: Final = 10
WHILE_S: Final = 60.0


class LeftOut:
    """The records of one partition that were left out; `/metrics` counts them all."""

    def __init__(self, partition: int, now_s: Callable[[], float]) -> None:
        self._partition = partition
        self._now_s = now_s
        # When the while began; lines in it, and records in it that have no line.
        self._since_s = now_s()
        self._lines = 0
        self._untold = 0

    def note(self, position: int, reason: str) -> None:
        """Tell of the record at ``position``, unless enough was told in this while."""
        now_s = self._now_s()
        if now_s - self._since_s >= WHILE_S:
            if self._untold:
                log.error(
                    "more records left out partition=%d count=%d", self._partition, self._untold
                )
            self._since_s, self._lines, self._untold = now_s, 0, 0
        if self._lines >= LINES:
            self._untold += 1
            return
        self._lines += 1
        log.error(
            "record left out partition=%d position=%d reason=%s", self._partition, position, reason
        )
