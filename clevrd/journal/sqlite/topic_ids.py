"""TopicIds: the numbers by which a segment knows its topics."""

from __future__ import annotations

from typing import Final

import apsw

from clevrd.journal.sqlite.library import number
from clevrd.journal.sqlite.segments import FIND_TOPIC, Names, names_crc

# Ids of topics that are remembered, so that they need not be looked up: 100 bytes each.
MAX_TOPICS: Final = 50_000

_ADD: Final = "INSERT INTO topics VALUES (?, ?, ?, ?)"
_LAST: Final = "SELECT max(id) FROM topics"


class TopicIds:
    """The topics of the segment that records are appended to."""

    __slots__ = ("_connection", "_last", "known")

    def __init__(self, connection: apsw.Connection) -> None:
        """Begin with the topics of a segment that is open to be written to.

        Raises:
            apsw.Error: it can't be read.
        """
        self._connection = connection
        self._last = number(connection, _LAST)
        # Ids, each with the checksum of the topic's names. Changed here alone.
        self.known: dict[Names, tuple[int, int]] = {}

    def look_up(self, names: Names) -> tuple[int, int]:
        """Return a topic's id and the checksum of its names, which are not `known`.

        A topic that the segment does not have is added to it.
        """
        row = self._connection.execute(FIND_TOPIC, names).fetchone()
        if row is not None:
            topic_id = row[0]
        else:
            self._last += 1
            topic_id = self._last
            self._connection.execute(_ADD, (*names, topic_id))
        if len(self.known) >= MAX_TOPICS:
            self.known.clear()
        found = self.known[names] = (topic_id, names_crc(*names))
        return found

    def forget(self) -> None:
        """Know no ids, since topics that were new may not be in the file."""
        self.known.clear()
