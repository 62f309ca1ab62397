"""Writer: the thread that appends records, all that have come while it was committing in one go.

A commit that fails in any way but for want of room ends the segment and the stamp with it: nobody
can say what the disk has of it, so no record is ever acknowledged from that file again. How records
are written to the segment's file is in `open_segment`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Final, NamedTuple

import apsw

from clevrd.errors import JournalFull, JournalUnavailable
from clevrd.journal.base import Fenced
from clevrd.journal.records import digest_of
from clevrd.journal.sqlite.appends import Append, Commit
from clevrd.journal.sqlite.directory import FORMAT, JournalDirectory, Meta, boot_id, new_stamp
from clevrd.journal.sqlite.library import (
    Fault,
    fault_of,
    give_up,
    is_flush,
    open_to_write,
    words_of,
)
from clevrd.journal.sqlite.open_segment import OpenSegment
from clevrd.journal.sqlite.segments import Catalog, Segment, make_segment
from clevrd.journal.sqlite.settings import SqliteSettings

log = logging.getLogger(__name__)

# Bytes of records that one commit has at most, unless one record alone is larger.
COMMIT_BYTES: Final = 8 << 20
# How often an idle writer looks at the clock.
IDLE_S: Final = 10.0


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
        # The segment that takes records; None while there is none.
        self._open: OpenSegment | None = None
        # The position that the next record gets, and the last record's digest; empty without one.
        self._next = 1
        self._last_digest = ""
        # The record that is to be digested for it, when a new segment asks; empty without one.
        self._last_record = b""
        # Whether another thread copies the WAL.
        self._is_copying = False
        # The highest number of a segment so far. A number is not given again, even if its file was
        # removed, since readers remember segments by their numbers.
        self._newest = 0

    # --- from other threads ----------------------------------------------------------------------

    @property
    def is_down(self) -> bool:
        """Whether there is no segment that takes records."""
        return self._open is None

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
        # It stands on the disk before any record is accepted with it, and no record is accepted
        # with the old one any more.
        self._write_meta(stamp, is_clean=False)
        self.stamp = stamp
        segment = self._make(begins_stamp=True)
        self._catalog.add(segment)
        self._use_file(segment)
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
        if self._open is None or segment is not self._open.segment:
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

    def _use_file(self, segment: Segment) -> None:
        self._use(segment, open_to_write(segment.path, self._vfs, is_durable=self._is_durable))

    def _use(self, segment: Segment, connection: apsw.Connection) -> None:
        self._open = OpenSegment(segment, connection)
        self._newest = max(self._newest, segment.number)

    def _leave(self) -> None:
        """Give the segment up: nothing more is written to it, and it keeps its WAL."""
        left, self._open = self._open, None
        if left is not None:
            with suppress(apsw.Error):
                give_up(left.connection)

    def _roll_if_due(self) -> None:
        """Go on in a new segment if this one is full."""
        full = self._open
        if full is None or not full.is_full(self._settings, self._wall_us()) or not self._index():
            return
        try:
            new = self._make(begins_stamp=False)
        except (apsw.Error, OSError) as error:
            # The old one still takes records, so this can wait for the next commit.
            self._told.error(words_of(error))
            return
        self._catalog.add(new)
        try:
            self._use_file(new)
        except apsw.Error as error:
            self.renew(words_of(error))
            return
        full.connection.set_wal_hook(None)
        self._told.full_segment(full.segment, full.connection)
        try:
            self._write_meta(self.stamp, is_clean=False)
        except OSError as error:
            # It names an older segment as the newest one, of which there may be newer ones.
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
        if self._open is not None and self._open.is_index_due(is_idle=self._queue.empty()):
            self._index()
        self._roll_if_due()
        if self._open is not None and self._open.is_wal_long and not self._is_copying:
            # Most of it is copied by another thread, while this one goes on committing.
            self._is_copying = True
            self._told.long_wal(self._open.segment)

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
        if self._open is None:
            self._try_again()
        taken = []
        for append in appends:
            if self._open is None:
                append.error = JournalUnavailable("The journal can't be written to; try again.")
            elif append.stamp != self.stamp:
                append.error = Fenced(append.stamp)
            else:
                taken.append(append)
        if not taken or self._open is None:
            return Commit(appends, 0)
        try:
            self._open.commit(taken, self._next)
        except Exception as error:
            refusal = self._after(error)
            for append in taken:
                append.error = refusal
            return Commit(appends, 0)
        self._next += len(taken)
        self._last_record = taken[-1].record
        return Commit(appends, time.perf_counter_ns() - began_ns)

    def _index(self) -> bool:
        """Put runs into the table; return whether none is left."""
        if self._open is None:
            return False
        try:
            self._open.index()
        except apsw.Error as error:
            self._after(error)
            return False
        return True

    def _after(self, error: Exception) -> Exception:
        """Undo a commit that failed, or leave the segment; return what the publishers are told."""
        self._told.error(words_of(error))
        if isinstance(error, apsw.Error):
            if self._has_no_room(error) and self._is_undone():
                return JournalFull(
                    "The journal's disk is full, so the message was not accepted; free some space,"
                    " or let the journal keep less, and send it again."
                )
        elif self._is_undone():
            # A record that can't be written at all, such as one with a number of 65 bits.
            return error
        # The records may be in the file all the same. Their positions are used again, in the next
        # segment, and readers look for nothing in this one behind the last record that is known.
        self.renew(words_of(error))
        return JournalUnavailable(
            "The journal could not be written, so the message may be lost; send it again."
        )

    def _has_no_room(self, error: apsw.Error) -> bool:
        """Return whether a write failed for want of room alone; a flush that fails never does."""
        if self._open is None or is_flush(error):
            return False
        return fault_of(error, self._open.connection.system_errno) is Fault.FULL

    def _is_undone(self) -> bool:
        return self._open is not None and self._open.is_undone()

    def end_copy(self, segment: Segment, error: apsw.Error | None) -> None:
        """Copy the rest of the WAL, which is little, so that the next commit begins it anew.

        Args:
            segment: the one whose WAL was copied.
            error: why not, if it was not.
        """
        self._is_copying = False
        if self._open is None or segment is not self._open.segment:
            return
        self._open.wait_to_copy()
        try:
            if error is not None:
                raise error
            self._open.copy_rest()
        except apsw.BusyError:
            return
        except apsw.Error as found:
            self._told.error(words_of(found))
            if not self._has_no_room(found):
                self.renew(words_of(found))

    def _write_meta(self, stamp: str, *, is_clean: bool, last_position: int = 0) -> None:
        segments = self._catalog.segments
        newest = segments[-1].number if segments else 0
        durability = self._settings.durability
        self._directory.write_meta(
            Meta(FORMAT, stamp, boot_id(), is_clean, durability, newest, last_position)
        )

    def _close(self) -> None:
        """Close the segment, and note that nothing is missing in it."""
        if self._open is None:
            return
        if not self._index():
            # All records are in the WAL; the next start reads them there.
            log.warning("journal not closed cleanly")
            self._leave()
            return
        closed, self._open = self._open, None
        try:
            closed.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            closed.connection.close()
            last_position = closed.segment.last_position
            self._write_meta(self.stamp, is_clean=True, last_position=last_position)
        except (apsw.Error, OSError) as error:
            # All records are in the WAL; the next start reads them there.
            log.warning("journal not closed cleanly reason=%s", words_of(error))
