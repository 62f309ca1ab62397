"""Writer: the thread that appends records, all that have come while it was committing in one go.

A commit that fails in any way but for want of room ends the segment and the stamp with it: nobody
can say what the disk has of it, so no record is ever acknowledged from that file again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final, NamedTuple

import apsw

from clevrd.errors import JournalFull, JournalUnavailable
from clevrd.journal.base import Fenced, Placed
from clevrd.journal.records import digest_of
from clevrd.journal.sqlite.directory import FORMAT, JournalDirectory, Meta, boot_id, new_stamp
from clevrd.journal.sqlite.library import (
    Fault,
    fault_of,
    give_up,
    is_flush,
    number,
    open_to_write,
    words_of,
)
from clevrd.journal.sqlite.segments import (
    Catalog,
    RunRow,
    Segment,
    add_pending,
    index_pending,
    inodes_of,
    make_segment,
    names_crc,
    record_crc,
    run_crc,
    spell_runs,
)
from clevrd.journal.sqlite.settings import SqliteSettings

log = logging.getLogger(__name__)

# Bytes of records that one commit has at most, unless one record alone is larger.
COMMIT_BYTES: Final = 8 << 20
# Pages in the WAL, 4 KiB each, after which it is copied into the file.
WAL_PAGES: Final = 1_000
# Runs that move to the table at once, in a commit of some milliseconds: when nothing else is to be
# done, and at the latest. With 1,000 the 99th percentile of appends was 5.1 ms at 20,000 messages/s
# in 10 topics, with 300 it was 3.6.
PENDING_RUNS: Final = 300
MAX_PENDING_RUNS: Final = 1_200
# Ids of topics that are remembered, so that they need not be looked up: 100 bytes each.
MAX_TOPICS: Final = 50_000
# How often an idle writer looks at the clock.
IDLE_S: Final = 10.0

_BEGIN: Final = "BEGIN IMMEDIATE"
_COMMIT: Final = "COMMIT"
_RECORD: Final = "INSERT INTO records VALUES (?, ?, ?, ?, ?)"
_FIND_TOPIC: Final = "SELECT id FROM topics WHERE partition_epoch = ? AND tenant = ? AND topic = ?"
_NEW_TOPIC: Final = "INSERT INTO topics VALUES (?, ?, ?, ?)"
_LAST_TOPIC: Final = "SELECT max(id) FROM topics"


class Append:
    """A record on its way into the log, and then what became of it."""

    __slots__ = ("error", "placed", "position", "record", "stamp", "waiter")

    def __init__(self, record: bytes, stamp: str, placed: Sequence[Placed], waiter: Any) -> None:
        self.record = record
        self.stamp = stamp
        self.placed = placed
        # The loop's own, which the writer does not look at.
        self.waiter = waiter
        # Set by the writer: its place, or why it has none.
        self.position = 0
        self.error: Exception | None = None


class Commit:
    """Appends that were looked at together, when it is known what became of them."""

    __slots__ = ("appends", "took_ns")

    def __init__(self, appends: list[Append], took_ns: int) -> None:
        self.appends = appends
        # 0 where nothing was committed.
        self.took_ns = took_ns


class Told(NamedTuple):
    """Functions that the writer calls in its thread."""

    # Appends were looked at: they are committed, or have an error.
    committed: Callable[[Commit], None]
    # A segment is full: to finish it, and close its connection, is for another thread.
    full_segment: Callable[[Segment, apsw.Connection], None]
    # A segment's WAL is long: to copy it into the file, and to have `end_copy` done, likewise.
    long_wal: Callable[[Segment], None]
    # The log began anew.
    new_stamp: Callable[[], None]
    # Something went wrong, in a few words.
    error: Callable[[str], None]


class Writer:
    """The newest segment, and the thread that alone writes to it.

    `put` and `do` may be called from any thread, everything else is called by the thread itself or
    before it starts. `stamp` and `is_down` may be read by any.
    """

    def __init__(
        self,
        settings: SqliteSettings,
        directory: JournalDirectory,
        catalog: Catalog,
        vfs: str | None,
        wall_us: Callable[[], int],
        told: Told,
    ) -> None:
        """Make the writer; `adopt` or `begin_stamp`, and then `start`, set it going."""
        self._settings = settings
        self._directory = directory
        self._catalog = catalog
        self._vfs = vfs
        self._wall_us = wall_us
        self._told = told
        self._is_durable = settings.durability == "fsync"
        # Appends, things to do, and None as the last one.
        self._queue: SimpleQueue[Append | Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="clevrd-journal-writer", daemon=True)
        # The stamp with which records are accepted now.
        self.stamp = ""
        # True while there is no segment that takes records.
        self.is_down = True
        self._segment: Segment | None = None
        self._connection: apsw.Connection | None = None
        # The position that the next record gets, and the last record's digest; empty without one.
        self._next = 1
        self._last_digest = ""
        # The record that is to be digested for it, when a new segment asks; empty without one.
        self._last_record = b""
        # Bytes of the segment's file when it was opened, and of what was appended since.
        self._size_bytes = 0
        # Pages in the WAL, as the last commit said; how many there may be before it is copied; and
        # whether that is under way.
        self._wal_pages = 0
        self._copy_at_pages = WAL_PAGES
        self._is_copying = False
        # Runs that are not in the table yet, and how many there may be.
        self._pending = 0
        self._index_at = PENDING_RUNS
        # Ids of the segment's topics, and the checksum of each one's names.
        self._topics: dict[tuple[str, str, str], tuple[int, int]] = {}
        self._last_topic = 0
        # The highest number of a segment so far. A number is not given again, even if its file was
        # removed, since readers remember segments by their numbers.
        self._newest = 0

    # --- from other threads ----------------------------------------------------------------------

    def put(self, append: Append) -> None:
        """Have a record appended; `committed` is told what became of it."""
        self._queue.put(append)

    def do(self, work: Callable[[], None]) -> None:
        """Have ``work`` done by the thread, between two commits."""
        self._queue.put(work)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread finish what was put, close the segment, and end; wait for that."""
        if self._thread.ident is None:
            self._close()
        elif self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    # --- segments --------------------------------------------------------------------------------

    def adopt(self, segment: Segment, connection: apsw.Connection, stamp: str, digest: str) -> None:
        """Go on in a segment that is there.

        Args:
            digest: its last record's.
        """
        self.stamp = stamp
        self._last_digest, self._last_record = digest, b""
        self._next = segment.last_position + 1
        self._use(segment, connection)

    def begin_stamp(self, after_position: int, digest: str) -> None:
        """Begin the log anew behind ``after_position``, with a stamp that it has not had.

        Raises:
            apsw.Error: there is no segment; the next append tries again.
            OSError: the same.
        """
        self._next = max(self._next, after_position + 1)
        self._last_digest, self._last_record = digest, b""
        stamp = new_stamp()
        # The new stamp is on the disk before any record is accepted with it, and no record is
        # accepted with the old one any more.
        self._write_meta(stamp, is_clean=False)
        self.stamp = stamp
        segment = self._make(begins_stamp=True)
        self._catalog.add(segment)
        self._open(segment)
        self._told.new_stamp()

    def renew(self, why: str) -> None:
        """Leave the segment as it is, and begin the log anew in another one.

        No error is raised: without a segment the next append tries again.
        """
        log.error("journal begins anew reason=%r; readers are told of a gap", why)
        self._leave()
        self._try_again()

    def leave(self, segment: Segment, why: str) -> bool:
        """Leave ``segment`` and begin anew, as `renew`; return False if it was left already."""
        if segment is not self._segment:
            return False
        self._told.error(why)
        self.renew(why)
        return True

    def _try_again(self) -> bool:
        """Return whether there is a segment now, of a new stamp."""
        try:
            self._directory.hold()
            self.begin_stamp(self._next - 1, "")
        except (apsw.Error, OSError) as error:
            self._told.error(words_of(error))
            return False
        return True

    def _make(self, *, begins_stamp: bool) -> Segment:
        numbers = self._directory.segment_numbers()
        return make_segment(
            self._directory,
            self._vfs,
            number=max([self._newest, *numbers]) + 1,
            stamp=self.stamp,
            after_position=self._next - 1,
            after_digest=digest_of(self._last_record) if self._last_record else self._last_digest,
            begins_stamp=begins_stamp,
            made_us=self._wall_us(),
        )

    def _open(self, segment: Segment) -> None:
        self._use(segment, open_to_write(segment.path, self._vfs, is_durable=self._is_durable))

    def _use(self, segment: Segment, connection: apsw.Connection) -> None:
        segment.is_final = False
        connection.set_wal_hook(self._note_wal)
        self._topics.clear()
        self._last_topic = number(connection, _LAST_TOPIC)
        self._newest = max(self._newest, segment.number)
        # The WAL is there from the first look into the file on.
        segment.inodes = inodes_of(segment.path)
        self._size_bytes = segment.size_bytes()
        self._wal_pages, self._copy_at_pages = 0, WAL_PAGES
        self._pending = sum(map(len, segment.pending.values()))
        self._index_at = PENDING_RUNS
        self._segment = segment
        self._connection = connection
        self.is_down = False

    def _note_wal(self, connection: apsw.Connection, name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def _leave(self) -> None:
        """Give the segment up: nothing more is written to it, and it keeps its WAL."""
        self.is_down = True
        self._segment = None
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(apsw.Error):
                give_up(connection)

    def _roll_if_due(self) -> None:
        segment, settings = self._segment, self._settings
        if segment is None or segment.last_position == segment.info.after_position:
            return
        age_us = self._wall_us() - segment.info.made_us
        if self._size_bytes < settings.segment_bytes and age_us < settings.segment_s * 1e6:
            return
        if not self._index():
            return
        try:
            new = self._make(begins_stamp=False)
        except (apsw.Error, OSError) as error:
            # The old one still takes records, so this can wait for the next commit.
            self._told.error(words_of(error))
            return
        old = self._connection
        self._catalog.add(new)
        try:
            self._open(new)
        except apsw.Error as error:
            self.renew(words_of(error))
            return
        if old is not None:
            old.set_wal_hook(None)
            self._told.full_segment(segment, old)
        try:
            self._write_meta(self.stamp, is_clean=False)
        except OSError as error:
            # The file on the disk then names an older segment as the newest one, which readers
            # allow for.
            self._told.error(words_of(error))

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        is_last = False
        while not is_last:
            appends, work, is_last = self._take()
            if appends:
                self._told.committed(self._append_all(appends))
            try:
                if work is not None:
                    work()
                self._tidy()
            except Exception as error:
                # Appends that come after it must be answered all the same.
                log.exception("journal's writer failed")
                self._told.error(words_of(error))
        self._close()

    def _tidy(self) -> None:
        """Do what is due between two commits."""
        if self._pending >= self._index_at and (
            self._pending >= MAX_PENDING_RUNS or self._queue.empty()
        ):
            self._index()
        self._roll_if_due()
        if self._wal_pages >= self._copy_at_pages and not self._is_copying:
            self._copy_wal()

    def _take(self) -> tuple[list[Append], Callable[[], None] | None, bool]:
        """Wait for something to do; return appends for one commit, other work, and the end."""
        appends: list[Append] = []
        size_bytes = 0
        try:
            item = self._queue.get(timeout=IDLE_S)
            while isinstance(item, Append):
                appends.append(item)
                size_bytes += len(item.record)
                if size_bytes >= COMMIT_BYTES:
                    return appends, None, False
                item = self._queue.get_nowait()
        except Empty:
            return appends, None, False
        return appends, item, item is None

    def _append_all(self, appends: list[Append]) -> Commit:
        began_ns = time.perf_counter_ns()
        if self._connection is None:
            self._try_again()
        taken = []
        for append in appends:
            if self._connection is None:
                append.error = JournalUnavailable("The journal can't be written to; try again.")
            elif append.stamp != self.stamp:
                append.error = Fenced(append.stamp)
            else:
                taken.append(append)
        if not taken or self._connection is None:
            return Commit(appends, 0)
        try:
            self._commit(self._connection, taken)
        except Exception as error:
            refusal = self._after(error)
            for append in taken:
                append.error = refusal
            return Commit(appends, 0)
        return Commit(appends, time.perf_counter_ns() - began_ns)

    def _commit(self, connection: apsw.Connection, appends: list[Append]) -> None:
        segment = self._segment
        assert segment is not None  # noqa: S101  # there is one while there is a connection
        execute = connection.execute
        all_rows: list[RunRow] = []
        execute(_BEGIN)
        position, newest_us, size_bytes = self._next, segment.newest_us, 0
        for append in appends:
            record, placed = append.record, append.placed
            time_us = placed[0].time_us if placed else newest_us
            rows = self._rows(connection, placed, position, time_us, record)
            runs = spell_runs(rows)
            crc = record_crc(position, time_us, runs, record)
            execute(_RECORD, (position, time_us, crc, runs, record))
            all_rows += rows
            append.position = position
            position += 1
            newest_us = max(newest_us, time_us)
            size_bytes += len(record) + 64 * (1 + len(placed))
        execute(_COMMIT)
        add_pending(segment, all_rows)
        self._pending += len(all_rows)
        self._next = position
        self._last_record = appends[-1].record
        self._size_bytes += size_bytes
        segment.oldest_us = segment.oldest_us or newest_us
        segment.newest_us = newest_us
        segment.last_position = position - 1

    def _rows(
        self,
        connection: apsw.Connection,
        placed: Sequence[Placed],
        position: int,
        time_us: int,
        record: bytes,
    ) -> list[RunRow]:
        lines = memoryview(record)
        rows: list[RunRow] = []
        for each in placed:
            topic = (each.partition_epoch, each.tenant, each.topic)
            topic_id, names = self._topics.get(topic) or self._topic(connection, topic)
            at_bytes, size_bytes = each.at_bytes, each.size_bytes
            row = (
                each.offset,
                each.count,
                position,
                at_bytes,
                size_bytes,
                each.skip,
                each.id_us,
                each.id_step,
            )
            crc = run_crc(names, row, time_us, lines[at_bytes : at_bytes + size_bytes])
            rows.append((topic_id, *row, crc))
        return rows

    def _topic(self, connection: apsw.Connection, topic: tuple[str, str, str]) -> tuple[int, int]:
        row = connection.execute(_FIND_TOPIC, topic).fetchone()
        if row is not None:
            topic_id = row[0]
        else:
            self._last_topic += 1
            topic_id = self._last_topic
            connection.execute(_NEW_TOPIC, (*topic, topic_id))
        if len(self._topics) >= MAX_TOPICS:
            self._topics.clear()
        found = self._topics[topic] = (topic_id, names_crc(*topic))
        return found

    def _index(self) -> bool:
        """Put runs into the table; return whether none is left."""
        segment, connection = self._segment, self._connection
        if segment is None or connection is None:
            return False
        if not self._pending:
            return True
        try:
            connection.execute(_BEGIN)
            index_pending(segment, connection)
            connection.execute(_COMMIT)
        except apsw.Error as error:
            self._after(error)
            # On a full disk it is tried again when as many have come.
            self._index_at = self._pending + PENDING_RUNS
            return False
        segment.pending = {}
        self._pending, self._index_at = 0, PENDING_RUNS
        return True

    def _after(self, error: Exception) -> Exception:
        """Undo a commit that failed, or leave the segment; return what the publishers are told."""
        connection = self._connection
        self._told.error(words_of(error))
        # Topics that were new are no more.
        self._topics.clear()
        if isinstance(error, apsw.Error) and connection is not None and not is_flush(error):
            fault = fault_of(error, connection.system_errno)
            if fault is Fault.FULL and _is_undone(connection):
                return JournalFull(
                    "The journal's disk is full, so the message was not accepted; free some space,"
                    " or let the journal keep less, and send it again."
                )
        if not isinstance(error, apsw.Error) and connection is not None and _is_undone(connection):
            # A record that can't be written at all, such as one with a number of 65 bits.
            return error
        # The records may be in the file all the same. Their positions are used again, in the next
        # segment, and readers look for nothing in this one behind the last record that is known.
        self.renew(words_of(error))
        return JournalUnavailable(
            "The journal could not be written, so the message may be lost; send it again."
        )

    # --- the WAL ---------------------------------------------------------------------------------

    def _copy_wal(self) -> None:
        """Have most of the WAL copied by another thread, while this one goes on committing."""
        if self._segment is not None:
            self._is_copying = True
            self._told.long_wal(self._segment)

    def end_copy(self, segment: Segment, error: apsw.Error | None) -> None:
        """Copy the rest, which is little, so that the next commit begins the WAL anew.

        Args:
            segment: the one whose WAL was copied.
            error: why not, if it was not.
        """
        self._is_copying = False
        connection = self._connection
        if connection is None or segment is not self._segment:
            return
        self._copy_at_pages = self._wal_pages + WAL_PAGES
        try:
            if error is not None:
                raise error
            pages, copied = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:
            return
        except apsw.Error as found:
            self._told.error(words_of(found))
            if is_flush(found) or fault_of(found, connection.system_errno) is not Fault.FULL:
                self.renew(words_of(found))
            return
        if pages == copied:
            self._wal_pages, self._copy_at_pages = 0, WAL_PAGES

    def _write_meta(self, stamp: str, *, is_clean: bool, last_position: int = 0) -> None:
        segments = self._catalog.segments
        newest = segments[-1].number if segments else 0
        durability = self._settings.durability
        self._directory.write_meta(
            Meta(FORMAT, stamp, boot_id(), is_clean, durability, newest, last_position)
        )

    def _close(self) -> None:
        """Close the segment, and note that nothing is missing in it."""
        segment, connection = self._segment, self._connection
        if segment is None or connection is None:
            return
        if not self._index():
            # All records are in the WAL; the next start reads them there.
            log.warning("journal not closed cleanly")
            self._leave()
            return
        self._connection = None
        self.is_down = True
        try:
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            connection.close()
            self._write_meta(self.stamp, is_clean=True, last_position=segment.last_position)
        except (apsw.Error, OSError) as error:
            # All records are in the WAL; the next start reads them there.
            log.warning("journal not closed cleanly reason=%s", words_of(error))


def _is_undone(connection: apsw.Connection) -> bool:
    """Return whether no part of the last transaction is left."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except apsw.Error:
        return False
    return not connection.in_transaction
