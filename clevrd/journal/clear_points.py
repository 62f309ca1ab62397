"""ClearPoints: in which epoch each message of a log is, of topics that were cleared. Pure.

The fold knows the epoch that a topic has now; a reader of old records needs those before, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from clevrd.journal.epoch_names import topic_epoch
from clevrd.journal.records import Header

_Slot = tuple[str, str]

# The epochs of a topic cannot be told before this offset, of which only its last clear is known.
_UNKNOWN: Final = -1


class _Topic:
    """A topic as far as its messages have been read, in their order."""

    __slots__ = ("cleared", "is_cleared_next", "partition_epoch")

    def __init__(self, partition_epoch: str, cleared: int) -> None:
        self.partition_epoch = partition_epoch
        # The offset up to which it was cleared; 0 for never, or _UNKNOWN.
        self.cleared = cleared
        # A clear was read since its last message.
        self.is_cleared_next = False


class ClearPoints:
    """Told of records in their order, it names the epochs of their messages."""

    def __init__(
        self, partition_epoch: str = "", cleared: Iterable[tuple[str, str, int]] = ()
    ) -> None:
        """Begin before the first record that there is; those before it may be gone.

        Args:
            partition_epoch: the one of the newest checkpoint; empty without one.
            cleared: tenant, topic and offset of topics that were cleared in it.
        """
        self._partition_epoch = partition_epoch
        self._last = {(tenant, topic): upto for tenant, topic, upto in cleared}
        self._topics: dict[_Slot, _Topic] = {}
        # The last sequence of each writer: a record that was sent again clears nothing.
        self._writers: dict[str, int] = {}
        # A record could not be read, which may have cleared topics.
        self._is_unsure = False

    def epoch_of(self, names: tuple[str, str, str], first: int) -> str:
        """Return the epoch of a topic's next messages, which begin at offset ``first``.

        It is empty where a record that has cleared the topic is gone, so that nobody can tell.

        Args:
            names: partition epoch, tenant and topic.
        """
        partition_epoch, tenant, topic = names
        known = self._topics.get((tenant, topic))
        last = self._last.get((tenant, topic), 0) if partition_epoch == self._partition_epoch else 0
        if known is None or known.partition_epoch != partition_epoch:
            is_cleared = known is not None and known.is_cleared_next
            # With offset 1 all that the topic had in this epoch of the partition is there.
            is_unknown = (last or self._is_unsure) and first > 1
            known = _Topic(partition_epoch, _UNKNOWN if is_unknown else 0)
            known.is_cleared_next = is_cleared
            self._topics[tenant, topic] = known
        if known.is_cleared_next:
            known.cleared, known.is_cleared_next = first - 1, False
        elif last < first and not self._is_unsure:
            known.cleared = max(known.cleared, last)
        if known.cleared == _UNKNOWN:
            return ""
        return topic_epoch(partition_epoch, tenant, topic, known.cleared)

    def lose(self) -> None:
        """Take in that a record can't be read: nobody knows which topics it has cleared."""
        self._is_unsure = True
        for topic in self._topics.values():
            topic.cleared, topic.is_cleared_next = _UNKNOWN, False

    def note(self, header: Header) -> None:
        """Take in what a record clears, behind its own messages."""
        if header.sequence <= self._writers.get(header.writer, 0):
            return
        self._writers[header.writer] = header.sequence
        for each in header.clears:
            slot = each.tenant, each.topic
            self._topics.setdefault(slot, _Topic("", 0)).is_cleared_next = True
