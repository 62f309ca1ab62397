"""Records: what a node appends to the log. Pure: no clock and no engine here.

A record is one line of header and then one line for each message, which is a publish object as in
docs/wire.md. So anybody who reads the log without clevrd leaves out the lines that begin with
``clevrd1`` and has the messages. The fold reads the header alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Final

import msgspec

from clevrd.core.publish_request import PublishRequest

# The first bytes of a record; the digit is its version. No JSON begins like this, so a record
# without them is the publish of a foreign producer.
MAGIC: Final = b"clevrd1 "
# Every later version begins so.
ANY_VERSION: Final = b"clevrd"
# Eight hexadecimal digits and a space follow: the CRC-32 of all bytes behind them.
_CRC_END: Final = len(MAGIC) + 8
_HEADER_AT: Final = _CRC_END + 1

# Bytes that a record of several messages has at most; a single message may be larger. Kafka takes
# 1 MB by default, and a client adds its own framing.
MAX_RECORD_BYTES: Final = 512 << 10


# Bytes of a foreign producer's record at most, as of a publish by default (`max_message_bytes`).
# Many clients take no message above 1 MiB, and would be cut by it each time they come back. It is a
# part of the format, since nodes with other bounds would count differently.
MAX_FOREIGN_BYTES: Final = (1 << 20) - (8 << 10)

# A foreign producer names no tenant, so its messages are this one's: `tenants.DEFAULT_TENANT`.
FOREIGN_TENANT: Final = "default-tenant"

# The end of the year 9998: ids and timestamps are spelled with four digits for the year.
_MAX_TIME_US: Final = 253_370_764_800_000_000 - 1


class BadRecord(ValueError):
    """A record that can't be read: its sentence says why."""


class LaterVersion(BadRecord):
    """A record of a later clevrd, which may count messages that this one can't see."""


