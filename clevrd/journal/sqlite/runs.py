"""Runs: messages of one topic as one segment has them, in its table or still waiting for it.

All that is read is compared with its checksum; what does not fit is left out and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import apsw
import msgspec

from clevrd.journal.base import StoredRun
from clevrd.journal.sqlite.segments import Names, RunRow, Segment, names_crc, run_crc
from clevrd.journal.sqlite.spans import Span

LARGEST: Final = 2**63 - 1

# A run whose record is gone has no time and no lines.
_RUN: Final = (
    "SELECT r.first, r.count, r.position, r.at_bytes, r.size_bytes, r.skip, r.id_us, r.id_step,"
    " r.crc, k.time_us, substr(k.record, r.at_bytes + 1, r.size_bytes)"
    " FROM runs r LEFT JOIN records k ON k.position = r.position WHERE r.topic_id = ?1"
    " AND r.position <= ?3"
)
_RUNS_FROM: Final = f"{_RUN} AND r.first >= ?2 ORDER BY r.first"
_RUNS_BACK: Final = f"{_RUN} AND r.first <= ?2 ORDER BY r.first DESC"
_FIRST_AT: Final = (
    "SELECT CAST(first AS INTEGER), CAST(id_us AS INTEGER) FROM runs"
    " WHERE topic_id = ?1 AND first <= ?2 AND position <= ?3 ORDER BY first DESC LIMIT 1"
)
_LINES: Final = "SELECT time_us, substr(record, ?2 + 1, ?3) FROM records WHERE position = ?1"


class Run(msgspec.Struct, frozen=True, gc=False):
    """Messages of one topic with consecutive offsets, read and found to be what was written."""

    first: int
    count: int
    skip: int
    id_us: int
    id_step: int
    time_us: int
    lines: bytes

    @property
    def last(self) -> int:
        """Its newest message's offset."""
        return self.first + self.count - 1

    def behind(self, after: int, most: int) -> StoredRun:
        """Return its messages behind offset ``after``, of which there is one; ``most`` at most."""
        passed = max(0, after + 1 - self.first)
        count, lines = min(self.count - passed, most), self.lines
        if self.skip or lines.count(b"\n") != count:
            begin = self.skip + passed
            end = begin + count
            lines = b"\n".join((*lines.split(b"\n", end)[begin:end], b""))
        id_us = self.id_us + passed * self.id_step
        return StoredRun(self.first + passed, count, id_us, self.id_step, self.time_us, lines)


class SegmentRuns:
    """A topic's runs in one segment, by a connection to it."""

    def __init__(
        self,
        segment: Segment,
        topic_id: int,
        names: Names,
        connection: apsw.Connection,
        report: Callable[[str], None],
    ) -> None:
        """Args: report: told of what is damaged, in a few words."""
        self._segment = segment
        self._topic_id = topic_id
        self._crc = names_crc(*names)
        self._connection = connection
        self._report = report

    def behind(self, after: int) -> Iterator[Run]:
        """Yield the runs that have messages behind offset ``after``.

        The last run of the table may come as well though it has none, while those behind it are
        not in the table yet.
        """
        topic_id, last_position = self._topic_id, self._segment.last_position
        # They are taken first: what moves to the table meanwhile is seen twice, and not missed.
        pending = tuple(self._segment.pending.get(topic_id, ()))
        execute = self._connection.execute
        row = execute(_FIRST_AT, (topic_id, after + 1, last_position)).fetchone()
        begin = 0 if row is None else row[0]
        seen = 0
        for each in execute(_RUNS_FROM, (topic_id, begin, last_position)):
            run = self._checked(each)
            if run is not None:
                seen = run.first
                yield run
        for waiting in pending:
            if waiting[1] > seen and waiting[1] + waiting[2] - 1 > after:
                run = self._checked(self._with_lines(waiting))
                if run is not None:
                    yield run

    def back_from(self, offset: int) -> Iterator[Run]:
        """Yield the runs that begin at ``offset`` or before, newest first."""
        topic_id, last_position = self._topic_id, self._segment.last_position
        for waiting in reversed(tuple(self._segment.pending.get(topic_id, ()))):
            if waiting[1] <= offset:
                offset = waiting[1] - 1
                run = self._checked(self._with_lines(waiting))
                if run is not None:
                    yield run
        for each in self._connection.execute(_RUNS_BACK, (topic_id, offset, last_position)):
            run = self._checked(each)
            if run is not None:
                yield run

    def _with_lines(self, row: RunRow) -> tuple[Any, ...]:
        """Return a run that is not in the table yet as the table would give it."""
        _, first, count, position, at_bytes, size_bytes, skip, id_us, id_step, crc = row
        where = (position, at_bytes, size_bytes)
        found: Any = self._connection.execute(_LINES, where).fetchone()
        time_us, lines = (None, None) if found is None else found
        columns = (first, count, position, at_bytes, size_bytes, skip, id_us, id_step)
        return (*columns, crc, time_us, lines)

    def _checked(self, row: tuple[Any, ...]) -> Run | None:
        """Return a row of runs with its lines as a run; None, and report it, if it is damaged."""
        *columns, crc, time_us, lines = row
        if isinstance(lines, bytes) and run_crc(self._crc, tuple(columns), time_us, lines) == crc:
            first, count, _, _, _, skip, id_us, id_step = columns
            return Run(first, count, skip, id_us, id_step, time_us, lines)
        self._report(f"messages from offset {row[0]!r} on")
        return None


def first_before(span: Span, id_us: int, connection: apsw.Connection) -> int:
    """Return the first offset of the last run in the table that begins below ``id_us``; or 0."""
    low, high, found = span.first, span.last, 0
    while low <= high:
        middle = (low + high) // 2
        row: Any = connection.execute(
            _FIRST_AT, (span.topic_id, middle, span.segment.last_position)
        ).fetchone()
        if row is None:
            low = middle + 1
        elif row[1] < id_us:
            found, low = max(found, row[0]), middle + 1
        else:
            high = row[0] - 1
    return found
