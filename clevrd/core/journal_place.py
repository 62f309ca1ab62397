"""JournalPlace: where in the journal a topic's messages are put in order."""

from __future__ import annotations

import msgspec


class JournalPlace(msgspec.Struct, frozen=True, gc=False):
    """A topic's part of the journal, in the partition's epoch in which the topic is now."""

    partition: int
    # Names the topic's epoch, together with the topic's tenant and name.
    partition_epoch: str
    # Whether an answered message outlives a power cut.
    is_durable: bool
    # Whether messages that are older than the ring can be read.
    has_history: bool
    # Whether other nodes have readers of the topic too.
    is_shared: bool = False
    # The offset up to which the topic was cleared: its epoch begins behind it. 0 if it never was.
    cleared: int = 0


class TopicStart(msgspec.Struct, frozen=True, gc=False):
    """The state in which a topic begins that may have had messages before, or elsewhere."""

    epoch: str
    created_at: str
    # The newest message's offset; 0 before the first.
    head: int
    place: JournalPlace
