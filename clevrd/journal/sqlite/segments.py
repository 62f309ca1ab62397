"""Segments: the files that hold the log, each for a stretch of time, and what one says of itself.

A segment has records in the order of the log, and for each topic the runs of its messages, by which
a history is read without looking at other topics. Positions rise from segment to segment.

A run stands first with its record, and moves to the table of runs with many others: each topic's
runs are on a page of their own there, so that 20 topics in a record would make a commit write 20
pages (120 KB) more.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import apsw
import msgspec

from clevrd.journal.sqlite.directory import FORMAT, JournalDirectory, segment_name
from clevrd.journal.sqlite.library import APPLICATION_ID
from clevrd.journal.sqlite.library import number as number_of

_SCHEMA: Final = """
-- One row: what the segment is, as JSON, and the CRC-32 of that.
CREATE TABLE info (text TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE records (
  position INTEGER PRIMARY KEY,
  -- Its messages' time, microseconds since 1970; without messages the time of those before it in
  -- this segment, or 0.
  time_us INTEGER NOT NULL,
  -- Of all that the row says.
  crc INTEGER NOT NULL,
  -- The record's runs, as rows of the table in MessagePack.
  runs BLOB NOT NULL,
  record BLOB NOT NULL
);
CREATE TABLE topics (
  partition_epoch TEXT NOT NULL,
  tenant TEXT NOT NULL,
  topic TEXT NOT NULL,
  id INTEGER NOT NULL,
  PRIMARY KEY (partition_epoch, tenant, topic)
) WITHOUT ROWID;
-- Messages of one topic with consecutive offsets in one record: see Placed.
CREATE TABLE runs (
  topic_id INTEGER NOT NULL,
  first INTEGER NOT NULL,
  count INTEGER NOT NULL,
  position INTEGER NOT NULL,
  at_bytes INTEGER NOT NULL,
  size_bytes INTEGER NOT NULL,
  skip INTEGER NOT NULL,
  id_us INTEGER NOT NULL,
  id_step INTEGER NOT NULL,
  -- Of all that the row says, the record's time, the topic's name and the lines.
  crc INTEGER NOT NULL,
  PRIMARY KEY (topic_id, first)
) WITHOUT ROWID;
-- One row: the last record whose runs are in the table.
CREATE TABLE indexed (position INTEGER NOT NULL);
"""
_LAST: Final = "SELECT max(position) FROM records"
_OLDEST: Final = "SELECT time_us FROM records WHERE time_us > 0 ORDER BY position LIMIT 1"
_NEWEST: Final = "SELECT time_us FROM records WHERE time_us > 0 ORDER BY position DESC LIMIT 1"
# The id of a topic, by its names.
FIND_TOPIC: Final = "SELECT id FROM topics WHERE partition_epoch = ? AND tenant = ? AND topic = ?"
_ADD_RUN: Final = "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
# Ends of the names of a database's files: itself, its WAL, and the WAL's index.
FILES: Final = ("", "-wal", "-shm")
# Partition epoch, tenant and topic.
Names = tuple[str, str, str]
# A row of runs, by its columns.
RunRow = tuple[int, int, int, int, int, int, int, int, int, int]

_run_encoder: Final = msgspec.msgpack.Encoder()
_run_decoder: Final = msgspec.msgpack.Decoder(list[RunRow])
_RECORD_KEY: Final = struct.Struct("<qq")
_RUN_KEY: Final = struct.Struct("<9q")


class SegmentInfo(msgspec.Struct, frozen=True):
    """A segment's description of itself; written when it is made, and never changed."""

    format: int
    number: int
    # The log's stamp while records are appended here.
    stamp: str
    # Records have higher positions. The last record before it, and that record's CRC-32; empty
    # where there was none, or where it can't be read.
    after_position: int
    after_digest: str
    # The first segment with this stamp, so that no record of it is older.
    begins_stamp: bool
    # The wall clock when it was made, microseconds since 1970.
    made_us: int
    # The file's inode number: a copy of a journal has others, and must not go on as if it were the
    # journal itself.
    inode: int


class BadSegment(Exception):
    """A file that is no segment, or whose beginning is damaged."""

    def __init__(self, sentence: str, *, is_later_format: bool = False) -> None:
        super().__init__(sentence)
        self.is_later_format = is_later_format


class Segment:
    """One segment as the journal knows it. Changed under the lock of its `Catalog`."""

    __slots__ = (
        "info",
        "inodes",
        "is_damaged",
        "is_final",
        "last_position",
        "newest_us",
        "oldest_us",
        "path",
        "pending",
    )

    def __init__(self, path: str, info: SegmentInfo) -> None:
        self.path = path
        self.info = info
        # The newest record of the segment that was committed; one before its first while it has
        # none.
        self.last_position = info.after_position
        # Times of its oldest and newest record, microseconds since 1970; 0 without a record.
        self.oldest_us = 0
        self.newest_us = 0
        # Inode numbers of its files (see FILES) when they were opened to be written to; 0 for one
        # that was not there. Empty before that.
        self.inodes: tuple[int, ...] = ()
        # True when it is not written to any more, and has no WAL.
        self.is_final = False
        # True when something in it was found to be damaged, and logged.
        self.is_damaged = False
        # Runs that are not in the table yet, by the topic's id, in the order of the log. The writer
        # adds to the lists, or replaces all; readers take what is there.
        self.pending: dict[int, list[RunRow]] = {}

    @property
    def number(self) -> int:
        """Its number; they rise with time, and are not consecutive."""
        return self.info.number

    def size_bytes(self) -> int:
        """Return the bytes of its files."""
        return file_bytes(self.path)


class Catalog:
    """The segments that there are, oldest first; read and changed by several threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Replaced, never changed, so that a thread may go through one while it is replaced.
        self.segments: tuple[Segment, ...] = ()

    def add(self, segment: Segment) -> None:
        """Add the newest segment."""
        with self.lock:
            self.segments = (*self.segments, segment)

    def remove(self, segment: Segment) -> None:
        """Forget a segment."""
        with self.lock:
            self.segments = tuple(each for each in self.segments if each is not segment)

    def with_position(self, position: int) -> Segment | None:
        """Return the segment that has ``position``, if any has."""
        for segment in reversed(self.segments):
            if segment.info.after_position < position <= segment.last_position:
                return segment
        return None


def inodes_of(path: str) -> tuple[int, ...]:
    """Return the inode numbers of a database's files, in the order of FILES; 0 for none."""
    return tuple(_inode_of(path + end) for end in FILES)


def _inode_of(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def is_gone(path: str) -> bool:
    """Return whether there is no file of this name; false where the disk does not say it."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def missing_file(segment: Segment) -> str:
    """Return a file of ``segment`` that another one, or none, has taken the place of; or nothing.

    SQLite goes on writing to files that were removed, and notices nothing.
    """
    found = inodes_of(segment.path)
    for end, inode, opened in zip(FILES, found, segment.inodes, strict=False):
        if opened and inode != opened:
            return segment.path + end
    return ""


def file_bytes(path: str) -> int:
    """Return the bytes of a database's files; 0 if there are none."""
    total = 0
    for end in ("", "-wal"):
        try:
            total += os.stat(path + end).st_size
        except OSError:
            continue
    return total


def has_wal(path: str) -> bool:
    """Return whether a database has a WAL with anything in it."""
    try:
        return os.stat(path + "-wal").st_size > 0
    except OSError:
        return False


# --- making and opening --------------------------------------------------------------------------


def make_segment(
    directory: JournalDirectory,
    vfs: str | None,
    *,
    number: int,
    stamp: str,
    after_position: int,
    after_digest: str,
    begins_stamp: bool,
    made_us: int,
) -> Segment:
    """Make a segment's file, whole or not at all.

    Raises:
        apsw.Error: it can't be made.
        OSError: the same.
    """
    new = directory.make_file("new.db")
    info = SegmentInfo(
        FORMAT,
        number,
        stamp,
        after_position,
        after_digest,
        begins_stamp,
        made_us,
        os.stat(new).st_ino,
    )
    text = msgspec.json.encode(info).decode()
    connection = apsw.Connection(new, flags=apsw.SQLITE_OPEN_READWRITE, vfs=vfs)
    try:
        connection.pragma("synchronous", "full")
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", FORMAT)
        connection.pragma("journal_mode", "wal")
        with connection:
            connection.execute(_SCHEMA)
            connection.execute("INSERT INTO indexed VALUES (?)", (after_position,))
            connection.execute("INSERT INTO info VALUES (?, ?)", (text, zlib.crc32(text.encode())))
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        connection.close(True)
    path = directory.inside(segment_name(number))
    os.rename(new, path)
    directory.sync()
    return Segment(path, info)


def read_info(connection: apsw.Connection) -> SegmentInfo:
    """Return what an open segment says of itself.

    Raises:
        BadSegment: the file is something else, or damaged.
        apsw.Error: it can't be read.
    """
    if connection.pragma("application_id") != APPLICATION_ID:
        raise BadSegment("it is no file of a journal")
    found = connection.pragma("user_version")
    if found > FORMAT:
        raise BadSegment(
            f"it has format {found}, and this clevrd knows up to {FORMAT}", is_later_format=True
        )
    rows = connection.execute("SELECT text, crc FROM info").fetchall()
    text = str(rows[0][0]) if len(rows) == 1 else ""
    if not text or zlib.crc32(text.encode()) != rows[0][1]:
        raise BadSegment("what it says of itself is damaged")
    try:
        return msgspec.json.decode(text, type=SegmentInfo)
    except msgspec.MsgspecError as error:
        raise BadSegment(f"what it says of itself can't be read: {error}") from error


def note_bounds(segment: Segment, connection: apsw.Connection) -> None:
    """Note the segment's newest record, and its records' times."""
    segment.last_position = max(segment.last_position, number_of(connection, _LAST))
    segment.oldest_us, segment.newest_us = (
        number_of(connection, _OLDEST),
        number_of(connection, _NEWEST),
    )


# --- runs ----------------------------------------------------------------------------------------


def spell_runs(rows: Sequence[RunRow]) -> bytes:
    """Return the rows of a record's runs as they stand with the record."""
    return _run_encoder.encode(rows)


def read_runs(spelled: bytes) -> list[RunRow]:
    """Return the rows that `spell_runs` was given.

    Raises:
        msgspec.MsgspecError: it is something else.
    """
    return _run_decoder.decode(spelled)


def add_pending(segment: Segment, rows: Iterable[RunRow]) -> None:
    """Add a record's runs to those that are not in the table yet."""
    for row in rows:
        of_topic = segment.pending.setdefault(row[0], [])
        # A record that was sent again has the same runs.
        if not of_topic or of_topic[-1][1] < row[1]:
            of_topic.append(row)


def load_pending(segment: Segment, connection: apsw.Connection) -> None:
    """Note the runs that are not in the table, of records that are what was written."""
    segment.pending = {}
    query = (
        "SELECT position, time_us, crc, runs, record FROM records"
        " WHERE position > (SELECT max(position) FROM indexed) AND position <= ? ORDER BY position"
    )
    rows: Any = connection.execute(query, (segment.last_position,))
    for position, time_us, crc, runs, record in rows:
        if is_sound_record(position, time_us, crc, runs, record):
            add_pending(segment, read_runs(runs))


def index_pending(segment: Segment, connection: apsw.Connection) -> None:
    """Put all runs into the table; the caller is in a transaction, and ends it."""
    rows = sorted(row for of_topic in segment.pending.values() for row in of_topic)
    connection.executemany(_ADD_RUN, rows)
    connection.execute("UPDATE indexed SET position = ?", (segment.last_position,))


# --- checksums -----------------------------------------------------------------------------------


def is_sound_record(position: Any, time_us: Any, crc: Any, runs: Any, record: Any) -> bool:
    """Return whether a row of records is what was written; a flipped bit may change its types."""
    return (
        isinstance(position, int)
        and isinstance(time_us, int)
        and isinstance(runs, bytes)
        and isinstance(record, bytes)
        and record_crc(position, time_us, runs, record) == crc
    )


def record_crc(position: int, time_us: int, runs: bytes, record: bytes) -> int:
    """Return the checksum of a row of records."""
    return zlib.crc32(record, zlib.crc32(runs, zlib.crc32(_RECORD_KEY.pack(position, time_us))))


def names_crc(partition_epoch: str, tenant: str, topic: str) -> int:
    """Return the checksum that those of a topic's runs begin with."""
    return zlib.crc32("\0".join((partition_epoch, tenant, topic)).encode())


def run_crc(names: int, row: tuple[int, ...], time_us: int, lines: bytes | memoryview) -> int:
    """Return the checksum of a row of runs; -1, which none is, if its columns are no numbers.

    Args:
        names: `names_crc` of the topic.
        row: the columns from first to id_step.
        time_us: the record's.
        lines: of ``size_bytes`` at ``at_bytes`` in the record.
    """
    try:
        return zlib.crc32(lines, zlib.crc32(_RUN_KEY.pack(*row, time_us), names))
    except struct.error:
        return -1
