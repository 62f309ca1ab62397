"""How a journal is opened: what is there, whether it is whole, and whether the log can go on.

The log goes on with its stamp only if nothing that was acknowledged is missing. Where that can't be
known it begins anew, so that no offset stands for two messages.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import apsw
import msgspec

from clevrd.errors import JournalUnavailable
from clevrd.journal.records import digest_of
from clevrd.journal.sqlite.directory import FORMAT, JournalDirectory, Meta, boot_id
from clevrd.journal.sqlite.finding import BadFile, find_segments
from clevrd.journal.sqlite.heads import BadCheckpoint, CheckpointFile
from clevrd.journal.sqlite.library import (
    Fault,
    fault_of,
    give_up,
    open_to_write,
    words_of,
)
from clevrd.journal.sqlite.segments import (
    Segment,
    is_sound_record,
    note_bounds,
)
from clevrd.journal.sqlite.settings import SqliteSettings
from clevrd.journal.sqlite.wal_tail import has_lost_commits

log = logging.getLogger(__name__)

# Records at the end of the log that are looked at before the log goes on.
_LOOKED_AT: Final = 256
_LAST_RECORDS: Final = (
    "SELECT position, time_us, crc, runs, record FROM records ORDER BY position DESC LIMIT ?"
)


class Opened(msgspec.Struct):
    """The journal as it was found."""

    segments: list[Segment]
    # Why the log can't go on with its stamp; empty if it can, and for a new journal.
    trouble: str
    # The segment that takes records, open; None if the log begins anew, or begins.
    connection: apsw.Connection | None
    # The log's stamp; empty without one.
    stamp: str
    # The last record, and its digest; empty where it is not known.
    last_position: int
    last_digest: str
    # Files that were set aside, since they can't be read at all.
    set_aside: int


def open_journal(
    settings: SqliteSettings,
    directory: JournalDirectory,
    checkpoint: CheckpointFile,
    vfs: str | None,
) -> Opened:
    """Look through a directory that is locked, and open what it has.

    Raises:
        JournalUnavailable: one line that says why not, and what to do.
    """
    try:
        return _Opening(settings, directory, checkpoint, vfs).run()
    except apsw.Error as error:
        raise JournalUnavailable(
            f"Can't open the journal {settings.directory}: {words_of(error)}; see to its disk, or"
            " name another directory (--journal)."
        ) from error
    except OSError as error:
        raise directory.refusal(error) from error


class _Opening:
    def __init__(
        self,
        settings: SqliteSettings,
        directory: JournalDirectory,
        checkpoint: CheckpointFile,
        vfs: str | None,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._checkpoint = checkpoint
        self._vfs = vfs
        # Numbers of files that could not be read.
        self._set_aside: list[int] = []

    def run(self) -> Opened:
        meta = self._directory.read_meta()
        segments = self._segments()
        trouble = self._trouble_of(meta, segments)
        newest = segments[-1] if segments else None
        connection, digest = None, ""
        if newest is not None and meta is not None and not trouble:
            connection = self._open(newest)
            if connection is None:
                trouble = f"{newest.path} is damaged"
            else:
                trouble, digest = self._trouble_in(newest, connection, meta)
        trouble = self._trouble_of_checkpoint(segments, trouble)
        if trouble and connection is not None:
            give_up(connection)
            connection = None
        last_position = max(
            self._checkpoint.position,
            newest.last_position if newest is not None else 0,
            meta.last_position if meta is not None else 0,
        )
        stamp = "" if meta is None or connection is None else meta.stamp
        if stamp and newest is not None:
            self._mark_open(meta, stamp, newest.number)
        return Opened(
            segments, trouble, connection, stamp, last_position, digest, len(self._set_aside)
        )

    def _mark_open(self, meta: Meta | None, stamp: str, newest: int) -> None:
        """Note that the journal is open, before anything is written to it."""
        marked = Meta(FORMAT, stamp, boot_id(), False, self._settings.durability, newest)
        if meta != marked:
            self._directory.write_meta(marked)

    # --- segments --------------------------------------------------------------------------------

    def _segments(self) -> list[Segment]:
        """Return the segments that can be read; set the others aside."""
        found = find_segments(self._directory, self._vfs)
        for bad in found.bad:
            if bad.is_later_format:
                raise JournalUnavailable(
                    f"{bad.path} can't be read: {bad.why}; run a later clevrd, or name another"
                    " directory (--journal)."
                )
        for bad in found.bad:
            self._put_aside(bad)
        return found.segments

    def _put_aside(self, bad: BadFile) -> None:
        self._set_aside.append(bad.number)
        for end in ("", "-wal", "-shm"):
            if os.path.exists(bad.path + end):
                os.replace(bad.path + end, f"{bad.path}.damaged{end}")
        kept_as = f"{bad.path}.damaged"
        log.error("journal file set aside reason=%r kept_as=%s", bad.why, kept_as)

    def _open(self, segment: Segment) -> apsw.Connection | None:
        try:
            return open_to_write(
                segment.path, self._vfs, is_durable=self._settings.durability == "fsync"
            )
        except apsw.Error as error:
            if fault_of(error) is not Fault.DAMAGED:
                raise
            return None

    # --- whether the log can go on ---------------------------------------------------------------

    def _trouble_of(self, meta: Meta | None, segments: list[Segment]) -> str:
        """Return why the log can't go on, as far as the files' outside tells; empty if it can."""
        if not segments and meta is None and not self._set_aside:
            return ""
        if meta is None:
            return "the file that says what it is is missing or damaged"
        if not segments or (self._set_aside and self._set_aside[-1] > segments[-1].number):
            return "its newest file can't be read"
        newest = segments[-1].info
        if newest.stamp != meta.stamp or newest.number < meta.newest:
            return "its newest file is missing, or it was restored from a backup"
        if os.stat(segments[-1].path).st_ino != newest.inode:
            return "it is a copy, or was restored from a backup"
        if meta.durability == "os" and not meta.is_clean:
            here = boot_id()
            if not here or here != meta.boot_id:
                return "the machine was started again, and not all may be on the disk"
        return ""

    def _trouble_in(
        self, newest: Segment, connection: apsw.Connection, meta: Meta
    ) -> tuple[str, str]:
        """Return why the log can't go on, as far as its end tells, and the last record's digest."""
        try:
            frames, _ = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            if has_lost_commits(newest.path + "-wal", max(frames, 0)):
                return "the end of its newest file is damaged", ""
            note_bounds(newest, connection)
            if newest.last_position < meta.last_position:
                return "its last records are missing", ""
            digest = newest.info.after_digest
            rows = connection.execute(_LAST_RECORDS, (_LOOKED_AT,)).fetchall()
            for position, time_us, crc, runs, record in reversed(rows):
                if not is_sound_record(position, time_us, crc, runs, record):
                    return "its last records are damaged", ""
                digest = digest_of(record)
        except apsw.Error as error:
            if fault_of(error) is not Fault.DAMAGED:
                raise
            return words_of(error), ""
        return "", digest

    def _trouble_of_checkpoint(self, segments: list[Segment], trouble: str) -> str:
        """Open the checkpoint's file; return why the log can't go on from it, if it can't."""
        try:
            self._checkpoint.open()
        except BadCheckpoint as error:
            self._checkpoint.make()
            if segments:
                log.error(
                    "journal's checkpoint lost reason=%r; the log is read from its beginning, which"
                    " takes long",
                    str(error),
                )
        return trouble or missing_behind(segments, self._checkpoint.position)


def missing_behind(segments: list[Segment], position: int) -> str:
    """Return which records behind a checkpoint are missing; empty if all are there.

    Args:
        position: the checkpoint's; 0 without one, when all records with the log's stamp count.
    """
    last_position = segments[-1].last_position if segments else 0
    if last_position < position:
        return "its last records are missing"
    of_stamp = [each for each in segments if each.info.stamp == segments[-1].info.stamp]
    reached = position
    for segment in of_stamp:
        # Records with an older stamp don't count any more.
        if segment.info.after_position > reached and not segment.info.begins_stamp:
            return "records behind its checkpoint are missing"
        reached = max(reached, segment.last_position)
    return ""
