"""Which segments a directory has, and how far each one reaches. Nothing is changed here."""

from __future__ import annotations

from itertools import pairwise

import apsw
import msgspec

from clevrd.journal.sqlite.directory import JournalDirectory, segment_name
from clevrd.journal.sqlite.library import Fault, fault_of, open_to_read, words_of
from clevrd.journal.sqlite.segments import (
    BadSegment,
    Segment,
    has_wal,
    load_pending,
    note_bounds,
    read_info,
)


class BadFile(msgspec.Struct, frozen=True):
    """A segment's file that can't be read at all."""

    number: int
    path: str
    why: str
    is_later_format: bool


class Found(msgspec.Struct, frozen=True):
    """The segments of a directory, oldest first."""

    segments: list[Segment]
    bad: list[BadFile]


def find_segments(
    directory: JournalDirectory, vfs: str | None = None, *, is_in_use: bool = False
) -> Found:
    """Look into all segments.

    Args:
        is_in_use: another process may append to the newest one meanwhile, and remove the oldest.

    Raises:
        apsw.Error: the disk, or the system, refuses.
        OSError: the same.
    """
    segments: list[Segment] = []
    bad: list[BadFile] = []
    numbers = directory.segment_numbers()
    for number in numbers:
        path = directory.inside(segment_name(number))
        is_final = not (has_wal(path) or (is_in_use and number == numbers[-1]))
        try:
            segments.append(_look_into(path, vfs, is_final=is_final))
        except UnicodeDecodeError as error:
            bad.append(BadFile(number, path, words_of(error), False))
        except BadSegment as error:
            bad.append(BadFile(number, path, str(error), error.is_later_format))
        except apsw.CantOpenError:
            if not is_in_use or path in {directory.inside(each) for each in directory.names()}:
                raise
            # The segment was too old, and is gone.
        except apsw.Error as error:
            if fault_of(error) is not Fault.DAMAGED and not isinstance(error, apsw.SQLError):
                raise
            bad.append(BadFile(number, path, words_of(error), False))
    for older, newer in pairwise(segments):
        if newer.number == older.number + 1 and not newer.info.begins_stamp:
            older.last_position = newer.info.after_position
        else:
            # Records of a commit that failed may be there; no publisher was told that they are.
            older.last_position = min(older.last_position, newer.info.after_position)
    for segment in segments:
        if not segment.is_final:
            _note_pending(segment, vfs)
    return Found(segments, bad)


def _look_into(path: str, vfs: str | None, *, is_final: bool) -> Segment:
    connection = open_to_read(path, vfs, is_final=is_final)
    try:
        segment = Segment(path, read_info(connection))
        segment.is_final = is_final
        note_bounds(segment, connection)
    finally:
        connection.close(True)
    return segment


def _note_pending(segment: Segment, vfs: str | None) -> None:
    """Note the runs of a segment that are not in its table; damaged ones are left out."""
    connection = open_to_read(segment.path, vfs, is_final=False)
    try:
        load_pending(segment, connection)
    except (apsw.CorruptError, msgspec.MsgspecError):
        # The damage is found again, and reported, when the records are read.
        return
    finally:
        connection.close(True)
