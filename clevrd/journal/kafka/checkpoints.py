"""Checkpoints in Kafka: a second topic, with two partitions for each one of the log.

In one are the parts of checkpoints, some 100 KiB each; in the other the *lists* of what is kept: a
list says of each checkpoint at which offsets its parts are. The newest list counts, and it is the
last record of its partition, so a start reads that one and then the parts that it names, however
many were written and given up before. Records that no list names any more are removed.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from clevrd.journal.base import Checkpoint
from clevrd.journal.checkpoint_parts import MAX_LOADED, Joined, state_parts, topic_parts
from clevrd.journal.kafka.library import KafkaFault
from clevrd.journal.kafka.questions import Questions
from clevrd.journal.kept_checkpoints import to_forget

log = logging.getLogger(__name__)

# Parts that may lie unused among those that are kept: so many times as many, and some more.
_SLACK: Final = 3
_LEAST_PARTS: Final = 32
# Parts that are read with one question.
_AT_ONCE: Final = 16

# Appends to a partition of the topic; returns the offset.
Append = Callable[[int, bytes], Awaitable[int]]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A checkpoint in a list."""

    # The id of the topic that has its log.
    topic_id: str
    position: int
    digest: str
    epoch: str
    # The offsets of its parts, those of its state first.
    state_parts: tuple[int, ...]
    topic_parts: tuple[int, ...]
    # CRC-32 of all parts, one after the other.
    crc: int
    # Bytes of the log's records, by those that its saver had read; 0 if it had read none.
    record_bytes: int
    # The engine that saved it; a random name.
    saver: str

    @property
    def parts(self) -> tuple[int, ...]:
        """The offsets of all parts."""
        return self.state_parts + self.topic_parts


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(list[Entry])


class CheckpointStore:
    """The checkpoints of one partition."""

    def __init__(
        self,
        questions: Questions,
        append: Append,
        topic: str,
        partition: int,
        partitions: int,
        saver: str,
    ) -> None:
        """Args: saver: says whose the checkpoints are that are saved here."""
        self._questions = questions
        self._append = append
        self._topic = topic
        self._lists = partition
        self._parts = partitions + partition
        self._saver = saver
        # The offset of the newest list when it was looked at last; -1 before that, and without one.
        self._seen = -1
        self._is_warned = False

    async def entries(self, topic_id: str) -> list[Entry]:
        """Return what is kept of the log in a topic, newest first. Raises KafkaFault."""
        _, end = await self._questions.extent(self._topic, self._lists)
        found = await self._questions.record(self._topic, self._lists, end - 1) if end else None
        if found is None:
            return []
        self._seen = end - 1
        try:
            entries = _decoder.decode(found.value)
        except msgspec.MsgspecError:
            return []
        return [each for each in entries if each.topic_id == topic_id]

    async def save(
        self, checkpoint: Checkpoint, topic_id: str, reach: int, record_bytes: int
    ) -> None:
        """Keep ``checkpoint``, unless another node has saved one meanwhile. Raises KafkaFault."""
        seen = self._seen
        others = await self.entries(topic_id)
        if others and self._seen > seen >= 0 and others[0].saver != self._saver:
            is_near = others[0].position >= checkpoint.position - reach
            if others[0].epoch == checkpoint.partition_epoch and is_near:
                return
        crc = 0
        state: list[int] = []
        topics: list[int] = []
        for parts, offsets in ((state_parts, state), (topic_parts, topics)):
            for part in parts(checkpoint):
                offsets.append(await self._append(self._parts, part))
                crc = zlib.crc32(part, crc)
        entry = Entry(
            topic_id=topic_id,
            position=checkpoint.position,
            digest=checkpoint.digest,
            epoch=checkpoint.partition_epoch,
            state_parts=tuple(state),
            topic_parts=tuple(topics),
            crc=crc,
            record_bytes=record_bytes,
            saver=self._saver,
        )
        entries = [entry, *others]
        positions = [each.position for each in entries]
        gone = set(to_forget(positions, entry.position, reach))
        kept = await self._moved([each for at, each in enumerate(entries) if at not in gone])
        self._seen = await self._append(self._lists, _encoder.encode(kept))
        await self._cut(kept)

    async def load(self, topic_id: str) -> list[Checkpoint]:
        """Return what is whole, newest first. Raises KafkaFault."""
        loaded: list[Checkpoint] = []
        parts = 0
        for entry in await self.entries(topic_id):
            parts += len(entry.parts)
            if loaded and parts > MAX_LOADED:
                break
            checkpoint = await self._load(entry)
            if checkpoint is not None:
                loaded.append(checkpoint)
        return loaded

    async def _load(self, entry: Entry) -> Checkpoint | None:
        joined = Joined(len(entry.state_parts))
        offsets: Sequence[int] = entry.parts
        for first in range(0, len(offsets), _AT_ONCE):
            asked = offsets[first : first + _AT_ONCE]
            for found in await self._questions.records(self._topic, self._parts, asked):
                if found is None:
                    return None
                try:
                    joined.add(found.value)
                except msgspec.MsgspecError:
                    return None
                await asyncio.sleep(0)
        if joined.crc != entry.crc:
            return None
        return joined.checkpoint(entry.position, entry.digest, entry.epoch)

    async def _moved(self, kept: Sequence[Entry]) -> list[Entry]:
        """Return ``kept``, whose first one was just written, with none that lies far before it.

        The topic is cut from its beginning alone, so a checkpoint that is kept for long would keep
        all that were written after it.
        """
        parts = sum(len(each.parts) for each in kept)
        bound = max(kept[0].parts, default=0) - _SLACK * parts - _LEAST_PARTS
        moved = []
        for entry in kept:
            if min(entry.parts, default=bound) >= bound:
                moved.append(entry)
                continue
            found = await self._questions.records(self._topic, self._parts, entry.parts)
            values = [each.value for each in found if each is not None]
            if len(values) == len(found):
                offsets = [await self._append(self._parts, value) for value in values]
                states = len(entry.state_parts)
                moved.append(
                    replace(
                        entry,
                        state_parts=tuple(offsets[:states]),
                        topic_parts=tuple(offsets[states:]),
                    )
                )
        return moved

    async def _cut(self, kept: Sequence[Entry]) -> None:
        """Remove what no list names any more; the topic's age does where that is not allowed."""
        befores = {self._lists: self._seen}
        if parts := [offset for each in kept for offset in each.parts]:
            befores[self._parts] = min(parts)
        try:
            await self._questions.cut(self._topic, befores)
        except KafkaFault as fault:
            if not self._is_warned:
                self._is_warned = True
                log.warning("old checkpoints not removed topic=%s reason=%s", self._topic, fault)
