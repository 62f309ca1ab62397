"""Checkpoints in Redis: lists of parts beside the log, so that neither side holds still for one.

A checkpoint is a list of parts of some 100 KiB, which are written one by one under a name that
nobody knows yet. Its entry in the list of checkpoints comes last. A list without an entry, of a
node that died meanwhile, goes by itself after some minutes.
"""

from __future__ import annotations

import asyncio
import secrets
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import msgspec

from clevrd.journal.base import Checkpoint, TopicHead
from clevrd.journal.kept_checkpoints import KEPT, to_forget
from clevrd.journal.redis.library import RedisFault
from clevrd.journal.redis.scripts import KEEP_CHECKPOINT, PartitionKeys

# Topics in a part: 200 KB, 0.5 ms of the loop.
_TOPICS: Final = 4_000
_STATE_BYTES: Final = 256 << 10
# Seconds that parts without an entry are kept.
_UNFINISHED_S: Final = 600
# Parts of several checkpoints that are loaded at once: older ones are left where they are.
_MAX_LOADED: Final = 400

# Asks the partition's primary.
Ask = Callable[..., Awaitable[Any]]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """An entry in the list of checkpoints."""

    name: str
    position: int
    digest: str
    epoch: str
    # Entries that the stream had ever had then.
    added: int
    # When it was saved, milliseconds since 1970 on the server's clock.
    saved_ms: int
    state_parts: int
    topic_parts: int
    # CRC-32 of all parts, one after the other.
    crc: int
    # The engine that saved it; a random name.
    saver: str


_encoder: Final = msgspec.json.Encoder()
_entry_decoder: Final = msgspec.json.Decoder(Entry)
_topics_decoder: Final = msgspec.json.Decoder(list[TopicHead])


def _parts(checkpoint: Checkpoint) -> Iterator[bytes]:
    state = checkpoint.state
    for first in range(0, len(state), _STATE_BYTES):
        yield state[first : first + _STATE_BYTES]


class CheckpointStore:
    """The checkpoints of one partition."""

    def __init__(self, ask: Ask, keys: PartitionKeys, saver: str) -> None:
        """Args: saver: says whose the checkpoints are that are saved here."""
        self._saver = saver
        self._ask = ask
        self._keys = keys

    async def entries(self) -> list[tuple[Entry, bytes]]:
        """Return what is kept, newest first; entries of a later version are left out."""
        found = await self._ask("LRANGE", self._keys.checkpoints, 0, 4 * KEPT)
        entries = []
        for spelled in found:
            try:
                entries.append((_entry_decoder.decode(spelled), spelled))
            except msgspec.MsgspecError:
                continue
        return entries

    async def save(self, checkpoint: Checkpoint, added: int, now_ms: int, reach: int) -> None:
        """Write ``checkpoint``, and then forget others."""
        name = secrets.token_hex(8)
        key = self._keys.checkpoint(name)
        crc = state_parts = topic_parts = 0
        for part in _parts(checkpoint):
            crc = await self._put(key, part, crc)
            state_parts += 1
        topics = checkpoint.topics
        for first in range(0, len(topics), _TOPICS):
            crc = await self._put(key, _encoder.encode(topics[first : first + _TOPICS]), crc)
            topic_parts += 1
        entry = Entry(
            name=name,
            position=checkpoint.position,
            digest=checkpoint.digest,
            epoch=checkpoint.partition_epoch,
            added=added,
            saved_ms=now_ms,
            state_parts=state_parts,
            topic_parts=topic_parts,
            crc=crc,
            saver=self._saver,
        )
        others = await self.entries()
        gone = to_forget([added, *(each.added for each, _ in others)], added, reach)
        going = [others[index - 1] for index in gone]
        keys = [self._keys.checkpoints, key, *(self._keys.checkpoint(e.name) for e, _ in going)]
        await self._ask(
            "EVAL",
            KEEP_CHECKPOINT.text,
            len(keys),
            *keys,
            _encoder.encode(entry),
            *(spelled for _, spelled in going),
        )

    async def load(self) -> list[Checkpoint]:
        """Return what is whole and whose record is still there, newest first."""
        loaded: list[Checkpoint] = []
        parts = 0
        for entry, _ in await self.entries():
            parts += entry.state_parts + entry.topic_parts
            if loaded and parts > _MAX_LOADED:
                break
            checkpoint = await self._load(entry)
            if checkpoint is not None:
                loaded.append(checkpoint)
        return loaded

    async def _put(self, key: str, part: bytes, crc: int) -> int:
        await self._ask("RPUSH", key, part)
        await self._ask("EXPIRE", key, _UNFINISHED_S)
        await asyncio.sleep(0)
        return zlib.crc32(part, crc)

    async def _load(self, entry: Entry) -> Checkpoint | None:
        key = self._keys.checkpoint(entry.name)
        crc, state, topics = 0, [], []
        try:
            for index in range(entry.state_parts + entry.topic_parts):
                part = await self._ask("LINDEX", key, index)
                if part is None:
                    return None
                crc = zlib.crc32(part, crc)
                if index < entry.state_parts:
                    state.append(part)
                else:
                    topics += _topics_decoder.decode(part)
                await asyncio.sleep(0)
        except (msgspec.MsgspecError, RedisFault) as error:
            if isinstance(error, RedisFault):
                raise
            return None
        if crc != entry.crc:
            return None
        return Checkpoint(
            entry.position, entry.digest, entry.epoch, b"".join(state), topics, is_whole=True
        )
