"""OpenSegment: the segment that records are appended to, and its transactions.

Everything here is called in the writer's thread. Errors of SQLite are the writer's to judge
(`writing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import apsw

from clevrd.journal.base import Placed
from clevrd.journal.sqlite.appends import Append
from clevrd.journal.sqlite.segments import (
    RunRow,
    Segment,
    add_pending,
    index_pending,
    inodes_of,
    record_crc,
    run_crc,
    spell_runs,
)
from clevrd.journal.sqlite.settings import SqliteSettings
from clevrd.journal.sqlite.topic_ids import TopicIds

# Pages in the WAL, 4 KiB each, after which it is copied into the file.
WAL_PAGES: Final = 1_000
# Runs that move to the table at once, in a commit of some milliseconds: when nothing else is to be
# done, and at the latest. With 1,000 the 99th percentile of appends was 5.1 ms at 20,000 messages/s
# in 10 topics, with 300 it was 3.6.
PENDING_RUNS: Final = 300
MAX_PENDING_RUNS: Final = 1_200

_BEGIN: Final = "BEGIN IMMEDIATE"
_COMMIT: Final = "COMMIT"
_RECORD: Final = "INSERT INTO records VALUES (?, ?, ?, ?, ?)"


class OpenSegment:
    """A segment with the connection that alone writes to it."""

    __slots__ = (
        "_copy_at_pages",
        "_index_at",
        "_pending",
        "_size_bytes",
        "_topics",
        "_wal_pages",
        "connection",
        "segment",
    )

    def __init__(self, segment: Segment, connection: apsw.Connection) -> None:
        """Go on in ``segment``.

        Raises:
            apsw.Error: it can't be read.
        """
        self.segment = segment
        self.connection = connection
        # Pages in the WAL, as the last commit said, and how many there may be before it is copied.
        self._wal_pages = 0
        self._copy_at_pages = WAL_PAGES
        segment.is_final = False
        connection.set_wal_hook(self._note_wal)
        self._topics = TopicIds(connection)
        # The WAL is there from the first look into the file on.
        segment.inodes = inodes_of(segment.path)
        # Bytes of its file when it was opened, and of what was appended since.
        self._size_bytes = segment.size_bytes()
        # Runs that are not in the table yet, and how many there may be.
        self._pending = sum(map(len, segment.pending.values()))
        self._index_at = PENDING_RUNS

    def commit(self, appends: Sequence[Append], first: int) -> None:
        """Write records in one transaction, and give them positions from ``first`` on."""
        segment = self.segment
        execute = self.connection.execute
        all_rows: list[RunRow] = []
        execute(_BEGIN)
        position, newest_us, size_bytes = first, segment.newest_us, 0
        for append in appends:
            record, placed = append.record, append.placed
            time_us = placed[0].time_us if placed else newest_us
            rows = self._rows(placed, position, time_us, record)
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
        self._size_bytes += size_bytes
        segment.oldest_us = segment.oldest_us or newest_us
        segment.newest_us = newest_us
        segment.last_position = position - 1

    def is_undone(self) -> bool:
        """Undo a transaction that failed; return whether no part of it is left."""
        # Topics that were new are no more.
        self._topics.forget()
        try:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
        except apsw.Error:
            return False
        return not self.connection.in_transaction

    def is_full(self, settings: SqliteSettings, now_us: int) -> bool:
        """Return whether another segment is due; not while this one has no record."""
        segment = self.segment
        if segment.last_position == segment.info.after_position:
            return False
        age_us = now_us - segment.info.made_us
        return self._size_bytes >= settings.segment_bytes or age_us >= settings.segment_s * 1e6

    # --- runs ------------------------------------------------------------------------------------

    def is_index_due(self, *, is_idle: bool) -> bool:
        """Return whether runs are to be put into their table.

        Args:
            is_idle: nothing else is to be done.
        """
        return self._pending >= self._index_at and (is_idle or self._pending >= MAX_PENDING_RUNS)

    def index(self) -> None:
        """Put all runs that wait into their table."""
        if not self._pending:
            return
        connection, segment = self.connection, self.segment
        try:
            connection.execute(_BEGIN)
            index_pending(segment, connection)
            connection.execute(_COMMIT)
        except apsw.Error:
            # On a full disk it is tried again when as many have come.
            self._index_at = self._pending + PENDING_RUNS
            raise
        segment.pending = {}
        self._pending, self._index_at = 0, PENDING_RUNS

    def _rows(
        self, placed: Sequence[Placed], position: int, time_us: int, record: bytes
    ) -> list[RunRow]:
        """Return the rows of a record's runs."""
        known = self._topics.known
        lines = memoryview(record)
        rows: list[RunRow] = []
        for each in placed:
            names = (each.partition_epoch, each.tenant, each.topic)
            topic_id, names_crc = known.get(names) or self._topics.look_up(names)
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
            crc = run_crc(names_crc, row, time_us, lines[at_bytes : at_bytes + size_bytes])
            rows.append((topic_id, *row, crc))
        return rows

    # --- the WAL ---------------------------------------------------------------------------------

    @property
    def is_wal_long(self) -> bool:
        """Whether the WAL is to be copied into the file."""
        return self._wal_pages >= self._copy_at_pages

    def wait_to_copy(self) -> None:
        """Copy the WAL again when it has grown as much as it may."""
        self._copy_at_pages = self._wal_pages + WAL_PAGES

    def copy_rest(self) -> None:
        """Copy what the WAL still has; the next commit begins it anew if that is all."""
        pages, copied = self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        if pages == copied:
            self._wal_pages, self._copy_at_pages = 0, WAL_PAGES

    def _note_wal(self, connection: apsw.Connection, name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK
