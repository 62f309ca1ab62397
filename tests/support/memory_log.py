"""MemoryLog: a log in memory that several nodes share, with the faults of real ones on request."""

from __future__ import annotations

import asyncio
import zlib
from collections import defaultdict
from collections.abc import Sequence

from clevrd.errors import JournalFull, JournalUnavailable
from clevrd.journal.base import Checkpoint, Fenced, Placed


class MemoryLog:
    """Records of all partitions, and the stamp under which more are accepted."""

    def __init__(self, partitions: int = 1) -> None:
        self.partitions = partitions
        self.stamp = "00"
        self.records: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
        self.checkpoints: dict[int, list[Checkpoint]] = defaultdict(list)
        self.changed = asyncio.Condition()
        # Appends that fail, once each, in their order: an error, raised after the record was taken
        # where `is_taken`.
        self.faults: list[tuple[Exception, bool]] = []
        # While clear, no append is taken up.
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def accept(self, partition: int, record: bytes) -> None:
        """Add a record, whoever made it."""
        log = self.records[partition]
        log.append((log[-1][0] + 1 if log else 1, record))

    def lose(self, partition: int, count: int, stamp: str) -> None:
        """Lose the newest records, as a failover does, and go on under another stamp."""
        del self.records[partition][-count:]
        self.stamp = stamp

    async def wake(self) -> None:
        """Wake the readers."""
        async with self.changed:
            self.changed.notify_all()


class MemoryEngine:
    """One node's way to a MemoryLog."""

    name = "memory log"
    durability = "fsync"
    keeps_topics = False
    is_shared = True
    answers_when_taken = False
    max_apart_s = 0.008
    is_unsure = False

    def __init__(self, log: MemoryLog) -> None:
        self.log = log
        self.partitions = log.partitions
        self.appends = 0
        self.is_closed = False

    async def open(self) -> None:
        """Do nothing."""

    async def stamp(self, partition: int) -> str:
        """Return the log's stamp."""
        return self.log.stamp

    async def append(
        self, partition: int, record: bytes, stamp: str, placed: Sequence[Placed]
    ) -> None:
        """Append, or fail as the log is told to."""
        await self.log.goes_on.wait()
        if stamp != self.log.stamp:
            raise Fenced
        self.appends += 1
        fault, is_taken = self.log.faults.pop(0) if self.log.faults else (None, True)
        if is_taken:
            self.log.accept(partition, record)
        await self.log.wake()
        if fault is not None:
            raise fault

    async def read(self, partition: int, after: int) -> list[tuple[int, bytes]]:
        """Return what is behind ``after``; wait for it."""
        while True:
            found = [each for each in self.log.records[partition] if each[0] > after]
            if found:
                return found[:100]
            async with self.log.changed:
                await self.log.changed.wait()

    async def first(self, partition: int) -> int:
        """Return the oldest position."""
        records = self.log.records[partition]
        return records[0][0] if records else 1

    async def is_short(self, partition: int) -> bool:
        """Return whether nothing is trimmed."""
        return await self.first(partition) <= 1

    async def digest(self, partition: int, position: int) -> str | None:
        """Return the CRC-32 of a record."""
        for at, record in self.log.records[partition]:
            if at == position:
                return f"{zlib.crc32(record):08x}"
        return None

    async def load_checkpoints(self, partition: int) -> list[Checkpoint]:
        """Return the checkpoints, newest first."""
        return self.log.checkpoints[partition][::-1]

    async def save_checkpoint(self, partition: int, checkpoint: Checkpoint) -> None:
        """Keep five."""
        kept = self.log.checkpoints[partition]
        kept.append(checkpoint)
        del kept[:-5]

    def history(self) -> None:
        """Return None: nodes read the log alone."""

    def storage(self) -> None:
        """Return None: it has no files."""

    async def close(self) -> None:
        """Note the end."""
        self.is_closed = True


UNAVAILABLE = JournalUnavailable("The log does not answer.")
FULL = JournalFull("The log is full.")
