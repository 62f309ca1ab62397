"""Inspection: a journal as the commands see it, whether a daemon has it open or not. Reads only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import apsw
import msgspec

from clevrd.errors import JournalUnavailable
from clevrd.journal.checkpoints import BadCheckpoint as BadState
from clevrd.journal.checkpoints import read_state
from clevrd.journal.sqlite.directory import (
    CHECKPOINT,
    LOCK,
    JournalDirectory,
    Meta,
    segment_name,
)
from clevrd.journal.sqlite.finding import BadFile, find_segments
from clevrd.journal.sqlite.heads import BadCheckpoint, read_checkpoint
from clevrd.journal.sqlite.library import check_library, open_to_read, words_of
from clevrd.journal.sqlite.segments import (
    Names,
    RunRow,
    Segment,
    file_bytes,
    has_wal,
    is_sound_record,
    names_crc,
    read_runs,
    run_crc,
)

# Bytes of records that are read in one transaction: while a long one is open, the daemon's WAL
# can't begin anew.
_SLICE_BYTES: Final = 4 << 20

_RECORDS: Final = (
    "SELECT position, time_us, crc, runs, record FROM records"
    " WHERE position > ? AND position <= ? ORDER BY position"
)
_TOPICS: Final = "SELECT id, partition_epoch, tenant, topic FROM topics"


class FoundRecord(msgspec.Struct, frozen=True):
    """A record that is what was written."""

    position: int
    time_us: int
    runs: list[RunRow]
    record: bytes


class Summary(msgspec.Struct, frozen=True):
    """The journal in figures."""

    directory: str
    # A daemon has it open.
    is_open: bool
    stamp: str
    durability: str
    segments: int
    # Files that can't be read.
    damaged_files: int
    size_bytes: int
    records: int
    messages: int
    topics: int
    # Times of the oldest and the newest record, microseconds since 1970; None without records.
    oldest_us: int | None
    newest_us: int | None


class Inspection:
    """One look at a journal."""

    def __init__(self, path: str) -> None:
        """Look at what there is.

        Raises:
            JournalUnavailable: there is no journal, or it can't be read.
        """
        check_library()
        self.directory = JournalDirectory(path)
        try:
            names = self.directory.names()
            meta = self.directory.read_meta()
            if meta is None and not self.directory.segment_numbers():
                what = "nothing" if not names else "other files"
                raise JournalUnavailable(f"{path} is no journal: it holds {what}.")
            self.is_open = self._is_open()
            found = find_segments(self.directory, is_in_use=self.is_open)
        except OSError as error:
            raise JournalUnavailable(
                f"Can't read the journal {path}: {words_of(error)}."
            ) from error
        except apsw.Error as error:
            raise JournalUnavailable(
                f"Can't read the journal {path}: {words_of(error)}."
            ) from error
        self.meta: Meta | None = meta
        self.segments: list[Segment] = found.segments
        self.bad: list[BadFile] = found.bad

    def _is_open(self) -> bool:
        """Return whether a daemon holds the journal's lock."""
        try:
            lock = os.open(self.directory.inside(LOCK), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def connect(self, segment: Segment) -> apsw.Connection:
        """Return a connection for reading ``segment``; the caller closes it."""
        return open_to_read(segment.path, None, is_final=segment.is_final)

    def topics(self, connection: apsw.Connection) -> dict[int, Names]:
        """Return a segment's topics by their ids: partition epoch, tenant and name."""
        rows: Any = connection.execute(_TOPICS)
        return {number: (epoch, tenant, topic) for number, epoch, tenant, topic in rows}

    def records(
        self, segment: Segment, connection: apsw.Connection, damaged: Callable[[str], None]
    ) -> Iterator[FoundRecord]:
        """Yield the records of ``segment``, up to the last one that it had at the beginning.

        Args:
            damaged: told of each record that can't be read, in a few words.

        Raises:
            apsw.Error: the rest can't be read.
        """
        after = segment.info.after_position
        while after < segment.last_position:
            size_bytes, slice_end = 0, after
            rows: Any = connection.execute(_RECORDS, (after, segment.last_position))
            for position, time_us, crc, runs, record in rows:
                for missing in range(slice_end + 1, position):
                    damaged(f"the record at position {missing} is missing")
                slice_end = position
                size_bytes += len(record)
                if is_sound_record(position, time_us, crc, runs, record):
                    yield FoundRecord(position, time_us, read_runs(runs), record)
                else:
                    damaged(f"the record at position {position} is damaged")
                if size_bytes >= _SLICE_BYTES:
                    break
            rows.close()
            if slice_end == after or size_bytes < _SLICE_BYTES:
                for missing in range(slice_end + 1, segment.last_position + 1):
                    damaged(f"the record at position {missing} is missing")
                return
            after = slice_end

    def cleared(self) -> tuple[str, Sequence[tuple[str, str, int]]]:
        """Return the newest checkpoint's partition epoch, and the topics that were cleared in it.

        Each topic has its tenant, its name, and the offset up to which it was cleared. Without a
        checkpoint that can be read there are none.
        """
        path = self.directory.inside(CHECKPOINT)
        try:
            connection = open_to_read(path, None, is_final=not (self.is_open or has_wal(path)))
            try:
                checkpoint = read_checkpoint(connection)
            finally:
                connection.close(True)
            if checkpoint is None:
                return "", ()
            state, _ = read_state(checkpoint.state)
        except (BadCheckpoint, BadState, apsw.Error):
            return "", ()
        return state.epoch, state.cleared

    def missing(self) -> Iterator[str]:
        """Yield a line for each file that was set aside, and for records between two segments."""
        aside = [each for each in sorted(self.directory.names()) if each.endswith(".db.damaged")]
        for name in aside:
            yield f"{self.directory.inside(name)}: it was set aside, since it could not be read"
        known = {segment_name(each.number) for each in self.bad}
        known |= {each.removesuffix(".damaged") for each in aside}
        for older, newer in pairwise(self.segments):
            first, last = older.last_position + 1, newer.info.after_position
            between = map(segment_name, range(older.number + 1, newer.number))
            # The oldest files may go while a daemon has the journal open.
            if first <= last and known.isdisjoint(between) and os.path.exists(older.path):
                yield (
                    f"{self.directory.path}: the records from position {first} to {last} are"
                    f" missing; they should be between {os.path.basename(older.path)} and"
                    f" {os.path.basename(newer.path)}"
                )

    def summary(self) -> Summary:
        """Return the journal in figures.

        Raises:
            apsw.Error: a segment is damaged.
        """
        messages = 0
        topics: set[tuple[str, str]] = set()
        for segment in self.segments:
            connection = self.connect(segment)
            try:
                (counted,) = connection.execute("SELECT total(count) FROM runs").fetchone() or (0,)
                messages += int(counted or 0)
                topics.update(names[1:] for names in self.topics(connection).values())
            finally:
                connection.close(True)
            messages += sum(row[2] for rows in segment.pending.values() for row in rows)
        times = [each for each in self.segments if each.oldest_us]
        return Summary(
            os.path.abspath(self.directory.path),
            self.is_open,
            self.meta.stamp if self.meta else "",
            self.meta.durability if self.meta else "",
            len(self.segments),
            len(self.bad),
            sum(each.size_bytes() for each in self.segments)
            + file_bytes(self.directory.inside(CHECKPOINT)),
            sum(each.last_position - each.info.after_position for each in self.segments),
            messages,
            len(topics),
            times[0].oldest_us if times else None,
            times[-1].newest_us if times else None,
        )


def is_sound(row: RunRow, names: Names | None, found: FoundRecord) -> bool:
    """Return whether a run is what was written with its record."""
    if names is None:
        return False
    _, first, count, position, at_bytes, size_bytes, skip, id_us, id_step, crc = row
    columns = (first, count, position, at_bytes, size_bytes, skip, id_us, id_step)
    lines = found.record[at_bytes : at_bytes + size_bytes]
    return run_crc(names_crc(*names), columns, found.time_us, lines) == crc
