"""Readers of segments: records in the order of the log, and a topic's messages by offset.

All that is read is compared with its checksum; what does not fit is left out and reported.
Everything here is called in threads that may wait for the disk.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, Final, TypeVar

import apsw
import msgspec

from clevrd.journal.base import Extent, StoredRun
from clevrd.journal.records import digest_of
from clevrd.journal.sqlite.library import Fault, fault_of, open_to_read, words_of
from clevrd.journal.sqlite.segments import (
    Catalog,
    RunRow,
    Segment,
    is_sound_record,
    names_crc,
    run_crc,
)

log = logging.getLogger(__name__)

# Open connections that are kept, each with a descriptor or three and up to 256 KiB of pages.
MAX_CONNECTIONS: Final = 32
# Segments and topics for which it is remembered what the one has of the other; 150 bytes each. A
# segment that has to be opened for it costs 0.3 ms.
MAX_SPANS: Final = 100_000
# A slice of the log: so many records, or so many bytes.
SLICE_RECORDS: Final = 4_096
SLICE_BYTES: Final = 4 << 20

_RECORDS: Final = (
    "SELECT position, time_us, crc, runs, record FROM records"
    " WHERE position > ? AND position <= ? ORDER BY position"
)
_RECORD: Final = "SELECT time_us, crc, runs, record FROM records WHERE position = ?"
_TOPIC: Final = "SELECT id FROM topics WHERE partition_epoch = ? AND tenant = ? AND topic = ?"
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
_LARGEST: Final = 2**63 - 1

Names = tuple[str, str, str]
T = TypeVar("T")


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


class Span(msgspec.Struct, frozen=True, gc=False):
    """The part of a topic's history that one segment has."""

    segment: Segment
    topic_id: int
    # Offsets of its oldest message and of its newest one, and the oldest one's id.
    first: int
    last: int
    first_id_us: int
    # The segment was not written to any more: there is no newer one behind ``last``.
    is_final: bool


