"""The file that carries topics over a planned restart: its records, written and read. No disk here.

A file is a head, one record for each topic, and an end. Every record begins with the file's marker,
so that the next record is found behind a damaged one. A topic's position has a checksum apart from
its messages, so that damaged messages do not cost the position. No field is used before its
checksum was compared, and no length that is read makes any memory grow beyond its bound.
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

# The file's head: magic, version, marker, last message id in microseconds; its checksum follows.
_FILE_HEAD: Final = struct.Struct(">7sB16sQ")
# A record's head: marker, kind, size of the description behind the head, size of the messages after
# the description. A checksum follows the description, and another one the messages.
_RECORD_HEAD: Final = struct.Struct(">16scHQ")
_SUM: Final = struct.Struct(">I")
_TOPIC: Final = b"T"
_END: Final = b"E"

# Messages are joined, added to the checksum and read in parts of so many bytes: 1 ms of a core.
CHUNK_BYTES: Final = 1 << 20
# The largest publish that can be configured is 64 MiB; the rest is for the text around it, such as
# topic and tenant.
MAX_FRAME_BYTES: Final = (64 << 20) + 65_536
# The last microsecond that RFC 3339 can spell.
_MAX_ID_US: Final = 253_402_300_800 * 1_000_000 - 1

_FIN_TEXT: Final = 0x81


class BadState(Exception):
    """The file is no state file, or one of another version; the text says which."""


class _DamagedError(Exception):
    """This part of the file is not as it was written."""


_Meaning = TypeVar("_Meaning")
_encode = msgspec.msgpack.Encoder().encode
_topic_decoder = msgspec.msgpack.Decoder(SavedTopic)
_count_decoder = msgspec.msgpack.Decoder(Annotated[int, Meta(ge=0)])


# --- writing -------------------------------------------------------------------------------------


def file_head(marker: bytes, last_id_us: int) -> bytes:
    """Return the head of a file.

    Args:
        marker: 16 random bytes, which no publisher can know and put into a message.
        last_id_us: newest message id, in microseconds since 1970; later ids must be greater.
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
    """Return ``topic`` as saved without the messages of its ring."""
    return msgspec.structs.replace(topic, first=topic.head + 1, messages=0)


def end_record(marker: bytes, topics: int) -> bytes:
    """Return the end of a file with ``topics`` records."""
    return _record_head(marker, _END, _encode(topics), 0)


def _record_head(marker: bytes, kind: bytes, meaning: bytes, body_bytes: int) -> bytes:
    return _summed(_RECORD_HEAD.pack(marker, kind, len(meaning), body_bytes) + meaning)


def _summed(part: bytes) -> bytes:
    return part + _SUM.pack(crc32(part))


# --- reading -------------------------------------------------------------------------------------


class StateFile(Protocol):
    """The source of a StateReader: a file, or bytes in tests."""

    def read(self, size: int, /) -> bytes:
        """Return the next ``size`` bytes, fewer at the end only."""

    def seek(self, offset: int, /) -> int:
        """Read on from ``offset``."""


class _Record:
    """A record's head, with a right checksum, and the place of its messages in the file."""

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
    """Reads a file of ``size_bytes`` that may be damaged in any way, or forged."""

    def __init__(self, file: StateFile, size_bytes: int) -> None:
        """Read the file's head.

        Raises:
            BadState: the file is no state file, is damaged at its start, or has another version.
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
        # Number of damaged records found so far.
        self.damaged = 0
        # Number of topics by the file's end record; None until a sound one is reached.
        self.written: int | None = None

    def topics(
        self, ring_for: Callable[[SavedTopic], RecentMessageCache | None]
    ) -> Iterator[tuple[SavedTopic, RecentMessageCache | None]]:
        """Yield each topic with its ring, or with None if its messages are damaged or unwanted.

        Args:
            ring_for: returns an empty ring that begins at the topic's first offset, with today's
                bounds; None to pass over the messages.
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
            # The rest of a frame longer than a chunk is read in one go, once its length is known.
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
        """Return the next place of the marker, or the file's end without one."""
        marker = self._marker
        self._file.seek(place)
        window = b""
        while chunk := self._file.read(CHUNK_BYTES):
            window += chunk
            found = window.find(marker)
            if found >= 0:
                return place + found
            # The marker may begin in this chunk and end in the next.
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
    """Return whether ``part`` ends with the checksum of the bytes before it."""
    return len(part) > _SUM.size and part[-_SUM.size :] == _SUM.pack(crc32(part[: -_SUM.size]))


def split_frames(joined: bytes) -> tuple[list[bytes], bytes]:
    """Return the text frames in ``joined``, and the beginning of another one behind them.

    RFC 6455 §5.2; server frames have no mask.
    """
    frames: list[bytes] = []
    start, end = 0, len(joined)
    while end - start >= 4:
        if joined[start + 1] == 126 and joined[start] == _FIN_TEXT:
            # Nearly all messages have this size of header; reading it here takes half the time of a
            # call.
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
    """Return the bytes of the frame at ``start``; 0 while its header is not whole."""
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
    """Return the bytes missing from the frame that begins with ``rest``; 0 if unknown."""
    return _frame_bytes(rest, 0) - len(rest) if len(rest) >= 2 else 0
