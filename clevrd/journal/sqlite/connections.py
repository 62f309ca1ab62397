"""SegmentConnections: connections by which segments are read, and the damage that is met there.

Everything here is called in threads that may wait for the disk.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import apsw

from clevrd.journal.sqlite.library import Fault, fault_of, open_to_read, words_of
from clevrd.journal.sqlite.segments import Catalog, Segment

log = logging.getLogger(__name__)

# Open connections that are kept, each with a descriptor or three and up to 256 KiB of pages.
MAX_CONNECTIONS: Final = 32

T = TypeVar("T")


class SegmentConnections:
    """Connections to segments, each for one thread at a time."""

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

    def guarded(
        self, segment: Segment, found: Callable[[apsw.Connection], Iterator[T]]
    ) -> Iterator[T]:
        """Yield what ``found`` finds; report damage, behind which nothing is found, and go on."""
        try:
            with self.reading(segment) as connection:
                yield from found(connection)
        except apsw.Error as error:
            if segment not in self._catalog.segments:
                # It was too old, and has just been removed.
                return
            if fault_of(error) is not Fault.DAMAGED:
                raise
            self.report(segment, words_of(error))

    @contextmanager
    def reading(self, segment: Segment) -> Iterator[apsw.Connection]:
        """Lend a connection to ``segment``; one that has met an error is closed."""
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

    def report(self, segment: Segment, what: str) -> None:
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
