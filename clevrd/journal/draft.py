"""Draft: the changes that a record makes in a partition epoch, before they are made. Pure.

A message has the next offset of its topic, unless its idempotency key is used already. Its id is
the partition's next one, and not before the log's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import intern

from clevrd.journal.base import Placed
from clevrd.journal.folded import Refused, Repeat
from clevrd.journal.logged_keys import LoggedKey, Slot
from clevrd.journal.partition_epoch import PartitionEpoch
from clevrd.journal.records import Header, Keyed, Run
from clevrd.journal.topic_heads import TopicSlot


class Draft:
    """The places of one record's messages; nothing is changed before `commit`."""

    __slots__ = (
        "_header",
        "_heads",
        "_id_step",
        "_keys",
        "_next_id_us",
        "_time_us",
        "epoch",
        "placed",
        "refused",
        "repeats",
    )

    def __init__(
        self, epoch: PartitionEpoch, header: Header, partition: int, partitions: int
    ) -> None:
        self.epoch = epoch
        self._header = header
        self._id_step = partitions
        time_us = max(header.time_us, epoch.time_us)
        self._time_us = time_us
        next_id_us = epoch.last_id_us + partitions
        if next_id_us < time_us:
            # The first of this partition's ids that is not before the time.
            next_id_us = time_us + (partition - time_us) % partitions
        self._next_id_us = next_id_us
        # The changed heads, and the new keys.
        self._heads: dict[TopicSlot, int] = {}
        self._keys: dict[Slot, LoggedKey] = {}
        self.placed: list[Placed] = []
        self.repeats: list[Repeat] = []
        self.refused: list[Refused] = []

    def is_of(self, epoch: PartitionEpoch, header: Header) -> bool:
        """Return whether this was made in ``epoch`` of the record with this very ``header``."""
        return self.epoch is epoch and self._header is header

    def count(self, runs: Sequence[Run], keyed: Sequence[Keyed], lines_at: int) -> None:
        """Count the messages of ``runs``, whose lines begin at byte ``lines_at``."""
        if keyed:
            self._count_keyed(runs, keyed, lines_at)
            return
        line = 0
        for run in runs:
            self._place(run, line, run.count, lines_at)
            line += run.count
            lines_at += run.size_bytes

    def commit(self) -> None:
        """Make the changes in the epoch."""
        epoch = self.epoch
        epoch.time_us = self._time_us
        if self._heads:
            epoch.last_id_us = self._next_id_us - self._id_step
            epoch.heads.update(self._heads)
        for entry in self._keys.values():
            epoch.keys.add(entry, self._time_us, self._header.max_keys)

    def _count_keyed(self, runs: Sequence[Run], keyed: Sequence[Keyed], lines_at: int) -> None:
        """Count messages of which some have keys.

        Messages of a run that follow each other have one place, since each place has a checksum
        over the whole run; a message that is not counted ends it.
        """
        run_line = 0
        # The keys of the lines before.
        used = 0
        for run in runs:
            # The line from which on messages have no place yet.
            line, end = run_line, run_line + run.count
            while used < len(keyed) and keyed[used].line < end:
                each = keyed[used]
                used += 1
                if self._is_new(run, each):
                    self._remember(run, each, each.line - line)
                    continue
                self._place(run, line, each.line - line, lines_at, line - run_line)
                line = each.line + 1
            self._place(run, line, end - line, lines_at, line - run_line)
            run_line = end
            lines_at += run.size_bytes

    def _place(self, run: Run, line: int, count: int, at_bytes: int, skip: int = 0) -> None:
        """Give ``count`` messages of ``run`` the next offsets, from a line of the record on.

        Args:
            at_bytes: where the run begins in the record.
            skip: how many lines of the run come before.
        """
        if not count:
            return
        slot = run.tenant, run.topic
        head = self._head(slot)
        self.placed.append(
            Placed(
                run.tenant,
                run.topic,
                self.epoch.name,
                head + 1,
                count,
                self._next_id_us,
                self._id_step,
                self._time_us,
                line,
                at_bytes,
                run.size_bytes,
                skip,
            )
        )
        self._heads[slot] = head + count
        self._next_id_us += count * self._id_step

    def _head(self, slot: TopicSlot) -> int:
        """Return the newest offset of a topic behind what is placed; 0 before the first."""
        return self._heads.get(slot) or self.epoch.heads.by_slot.get(slot, 0)

    def _is_new(self, run: Run, keyed: Keyed) -> bool:
        """Return whether the key is free; note a repeat, or a message that is refused."""
        slot = run.tenant, run.topic, keyed.key
        first = self._keys.get(slot) or self.epoch.keys.find(slot, self._time_us)
        if first is None:
            return True
        if first.content != keyed.content:
            self.refused.append(Refused(keyed.line, run.tenant, run.topic))
        else:
            self.repeats.append(
                Repeat(keyed.line, run.tenant, run.topic, first.offset, first.id_us, first.time_us)
            )
        return False

    def _remember(self, run: Run, keyed: Keyed, ahead: int) -> None:
        """Keep the key of a message that has so many others before it without a place yet."""
        header = self._header
        if header.keep_keys_ms <= 0 or header.max_keys <= 0:
            return
        head = self._head((run.tenant, run.topic))
        entry = LoggedKey(
            intern(run.tenant),
            run.topic,
            keyed.key,
            keyed.content,
            head + 1 + ahead,
            self._next_id_us + ahead * self._id_step,
            self._time_us,
            self._time_us + header.keep_keys_ms * 1_000,
        )
        self._keys[entry.slot] = entry
