"""The file that carries topics over a planned restart: its records, written and read. No disk here.

A file is a head, one record for each topic, and an end. Every record begins with the file's marker,
so that the next one is found behind a damaged one; where a topic stands has a checksum of its own,
apart from its messages, so that damage to these costs these and not the position. Nothing that is
read is believed before its checksum, and no length makes anything grow beyond its bound.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Annotated, Final, Protocol, TypeVar
from zlib import crc32

import msgspec
from msgspec import Meta

from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES, RecentMessageCache
from clevrd.core.saved_topic import SavedTopic

MAGIC: Final = b"clevrd\n"
VERSION: Final = 1
MARKER_BYTES: Final = 16

# Magic, version, marker, last message id in microseconds; then the checksum of these.
_FILE_HEAD: Final = struct.Struct(">7sB16sQ")
# Marker, kind, size of what stands behind this, size of the messages after that. Checksums follow
# what stands there, and the messages.
_RECORD_HEAD: Final = struct.Struct(">16scHQ")
_SUM: Final = struct.Struct(">I")
_TOPIC: Final = b"T"
_END: Final = b"E"

# Messages are joined, summed and read so many bytes at a time: 1 ms of a core.
CHUNK_BYTES: Final = 1 << 20
# The largest publish that can be configured is 64 MiB; topic and tenant are spelt around it.
MAX_FRAME_BYTES: Final = (64 << 20) + 65_536
# The last microsecond that RFC 3339 can spell.
_MAX_ID_US: Final = 253_402_300_800 * 1_000_000 - 1

_FIN_TEXT: Final = 0x81


class BadState(Exception):
    """This is no such file, or not one that this version reads; the text says which."""


class _DamagedError(Exception):
    """This part of the file is not as it was written."""


_Meaning = TypeVar("_Meaning")
_encode = msgspec.msgpack.Encoder().encode
_topic_decoder = msgspec.msgpack.Decoder(SavedTopic)
_count_decoder = msgspec.msgpack.Decoder(Annotated[int, Meta(ge=0)])


# --- writing -------------------------------------------------------------------------------------


def file_head(marker: bytes, last_id_us: int) -> bytes:
    """Return how a file begins.

    Args:
        marker: 16 random bytes, which no publisher can know and put into a message.
        last_id_us: what the ids of later messages must be greater than.
    """
    return _summed(_FILE_HEAD.pack(MAGIC, VERSION, marker, last_id_us))


def topic_record(
    marker: bytes, topic: SavedTopic, ring: RecentMessageCache | None
) -> Iterator[bytes]:
    """Yield the record of ``topic``, with the messages of ``ring``, part by part."""
    body_bytes = 0 if ring is None else ring.size_bytes - FRAME_OVERHEAD_BYTES * len(ring)
    yield _record_head(marker, _TOPIC, _encode(topic), body_bytes)
    checksum = 0
    if ring is not None:
        after = ring.first - 1
        while frames := ring.take(after, ring.head, CHUNK_BYTES):
            after += len(frames)
            chunk = b"".join(frames)
            checksum = crc32(chunk, checksum)
            yield chunk
    yield _SUM.pack(checksum)


def without_messages(topic: SavedTopic) -> SavedTopic:
    """Return ``topic`` as it stands when its ring is left out."""
    return msgspec.structs.replace(topic, first=topic.head + 1, messages=0)


def end_record(marker: bytes, topics: int) -> bytes:
    """Return how a file of so many topics ends."""
    return _record_head(marker, _END, _encode(topics), 0)


def _record_head(marker: bytes, kind: bytes, meaning: bytes, body_bytes: int) -> bytes:
    return _summed(_RECORD_HEAD.pack(marker, kind, len(meaning), body_bytes) + meaning)


def _summed(part: bytes) -> bytes:
    return part + _SUM.pack(crc32(part))


# --- reading -------------------------------------------------------------------------------------


class StateFile(Protocol):
    """What is read from: a file, or bytes in tests."""

    def read(self, size: int, /) -> bytes:
        """Return the next ``size`` bytes, fewer at the end only."""

    def seek(self, offset: int, /) -> int:
        """Read on from ``offset``."""


class _Record:
    """A record's head, whose checksum is right, and where its messages are."""

    __slots__ = ("body_bytes", "body_start", "kind", "meaning")

    def __init__(self, kind: bytes, meaning: bytes, body_start: int, body_bytes: int) -> None:
        self.kind = kind
        self.meaning = meaning
        self.body_start = body_start
        self.body_bytes = body_bytes

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.body_start + self.body_bytes + _SUM.size


