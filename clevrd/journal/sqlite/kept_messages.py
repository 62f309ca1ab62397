"""KeptMessages: a topic's history as far as it is to be shown, for readers' threads.

Files go by age and by bytes alone, so what `retention_messages` gives up is hidden here.
"""

from __future__ import annotations

from clevrd.journal.base import Extent, StoredRun
from clevrd.journal.sqlite.heads import CheckpointFile
from clevrd.journal.sqlite.reading import Names, SegmentReaders


class KeptMessages:
    """The messages that segments have, within the bound of messages for each topic."""

    def __init__(
        self, readers: SegmentReaders, checkpoint: CheckpointFile, max_messages: int
    ) -> None:
        """Args: max_messages: how many of a topic are shown; 0 for all."""
        self._readers = readers
        self._checkpoint = checkpoint
        self._max_messages = max_messages

    def extent(self, names: Names) -> Extent | None:
        """Return what is kept of a topic; None if nothing ever was."""
        found = self._readers.extent(names)
        if found is None:
            head = self._checkpoint.head(*names)
            return Extent(head + 1, head) if head else None
        if self._max_messages:
            return Extent(max(found.first, found.head - self._max_messages + 1), found.head)
        return found

    def page(self, names: Names, after: int, max_messages: int, max_bytes: int) -> list[StoredRun]:
        """Return messages behind offset ``after``, in order: see `History.page`."""
        extent = self.extent(names) if self._max_messages else None
        if extent is not None:
            after = max(after, extent.first - 1)
        return self._readers.page(names, after, max_messages, max_bytes)

    def last_before(self, names: Names, id_us: int) -> int:
        """Return the offset of the newest message whose id is below ``id_us``; 0 without."""
        found = self._readers.last_before(names, id_us)
        if found and self._max_messages:
            extent = self.extent(names)
            if extent is None or found < extent.first:
                return 0
        return found
