"""Import: appends messages to a log that no node has open, as a node of its own.

Messages keep their order, and their times as long as these rise. Offsets and epochs are the log's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Final

import msgspec

from clevrd.core.publish_request import PublishRequest
from clevrd.journal.base import Engine
from clevrd.journal.checkpoints import BadCheckpoint
from clevrd.journal.fold import Fold
from clevrd.journal.records import (
    MAX_RECORD_BYTES,
    Header,
    Run,
    encode_record,
    line_of,
    partition_of,
)

# Messages of one record have one time, and ids that differ by a microsecond or so: those of so long
# a time go together.
_TIE_US: Final = 1_000
MAX_MESSAGES: Final = 900
# Records between two checkpoints.
_CHECKPOINT_RECORDS: Final = 100_000


class Imported(msgspec.Struct, frozen=True, gc=False):
    """A message to be appended."""

    tenant: str
    request: PublishRequest
    # Microseconds since 1970.
    time_us: int


class _Partition:
    """A partition's fold, and the messages for its next record."""

    def __init__(self, number: int, fold: Fold) -> None:
        self.number = number
        self.fold = fold
        self.messages: list[tuple[Imported, bytes]] = []
        self.size_bytes = 0
        self.records = 0


class Importer:
    """Appends to an engine that is open."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = secrets.token_hex(8)
        self._sequence = 0
        self._partitions: list[_Partition] = []
        # Messages that are in the log.
        self.count = 0

    async def _start(self, time_us: int) -> None:
        """Count what the log has; an epoch that is new begins at ``time_us``."""
        for number in range(self._engine.partitions):
            partition = _Partition(number, await self._counted(number))
            self._partitions.append(partition)
            # An empty record begins the log's epoch, if it is new, and shows where the log ends.
            await self._append(partition, time_us)

    async def add(self, messages: Iterable[Imported]) -> None:
        """Append ``messages``; the last ones may wait for more, or for `finish`.

        Raises:
            JournalFull: there is no room for the next record.
            JournalUnavailable: the engine is away.
        """
        for message in messages:
            if not self._partitions:
                await self._start(message.time_us)
            topic = message.request.topic
            number = partition_of(message.tenant, topic, len(self._partitions))
            partition = self._partitions[number]
            line = line_of(message.request)
            waiting = partition.messages
            if waiting and (
                partition.size_bytes + len(line) > MAX_RECORD_BYTES // 2
                or len(waiting) >= MAX_MESSAGES
                or not 0 <= message.time_us - waiting[0][0].time_us < _TIE_US
            ):
                await self._append(partition)
            partition.messages.append((message, line))
            partition.size_bytes += len(line)

    async def finish(self) -> None:
        """Append what waits, and save checkpoints."""
        for partition in self._partitions:
            if partition.messages:
                await self._append(partition)
            await self._save(partition)

    async def _counted(self, number: int) -> Fold:
        """Return the fold behind the newest checkpoint, or before the first record."""
        engine = self._engine
        is_complete = await engine.first(number) <= 1

        def new_fold() -> Fold:
            return Fold(
                number, engine.partitions, keeps_topics=engine.keeps_topics, is_complete=is_complete
            )

        for checkpoint in await engine.load_checkpoints(number):
            if await engine.digest(number, checkpoint.position) == checkpoint.digest:
                fold = new_fold()
                try:
                    for _ in fold.restore(checkpoint):
                        pass
                except BadCheckpoint:
                    continue
                return fold
        return new_fold()

    async def _append(self, partition: _Partition, time_us: int = 0) -> None:
        """Append a record with what waits, and count the log up to it.

        Args:
            time_us: its time if nothing waits.
        """
        runs: dict[tuple[str, str], list[bytes]] = {}
        for message, line in partition.messages:
            runs.setdefault((message.tenant, message.request.topic), []).append(line)
        fold, number = partition.fold, partition.number
        stamp = await self._engine.stamp(number)
        self._sequence += 1
        first_us = partition.messages[0][0].time_us if partition.messages else time_us
        header = Header(
            stamp,
            self._writer,
            self._sequence,
            fold.time_after(stamp, first_us),
            tuple(
                Run(tenant, topic, len(lines), sum(map(len, lines)))
                for (tenant, topic), lines in runs.items()
            ),
            (),
            fold.seen(stamp),
            not (partition.messages or fold.is_known),
        )
        record = encode_record(header, [line for lines in runs.values() for line in lines])
        placed = fold.plan(header, len(record) - partition.size_bytes)
        await self._engine.append(number, record, stamp, placed)
        while not await self._read_to(partition, self._sequence):
            pass
        self.count += len(partition.messages)
        partition.messages, partition.size_bytes = [], 0
        partition.records += 1
        if partition.records % _CHECKPOINT_RECORDS == 0:
            await self._save(partition)

    async def _read_to(self, partition: _Partition, sequence: int) -> bool:
        """Count the next records; return whether this process's record ``sequence`` is one."""
        fold = partition.fold
        is_there = False
        for position, record in await self._engine.read(partition.number, fold.position):
            folded = fold.apply(position, record)
            is_there |= (folded.writer, folded.sequence) == (self._writer, sequence)
        return is_there

    async def _save(self, partition: _Partition) -> None:
        steps = list(partition.fold.checkpoint(is_whole=not self._engine.keeps_topics))
        if steps and steps[-1] is not None:
            await self._engine.save_checkpoint(partition.number, steps[-1])
