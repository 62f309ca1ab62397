"""RecordChain: a digest of all that was counted in a partition epoch, in which order and how. Pure.

Nodes tell each other the end of theirs, and so find out if they have counted otherwise.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from typing import Final

from clevrd.journal.records import Seen

# Records whose chain is remembered, for what other nodes say they have seen. A node that is further
# behind is not judged by its words, until it has caught up.
REMEMBERED: Final = 1_024


class RecordChain:
    """The chain behind each of the last records of one epoch."""

    __slots__ = ("_behind", "value")

    def __init__(self, epoch: str) -> None:
        # The chain behind the last record.
        self.value = zlib.crc32(epoch.encode())
        # The same behind each of the last records, by their positions.
        self._behind: OrderedDict[int, int] = OrderedDict()

    @property
    def position(self) -> int:
        """The last record's position; there is one."""
        return next(reversed(self._behind))

    def go_on(self, position: int, value: int) -> None:
        """Go on behind the record at ``position``, as a checkpoint has it."""
        self.value = self._behind[position] = value

    def add(self, position: int, digest: str, last_id_us: int) -> None:
        """Add a record, when it is counted."""
        link = f"{position} {digest} {last_id_us}"
        behind = self._behind
        self.value = behind[position] = zlib.crc32(link.encode(), self.value)
        if len(behind) > REMEMBERED:
            behind.popitem(last=False)

    def seen(self) -> Seen | None:
        """Return what this node tells the others; nothing before the first record."""
        if not self._behind:
            return None
        return Seen(str(self.position), f"{self.value:08x}")

    def has(self, seen: Seen) -> bool:
        """Return whether a writer has counted the same, as far as what it has seen can tell."""
        if not self._behind:
            return True
        position = int(seen.position)
        if position < next(iter(self._behind)):
            # It is of an epoch before, or too long ago.
            return True
        value = self._behind.get(position)
        return value is not None and seen.digest == f"{value:08x}"