class StateReader:
    """Reads a file of ``size_bytes`` that may be damaged in any way, or made to harm."""

    def __init__(self, file: StateFile, size_bytes: int) -> None:
        """Read the file's head.

        Raises:
            BadState: the file is not one of these, or of a later version.
        """
        self._file = file
        self._size_bytes = size_bytes
        part = file.read(_FILE_HEAD.size + _SUM.size)
        if not part.startswith(MAGIC):
            raise BadState("it is not a state file of clevrd's")
        if not _is_sound(part):
            raise BadState("its first bytes are damaged")
        _, version, self._marker, last_id_us = _FILE_HEAD.unpack_from(part)
        if version != VERSION:
            raise BadState(f"its format is version {version}, and this clevrd reads {VERSION}")
        self.last_id_us = min(last_id_us, _MAX_ID_US)
        # Records in which something was not as it was written.
        self.damaged = 0
        # Topics that were written, once the end was reached and sound.
        self.written: int | None = None

    def topics(
        self, ring_for: Callable[[SavedTopic], RecentMessageCache | None]
    ) -> Iterator[tuple[SavedTopic, RecentMessageCache | None]]:
        """Yield each topic with its ring, which is None where its messages are not to be had.

        Args:
            ring_for: returns an empty ring that begins at the topic's first offset, with the
                bounds that hold now; None passes over the messages.
        """
        place = _FILE_HEAD.size + _SUM.size
        while place < self._size_bytes:
            try:
                record = self._record_at(place)
                if record.kind == _END:
                    self.written = _meaning_of(record, _count_decoder)
                    return
                topic = _meaning_of(record, _topic_decoder)
            except _DamagedError:
                self.damaged += 1
                place = self._next_marker(place + 1)
                continue
            ring = ring_for(topic)
            yield topic, None if ring is None else self._filled(ring, topic, record)
            place = record.end

    def _record_at(self, place: int) -> _Record:
        """Return the head of the record at ``place``."""
        self._file.seek(place)
        part = self._file.read(_RECORD_HEAD.size)
        if len(part) < _RECORD_HEAD.size:
            raise _DamagedError
        marker, kind, meaning_bytes, body_bytes = _RECORD_HEAD.unpack(part)
        part += self._file.read(meaning_bytes + _SUM.size)
        if marker != self._marker or kind not in (_TOPIC, _END) or not _is_sound(part):
            raise _DamagedError
        meaning = part[_RECORD_HEAD.size : -_SUM.size]
        return _Record(kind, meaning, place + len(part), body_bytes)

    def _filled(
        self, ring: RecentMessageCache, topic: SavedTopic, record: _Record
    ) -> RecentMessageCache | None:
        """Fill ``ring`` with the record's newest messages; None when they are damaged."""
        try:
            self._fill(ring, record)
        except _DamagedError:
            self.damaged += 1
            return None
        if ring.head != topic.head:
            self.damaged += 1
            return None
        return ring

    def _fill(self, ring: RecentMessageCache, record: _Record) -> None:
        if record.end > self._size_bytes:
            raise _DamagedError
        self._file.seek(record.body_start)
        left_bytes = record.body_bytes
        checksum = 0
        rest = b""
        while left_bytes:
            # A frame longer than a chunk is read in one go, once it is known how long it is.
            chunk = self._file.read(min(left_bytes, max(CHUNK_BYTES, _lacks(rest))))
            if not chunk:
                raise _DamagedError
            left_bytes -= len(chunk)
            checksum = crc32(chunk, checksum)
            frames, rest = split_frames(rest + chunk)
            if excess := ring.extend(frames):
                ring.evict(excess)
        if rest or self._file.read(_SUM.size) != _SUM.pack(checksum):
            raise _DamagedError

    def _next_marker(self, place: int) -> int:
        """Return where the marker stands next, the file's end if it does not."""
        marker = self._marker
        self._file.seek(place)
        window = b""
        while chunk := self._file.read(CHUNK_BYTES):
            window += chunk
            found = window.find(marker)
            if found >= 0:
                return place + found
            # It may begin in this chunk and end in the next.
            kept = min(len(window), len(marker) - 1)
            place += len(window) - kept
            window = window[-kept:]
        return self._size_bytes


def _meaning_of(record: _Record, decoder: msgspec.msgpack.Decoder[_Meaning]) -> _Meaning:
    try:
        return decoder.decode(record.meaning)
    except (msgspec.MsgspecError, ValueError) as error:
        raise _DamagedError from error


def _is_sound(part: bytes) -> bool:
    """Return whether ``part`` ends with the checksum of the rest of it."""
    return len(part) > _SUM.size and part[-_SUM.size :] == _SUM.pack(crc32(part[: -_SUM.size]))


def split_frames(joined: bytes) -> tuple[list[bytes], bytes]:
    """Return the text frames in ``joined``, and the beginning of one more behind them.

    RFC 6455 §5.2; server frames have no mask.
    """
    frames: list[bytes] = []
    start, end = 0, len(joined)
    while end - start >= 4:
        if joined[start + 1] == 126 and joined[start] == _FIN_TEXT:
            # Nearly all messages are of this size, and this is half the time a call takes.
            stop = start + 4 + (joined[start + 2] << 8 | joined[start + 3])
        else:
            size = _frame_bytes(joined, start)
            stop = start + size if size else end + 1
        if stop > end:
            break
        frames.append(joined[start:stop])
        start = stop
    return frames, joined[start:]


def _frame_bytes(joined: bytes, start: int) -> int:
    """Return how long the frame at ``start`` is; 0 while its header is not whole."""
    if joined[start] != _FIN_TEXT:
        raise _DamagedError
    size = joined[start + 1]
    if size < 126:
        return size + 2
    header_bytes = 4 if size == 126 else 10
    header = joined[start + 2 : start + header_bytes]
    if size > 127 or int.from_bytes(header, "big") > MAX_FRAME_BYTES:
        raise _DamagedError
    if len(header) < header_bytes - 2:
        return 0
    return int.from_bytes(header, "big") + header_bytes


def _lacks(rest: bytes) -> int:
    """Return how many bytes the frame that begins with ``rest`` lacks, 0 if that isn't known."""
    return _frame_bytes(rest, 0) - len(rest) if len(rest) >= 2 else 0
