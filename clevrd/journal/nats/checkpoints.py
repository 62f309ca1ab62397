"""Checkpoints in a stream beside the log: lists of parts, so that neither side holds still for one.

A checkpoint's parts are messages of a subject that has its name, which nobody knows yet. Its entry
comes last, under a subject of its own. Parts without an entry, of a node that died meanwhile, are
removed by the next node that saves one, once they are some minutes old.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import msgspec

from clevrd.journal.base import Checkpoint, TopicHead
from clevrd.journal.kept_checkpoints import KEPT, to_forget
from clevrd.journal.nats.library import NO_MESSAGE, NatsFault
from clevrd.journal.nats.streams import Names, StreamInfo

# Topics in a part: 200 KB, 0.5 ms of the loop.
_TOPICS: Final = 4_000
# Bytes of a message; a part may have several.
_MESSAGE_BYTES: Final = 256 << 10
# Seconds that parts without an entry are kept.
_UNFINISHED_S: Final = 600
# Messages of several checkpoints that are loaded at once: older ones are left where they are.
_MAX_LOADED: Final = 400

# Asks JetStream; sends a message, and waits until it is kept.
Ask = Callable[[str, Any], Awaitable[bytes]]
Put = Callable[[str, bytes], Awaitable[object]]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """An entry in the list of checkpoints."""

    # The first 12 digits of the name are the milliseconds since 1970 at which the checkpoint was
    # begun, in hexadecimal.
    name: str
    position: int
    digest: str
    epoch: str
    # When the partition's stream was made.
    created: str
    # When it was saved, milliseconds since 1970.
    saved_ms: int
    state_bytes: int
    # Bytes of each part with topics.
    topic_parts: tuple[int, ...]
    messages: int
    # CRC-32 of all messages, one after the other.
    crc: int
    # The engine that saved it; a random name.
    saver: str


class _Found(msgspec.Struct, frozen=True):
    subject: str = ""
    seq: int = 0
    data: str = ""


class _Answer(msgspec.Struct, frozen=True):
    message: _Found = _Found()


class _Subjects(msgspec.Struct, frozen=True):
    subjects: dict[str, int] | None = None


class _SubjectsOf(msgspec.Struct, frozen=True):
    state: _Subjects = _Subjects()


_encoder: Final = msgspec.json.Encoder()
_entry_decoder: Final = msgspec.json.Decoder(Entry)
_topics_decoder: Final = msgspec.json.Decoder(list[TopicHead])
_answer_decoder: Final = msgspec.json.Decoder(_Answer)
_subjects_decoder: Final = msgspec.json.Decoder(_SubjectsOf)


def _pieces(checkpoint: Checkpoint, sizes: list[int]) -> Iterator[bytes]:
    """Yield the bytes of a checkpoint; add to ``sizes`` those of each part with topics."""
    yield checkpoint.state
    topics = checkpoint.topics
    for first in range(0, len(topics), _TOPICS):
        part = _encoder.encode(topics[first : first + _TOPICS])
        sizes.append(len(part))
        yield part


class CheckpointStore:
    """The checkpoints of one partition."""

    def __init__(self, ask: Ask, put: Put, names: Names, partition: int, saver: str) -> None:
        """Args: saver: says whose the checkpoints are that are saved here."""
        self._ask = ask
        self._put = put
        self._names = names
        self._partition = partition
        self._saver = saver

    async def entries(self) -> list[Entry]:
        """Return what is kept, newest first; entries of a later version are left out."""
        entries: list[Entry] = []
        subject = self._names.checkpoint(self._partition, "entry", "*")
        at = 1
        for _ in range(4 * KEPT):
            found = await self._get({"seq": at, "next_by_subj": subject})
            if found is None:
                break
            at = found[0] + 1
            try:
                entries.append(_entry_decoder.decode(found[1]))
            except msgspec.MsgspecError:
                continue
        return entries[::-1]

    async def save(self, checkpoint: Checkpoint, info: StreamInfo, now_ms: int, reach: int) -> None:
        """Write ``checkpoint``, and then forget others.

        Args:
            info: the partition's stream.
        """
        name = f"{now_ms:012x}{secrets.token_hex(6)}"
        crc = messages = 0
        sizes: list[int] = []
        for piece in _pieces(checkpoint, sizes):
            for first in range(0, len(piece), _MESSAGE_BYTES):
                part = piece[first : first + _MESSAGE_BYTES]
                await self._put(self._subject(name, str(messages)), part)
                crc = zlib.crc32(part, crc)
                messages += 1
                await asyncio.sleep(0)
        others = await self.entries()
        entry = Entry(
            name=name,
            position=checkpoint.position,
            digest=checkpoint.digest,
            epoch=checkpoint.partition_epoch,
            created=info.created,
            saved_ms=now_ms,
            state_bytes=len(checkpoint.state),
            topic_parts=tuple(sizes),
            messages=messages,
            crc=crc,
            saver=self._saver,
        )
        await self._put(self._entry_subject(name), _encoder.encode(entry))
        # Checkpoints of a log before this one, or of records that it has lost, are of no use.
        going = [
            each for each in others if each.created != info.created or each.position > info.last
        ]
        left = [each for each in others if each not in going]
        positions = [checkpoint.position, *(each.position for each in left)]
        gone = to_forget(positions, checkpoint.position, reach)
        going += [left[index - 1] for index in gone if index]
        for each in going:
            await self._forget(each.name)
        await self._remove_unfinished({name, *(each.name for each in others)}, now_ms)

    async def load(self, info: StreamInfo) -> list[Checkpoint]:
        """Return what is whole and whose record may still be there, newest first."""
        loaded: list[Checkpoint] = []
        messages = 0
        for entry in await self.entries():
            if entry.created != info.created:
                continue
            messages += entry.messages
            if loaded and messages > _MAX_LOADED:
                break
            checkpoint = await self._load(entry)
            if checkpoint is not None:
                loaded.append(checkpoint)
        return loaded

    async def _load(self, entry: Entry) -> Checkpoint | None:
        crc = 0
        data = bytearray()
        state: bytes | None = None
        topics: list[TopicHead] = []
        sizes = iter((entry.state_bytes, *entry.topic_parts))
        wanted = next(sizes)
        for number in range(entry.messages + 1):
            # All parts that are whole by now.
            while len(data) >= wanted >= 0:
                part = bytes(data[:wanted])
                del data[:wanted]
                if state is None:
                    state = part
                else:
                    try:
                        topics += _topics_decoder.decode(part)
                    except msgspec.MsgspecError:
                        return None
                wanted = next(sizes, -1)
            if number == entry.messages:
                break
            subject = self._subject(entry.name, str(number))
            found = await self._get({"last_by_subj": subject})
            if found is None:
                return None
            crc = zlib.crc32(found[1], crc)
            data += found[1]
            await asyncio.sleep(0)
        if crc != entry.crc or wanted >= 0 or state is None:
            return None
        return Checkpoint(entry.position, entry.digest, entry.epoch, state, topics, is_whole=True)

    async def _get(self, question: dict[str, object]) -> tuple[int, bytes] | None:
        """Return a message's position and data; None if it is not there."""
        try:
            answer = await self._ask(f"STREAM.MSG.GET.{self._names.checkpoints}", question)
        except NatsFault as fault:
            if fault.code == NO_MESSAGE:
                return None
            raise
        message = _answer_decoder.decode(answer).message
        return message.seq, base64.b64decode(message.data)

    async def _forget(self, name: str) -> None:
        """Remove a checkpoint; its entry goes first."""
        for subject in (self._entry_subject(name), self._subject(name, "*")):
            await self._ask(f"STREAM.PURGE.{self._names.checkpoints}", {"filter": subject})

    async def _remove_unfinished(self, known: set[str], now_ms: int) -> None:
        subjects = self._names.checkpoint(self._partition, "part", "*", "0")
        answer = await self._ask(
            f"STREAM.INFO.{self._names.checkpoints}", {"subjects_filter": subjects}
        )
        found = _subjects_decoder.decode(answer).state.subjects or {}
        for subject in found:
            name = subject.split(".")[-2]
            began_ms = int(name[:12], 16)
            if name not in known and now_ms - began_ms > _UNFINISHED_S * 1000:
                await self._forget(name)

    def _subject(self, name: str, part: str) -> str:
        return self._names.checkpoint(self._partition, "part", name, part)

    def _entry_subject(self, name: str) -> str:
        return self._names.checkpoint(self._partition, "entry", name)
