"""ForeignRecords: publishes of other producers, which wait for the next record of a node. Pure.

They have no stamp. If one were counted at once, it could be given the place of a message that was
lost just before it, and that some nodes have delivered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from clevrd.core.publish_request import PublishRequest
from clevrd.journal.draft import Draft
from clevrd.journal.folded import Confirmed
from clevrd.journal.records import FOREIGN_TENANT, Keyed, Run, content_of

# Foreign records that may wait for the next record of a node, which confirms them. Part of the
# format. A node appends a record as soon as it sees a foreign one, so far fewer wait but for a time
# without nodes.
MAX_WAITING: Final = 4_096
MAX_WAITING_BYTES: Final = 8 << 20


class ForeignRecord(NamedTuple):
    """A foreign record until the next record of a node."""

    position: int
    record: bytes
    request: PublishRequest

    def runs(self) -> Sequence[Run]:
        """Return the record as a run of one message."""
        return (Run(FOREIGN_TENANT, self.request.topic, 1, len(self.record)),)

    def keyed(self) -> Sequence[Keyed]:
        """Return the message's idempotency key, if it has one."""
        key = self.request.idempotency_key
        return () if key is None else (Keyed(0, key, content_of(self.request)),)


class ForeignRecords:
    """The foreign records of one partition that wait, in the order of the log."""

    __slots__ = ("_bytes", "waiting")

    def __init__(self) -> None:
        # Changed here alone.
        self.waiting: list[ForeignRecord] = []
        self._bytes = 0

    @property
    def are_too_many(self) -> bool:
        """Whether they are counted without waiting longer: no node has appended for long."""
        return len(self.waiting) >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES

    def add(self, each: ForeignRecord) -> None:
        """Have the next record wait."""
        self.waiting.append(each)
        self._bytes += len(each.record)

    def clear(self) -> None:
        """Forget them all: they are counted, or will be read again."""
        self.waiting.clear()
        self._bytes = 0

    def count(self, draft: Draft) -> tuple[Confirmed, ...]:
        """Count them in ``draft``; return those that are no repeats, and leave none in it."""
        confirmed = []
        for each in self.waiting:
            draft.count(each.runs(), each.keyed(), 0)
            if draft.placed:
                confirmed.append(Confirmed(*each, draft.placed.pop()))
        draft.repeats.clear()
        draft.refused.clear()
        return tuple(confirmed)
