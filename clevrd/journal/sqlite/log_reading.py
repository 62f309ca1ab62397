"""LogReader: records in the order of the log, as segments have them.

All that is read is compared with its checksum; what does not fit is left out and reported.
Everything here is called in threads that may wait for the disk.
"""

from __future__ import annotations

from typing import Any, Final

import apsw

from clevrd.journal.records import digest_of
from clevrd.journal.sqlite.connections import SegmentConnections
from clevrd.journal.sqlite.library import Fault, fault_of, words_of
from clevrd.journal.sqlite.segments import Catalog, Segment, is_sound_record

# A slice of the log: so many records, or so many bytes.
SLICE_RECORDS: Final = 4_096
SLICE_BYTES: Final = 4 << 20

_RECORDS: Final = (
    "SELECT position, time_us, crc, runs, record FROM records"
    " WHERE position > ? AND position <= ? ORDER BY position"
)
_RECORD: Final = "SELECT time_us, crc, runs, record FROM records WHERE position = ?"


class LogReader:
    """The log in all segments."""

    def __init__(self, catalog: Catalog, connections: SegmentConnections) -> None:
        self._catalog = catalog
        self._connections = connections

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

    def digest(self, position: int) -> str | None:
        """Return the CRC-32 of the record at ``position``; None if it is gone."""
        segments = self._catalog.segments
        if segments and position == segments[0].info.after_position:
            return segments[0].info.after_digest or None
        segment = self._catalog.with_position(position)
        record = None if segment is None else self._record(segment, position)
        return None if record is None else digest_of(record)

    def _records_of(self, segment: Segment, after: int) -> tuple[list[tuple[int, bytes]], bool]:
        found: list[tuple[int, bytes]] = []
        size_bytes, is_damaged = 0, False
        # Positions are consecutive, so a row that is gone is noticed.
        expected = max(after, segment.info.after_position) + 1
        try:
            with self._connections.reading(segment) as connection:
                rows: Any = connection.execute(_RECORDS, (after, segment.last_position))
                for position, time_us, crc, runs, record in rows:
                    is_sound = is_sound_record(position, time_us, crc, runs, record)
                    if position != expected or not is_sound:
                        is_damaged = True
                        self._connections.report(segment, f"the record at position {expected}")
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
            self._connections.report(segment, words_of(error))
        return found, is_damaged

    def _record(self, segment: Segment, position: int) -> bytes | None:
        """Return the record at ``position`` in ``segment``; None if it can't be read."""
        try:
            with self._connections.reading(segment) as connection:
                row = connection.execute(_RECORD, (position,)).fetchone()
        except apsw.Error as error:
            if fault_of(error) is not Fault.DAMAGED:
                raise
            self._connections.report(segment, words_of(error))
            return None
        if row is None:
            return None
        time_us, crc, runs, record = row
        if not is_sound_record(position, time_us, crc, runs, record):
            self._connections.report(segment, f"the record at position {position}")
            return None
        return bytes(record)
