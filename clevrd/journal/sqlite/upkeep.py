"""Upkeep: what is done to the journal's files beside the commits, in the keeper's thread.

Full segments become files that never change again, old ones are removed, a long WAL is copied, and
files that somebody else has removed are noticed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import apsw

from clevrd.journal.sqlite.heads import CheckpointFile
from clevrd.journal.sqlite.library import give_up, open_to_write, words_of
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
from clevrd.journal.sqlite.writing import Writer

log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """How much there is."""

    segments: int
    size_bytes: int
    # The oldest record's time, microseconds since 1970; 0 without a record.
    oldest_us: int
    # Segments that were removed since it was measured last.
    removed: int


class UpkeepTold(NamedTuple):
    """Functions that are called in the keeper's thread."""

    # The files were measured.
    measured: Callable[[Measured], None]
    # Something went wrong, in a few words.
    error: Callable[[str], None]


class Upkeep:
    """The files of one journal, as the keeper's thread takes care of them."""

    def __init__(
        self,
        settings: SqliteSettings,
        catalog: Catalog,
        readers: SegmentReaders,
        writer: Writer,
        checkpoint: CheckpointFile,
        vfs: str | None,
        wall_us: Callable[[], int],
        told: UpkeepTold,
    ) -> None:
        """Do nothing until a method is called."""
        self._settings = settings
        self._catalog = catalog
        self._readers = readers
        self._writer = writer
        self._checkpoint = checkpoint
        self._vfs = vfs
        self._wall_us = wall_us
        self._told = told

    def look_over(self) -> None:
        """Finish segments that are full, remove those that are too old, and measure the rest.

        Begin with what may have been removed by others.
        """
        self._look_for_loss()
        self._forget_gone()
        for segment in self._catalog.segments[:-1]:
            if not segment.is_final:
                self.finish(segment)
        segments = self._catalog.segments
        sizes_bytes = [each.size_bytes() for each in segments]
        going = segments_to_remove(
            self._settings, segments, sizes_bytes, self._wall_us(), self._checkpoint.position
        )
        for segment in going:
            self._remove(segment)
        self.measure(removed=len(going))

    def measure(self, *, removed: int = 0) -> None:
        """Tell how much there is.

        Args:
            removed: segments that were removed since they were measured last.
        """
        left = self._catalog.segments
        size_bytes = sum(each.size_bytes() for each in left)
        oldest_us = next((each.oldest_us for each in left if each.oldest_us), 0)
        self._told.measured(Measured(len(left), size_bytes, oldest_us, removed))

    def finish(self, segment: Segment, connection: apsw.Connection | None = None) -> None:
        """Copy a segment's WAL into its file, so that it is one file that never changes again.

        Args:
            connection: the writer's, which is closed; a new one without it.
        """
        try:
            if connection is None:
                connection = open_to_write(segment.path, self._vfs, is_durable=True)
            if segment.pending:
                with connection:
                    index_pending(segment, connection)
                segment.pending = {}
            self._readers.forget(segment)
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            connection.close()
            segment.is_final = not has_wal(segment.path)
        except apsw.Error as error:
            # Its records are in its WAL, where readers find it.
            self._told.error(words_of(error))
            if connection is not None:
                with suppress(apsw.Error):
                    connection.close(True)

    def copy_wal(self, segment: Segment) -> None:
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

    def _look_for_loss(self) -> None:
        """Have the log begin anew if its newest file is not in the directory any more."""
        newest = self._catalog.segments[-1] if self._catalog.segments else None
        if newest is not None and (path := missing_file(newest)):
            why = f"{path} was removed or replaced while it was open"
            self._writer.do(lambda: self._leave(newest, why))

    def _leave(self, newest: Segment, why: str) -> None:
        """Leave the newest segment, and forget all whose files are gone. Called by the writer."""
        if not self._writer.leave(newest, why):
            return
        for segment in self._catalog.segments:
            if inodes_of(segment.path)[0] != segment.info.inode:
                self._forget(segment)

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
                self._forget(segment)

    def _remove(self, segment: Segment) -> None:
        """Remove a segment's files; its messages are given up."""
        self._forget(segment)
        for end in FILES:
            try:
                os.unlink(segment.path + end)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._told.error(words_of(error))
        log.info(
            "journal segment removed file=%s last_position=%d", segment.path, segment.last_position
        )

    def _forget(self, segment: Segment) -> None:
        self._catalog.remove(segment)
        self._readers.forget(segment)
