"""LogReader: the next records of one partition, as its stream hands them to a consumer of ours.

The consumer is a pull consumer, so that the server never sends more than was asked for, without
acknowledgements, and in the server's memory. It goes by itself when nothing is asked of it for a
minute. It begins behind the last record that was read, and it is not told if its stream is a new
one, or ends before that place. So the engine looks at the stream each time that a consumer is made.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

from clevrd.journal.base import Trimmed
from clevrd.journal.nats.connection import TICK_S, Connection
from clevrd.journal.nats.library import LOST, NatsFault
from clevrd.journal.unseen_append import UnseenAppend

_NS: Final = 1_000_000_000
# Records that are asked for at once, and their bytes: at least one record of any size.
_BATCH: Final = 512
_BATCH_BYTES: Final = 1 << 20
_FRAMING_BYTES: Final = 4 << 10
# How long the server may wait for a record, and how often it says that there is none.
_EXPIRES_S: Final = 30
_HEARTBEAT_S: Final = 1
# Ticks without a record and without a word that there is none.
_SILENT_TICKS: Final = 6
# Ticks after which an appended record should have been read by a reader that waits.
_DEAF_TICKS: Final = 4
# A consumer of a node that has died is gone after so long.
_INACTIVE_S: Final = 60

_HEARTBEAT: Final = "100"
# An end of a question that leaves the consumer as it is: time, or bytes.
_TIMEOUT: Final = "408"
_ENOUGH: Final = "maxbytes"
# All records of a question have come, which were counted.
_COMPLETED: Final = "batchcompleted"


class ConsumerFeed:
    """One consumer, and what has come from it."""

    def __init__(
        self, connection: Connection, stream: str, after: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Make a feed of the records behind ``after``; `open` begins it."""
        self._connection = connection
        self._stream = stream
        self._after = after
        self._loop = loop
        self._name = f"clevrd{secrets.token_hex(8)}"
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{self._name}"
        self._inbox = ""
        self._listening: Any = None
        size_bytes = max(_BATCH_BYTES, connection.max_payload + _FRAMING_BYTES)
        self._question = b'{"batch":%d,"max_bytes":%d,"expires":%d,"idle_heartbeat":%d}' % (
            _BATCH,
            size_bytes,
            _EXPIRES_S * _NS,
            _HEARTBEAT_S * _NS,
        )
        # Records that have come, at most as many as were asked for.
        self._records: list[tuple[int, bytes]] = []
        # Records that are still to come of those that were asked for; 0: nothing is asked.
        self._asked = 0
        # The consumer's number of the last record.
        self._delivered = 0
        self._silent_ticks = 0
        # Done when a record has come, or the feed has ended; None while nobody waits.
        self._waiting: asyncio.Future[None] | None = None
        self.fault: NatsFault | None = None

    @property
    def is_asking(self) -> bool:
        """Whether the server owes records, or a word that there are none."""
        return bool(self._asked)

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits for a record, and none has come."""
        return self._waiting is not None

    async def open(self) -> None:
        """Make the consumer; raises NatsFault."""
        self._inbox = self._connection.new_inbox()
        self._listening = await self._connection.listen(self._inbox, self._got)
        await self._connection.api(
            f"CONSUMER.CREATE.{self._stream}.{self._name}",
            {
                "stream_name": self._stream,
                "config": {
                    "name": self._name,
                    "deliver_policy": "by_start_sequence",
                    "opt_start_seq": self._after + 1,
                    "ack_policy": "none",
                    "replay_policy": "instant",
                    "mem_storage": True,
                    "num_replicas": 1,
                    "inactive_threshold": _INACTIVE_S * _NS,
                },
            },
        )
        self._connection.feeds.add(self)

    async def take(self) -> list[tuple[int, bytes]]:
        """Return what has come; wait for a record. Raises NatsFault behind the last one."""
        while not self._records:
            if self.fault is not None:
                raise NatsFault(self.fault.code, self.fault.text)
            if not self._asked:
                await self._ask()
                continue
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        records, self._records = self._records, []
        if not self._asked and self.fault is None:
            # The next records are on their way while these are folded.
            await self._ask()
        return records

    def tick(self) -> None:
        """Note that TICK_S have passed; end where the consumer shows itself no more."""
        if self._asked:
            self._silent_ticks += 1
            if self._silent_ticks > _SILENT_TICKS:
                self.end(NatsFault(LOST, "its consumer is silent"))

    def drop(self, fault: NatsFault) -> None:
        """End, and forget what has come: its positions are those of another log."""
        self.end(fault)
        self._records = []

    def end(self, fault: NatsFault) -> None:
        """Note that nothing more comes."""
        if self.fault is None:
            self.fault = fault
            self._connection.feeds.discard(self)
        self._wake()

    async def close(self) -> None:
        """Let go of the consumer, which nobody asks any more."""
        self.end(NatsFault(LOST, "the read was given up"))
        if self._connection.fault is None and self._listening is not None:
            with suppress(Exception):
                await self._connection.leave(self._listening)
                await self._connection.publish(
                    f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._name}", b""
                )

    async def _ask(self) -> None:
        self._asked = _BATCH
        self._silent_ticks = 0
        await self._connection.publish(self._subject, self._question, self._inbox)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _got(
        self, _subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> None:
        self._silent_ticks = 0
        self._connection.note_heard()
        if self.fault is not None:
            return
        place = reply.split(b".")
        if len(place) < 9:
            self._note_status(headers or {})
            return
        # $JS.ACK, in a domain also that and its account; stream, consumer, deliveries, sequence in
        # the stream, sequence of the consumer, time, pending.
        at = 5 if len(place) == 9 else 7
        self._delivered += 1
        if int(place[at + 1]) != self._delivered:
            self.end(NatsFault(LOST, "records were lost on their way"))
            return
        self._asked -= 1
        self._records.append((int(place[at]), data))
        if self._waiting is not None:
            self._wake()

    def _note_status(self, headers: dict[str, str]) -> None:
        """Take a word of the server's that is no record."""
        status = headers.get("Status", "")
        said = headers.get("Description", "").strip()
        word = said.lower().replace(" ", "").replace("_", "")
        if status == _HEARTBEAT:
            last = headers.get("Nats-Last-Consumer", "")
            if last.isdigit() and int(last) > self._delivered:
                self.end(NatsFault(LOST, "records were lost on their way"))
        elif _COMPLETED in word:
            return
        elif status == _TIMEOUT or _ENOUGH in word:
            # The code that waits asks for records again.
            self._asked = 0
            self._wake()
        else:
            self.end(NatsFault(LOST, f"its consumer has ended ({status} {said})".strip()))