class Run(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Messages of one topic that stand together in a record."""

    tenant: str
    topic: str
    count: int
    # Bytes of its lines, line feeds included.
    size_bytes: int


class Keyed(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A message with an idempotency key."""

    # Which of the record's lines it is; the first is 0.
    line: int
    key: str
    # A digest of the message: another message under the same key is a mistake.
    content: str


class Clear(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A topic that is to lose all messages before this record."""

    tenant: str
    topic: str


class Seen(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The record that the writer had folded last, by which others find that their logs differ."""

    # A position, in decimal digits: it may exceed 64 bits.
    position: str
    digest: str


class Header(msgspec.Struct, frozen=True, array_like=True):
    """The part of a record that the fold reads; fields of later versions are added at the end."""

    # The stamp of the log when the record was made; hexadecimal digits.
    stamp: str
    # Random for each start of a process; hexadecimal digits.
    writer: str
    # Rises by one from record to record of a writer in a partition; the first is 1.
    sequence: int
    # The writer's clock, microseconds since 1970.
    time_us: int
    runs: tuple[Run, ...] = ()
    # In the order of their lines.
    keyed: tuple[Keyed, ...] = ()
    seen: Seen | None = None
    # The writer has no usable checkpoint: all nodes begin a new epoch.
    is_reset: bool = False
    # For how long this record's keys are remembered, and the number of keys at which the oldest
    # ones are forgotten. Each record says so itself: if nodes went by their own settings, two nodes
    # with different ones would count differently.
    keep_keys_ms: int = 0
    max_keys: int = 0
    # The writer's version of clevrd, in records without messages, by which nodes show themselves.
    version: str = ""
    # Topics that begin a new epoch behind this record's messages, with the offsets going on. A
    # clevrd that does not know this counts the same, and keeps the messages and the epoch's name.
    clears: tuple[Clear, ...] = ()


# 40 digits: 128 bits.
_DIGITS: Final = re.compile(r"[0-9]{1,40}")

_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(Header)


class _Line(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    # A field that a later version adds has to stand before the data: `plain_data` of this version
    # would take one behind them for a part of them.
    topic: str
    data: msgspec.Raw
    key: str | None = None
    idempotency_key: str | None = None
    ttl_s: int | float | None = None
    headers: dict[str, str] | None = None


class StoredLine(msgspec.Struct, frozen=True, gc=False):
    """A message as its line in a record has it, but for fields of a later clevrd."""

    data: msgspec.Raw
    key: str | None = None
    idempotency_key: str | None = None
    ttl_s: int | float | None = None
    # The JSON of its headers, which another program may have written; empty for none.
    headers: msgspec.Raw = msgspec.Raw(b"")


# Ends of the fields that a line may have behind these two, as the encoder spells them; the end of
# key's is that of idempotency_key's too.
_MORE_FIELDS: Final = tuple(
    b'%b":' % name.encode() for name in _Line.__struct_fields__[2:] if name != "idempotency_key"
)


def line_of(request: PublishRequest, idempotency_key: str | None = None) -> bytes:
    """Return a message as a line, line feed included.

    Args:
        idempotency_key: the key of its header field, where it has none in its body.
    """
    line = _encoder.encode(
        _Line(
            request.topic,
            request.data,
            request.key,
            request.idempotency_key or idempotency_key,
            request.ttl_s,
            request.headers or None,
        )
    )
    if b"\n" in line or b"\r" in line:
        # A publisher's JSON may be pretty-printed. Inside of strings such bytes are escaped, so
        # those that are found stand between tokens.
        line = line.replace(b"\n", b" ").replace(b"\r", b" ")
    return line + b"\n"


def lines_of(requests: Sequence[PublishRequest], idempotency_key: str | None) -> bytes:
    """Return messages of one topic, each as `line_of` does, in a sixth of its time for a batch."""
    begin = b'{"topic":%b,"data":' % _encoder.encode(requests[0].topic)
    more = [
        None
        for each in requests
        if each.key is not None
        or each.idempotency_key is not None
        or each.ttl_s is not None
        or each.headers
    ]
    data = [request.data for request in requests]
    together = b"".join(data)
    # A publisher's JSON may be pretty-printed.
    if more or idempotency_key is not None or b"\n" in together or b"\r" in together:
        return b"".join([line_of(request, idempotency_key) for request in requests])
    return begin + (b"}\n" + begin).join(data) + b"}\n"


def plain_data(lines: bytes, count: int, topic: str) -> list[bytes]:
    """Return the data of ``count`` messages of ``topic`` whose lines say nothing else of them.

    The lines are not parsed for it. There is none where any may say more, as one of which the data
    have a field of that name.
    """
    begin = b'{"topic":%b,"data":' % _encoder.encode(topic)
    if not (lines.startswith(begin) and lines.endswith(b"}\n")):
        return []
    if any(field in lines for field in _MORE_FIELDS):
        return []
    data = lines[len(begin) : -2].split(b"}\n" + begin)
    return data if len(data) == count else []


def encode_record(header: Header, lines: Sequence[bytes]) -> bytes:
    """Return a record; ``lines`` are the messages of ``header.runs``, run by run."""
    parts = (b" ", _encoder.encode(header), b"\n", *lines)
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    # One copy of the lines is made, and not a second one for what stands before them.
    return b"".join((MAGIC, b"%08x" % crc, *parts))


def is_foreign(record: bytes) -> bool:
    """Return whether no node made this record; it is a publish object then, or nothing."""
    return not record.startswith(ANY_VERSION)


def decode_header(record: bytes) -> tuple[Header, int]:
    """Return the header of a node's record, and where its lines begin.

    Raises:
        BadRecord: it is of a later version, or damaged.
    """
    if not record.startswith(MAGIC):
        version = record[len(ANY_VERSION) : len(MAGIC)].decode("ascii", "replace").strip()
        raise LaterVersion(
            f"a record of version {version}, which this clevrd does not know; give all nodes the"
            " newest version"
        )
    end = record.find(b"\n", _HEADER_AT)
    if end < 0 or record[len(MAGIC) : _CRC_END] != b"%08x" % zlib.crc32(
        memoryview(record)[_CRC_END:]
    ):
        raise BadRecord("a damaged record: its checksum does not fit")
    try:
        header = _decoder.decode(memoryview(record)[_HEADER_AT:end])
    except msgspec.MsgspecError as error:
        raise BadRecord(f"a record with a header that can't be read: {error}") from error
    _check_header(header, len(record) - end - 1)
    return header, end + 1


def _check_header(header: Header, lines_bytes: int) -> None:
    """Raise BadRecord unless the fold can go by ``header``, which has so many bytes of lines."""
    count = 0
    for run in header.runs:
        # A line has at least its line feed.
        if not 0 < run.count <= run.size_bytes:
            raise BadRecord("a record with a run that can't have the count that its header says")
        count += run.count
        lines_bytes -= run.size_bytes
    if lines_bytes:
        raise BadRecord("a record whose lines have not the size that its header says")
    if header.keyed:
        lines = [-1, *(keyed.line for keyed in header.keyed), count]
        if any(line >= following for line, following in pairwise(lines)):
            raise BadRecord("a record with an idempotency key for a line that it does not have")
    if not (header.stamp and header.writer):
        raise BadRecord("a record without a stamp or a writer")
    if not 0 <= header.time_us <= _MAX_TIME_US:
        raise BadRecord("a record with a time beyond the year 9998, or before 1970")
    if header.seen is not None and not _DIGITS.fullmatch(header.seen.position):
        raise BadRecord("a record that names a position which is no number")


def partition_of(tenant: str, topic: str, partitions: int) -> int:
    """Return the number of the partition that has a topic's records, the same on all nodes."""
    return zlib.crc32(f"{tenant}\0{topic}".encode()) % partitions


def digest_of(record: bytes) -> str:
    """Return the CRC-32 of all of ``record``, 8 hexadecimal digits: see `Engine.digest`."""
    return f"{zlib.crc32(record):08x}"


def content_of(request: PublishRequest) -> str:
    """Return the digest by which a repeat is told from another message with the same key.

    Headers do not count: a client that tries again has another span, and nodes that know nothing of
    headers have to find the same.
    """
    content = bytes(request.data)
    if request.key is not None:
        # JSON has no zero byte.
        content = b"%b\0%b" % (content, request.key.encode())
    return blake2b(content, digest_size=8).hexdigest()
