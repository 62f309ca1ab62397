"""ClearedTopics: up to which offset topics of a partition epoch were cleared. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from clevrd.journal.folded import Cleared
from clevrd.journal.records import Clear
from clevrd.journal.topic_heads import TopicSlot

# Topics of a partition that may be cleared in one of its epochs; one more stays as it is. It is a
# part of the format.
MAX_CLEARED: Final = 10_000


class ClearedTopics:
    """The topics that ever were cleared in one partition epoch."""

    __slots__ = ("_upto",)

    def __init__(self, rows: Iterable[tuple[str, str, int]] = ()) -> None:
        """Begin with the rows of a checkpoint."""
        self._upto: dict[TopicSlot, int] = {(tenant, topic): upto for tenant, topic, upto in rows}

    def upto(self, slot: TopicSlot) -> int:
        """Return the offset up to which a topic was cleared; 0 if it never was."""
        return self._upto.get(slot, 0)

    def clear(self, clears: Iterable[Clear], heads: Mapping[TopicSlot, int]) -> tuple[Cleared, ...]:
        """Clear topics up to their ``heads``; return those that had messages."""
        return tuple(self._cleared(clears, heads))

    def rows(self) -> tuple[tuple[str, str, int], ...]:
        """Return tenant, topic and offset of each."""
        return tuple((*slot, upto) for slot, upto in self._upto.items())

    def _cleared(
        self, clears: Iterable[Clear], heads: Mapping[TopicSlot, int]
    ) -> Iterator[Cleared]:
        for each in clears:
            slot = each.tenant, each.topic
            head = heads.get(slot, 0)
            if head != self.upto(slot) and self._has_room(slot):
                self._upto[slot] = head
                yield Cleared(*slot, head)

    def _has_room(self, slot: TopicSlot) -> bool:
        return slot in self._upto or len(self._upto) < MAX_CLEARED
