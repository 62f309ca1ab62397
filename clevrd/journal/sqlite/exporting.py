"""Exports a journal: its messages in the order of the log, run by run, and what is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import apsw
import msgspec

from clevrd.journal.clear_points import ClearPoints
from clevrd.journal.records import BadRecord, LaterVersion, decode_header
from clevrd.journal.sqlite.inspection import FoundRecord, Inspection, is_sound
from clevrd.journal.sqlite.library import DAMAGE, words_of
from clevrd.journal.sqlite.segments import Names, RunRow, Segment
from clevrd.plurals import noun_for


class ExportedRun(msgspec.Struct, frozen=True):
    """Messages of one topic that stand together in a record."""

    row: RunRow
    names: Names
    # The topic's; empty where nobody can tell.
    epoch: str
    time_us: int
    # The record's lines from the run's first one on.
    lines: list[bytes]
    # The segment's path and the record's position.
    path: str
    position: int


class Export:
    """One export of a journal."""

    def __init__(self, inspection: Inspection) -> None:
        self._inspection = inspection
        self._left_out = [f"{bad.path}: {bad.why}" for bad in inspection.bad]
        self._left_out += inspection.missing()
        self._points = ClearPoints(*inspection.cleared())
        # Topics' newest offsets so far. A record that was sent again has the same messages.
        self._heads: dict[Names, int] = {}
        # How many records a later clevrd has written, and the places of the first and the last one.
        self._later_records = 0
        self._later_from = self._later_to = ""

    def runs(self) -> Iterator[ExportedRun]:
        """Yield all runs that can be read."""
        reached = 0
        for segment in self._inspection.segments:
            if 0 < reached < segment.info.after_position:
                self._points.lose()
            reached = segment.last_position
            connection = self._inspection.connect(segment)
            try:
                yield from self._runs_of(segment, connection)
            except (*DAMAGE, msgspec.MsgspecError) as error:
                self._lose(segment.path, words_of(error))
            finally:
                connection.close(True)

    def leave_out(self, path: str, what: str) -> None:
        """Note what of a segment is not exported, in a few words."""
        self._left_out.append(f"{path}: {what}")

    def left_out(self) -> list[str]:
        """Return a line for each thing that was not exported; one for all of a later clevrd's."""
        if not self._later_records:
            return self._left_out
        noun = noun_for(self._later_records, "record")
        return [
            *self._left_out,
            f"{self._inspection.directory.path}: {self._later_records:,} {noun} of a later clevrd,"
            f" from {self._later_from} to {self._later_to}, and the epochs behind; export the"
            " journal with that clevrd, or a later one",
        ]

    def _runs_of(self, segment: Segment, connection: apsw.Connection) -> Iterator[ExportedRun]:
        topics = self._inspection.topics(connection)
        lose = partial(self._lose, segment.path)
        for record in self._inspection.records(segment, connection, lose):
            try:
                header: Any = decode_header(record.record)[0]
            except LaterVersion:
                self._note_later(segment, record)
                continue
            except BadRecord:
                header = None
            yield from self._runs_in(record, topics, segment.path)
            if header is not None:
                self._points.note(header)

    def _runs_in(
        self, record: FoundRecord, topics: dict[int, Names], path: str
    ) -> Iterator[ExportedRun]:
        for row in record.runs:
            topic_id, first, count, _, at_bytes, size_bytes, *_ = row
            names = topics.get(topic_id)
            if names is None or not is_sound(row, names, record):
                self.leave_out(
                    path, f"a run of the record at position {record.position} is damaged"
                )
                continue
            if first <= self._heads.get(names, 0):
                continue
            self._heads[names] = first + count - 1
            epoch = self._points.epoch_of(names, first)
            lines = record.record[at_bytes : at_bytes + size_bytes].split(b"\n")
            yield ExportedRun(row, names, epoch, record.time_us, lines, path, record.position)

    def _lose(self, path: str, what: str) -> None:
        """Note that a record is gone, and with it whatever it has cleared."""
        self.leave_out(path, what)
        self._points.lose()

    def _note_later(self, segment: Segment, record: FoundRecord) -> None:
        self._points.lose()
        place = f"position {record.position} in {os.path.basename(segment.path)}"
        self._later_from = self._later_from or place
        self._later_to = place
        self._later_records += 1
