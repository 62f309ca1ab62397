"""Verifies a journal: every checksum of every file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import apsw
import msgspec

from clevrd.journal.sqlite.directory import CHECKPOINT
from clevrd.journal.sqlite.heads import BadCheckpoint, read_checkpoint
from clevrd.journal.sqlite.inspection import Inspection, is_sound
from clevrd.journal.sqlite.library import open_to_read, words_of
from clevrd.journal.sqlite.opening import missing_behind
from clevrd.journal.sqlite.segments import RunRow, Segment, has_wal
from clevrd.plurals import noun_for

# Rows of the table for one record's runs, by their topics and first offsets.
_ROW: Final = "SELECT * FROM runs WHERE topic_id = ? AND first = ?"
_ROWS: Final = "SELECT count(*) FROM runs WHERE position <= ?"


def damage_in(inspection: Inspection) -> Iterator[str]:
    """Yield a line for each thing that is not what was written."""
    for bad in inspection.bad:
        yield f"{bad.path}: {bad.why}"
    if inspection.meta is None:
        yield f"{inspection.directory.inside('meta')}: it is missing or damaged"
    yield from inspection.missing()
    for segment in inspection.segments:
        try:
            yield from (f"{segment.path}: {each}" for each in _damage_of(inspection, segment))
        except (apsw.Error, UnicodeDecodeError, msgspec.MsgspecError) as error:
            yield f"{segment.path}: {words_of(error)}"
    yield from _damage_of_checkpoint(inspection)


def _damage_of(inspection: Inspection, segment: Segment) -> Iterator[str]:
    connection = inspection.connect(segment)
    try:
        answers: Any = connection.execute("PRAGMA integrity_check(10)").fetchall()
        yield from (str(text) for (text,) in answers if text != "ok")
        found: list[str] = []
        topics = inspection.topics(connection)
        waiting = {(row[0], row[1]) for rows in segment.pending.values() for row in rows}
        expected = 0
        for record in inspection.records(segment, connection, found.append):
            for row in record.runs:
                if not is_sound(row, topics.get(row[0]), record):
                    found.append(f"a run of the record at position {record.position} is damaged")
                elif (row[0], row[1]) not in waiting:
                    expected += 1
                    found += _damage_of_row(connection, row)
            yield from found
            found.clear()
        yield from found
        if not found:
            # A daemon that has the journal open may have moved those that waited by now.
            yield from _surplus(connection, segment, expected + len(waiting))
    finally:
        connection.close(True)


def _damage_of_row(connection: apsw.Connection, row: RunRow) -> list[str]:
    """Return what is wrong with a run's row in the table."""
    found: Any = connection.execute(_ROW, row[:2]).fetchone()
    if found is None:
        return [f"the messages from offset {row[1]} on of a topic are in no table"]
    # A record that was sent again has the same runs, and the first one's position stands.
    is_same = (*found[:3], *found[4:9]) == (*row[:3], *row[4:9])
    return [] if is_same else [f"the row of the messages from offset {row[1]} on is damaged"]


def _surplus(connection: apsw.Connection, segment: Segment, expected: int) -> list[str]:
    rows: Any = connection.execute(_ROWS, (segment.last_position,)).fetchone()
    if rows[0] <= expected:
        return []
    surplus = rows[0] - expected
    return [f"it has {surplus} {noun_for(surplus, 'row')} of messages that are in no record"]


def _damage_of_checkpoint(inspection: Inspection) -> Iterator[str]:
    path = inspection.directory.inside(CHECKPOINT)
    try:
        connection = open_to_read(path, None, is_final=not (inspection.is_open or has_wal(path)))
        try:
            checkpoint = read_checkpoint(connection)
        finally:
            connection.close(True)
    except (BadCheckpoint, apsw.Error) as error:
        yield f"{path}: {error if isinstance(error, BadCheckpoint) else words_of(error)}"
        return
    if not inspection.is_open and not inspection.bad:
        why = missing_behind(inspection.segments, checkpoint.position if checkpoint else 0)
        if why:
            yield f"{inspection.directory.path}: {why}"
