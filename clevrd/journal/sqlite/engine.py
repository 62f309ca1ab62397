"""SqliteEngine: the journal of one machine, as the node sees it.

It has one partition, and is the only writer. Appends are committed by the writer's thread
(`writing`), what is read is read in others (`reading`), and a keeper's thread does what may take
long: checkpoints, and segments that are full or too old. The loop never waits for the disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

import apsw

from clevrd.errors import JournalFull, JournalUnavailable
from clevrd.journal.base import Checkpoint, Extent, Fenced, History, Placed, StoredRun
from clevrd.journal.sqlite.directory import JournalDirectory
from clevrd.journal.sqlite.figures import SqliteFigures
from clevrd.journal.sqlite.heads import BadCheckpoint, CheckpointFile
from clevrd.journal.sqlite.library import (
    Fault,
    check_library,
    fault_of,
    give_up,
    open_to_write,
    words_of,
)
from clevrd.journal.sqlite.opening import Opened, open_journal
from clevrd.journal.sqlite.reading import SegmentReaders
from clevrd.journal.sqlite.retention import segments_to_remove
from clevrd.journal.sqlite.segments import (
    FILES,
    Catalog,
    Segment,
    has_wal,
    index_pending,
    inodes_of,
    is_gone,
    missing_file,
)
from clevrd.journal.sqlite.settings import SqliteSettings
from clevrd.journal.sqlite.writing import Append, Commit, Told, Writer
from clevrd.metrics.histograms import times_view
from clevrd.metrics.journal import JournalStorage

log = logging.getLogger(__name__)

T = TypeVar("T")

# Bytes of records that are kept for `read` at most; older ones are read from the file.
TAIL_BYTES: Final = 16 << 20
# How often files are looked for that are too old, or that were removed while they were open.
LOOK_OVER_S: Final = 10.0
# How often it is logged at most that a history can't be read.
_TELL_READ_S: Final = 60.0
# Threads that read: one that waits for the disk must not hold up another.
_READERS: Final = 2


def _wall_us() -> int:
    return time.time_ns() // 1000


class SqliteEngine:
    """Engine and History of `journal/base`, over SQLite files in one directory."""

    name = "sqlite"
    partitions = 1
    keeps_topics = True
    is_shared = False
    answers_when_taken = False

    def __init__(
        self,
        settings: SqliteSettings,
        *,
        wall_us: Callable[[], int] = _wall_us,
        vfs: str | None = None,
    ) -> None:
        """Make an engine; `open` opens it.

        Args:
            wall_us: the wall clock, microseconds since 1970.
            vfs: the name of what SQLite does its input and output by; None for its own.
        """
        self.durability = settings.durability
        self.figures = SqliteFigures()
        self._settings = settings
        self._wall_us = wall_us
        self._vfs = vfs
        self._directory = JournalDirectory(settings.directory)
        self._checkpoint = CheckpointFile(
            self._directory, vfs, is_durable=settings.durability == "fsync"
        )
        self._catalog = Catalog()
        self._segment_readers = SegmentReaders(self._catalog, vfs, self._note_damage)
        self._writer = Writer(
            settings,
            self._directory,
            self._catalog,
            vfs,
            wall_us,
            Told(
                self._tell_committed,
                self._tell_full_segment,
                self._tell_long_wal,
                lambda: self._tell(self._count_stamp),
                self._tell_error,
            ),
        )
        self._readers = ThreadPoolExecutor(_READERS, "clevrd-journal-reader")
        self._keeper = ThreadPoolExecutor(1, "clevrd-journal-keeper")
        # Set by open, which runs in the loop that everything is called from.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        # Records that were committed and not read yet: all behind the position _floor.
        self._tail: deque[tuple[int, bytes]] = deque()
        self._tail_bytes = 0
        self._floor = 0
        # Records up to this position are not read again: they have an older stamp, behind which all
        # is counted from the beginning.
        self._skip_to = 0
        # Calls of `read` that wait for the next record.
        self._waiting: list[asyncio.Future[None]] = []
        # When the log was told last that something can't be read, on the loop's clock.
        self._read_told_s = -_TELL_READ_S

    # --- Engine ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the journal, or make it.

        Raises:
            JournalUnavailable: with a sentence that says what to do.
        """
        check_library()
        self._loop = asyncio.get_running_loop()
        try:
            opened = await self._keep(self._open)
        except BaseException:
            await self.close()
            raise
        self.figures.damaged += opened.set_aside
        await self._keep(self._measure)
        self._floor = self._last_position()
        if self._checkpoint.position == 0:
            self._skip_to = self._begin_of_stamp()
        self._writer.start()
        self._look_over_again()

    @property
    def is_unsure(self) -> bool:
        """Whether there is no segment that takes records, or no commit since the last error."""
        return self._writer.is_down or bool(self.figures.last_error)

    async def stamp(self, partition: int) -> str:
        """Return the stamp; try to begin anew where no segment takes records."""
        self._check_open()
        if self._writer.is_down:
            # An append that can't be taken: the writer tries to begin a segment for it.
            with suppress(Fenced):
                await self._append(Append(b"", "", (), self._future()))
        return self._writer.stamp

    async def append(
        self, partition: int, record: bytes, stamp: str, placed: Sequence[Placed]
    ) -> None:
        """Append ``record`` and its runs; return when they are committed: see `Engine.append`."""
        self._check_open()
        await self._append(Append(record, stamp, placed, self._future()))

    async def read(self, partition: int, after: int) -> list[tuple[int, bytes]]:
        """Return the next committed records behind ``after``; wait for one."""
        while True:
            self._check_open()
            after = max(after, self._skip_to)
            if after < self._floor:
                floor = self._floor
                found, damaged_stamp = await self._read(self._segment_readers.records, after)
                if damaged_stamp == self._writer.stamp:
                    # Without the record nobody can count on: its topics begin a new epoch.
                    self._writer.do(lambda: self._writer.renew("a record can't be read"))
                if found:
                    return found
                after = max(after, floor)
            elif self._tail and self._tail[-1][0] > after:
                return self._from_tail(after)
            else:
                waiter = self._future()
                self._waiting.append(waiter)
                await waiter

    async def first(self, partition: int) -> int:
        """Return the oldest record's position; one more than the last one's if there is none."""
        self._check_open()
        segments = self._catalog.segments
        return segments[0].info.after_position + 1 if segments else 1

    async def is_short(self, partition: int) -> bool:
        """Return False: messages are read from the history when somebody wants them."""
        return False

    async def digest(self, partition: int, position: int) -> str | None:
        """Return the CRC-32 of the record at ``position``; None if it is gone."""
        return await self._read(self._segment_readers.digest, position)

    async def load_checkpoints(self, partition: int) -> list[Checkpoint]:
        """Return the checkpoint, if there is one."""
        self._check_open()
        try:
            checkpoint = await self._keep(self._checkpoint.load)
        except BadCheckpoint as error:
            log.error("journal's checkpoint lost reason=%r; the log begins anew", str(error))
            await self._keep(self._checkpoint.make)
            self._writer.do(lambda: self._writer.renew("its checkpoint is damaged"))
            return []
        return [] if checkpoint is None else [checkpoint]

    async def save_checkpoint(self, partition: int, checkpoint: Checkpoint) -> None:
        """Keep ``checkpoint`` in the place of the one before it.

        Raises:
            JournalFull: there is no room; the one before it stands.
            JournalUnavailable: it was not saved for another reason.
        """
        self._check_open()
        await self._keep(self._checkpoint.save, checkpoint)
        self.figures.checkpoints += 1
        self._look_over_soon()

    def history(self) -> History:
        """Return itself."""
        return self

    def storage(self) -> JournalStorage:
        """Return the figures of its files."""
        counted = self.figures
        return JournalStorage(
            files=counted.segments,
            size_bytes=counted.size_bytes,
            oldest_at_s=counted.oldest_us / 1e6,
            commits=counted.commits,
            commit_s=times_view(counted.times, counted.commit_ns),
            damaged=counted.damaged,
            new_stamps=counted.new_stamps,
            last_error=counted.last_error or counted.read_error,
        )

    async def close(self) -> None:
        """Finish what was begun, and close; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(_closed())
        self._waiting.clear()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._close)

    # --- History ---------------------------------------------------------------------------------

    async def extent(self, partition_epoch: str, tenant: str, topic: str) -> Extent | None:
        """Return what is kept of the topic in this epoch; None if nothing ever was."""
        return await self._read(self._extent, (partition_epoch, tenant, topic))

    async def page(
        self,
        partition_epoch: str,
        tenant: str,
        topic: str,
        after: int,
        max_messages: int,
        max_bytes: int,
    ) -> list[StoredRun]:
        """Return messages behind offset ``after``, in order: see `History.page`."""
        names = (partition_epoch, tenant, topic)
        return await self._read(self._page, names, after, max_messages, max_bytes)

    async def last_before(self, partition_epoch: str, tenant: str, topic: str, id_us: int) -> int:
        """Return the offset of the newest message kept whose id is below ``id_us``; 0 without."""
        return await self._read(self._last_before, (partition_epoch, tenant, topic), id_us)

    # --- in readers' threads ---------------------------------------------------------------------

    def _extent(self, names: tuple[str, str, str]) -> Extent | None:
        found = self._segment_readers.extent(names)
        if found is None:
            head = self._checkpoint.head(*names)
            return Extent(head + 1, head) if head else None
        reach = self._settings.retention_messages
        if reach:
            return Extent(max(found.first, found.head - reach + 1), found.head)
        return found

    def _page(
        self, names: tuple[str, str, str], after: int, max_messages: int, max_bytes: int
    ) -> list[StoredRun]:
        if self._settings.retention_messages:
            extent = self._extent(names)
            if extent is not None:
                after = max(after, extent.first - 1)
        return self._segment_readers.page(names, after, max_messages, max_bytes)

    def _last_before(self, names: tuple[str, str, str], id_us: int) -> int:
        found = self._segment_readers.last_before(names, id_us)
        if found and self._settings.retention_messages:
            extent = self._extent(names)
            if extent is None or found < extent.first:
                return 0
        return found

    # --- in the keeper's thread ------------------------------------------------------------------

    def _open(self) -> Opened:
        self._directory.open()
        opened = open_journal(self._settings, self._directory, self._checkpoint, self._vfs)
        for segment in opened.segments:
            self._catalog.add(segment)
        if opened.connection is not None:
            self._writer.adopt(
                opened.segments[-1], opened.connection, opened.stamp, opened.last_digest
            )
            return opened
        if opened.trouble:
            log.error("journal begins anew reason=%r; readers are told of a gap", opened.trouble)
        try:
            self._writer.begin_stamp(opened.last_position, opened.last_digest)
        except OSError as error:
            raise self._directory.refusal(error) from error
        except apsw.Error as error:
            raise JournalUnavailable(
                f"Can't make a file in the journal {self._directory.path}: {words_of(error)}; see"
                " to its disk, or name another directory (--journal)."
            ) from error
        return opened

    def _look_over(self) -> None:
        """Finish segments that are full, remove those that are too old, and measure the rest.

        Begin with what may have been removed by others.
        """
        self._look_for_loss()
        self._forget_gone()
        for segment in self._catalog.segments[:-1]:
            if not segment.is_final:
                self._finish(segment)
        segments = self._catalog.segments
        sizes_bytes = [each.size_bytes() for each in segments]
        going = segments_to_remove(
            self._settings, segments, sizes_bytes, self._wall_us(), self._checkpoint.position
        )
        for segment in going:
            self._remove(segment)
        self._measure(removed=len(going))

    def _measure(self, *, removed: int = 0) -> None:
        """Note how much there is.

        Args:
            removed: segments that were removed since they were measured last.
        """
        left = self._catalog.segments
        total_bytes = sum(each.size_bytes() for each in left)
        oldest_us = next((each.oldest_us for each in left if each.oldest_us), 0)
        self._tell(self._note_files, len(left), total_bytes, oldest_us, removed)

    def _look_for_loss(self) -> None:
        """Have the log begin anew if its newest file is not in the directory any more."""
        newest = self._catalog.segments[-1] if self._catalog.segments else None
        if newest is not None and (path := missing_file(newest)):
            why = f"{path} was removed or replaced while it was open"
            self._writer.do(lambda: self._leave(newest, why))

    def _forget_gone(self) -> None:
        """Forget old segments whose files somebody has removed: their messages are a gap then.

        Not while the newest one is missing too: the whole directory may come back.
        """
        segments = self._catalog.segments
        if not segments or missing_file(segments[-1]):
            return
        for segment in segments[:-1]:
            if is_gone(segment.path):
                log.error("journal file is gone file=%s; its messages are a gap", segment.path)
                self._catalog.remove(segment)
                self._segment_readers.forget(segment)

    def _leave(self, newest: Segment, why: str) -> None:
        """Leave the newest segment, and forget all whose files are gone. Called by the writer."""
        if not self._writer.leave(newest, why):
            return
        for segment in self._catalog.segments:
            if inodes_of(segment.path)[0] != segment.info.inode:
                self._catalog.remove(segment)
                self._segment_readers.forget(segment)

    def _copy_wal(self, segment: Segment) -> None:
        """Copy what the WAL has now into the segment's file, while records are appended."""
        failed = None
        try:
            connection = open_to_write(segment.path, self._vfs, is_durable=True)
            try:
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            finally:
                give_up(connection)
        except apsw.BusyError:
            log.debug("journal's WAL in use file=%s", segment.path)
        except apsw.Error as error:
            failed = error
        self._writer.do(lambda: self._writer.end_copy(segment, failed))

    def _finish(self, segment: Segment, connection: apsw.Connection | None = None) -> None:
        """Copy a segment's WAL into its file, so that it is one file that never changes again."""
        try:
            if connection is None:
                connection = open_to_write(segment.path, self._vfs, is_durable=True)
            if segment.pending:
                with connection:
                    index_pending(segment, connection)
                segment.pending = {}
            self._segment_readers.forget(segment)
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            connection.close()
            segment.is_final = not has_wal(segment.path)
        except apsw.Error as error:
            # The segment's records are in its WAL, where readers find them.
            self._tell_error(words_of(error))
            if connection is not None:
                with suppress(apsw.Error):
                    connection.close(True)

    def _remove(self, segment: Segment) -> None:
        self._catalog.remove(segment)
        self._segment_readers.forget(segment)
        for end in FILES:
            try:
                os.unlink(segment.path + end)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._tell_error(words_of(error))
        log.info(
            "journal segment removed file=%s last_position=%d", segment.path, segment.last_position
        )

    def _close(self) -> None:
        """Close everything, in any thread: readers first, and the lock last.

        So the writer is the last one to close its file, and SQLite removes the WAL.
        """
        self._readers.shutdown()
        self._segment_readers.close()
        # An opening that nobody waits for any more ends first.
        self._keeper.submit(lambda: None).result()
        self._writer.stop()
        self._keeper.shutdown()
        self._checkpoint.close()
        self._directory.close()

    # --- told by other threads -------------------------------------------------------------------

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        """Have the loop call ``what``; nothing if it is closed."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(what, *arguments)

    def _tell_committed(self, commit: Commit) -> None:
        self._tell(self._note_commit, commit)

    def _tell_full_segment(self, segment: Segment, connection: apsw.Connection) -> None:
        try:
            self._keeper.submit(self._finish, segment, connection)
            self._keeper.submit(self._look_over)
        except RuntimeError:
            # The keeper has ended; the next start finishes the segment.
            connection.close(True)

    def _tell_long_wal(self, segment: Segment) -> None:
        # If the keeper has ended, the end of the journal copies the WAL.
        with suppress(RuntimeError):
            self._keeper.submit(self._copy_wal, segment)

    def _tell_error(self, words: str) -> None:
        self._tell(self._note_error, words)

    def _note_damage(self) -> None:
        self._tell(self._count_damage)

    # --- on the loop -----------------------------------------------------------------------------

    def _note_commit(self, commit: Commit) -> None:
        figures = self.figures
        # Readers are woken first: a node that has read its record need not wait for it any more.
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
        taken = 0
        for append in commit.appends:
            if append.error is None:
                self._tail.append((append.position, append.record))
                self._tail_bytes += len(append.record)
                taken += 1
            elif isinstance(append.error, JournalFull):
                figures.full += 1
                figures.is_full = True
            waiter = append.waiter
            if not waiter.done():
                if append.error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(append.error)
        if not taken:
            return
        figures.note_commit(taken, commit.took_ns)
        figures.is_full = False
        figures.last_error = ""
        while self._tail_bytes > TAIL_BYTES and len(self._tail) > 1:
            self._drop_oldest()

    def _note_files(self, segments: int, size_bytes: int, oldest_us: int, removed: int) -> None:
        figures = self.figures
        figures.segments, figures.size_bytes, figures.oldest_us = segments, size_bytes, oldest_us
        figures.removed_segments += removed

    def _note_error(self, words: str) -> None:
        self.figures.last_error = words

    def _count_stamp(self) -> None:
        self.figures.new_stamps += 1

    def _count_damage(self) -> None:
        self.figures.damaged += 1

    def _from_tail(self, after: int) -> list[tuple[int, bytes]]:
        tail = self._tail
        while tail[0][0] <= after:
            self._drop_oldest()
        return list(tail)

    def _drop_oldest(self) -> None:
        position, record = self._tail.popleft()
        self._tail_bytes -= len(record)
        self._floor = position

    def _last_position(self) -> int:
        segments = self._catalog.segments
        return segments[-1].last_position if segments else 0

    def _begin_of_stamp(self) -> int:
        """Return the last position before the first record with the log's stamp."""
        of_stamp = [
            each for each in self._catalog.segments if each.info.stamp == self._writer.stamp
        ]
        return of_stamp[0].info.after_position if of_stamp else 0

    def _future(self) -> asyncio.Future[None]:
        assert self._loop is not None  # noqa: S101  # the caller has asked _check_open
        return self._loop.create_future()

    def _check_open(self) -> None:
        if self._is_closed or self._loop is None:
            raise _closed()

    async def _append(self, append: Append) -> None:
        self._writer.put(append)
        await append.waiter

    def _look_over_again(self) -> None:
        """Look over the files now and every LOOK_OVER_S, whether records are appended or not."""
        assert self._loop is not None  # noqa: S101  # it was set before the first call
        self._look_over_soon()
        self._timer = self._loop.call_later(LOOK_OVER_S, self._look_over_again)

    def _look_over_soon(self) -> None:
        with suppress(RuntimeError):
            self._keeper.submit(self._look_over)

    async def _read(self, read: Callable[..., T], *arguments: object) -> T:
        """Have ``read`` done in a reader's thread; log failures, once in _TELL_READ_S at most."""
        try:
            found = await self._in(self._readers, read, *arguments)
        except (JournalFull, JournalUnavailable) as error:
            if not self._is_closed:
                self._note_failed_read(str(error))
            raise
        self.figures.read_error = ""
        return found

    def _note_failed_read(self, words: str) -> None:
        self.figures.read_error = words
        now_s = asyncio.get_running_loop().time()
        if now_s - self._read_told_s >= _TELL_READ_S:
            self._read_told_s = now_s
            log.error("journal can't be read reason=%r", words)

    async def _keep(self, work: Callable[..., T], *arguments: object) -> T:
        """Have ``work`` done in the keeper's thread."""
        return await self._in(self._keeper, work, *arguments)

    async def _in(
        self, threads: ThreadPoolExecutor, work: Callable[..., T], *arguments: object
    ) -> T:
        self._check_open()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(threads, work, *arguments)
        except apsw.Error as error:
            if fault_of(error) is Fault.FULL:
                raise JournalFull("The journal's disk is full; free some space.") from error
            raise JournalUnavailable(
                f"The journal {self._directory.path} can't be read or written: {words_of(error)};"
                " see to its disk."
            ) from error
        except RuntimeError as error:
            if self._is_closed:
                raise _closed() from error
            raise


def _closed() -> JournalUnavailable:
    return JournalUnavailable("The journal is closed.")