class LogReader:
    """Reads on where the last call ended, or from anywhere else."""

    def __init__(
        self,
        stream: str,
        connect: Callable[[], Awaitable[Connection]],
        check: Callable[[int, bytes | None], Awaitable[None]],
        first: Callable[[], Awaitable[int]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Make a reader.

        Args:
            check: raises Trimmed unless records can be read behind a position, where the given
                record is, if it is known.
            first: the oldest record's position.
        """
        self._stream = stream
        self._connect = connect
        self._check = check
        self._first = first
        self._loop = loop
        self._feed: ConsumerFeed | None = None
        # Where the last answer ended, and the record there; None where it was not read here.
        self.at = 0
        self._last: bytes | None = None
        # Records that have come, behind a place where some are missing.
        self._rest: list[tuple[int, bytes]] = []
        self._unseen = UnseenAppend(_DEAF_TICKS)

    def note_append(self, position: int) -> None:
        """Expect the record at ``position``."""
        self._unseen.position = position

    def restart(self) -> None:
        """Have the next read look at the stream again: it may not be what it was."""
        self._unseen.forget()
        self._rest = []
        if self._feed is not None:
            self._feed.drop(NatsFault(LOST, "the log has begun anew"))

    def tick(self) -> None:
        """End a consumer that does not bring what was appended; called each TICK_S."""
        feed = self._feed
        is_waiting = feed is not None and feed.is_waiting
        if self._unseen.is_deaf(self.at, is_waiting=is_waiting) and feed is not None:
            seconds = _DEAF_TICKS * TICK_S
            feed.end(NatsFault(LOST, f"a record was not seen within {seconds:.0f} s"))

    async def read(self, after: int) -> list[tuple[int, bytes]]:
        """Return the next records behind ``after``; wait for one.

        Raises:
            NatsFault: the server refuses, or can't be reached.
            Trimmed: records behind ``after`` are gone.
        """
        if after != self.at:
            await self._let_go()
            self.at, self._last = after, None
        found, self._rest = self._rest, []
        if not found:
            found = await self._take(after)
        if found[-1][0] - after != len(found):
            found = await self._up_to_hole(found, after)
        self.at, self._last = found[-1]
        return found

    async def _take(self, after: int) -> list[tuple[int, bytes]]:
        feed = self._feed
        if feed is None:
            feed = ConsumerFeed(await self._connect(), self._stream, after, self._loop)
            try:
                await feed.open()
                # Behind the making of the consumer, which ends with its stream.
                await self._check(after, self._last)
            except BaseException:
                # One that was not looked at is never read from, whatever kept it from that.
                await feed.close()
                raise
            self._feed = feed
        try:
            return await feed.take()
        except NatsFault:
            await self._let_go()
            raise

    async def _up_to_hole(
        self, found: list[tuple[int, bytes]], after: int
    ) -> list[tuple[int, bytes]]:
        """Return what comes before the first place where records are missing; keep the others.

        Raises:
            Trimmed: they are missing right behind ``after``, and were the oldest ones. Single
                records that somebody has deleted are passed over; nodes that have counted them are
                found by what the others say that they have seen.
        """
        whole = 0
        while found[whole][0] == after + whole + 1:
            whole += 1
        if whole:
            self._rest = found[whole:]
            return found[:whole]
        if await self._first() > after + 1:
            await self._let_go()
            raise Trimmed
        return found

    async def _let_go(self) -> None:
        self._rest = []
        feed, self._feed = self._feed, None
        if feed is not None:
            await feed.close()
