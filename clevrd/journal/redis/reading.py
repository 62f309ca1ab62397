"""LogReader: the next records of one partition, over a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from clevrd.journal.base import Trimmed
from clevrd.journal.redis.connections import QUESTIONS, Connections
from clevrd.journal.redis.library import LOST, RedisFault
from clevrd.journal.redis.pipeline import TICK_S
from clevrd.journal.redis.scripts import PartitionKeys, entry_of, position_of
from clevrd.journal.unseen_append import UnseenAppend

# How long Redis waits for a record before it says that there is none, and how long the answer may
# take then: a connection that has died is found within 5 s.
BLOCK_MS: Final = 2_000
_PATIENCE_TICKS: Final = 10
# Ticks after which an appended record should have been read by a reader that waits.
_DEAF_TICKS: Final = 4
# Bytes that one answer should have, by the size of the records before it.
_ANSWER_BYTES: Final = 1 << 20
_FIRST_COUNT: Final = 16
_MAX_COUNT: Final = 512
# A reader that is away for longer looks whether records went meanwhile that it has not read.
_AWAY_S: Final = 1.0


class LogReader:
    """Reads on where the last call ended, or from anywhere else."""

    def __init__(
        self,
        partition: int,
        keys: PartitionKeys,
        connections: Connections,
        now_s: Callable[[], float],
    ) -> None:
        self._partition = partition
        self._role = f"reads {partition}"
        self._keys = keys
        self._connections = connections
        self._now_s = now_s
        # Entries to ask for.
        self._count = _FIRST_COUNT
        # Where the last answer ended, and when it came.
        self._at = 0
        # The place before the log's first record, as it was when somebody asked.
        self._unchecked = 0
        self._answered_s = 0.0
        self._is_waiting = False
        self._unseen = UnseenAppend(_DEAF_TICKS)

    def note_first(self, position: int) -> None:
        """Note where the log begins: what was before that can't be checked."""
        self._unchecked = position - 1

    def note_append(self, position: int) -> None:
        """Expect the record at ``position``."""
        self._unseen.position = position

    def forget_append(self) -> None:
        """Expect nothing: the log may have lost what was appended."""
        self._unseen.forget()

    def tick(self) -> None:
        """Break a connection that does not bring what was appended; called each TICK_S."""
        if self._unseen.is_deaf(self._at, is_waiting=self._is_waiting):
            fault = RedisFault(LOST, f"a record was not seen within {_DEAF_TICKS * TICK_S:.0f} s")
            self._connections.drop(fault, self._role)

    async def read(self, after: int) -> list[tuple[int, bytes]]:
        """Return the next records behind ``after``; wait for one.

        Raises:
            RedisFault: the server refuses, or can't be reached.
            Trimmed: records behind ``after`` are gone.
        """
        if after != self._at:
            self._at, self._answered_s = after, 0.0
        while True:
            is_live = self._now_s() - self._answered_s < _AWAY_S
            found = await self._ask(after)
            self._answered_s = self._now_s()
            if not found:
                continue
            if after not in (0, self._unchecked) and (len(found) == self._count or not is_live):
                await self._check_not_trimmed(after)
            self._adapt(found)
            self._at = found[-1][0]
            return found

    async def _ask(self, after: int) -> list[tuple[int, bytes]]:
        self._is_waiting = True
        try:
            reply = await self._connections.call(
                self._partition,
                self._role,
                *("XREAD", "COUNT", self._count, "BLOCK", BLOCK_MS),
                *("STREAMS", self._keys.log, entry_of(after)),
                patience_ticks=_PATIENCE_TICKS,
            )
        except asyncio.CancelledError:
            # The next read must not wait for this one to be answered.
            self._connections.drop(RedisFault(LOST, "the read was given up"), self._role)
            raise
        finally:
            self._is_waiting = False
        return [_record_of(entry) for entry in reply[0][1]] if reply else []

    async def _check_not_trimmed(self, after: int) -> None:
        """Raise Trimmed unless the record at ``after`` is there: then all behind it was, too."""
        entry = entry_of(after)
        if not await self._connections.call(
            self._partition, QUESTIONS, "XRANGE", self._keys.log, entry, entry
        ):
            raise Trimmed

    def _adapt(self, found: list[tuple[int, bytes]]) -> None:
        size_bytes = sum(len(record) for _, record in found)
        fitting = max(1, len(found) * _ANSWER_BYTES // max(size_bytes, 1))
        self._count = min(fitting, 2 * self._count, _MAX_COUNT)


def _record_of(entry: Any) -> tuple[int, bytes]:
    """Return an entry's position and its record; an entry without one is an empty record."""
    fields = entry[1] or ()
    for index in range(0, len(fields) - 1, 2):
        if fields[index] == b"d":
            return position_of(entry[0]), fields[index + 1]
    return position_of(entry[0]), b""
