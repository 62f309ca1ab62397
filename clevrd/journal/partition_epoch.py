"""PartitionEpoch: all that is counted since a partition's epoch began. Pure."""

from __future__ import annotations

from clevrd.journal.cleared_topics import ClearedTopics
from clevrd.journal.logged_keys import LoggedKeys
from clevrd.journal.record_chain import RecordChain
from clevrd.journal.topic_heads import TopicHeads
from clevrd.journal.writer_sequences import WriterSequences


class PartitionEpoch:
    """One epoch of a partition; before the first one its name is empty, and nothing is counted."""

    __slots__ = (
        "began_us",
        "chain",
        "cleared",
        "heads",
        "keys",
        "last_id_us",
        "name",
        "time_us",
        "writers",
    )

    def __init__(self, name: str, began_us: int, *, keeps_topics: bool) -> None:
        """Begin an epoch.

        Args:
            began_us: the log's time, microseconds since 1970.
            keeps_topics: see `TopicHeads`.
        """
        self.name = name
        self.began_us = began_us
        # The log's time: that of the latest record, never counting back.
        self.time_us = began_us
        # The last id that was given; 0 before the first.
        self.last_id_us = 0
        self.chain = RecordChain(name)
        self.heads = TopicHeads(keeps_topics=keeps_topics)
        self.cleared = ClearedTopics()
        self.writers = WriterSequences()
        self.keys = LoggedKeys()

    def clear_some(self) -> bool:
        """Let go of some of it, when it is over; return whether any is left."""
        return self.heads.clear_some() or self.keys.clear_some()
