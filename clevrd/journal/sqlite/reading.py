"""HistoryReader: a topic's messages by offset, from all segments.

Everything here is called in threads that may wait for the disk.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import apsw
import msgspec

from clevrd.journal.base import Extent, StoredRun
from clevrd.journal.sqlite.connections import SegmentConnections
from clevrd.journal.sqlite.runs import LARGEST, Run, SegmentRuns, first_before
from clevrd.journal.sqlite.segments import FIND_TOPIC, Catalog, Names, Segment
from clevrd.journal.sqlite.spans import KnownSpans, Span


class HistoryReader:
    """The histories of all topics that segments have."""

    def __init__(self, catalog: Catalog, connections: SegmentConnections) -> None:
        self._catalog = catalog
        self._connections = connections
        self._spans = KnownSpans()

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
            for run in self._runs_behind(span, names, after):
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
        after: int = LARGEST,
    ) -> int:
        """Return how many segments, the oldest ones, are before a place, by a binary search.

        Segments that have nothing of the topic may be counted or not.

        Args:
            is_before: true of the older segments that have the topic, and false of the others.
            after: as for `KnownSpans.find`.
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
        self, segments: Iterable[Segment], names: Names, after: int = LARGEST
    ) -> Iterator[Span]:
        """Yield what each segment has of a topic; each is looked into when it is asked for.

        Args:
            after: as for `KnownSpans.find`.
        """
        for segment in segments:
            span = self._span(segment, names, after)
            if span is not None:
                yield span

    def _span(self, segment: Segment, names: Names, after: int) -> Span | None:
        """Return what a segment has of a topic; that is remembered."""
        return self._spans.find(names, segment, after, partial(self._look_up, segment, names))

    def _look_up(self, segment: Segment, names: Names) -> Span | None:
        return next(
            self._connections.guarded(segment, partial(self._spans_in, segment, names)), None
        )

    def _spans_in(
        self, segment: Segment, names: Names, connection: apsw.Connection
    ) -> Iterator[Span]:
        """Yield what a segment has of a topic, if it has anything that can be read."""
        is_final = segment.is_final
        row: Any = connection.execute(FIND_TOPIC, names).fetchone()
        if row is not None:
            runs = self._runs(segment, row[0], names, connection)
            first = next(runs.behind(0), None)
            last = next(runs.back_from(LARGEST), None)
            if first is not None and last is not None:
                yield Span(segment, row[0], first.first, last.last, first.id_us, is_final)

    def _runs_behind(self, span: Span, names: Names, after: int) -> Iterator[Run]:
        """Yield the runs of a segment that have messages behind offset ``after``."""
        return self._connections.guarded(
            span.segment,
            lambda connection: self._runs(span.segment, span.topic_id, names, connection).behind(
                after
            ),
        )

    def _runs_back(self, span: Span, names: Names, offset: int) -> Iterator[Run]:
        """Yield the runs of a segment that begin at ``offset`` or before, newest first."""
        return self._connections.guarded(
            span.segment,
            lambda connection: self._runs(span.segment, span.topic_id, names, connection).back_from(
                offset
            ),
        )

    def _runs(
        self, segment: Segment, topic_id: int, names: Names, connection: apsw.Connection
    ) -> SegmentRuns:
        report = partial(self._connections.report, segment)
        return SegmentRuns(segment, topic_id, names, connection, report)

    def _first_before(self, span: Span, id_us: int) -> int:
        """Return the first offset of the last run that begins with an id below ``id_us``; or 0."""
        segment = span.segment
        for waiting in reversed(tuple(segment.pending.get(span.topic_id, ()))):
            if waiting[7] < id_us:
                return waiting[1]
        return next(
            self._connections.guarded(
                segment, lambda connection: iter((first_before(span, id_us, connection),))
            ),
            0,
        )


def _first_of(run: StoredRun, max_bytes: int, *, at_least: int) -> StoredRun:
    """Return the first messages of ``run``: as many as have ``max_bytes`` together."""
    ends = list(accumulate(map(len, run.lines.split(b"\n")[:-1])))
    count = max(at_least, bisect_right(ends, max_bytes))
    # The line feeds are added, which are no bytes of messages.
    upto = ends[count - 1] + count if count else 0
    return msgspec.structs.replace(run, count=count, lines=run.lines[:upto])
