"""LogReader: the records of all partitions as they come, by one consumer and one thread.

Each partition is read where it was asked for last. The records that have come and
are not asked for yet are bounded: a partition whose records nobody takes is paused, and does not
hold up the others.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaException, TopicPartition

from clevrd.journal.kafka.library import LOST, KafkaFault, Troubles, fault_of, make_consumer
from clevrd.journal.kafka.questions import OUT_OF_RANGE
from clevrd.journal.kafka.settings import KafkaSettings

# How long the thread waits for records before it looks whether it is told something.
_POLL_S: Final = 0.05
# Records that are handed to the loop at once.
_MESSAGES: Final = 128
# KiB that librdkafka may have fetched ahead of the thread, for each partition.
_QUEUED_KBYTES: Final = 2_048
# Bytes of records that wait for their reader, at which the partition is paused, and read on again.
_HIGH_BYTES: Final = 4 << 20
_LOW_BYTES: Final = 1 << 20
# Bytes and records that one `read` returns; a single record may be larger.
_ANSWER_BYTES: Final = 1 << 20
_ANSWER_RECORDS: Final = 512
# Places whose verdict somebody may still ask for; only void ones are kept.
_MAX_VOID: Final = 64
# Callers that wait for a record wait for so many ticks, and up to one more.
TICK_S: Final = 0.5
_WATCH_TICKS: Final = 2
TRUNCATED: Final = "_LOG_TRUNCATION"


class OutOfRange(Exception):
    """There is no record where the partition was to be read on."""


class Arrived(NamedTuple):
    """A record, or an error of its partition, as the thread hands it to the loop."""

    partition: int
    # Which of the places that were asked for it follows.
    turn: int
    offset: int
    value: bytes
    leader_epoch: int | None
    fault: KafkaFault | None


class _Watcher:
    """A caller that waits for a record to arrive: its offset, and ticks that it waits yet."""

    __slots__ = ("arrived", "offset", "ticks")

    def __init__(self, offset: int, arrived: asyncio.Future[bool]) -> None:
        self.offset = offset
        self.arrived = arrived
        self.ticks = _WATCH_TICKS

    def give(self, has_arrived: bool) -> None:
        """Tell the caller, if it still waits."""
        if not self.arrived.done():
            self.arrived.set_result(has_arrived)


class _Slot:
    """One partition, on the loop's side."""

    __slots__ = (
        "at",
        "bytes",
        "end",
        "expected",
        "fault",
        "is_asked",
        "is_paused",
        "records",
        "turn",
        "void",
        "waiter",
        "watchers",
    )

    def __init__(self) -> None:
        # The offset that the next `read` begins at if it goes on where the last one has ended.
        self.at = -1
        # The offset behind all that have arrived; -1 before the first.
        self.end = -1
        # Counts the places that were asked for, so that what comes from one before is passed over.
        self.turn = 0
        self.records: deque[tuple[int, bytes]] = deque()
        self.bytes = 0
        self.is_asked = False
        self.is_paused = False
        self.fault: KafkaFault | None = None
        self.waiter: asyncio.Future[None] | None = None
        # The newest records that were left out, as void.
        self.void: deque[int] = deque(maxlen=_MAX_VOID)
        # Records that were just sent, with the futures of their offsets, in the order of sending.
        self.expected: deque[tuple[bytes, asyncio.Future[int]]] = deque()
        # Callers that wait for a record to arrive.
        self.watchers: list[_Watcher] = []

    def wake(self) -> None:
        """Let the `read` that waits look again."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class _Consuming:
    """One consumer and its thread."""

    def __init__(
        self,
        consumer: Any,
        topic: str,
        loop: asyncio.AbstractEventLoop,
        take: Callable[[list[Arrived]], None],
    ) -> None:
        self._consumer = consumer
        self._topic = topic
        self._loop = loop
        self._take = take
        self._orders: deque[tuple[str, int, int, int]] = deque()
        # The turn of each partition that is read; the thread's alone.
        self._turns: dict[int, int] = {}
        self._is_ending = False
        self.thread = threading.Thread(target=self._serve, name="clevrd-kafka-reads", daemon=True)
        self.thread.start()

    def order(self, verb: str, partition: int, offset: int = 0, turn: int = 0) -> None:
        """Have the thread do something before it reads on."""
        self._orders.append((verb, partition, offset, turn))

    def end(self) -> None:
        """Let the thread close the consumer soon."""
        self._is_ending = True

    def _serve(self) -> None:
        consumer = self._consumer
        while not self._is_ending:
            arrived: list[Arrived] = []
            try:
                while self._orders:
                    self._obey(*self._orders.popleft())
                message = consumer.poll(_POLL_S)
                if message is not None:
                    arrived.append(self._arrived(message))
                    arrived += map(self._arrived, consumer.consume(_MESSAGES - 1, 0))
            except KafkaException as error:
                fault = fault_of(error)
                arrived += [Arrived(p, t, -1, b"", None, fault) for p, t in self._turns.items()]
            if arrived:
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._take, arrived)
        self._consumer = None
        consumer.close()

    def _obey(self, verb: str, partition: int, offset: int, turn: int) -> None:
        consumer = self._consumer
        place = TopicPartition(self._topic, partition, offset)
        if verb == "read":
            if partition in self._turns:
                consumer.incremental_unassign([place])
            self._turns[partition] = turn
            consumer.incremental_assign([place])
        elif verb == "pause":
            consumer.pause([place])
        else:
            consumer.resume([place])

    def _arrived(self, message: Any) -> Arrived:
        partition = message.partition()
        turn = self._turns.get(partition, -1)
        error = message.error()
        if error is not None:
            return Arrived(partition, turn, -1, b"", None, fault_of(error))
        value = message.value() or b""
        return Arrived(partition, turn, message.offset(), value, message.leader_epoch(), None)


class LogReader:
    """Reads partitions on where the last call ended, or from anywhere else."""

    def __init__(
        self,
        settings: KafkaSettings,
        troubles: Troubles,
        loop: asyncio.AbstractEventLoop,
        judge: Callable[[Arrived], bool],
    ) -> None:
        """Args: judge: says whether a record counts; it is asked of each, in order."""
        self._settings = settings
        self._troubles = troubles
        self._loop = loop
        self._judge = judge
        self._slots = [_Slot() for _ in range(settings.partitions)]
        self._consuming: _Consuming | None = None
        self._is_closed = False

    def end_of(self, partition: int) -> int:
        """Return the offset behind all that have arrived; -1 where nothing was read."""
        return self._slots[partition].end

    def is_reading(self, partition: int) -> bool:
        """Whether the partition is being read, and records of it arrive by themselves."""
        slot = self._slots[partition]
        return slot.is_asked and slot.fault is None and not slot.is_paused

    def is_void(self, partition: int, offset: int) -> bool:
        """Whether the record at ``offset``, which has arrived lately, was left out."""
        return offset in self._slots[partition].void

    def expect(self, partition: int, record: bytes, offset: asyncio.Future[int]) -> None:
        """Expect ``record``, which was just sent: when it arrives it was taken, at ``offset``.

        It arrives about when the broker answers who has sent it, whose word is waited for by
        another thread: with records that follow each other fast that one may take its time.
        """
        self._slots[partition].expected.append((record, offset))

    async def arrives(self, partition: int, offset: int) -> bool:
        """Wait until the record at ``offset`` has arrived; False if that takes too long."""
        slot = self._slots[partition]
        if slot.end > offset:
            return True
        arrived: asyncio.Future[bool] = self._loop.create_future()
        slot.watchers.append(_Watcher(offset, arrived))
        return await arrived

    def tick(self) -> None:
        """Let go of callers that have waited for too long; called each TICK_S.

        A timer for each of them would cost as much as the rest of an append.
        """
        for slot in self._slots:
            for watcher in slot.watchers:
                watcher.ticks -= 1
                if watcher.ticks < 0:
                    watcher.give(False)
            slot.watchers = [each for each in slot.watchers if not each.arrived.done()]

    async def read(self, partition: int, offset: int) -> list[tuple[int, bytes]]:
        """Return the next records from ``offset`` on, with their offsets; wait for one.

        Raises:
            KafkaFault: no broker can be reached, or it refuses.
            OutOfRange: there is nothing to go on from.
        """
        slot = self._slots[partition]
        if offset != slot.at or not slot.is_asked:
            self._ask_for(partition, offset)
        while not slot.records:
            fault, slot.fault = slot.fault, None
            if fault is not None:
                slot.is_asked = False
                if fault.code in OUT_OF_RANGE or fault.code == TRUNCATED:
                    raise OutOfRange(fault.code) from fault
                raise KafkaFault(fault.code, fault.text)
            slot.waiter = self._loop.create_future()
            await slot.waiter
        found: list[tuple[int, bytes]] = []
        size_bytes = 0
        while slot.records and len(found) < _ANSWER_RECORDS and size_bytes < _ANSWER_BYTES:
            found.append(slot.records.popleft())
            size_bytes += len(found[-1][1])
        slot.bytes -= size_bytes
        slot.at = found[-1][0] + 1
        if slot.is_paused and slot.bytes <= _LOW_BYTES:
            slot.is_paused = False
            if self._consuming is not None:
                self._consuming.order("resume", partition)
        return found

    def renew(self, fault: KafkaFault | None = None) -> None:
        """Read on with a new consumer; with ``fault`` tell that to all readers that wait."""
        consuming, self._consuming = self._consuming, None
        if consuming is not None:
            consuming.end()
        for number, slot in enumerate(self._slots):
            if not slot.is_asked:
                continue
            if fault is not None:
                self._forget(slot)
                slot.fault = fault
                slot.is_asked = True
                slot.wake()
            else:
                self._ask_for(number, slot.at)

    async def close(self) -> None:
        """End reading: tell the readers that wait, and wait for the thread, but not for long."""
        self._is_closed = True
        consuming = self._consuming
        self.renew(KafkaFault(LOST, "the journal is closed"))
        if consuming is not None:
            await self._loop.run_in_executor(None, consuming.thread.join, 5.0)

    def _ask_for(self, partition: int, offset: int) -> None:
        """Have the thread read from ``offset`` on."""
        if self._is_closed:
            raise KafkaFault(LOST, "the journal is closed")
        slot = self._slots[partition]
        if self._consuming is None:
            consumer = make_consumer(self._settings, self._troubles, _QUEUED_KBYTES)
            topic = self._settings.address.topic
            self._consuming = _Consuming(consumer, topic, self._loop, self._take)
        self._forget(slot)
        slot.at = offset
        slot.is_asked = True
        self._consuming.order("read", partition, offset, slot.turn)

    def _forget(self, slot: _Slot) -> None:
        slot.turn += 1
        slot.records.clear()
        slot.bytes = 0
        slot.end = -1
        slot.is_paused = slot.is_asked = False
        slot.fault = None
        slot.void.clear()

    def _take(self, arrived: list[Arrived]) -> None:
        """Take what the thread has read; called on the loop."""
        seen: list[tuple[asyncio.Future[int], int]] = []
        for each in arrived:
            if not 0 <= each.partition < len(self._slots):
                continue
            slot = self._slots[each.partition]
            if each.turn != slot.turn:
                continue
            if each.fault is not None:
                slot.fault = each.fault
            elif each.offset >= slot.end:
                self._take_record(slot, each)
                if slot.expected and (sent := _sent_as(slot.expected, each.value)) is not None:
                    seen.append((sent, each.offset))
            slot.wake()
        # Behind the readers, so that a record is folded when its sender goes on.
        for sent, offset in seen:
            sent.set_result(offset)

    def _take_record(self, slot: _Slot, each: Arrived) -> None:
        if self._judge(each):
            slot.records.append((each.offset, each.value))
            slot.bytes += len(each.value)
        else:
            slot.void.append(each.offset)
        slot.end = each.offset + 1
        if slot.watchers:
            for watcher in slot.watchers:
                if watcher.offset < slot.end:
                    watcher.give(True)
            slot.watchers = [each for each in slot.watchers if not each.arrived.done()]
        if slot.bytes >= _HIGH_BYTES and not slot.is_paused and self._consuming is not None:
            slot.is_paused = True
            self._consuming.order("pause", each.partition)


def _sent_as(
    expected: deque[tuple[bytes, asyncio.Future[int]]], value: bytes
) -> asyncio.Future[int] | None:
    """Return the future of the oldest record that is expected, if it is this one."""
    while expected and expected[0][1].done():
        expected.popleft()
    if not expected or expected[0][0] != value:
        return None
    return expected.popleft()[1]
