"""SqliteEngine: the journal of one machine, as the node sees it.

It has one partition, and is the only writer. Appends are committed by the writer's thread
(`writing`), what is read is read in others (`log_reading` and `reading`), and a keeper's thread
does what may take long: checkpoints, and segments that are full or too old (`upkeep`). The loop
never waits for the disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

import apsw

from clevrd.errors import JournalFull, JournalUnavailable
from clevrd.journal.base import Checkpoint, Extent, Fenced, History, Placed, StoredRun
from clevrd.journal.pace import APART_S
from clevrd.journal.sqlite.appends import Append, Commit
from clevrd.journal.sqlite.connections import SegmentConnections
from clevrd.journal.sqlite.directory import JournalDirectory
from clevrd.journal.sqlite.figures import SqliteFigures
from clevrd.journal.sqlite.heads import BadCheckpoint, CheckpointFile
from clevrd.journal.sqlite.kept_messages import KeptMessages
from clevrd.journal.sqlite.library import Fault, check_library, fault_of, words_of
from clevrd.journal.sqlite.log_reading import LogReader
from clevrd.journal.sqlite.opening import Opened, open_journal
from clevrd.journal.sqlite.reading import HistoryReader
from clevrd.journal.sqlite.segments import Catalog, Segment
from clevrd.journal.sqlite.settings import SqliteSettings
from clevrd.journal.sqlite.tail import Tail
from clevrd.journal.sqlite.upkeep import Measured, Upkeep, UpkeepTold
from clevrd.journal.sqlite.writing import Told, Writer
from clevrd.metrics.journal import JournalStorage

log = logging.getLogger(__name__)

T = TypeVar("T")

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
    # Its one partition has every message.
    max_apart_s = APART_S

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
        self._vfs = vfs
        self._directory = JournalDirectory(settings.directory)
        self._checkpoint = CheckpointFile(
            self._directory, vfs, is_durable=settings.durability == "fsync"
        )
        self._catalog = Catalog()
        self._connections = SegmentConnections(self._catalog, vfs, self._note_damage)
        self._log = LogReader(self._catalog, self._connections)
        self._kept = KeptMessages(
            HistoryReader(self._catalog, self._connections),
            self._checkpoint,
            settings.retention_messages,
        )
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
        self._upkeep = Upkeep(
            settings,
            self._catalog,
            self._connections,
            self._writer,
            self._checkpoint,
            vfs,
            wall_us,
            UpkeepTold(self._tell_measured, self._tell_error),
        )
        self._readers = ThreadPoolExecutor(_READERS, "clevrd-journal-reader")
        self._keeper = ThreadPoolExecutor(1, "clevrd-journal-keeper")
        # Set by open, which runs in the loop that everything is called from.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        # Records that were committed and not read yet.
        self._tail = Tail()
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
        await self._keep(self._upkeep.measure)
        self._tail.floor = self._last_position()
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
            if after < self._tail.floor:
                floor = self._tail.floor
                found, damaged_stamp = await self._read(self._log.records, after)
                if damaged_stamp == self._writer.stamp:
                    # Without the record nobody can count on: its topics begin a new epoch.
                    self._writer.do(lambda: self._writer.renew("a record can't be read"))
                if found:
                    return found
                after = max(after, floor)
            elif self._tail.has_any(after):
                return self._tail.take(after)
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
        return await self._read(self._log.digest, position)

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
        return self.figures.storage()

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
        return await self._read(self._kept.extent, (partition_epoch, tenant, topic))

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
        return await self._read(self._kept.page, names, after, max_messages, max_bytes)

    async def last_before(self, partition_epoch: str, tenant: str, topic: str, id_us: int) -> int:
        """Return the offset of the newest message kept whose id is below ``id_us``; 0 without."""
        return await self._read(self._kept.last_before, (partition_epoch, tenant, topic), id_us)

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

    def _close(self) -> None:
        """Close everything, in any thread: readers first, and the lock last.

        So the writer is the last one to close its file, and SQLite removes the WAL.
        """
        self._readers.shutdown()
        self._connections.close()
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
            self._keeper.submit(self._upkeep.finish, segment, connection)
            self._keeper.submit(self._upkeep.look_over)
        except RuntimeError:
            # The keeper has ended; the next start finishes the segment.
            connection.close(True)

    def _tell_long_wal(self, segment: Segment) -> None:
        # If the keeper has ended, the end of the journal copies the WAL.
        with suppress(RuntimeError):
            self._keeper.submit(self._upkeep.copy_wal, segment)

    def _tell_measured(self, measured: Measured) -> None:
        self._tell(self._note_files, measured)

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
                self._tail.add(append.position, append.record)
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

    def _note_files(self, measured: Measured) -> None:
        figures = self.figures
        figures.segments = measured.segments
        figures.size_bytes = measured.size_bytes
        figures.oldest_us = measured.oldest_us
        figures.removed_segments += measured.removed

    def _note_error(self, words: str) -> None:
        self.figures.last_error = words

    def _count_stamp(self) -> None:
        self.figures.new_stamps += 1

    def _count_damage(self) -> None:
        self.figures.damaged += 1

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
            self._keeper.submit(self._upkeep.look_over)

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