class SegmentReaders:
    """Connections to segments, and what is read by them."""

    def __init__(self, catalog: Catalog, vfs: str | None, damaged: Callable[[], None]) -> None:
        """Args: damaged: told of each thing that is not what was written, in any thread."""
        self._catalog = catalog
        self._vfs = vfs
        self._damaged = damaged
        self._lock = threading.Lock()
        # Connections that no thread uses, the one used last at the end.
        self._idle: OrderedDict[Segment, list[apsw.Connection]] = OrderedDict()
        self._idle_count = 0
        self._is_closed = False
        # Topic -> number of a segment -> what it has of the topic, or had while it was written to.
        self._spans: OrderedDict[Names, dict[int, Span | None]] = OrderedDict()
        # All that are in it.
        self._spans_count = 0

    def close(self) -> None:
        """Close all connections, and keep none from here on."""
        with self._lock:
            self._is_closed = True
            idle = [each for several in self._idle.values() for each in several]
            self._idle.clear()
        for connection in idle:
            connection.close(True)

    def forget(self, segment: Segment) -> None:
        """Close what is open of ``segment``, whose files go or have changed."""
        with self._lock:
            idle = self._idle.pop(segment, [])
            self._idle_count -= len(idle)
        for connection in idle:
            connection.close(True)

    # --- the log ---------------------------------------------------------------------------------

    def records(self, after: int) -> tuple[list[tuple[int, bytes]], str]:
        """Return the next records behind ``after``, and the stamp of one that could not be read.

        The stamp is empty where all could be read.

        Raises:
            apsw.Error: nothing can be read now.
        """
        damaged_stamp = ""
        for segment in self._catalog.segments:
            if segment.last_position <= after:
                continue
            found, is_damaged = self._records_of(segment, after)
            if is_damaged:
                damaged_stamp = segment.info.stamp
            if found:
                return found, damaged_stamp
        return [], damaged_stamp

    def _records_of(self, segment: Segment, after: int) -> tuple[list[tuple[int, bytes]], bool]:
        found: list[tuple[int, bytes]] = []
        size_bytes, is_damaged = 0, False
        # Positions are consecutive, so a row that is gone is noticed.
        expected = max(after, segment.info.after_position) + 1
        try:
            with self._reading(segment) as connection:
                rows: Any = connection.execute(_RECORDS, (after, segment.last_position))
                for position, time_us, crc, runs, record in rows:
                    is_sound = is_sound_record(position, time_us, crc, runs, record)
                    if position != expected or not is_sound:
                        is_damaged = True
                        self._report(segment, f"the record at position {expected}")
                    expected = position + 1
                    if not is_sound:
                        continue
                    found.append((position, record))
                    size_bytes += len(record)
                    if size_bytes >= SLICE_BYTES or len(found) >= SLICE_RECORDS:
                        break
        except apsw.Error as error:
            if segment not in self._catalog.segments:
                return found, False
            if fault_of(error) is not Fault.DAMAGED:
                raise
            is_damaged = True
            self._report(segment, words_of(error))
        return found, is_damaged

    def digest(self, position: int) -> str | None:
        """Return the CRC-32 of the record at ``position``; None if it is gone."""
        segments = self._catalog.segments
        if segments and position == segments[0].info.after_position:
            return segments[0].info.after_digest or None
        segment = self._catalog.with_position(position)
        record = None if segment is None else self.record(segment, position)
        return None if record is None else digest_of(record)

    def record(self, segment: Segment, position: int) -> bytes | None:
        """Return the record at ``position`` in ``segment``; None if it can't be read."""
        try:
            with self._reading(segment) as connection:
                row = connection.execute(_RECORD, (position,)).fetchone()
        except apsw.Error as error:
            if fault_of(error) is not Fault.DAMAGED:
                raise
            self._report(segment, words_of(error))
            return None
        if row is None:
            return None
        time_us, crc, runs, record = row
        if not is_sound_record(position, time_us, crc, runs, record):
            self._report(segment, f"the record at position {position}")
            return None
        return bytes(record)

    # --- histories -------------------------------------------------------------------------------

    def extent(self, names: Names) -> Extent | None:
        """Return what the segments have of a topic; None for nothing."""
        segments = self._catalog.segments
        oldest = next(self._spans_of(segments, names), None)
        newest = next(self._spans_of(reversed(segments), names), None)
        return None if oldest is None or newest is None else Extent(oldest.first, newest.last)

    def page(self, names: Names, after: int, max_messages: int, max_bytes: int) -> list[StoredRun]:
        """Return messages behind offset ``after``: see `History.page`."""
        found: list[StoredRun] = []
        room, room_bytes = max_messages, max_bytes
        segments = self._catalog.segments
        begin = self._count_while(segments, names, lambda span: span.last <= after, after)
        for span in self._spans_of(segments[begin:], names, after):
            if span.last <= after:
                continue
            for run in self._runs(span, names, after):
                if run.last <= after:
                    # The last run of the table, while those behind it are not in it yet.
                    continue
                part = run.behind(after, room)
                if len(part.lines) > room_bytes:
                    fitting = _first_of(part, room_bytes, at_least=0 if found else 1)
                    if fitting.count:
                        found.append(fitting)
                    return found
                found.append(part)
                room -= part.count
                room_bytes -= len(part.lines)
                if not room:
                    return found
        return found

    def last_before(self, names: Names, id_us: int) -> int:
        """Return the offset of the newest message whose id is below ``id_us``; 0 without one."""
        segments = self._catalog.segments
        end = self._count_while(segments, names, lambda span: span.first_id_us < id_us)
        for span in self._spans_of(reversed(segments[:end]), names):
            first = self._first_before(span, id_us)
            if first == 0:
                continue
            for run in self._runs_back(span, names, first):
                if run.id_us < id_us:
                    return run.first + min(run.count - 1, (id_us - 1 - run.id_us) // run.id_step)
        return 0

    def _count_while(
        self,
        segments: Sequence[Segment],
        names: Names,
        is_before: Callable[[Span], bool],
        after: int = _LARGEST,
    ) -> int:
        """Return how many segments, the oldest ones, are before a place, by a binary search.

        Segments that have nothing of the topic may be counted or not.

        Args:
            is_before: true of the older segments that have the topic, and false of the others.
            after: as for `_span`.
        """
        low, high = 0, len(segments)
        while low < high:
            middle = (low + high) // 2
            at = middle
            while at < high and (span := self._span(segments[at], names, after)) is None:
                at += 1
            if at < high and span is not None and is_before(span):
                low = at + 1
            else:
                high = middle
        return low

    def _spans_of(
        self, segments: Iterable[Segment], names: Names, after: int = _LARGEST
    ) -> Iterator[Span]:
        """Yield what each segment has of a topic; each is looked into when it is asked for.

        Args:
            after: as for `_span`.
        """
        for segment in segments:
            span = self._span(segment, names, after)
            if span is not None:
                yield span

    def _span(self, segment: Segment, names: Names, after: int = _LARGEST) -> Span | None:
        """Return what a segment has of a topic; that is remembered.

        Args:
            after: what is remembered of a segment that was written to will do if it has messages
                behind this offset: a reader that catches up asks for the same with each page.
        """
        is_final, number = segment.is_final, segment.number
        with self._lock:
            known = self._spans.get(names)
            if known is not None and number in known:
                span = known[number]
                if span is None or span.is_final or span.last > after:
                    self._spans.move_to_end(names)
                    return span
        span = next(self._guarded(segment, partial(self._spans_in, segment, names)), None)
        if is_final or span is not None:
            with self._lock:
                self._remember(names, number, span)
        return span

    def _remember(self, names: Names, number: int, span: Span | None) -> None:
        known = self._spans.setdefault(names, {})
        self._spans_count += number not in known
        known[number] = span
        self._spans.move_to_end(names)
        while self._spans_count > MAX_SPANS:
            _, forgotten = self._spans.popitem(last=False)
            self._spans_count -= len(forgotten)

    def _spans_in(
        self, segment: Segment, names: Names, connection: apsw.Connection
    ) -> Iterator[Span]:
        """Yield what a segment has of a topic, if it has anything that can be read."""
        is_final = segment.is_final
        row: Any = connection.execute(_TOPIC, names).fetchone()
        if row is not None:
            whole = Span(segment, row[0], 0, _LARGEST, 0, is_final)
            first = next(self._runs_from(whole, names, 0, connection), None)
            last = next(self._runs_back_from(whole, names, _LARGEST, connection), None)
            if first is not None and last is not None:
                yield Span(segment, row[0], first.first, last.last, first.id_us, is_final)

    def _runs(self, span: Span, names: Names, after: int) -> Iterator[Run]:
        """Yield the runs of a segment that have messages behind offset ``after``."""
        return self._guarded(span.segment, partial(self._runs_from, span, names, after))

    def _runs_back(self, span: Span, names: Names, offset: int) -> Iterator[Run]:
        """Yield the runs of a segment that begin at ``offset`` or before, newest first."""
        return self._guarded(span.segment, partial(self._runs_back_from, span, names, offset))

    def _runs_from(
        self, span: Span, names: Names, after: int, connection: apsw.Connection
    ) -> Iterator[Run]:
        segment, topic_id = span.segment, span.topic_id
        crc, last_position = names_crc(*names), segment.last_position
        # The pending runs are taken first: a run that moves to the table meanwhile is seen twice,
        # and not missed.
        pending = tuple(segment.pending.get(topic_id, ()))
        row = connection.execute(_FIRST_AT, (topic_id, after + 1, last_position)).fetchone()
        begin = 0 if row is None else row[0]
        seen = 0
        for each in connection.execute(_RUNS_FROM, (topic_id, begin, last_position)):
            run = self._checked(segment, crc, each)
            if run is not None:
                seen = run.first
                yield run
        for waiting in pending:
            if waiting[1] > seen and waiting[1] + waiting[2] - 1 > after:
                run = self._checked(segment, crc, self._with_lines(connection, waiting))
                if run is not None:
                    yield run

    def _runs_back_from(
        self, span: Span, names: Names, offset: int, connection: apsw.Connection
    ) -> Iterator[Run]:
        segment, topic_id = span.segment, span.topic_id
        crc, last_position = names_crc(*names), segment.last_position
        for waiting in reversed(tuple(segment.pending.get(topic_id, ()))):
            if waiting[1] <= offset:
                offset = waiting[1] - 1
                run = self._checked(segment, crc, self._with_lines(connection, waiting))
                if run is not None:
                    yield run
        for each in connection.execute(_RUNS_BACK, (topic_id, offset, last_position)):
            run = self._checked(segment, crc, each)
            if run is not None:
                yield run

    def _with_lines(self, connection: apsw.Connection, row: RunRow) -> tuple[Any, ...]:
        """Return a run that is not in the table yet as the table would give it."""
        _, first, count, position, at_bytes, size_bytes, skip, id_us, id_step, crc = row
        found: Any = connection.execute(_LINES, (position, at_bytes, size_bytes)).fetchone()
        time_us, lines = (None, None) if found is None else found
        columns = (first, count, position, at_bytes, size_bytes, skip, id_us, id_step)
        return (*columns, crc, time_us, lines)

    def _first_before(self, span: Span, id_us: int) -> int:
        """Return the first offset of the last run that begins with an id below ``id_us``; or 0."""
        segment, topic_id = span.segment, span.topic_id
        for waiting in reversed(tuple(segment.pending.get(topic_id, ()))):
            if waiting[7] < id_us:
                return waiting[1]
        return next(self._guarded(segment, partial(self._search, span, id_us)), 0)

    def _search(self, span: Span, id_us: int, connection: apsw.Connection) -> Iterator[int]:
        """Yield the first offset of the last run in the table that begins below ``id_us``."""
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
        yield found

    def _checked(self, segment: Segment, names: int, row: tuple[Any, ...]) -> Run | None:
        """Return a row of runs with its lines as a run; None, and report it, if it is damaged."""
        *columns, crc, time_us, lines = row
        if isinstance(lines, bytes) and run_crc(names, tuple(columns), time_us, lines) == crc:
            first, count, _, _, _, skip, id_us, id_step = columns
            return Run(first, count, skip, id_us, id_step, time_us, lines)
        self._report(segment, f"messages from offset {row[0]!r} on")
        return None

    # --- connections -----------------------------------------------------------------------------

    def _guarded(
        self, segment: Segment, found: Callable[[apsw.Connection], Iterator[T]]
    ) -> Iterator[T]:
        """Yield what ``found`` finds; report damage, behind which nothing is found, and go on."""
        try:
            with self._reading(segment) as connection:
                yield from found(connection)
        except apsw.Error as error:
            if segment not in self._catalog.segments:
                # The segment was too old, and has just been removed.
                return
            if fault_of(error) is not Fault.DAMAGED:
                raise
            self._report(segment, words_of(error))

    @contextmanager
    def _reading(self, segment: Segment) -> Iterator[apsw.Connection]:
        connection = self._take(segment)
        try:
            yield connection
        except apsw.Error:
            connection.close(True)
            raise
        except BaseException:
            # The caller has enough of what it reads.
            self._give_back(segment, connection)
            raise
        self._give_back(segment, connection)

    def _take(self, segment: Segment) -> apsw.Connection:
        with self._lock:
            idle = self._idle.get(segment)
            if idle:
                self._idle_count -= 1
                connection = idle.pop()
                if not idle:
                    del self._idle[segment]
                return connection
        connection = open_to_read(segment.path, self._vfs, is_final=segment.is_final)
        connection.pragma("cache_size", -256)
        return connection

    def _give_back(self, segment: Segment, connection: apsw.Connection) -> None:
        extra = connection
        with self._lock:
            if not self._is_closed and segment in self._catalog.segments:
                self._idle.setdefault(segment, []).append(connection)
                self._idle.move_to_end(segment)
                self._idle_count += 1
                if self._idle_count <= MAX_CONNECTIONS:
                    return
                oldest, several = next(iter(self._idle.items()))
                extra = several.pop(0)
                self._idle_count -= 1
                if not several:
                    del self._idle[oldest]
        extra.close(True)

    def _report(self, segment: Segment, what: str) -> None:
        """Count damage, and log the first one of each segment."""
        self._damaged()
        if not segment.is_damaged:
            segment.is_damaged = True
            log.error(
                "journal damaged file=%s what=%r; it is left out, and so is all further damage in"
                " this file (clevrd journal verify lists it)",
                segment.path,
                what,
            )


def _first_of(run: StoredRun, max_bytes: int, *, at_least: int) -> StoredRun:
    """Return the first messages of ``run``: as many as have ``max_bytes`` together."""
    ends = list(accumulate(map(len, run.lines.split(b"\n")[:-1])))
    count = max(at_least, bisect_right(ends, max_bytes))
    # The line feeds are added, which are no bytes of messages.
    upto = ends[count - 1] + count if count else 0
    return msgspec.structs.replace(run, count=count, lines=run.lines[:upto])
