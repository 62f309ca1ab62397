"""Questions: what is asked of the brokers apart from appends and reads.

Topics are asked about by an admin client, whose answers come by its own threads; single records
are read by a consumer of their own in one thread, since its calls wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
from confluent_kafka import KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]

from clevrd.journal.kafka.leaders import extent_of
from clevrd.journal.kafka.library import (
    LOST,
    MISSING,
    KafkaFault,
    Troubles,
    fault_of,
    make_admin,
    make_consumer,
)
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.kafka.stamps import topic_digits
from clevrd.journal.kafka.topic_state import TopicState

ResultT = TypeVar("ResultT")

# How long a question may take.
ASK_S: Final = 4.0
_GLANCE_S: Final = 0.2
# An answer is fetched with what follows it, which nobody wants.
_QUEUED_KBYTES: Final = 1_024
# The broker is asked for records that are there. The library asks on behind the last one, and the
# next question waits until the broker has answered that.
_FETCH_MS: Final = 10
# The names of errors that say that a record is not there.
OUT_OF_RANGE: Final = frozenset({"_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE", "_NO_OFFSET"})


class FoundRecord(msgspec.Struct, frozen=True):
    """A record as it was read alone."""

    value: bytes
    # The leader's epoch in which it was taken; None where the broker does not say.
    leader_epoch: int | None


class Questions:
    """An admin client and a consumer, each made when it is needed first."""

    def __init__(self, settings: KafkaSettings, troubles: Troubles) -> None:
        self._settings = settings
        self._troubles = troubles
        # The admin client, once there is one. Nothing else refers to it, not even a frame that a
        # traceback keeps: who drops the last reference waits for its threads, a second or longer.
        self._admin: list[Any] = []
        # Questions to it that are under way, and whether there is none.
        self._asked = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        # Used by its thread alone.
        self._consumer: Any = None
        self._thread = ThreadPoolExecutor(1, "clevrd-kafka-questions")
        self._is_closed = False

    # --- topics ----------------------------------------------------------------------------------

    async def topic_id(self, name: str) -> str | None:
        """Return a topic's id; None if there is no such topic. Raises KafkaFault."""
        described = await self._described(name)
        if described is None:
            return None
        found = described.topic_id
        if found is None:
            return topic_digits(0, 0)
        return topic_digits(found.get_most_significant_bits(), found.get_least_significant_bits())

    async def topic(self, name: str) -> TopicState | None:
        """Return a topic as it is; None if there is none. Raises KafkaFault."""
        described = await self._described(name)
        if described is None:
            return None
        config: Mapping[str, str] = {}
        try:
            config = await self._config(name)
        except KafkaFault as fault:
            # Not all who may use a topic may see its configuration.
            if "AUTHORIZATION" not in fault.code:
                raise
        found = described.topic_id
        digits = (
            topic_digits(0, 0)
            if found is None
            else topic_digits(found.get_most_significant_bits(), found.get_least_significant_bits())
        )
        partitions = described.partitions
        replicas = min((len(each.replicas) for each in partitions), default=0)
        return TopicState(digits, len(partitions), replicas, config)

    async def make_topic(
        self, name: str, partitions: int, replicas: int, config: Mapping[str, str]
    ) -> None:
        """Make a topic, unless somebody else does at the same time. Raises KafkaFault."""
        topic = NewTopic(name, partitions, replicas or -1, config=dict(config))
        try:
            await self._ask(lambda admin: admin.create_topics([topic])[name])
        except KafkaFault as fault:
            if fault.code != "TOPIC_ALREADY_EXISTS":
                raise

    async def cut(self, topic: str, befores: Mapping[int, int]) -> None:
        """Remove the records of partitions before an offset in each. Raises KafkaFault."""
        for number, offset in befores.items():
            await self._ask(partial(_cut, TopicPartition(topic, number, offset)))

    async def _described(self, name: str) -> Any:
        try:
            return await self._ask(
                lambda admin: admin.describe_topics(TopicCollection([name]))[name]
            )
        except KafkaFault as fault:
            if fault.code == MISSING:
                return None
            raise

    async def _config(self, name: str) -> dict[str, str]:
        resource = ConfigResource(ResourceType.TOPIC, name)
        found = await self._ask(lambda admin: admin.describe_configs([resource])[resource])
        return {each.name: each.value for each in found.values() if each.value is not None}

    async def _ask(self, question: Callable[[Any], Future[ResultT]]) -> ResultT:
        if self._is_closed:
            raise KafkaFault(LOST, "the journal is closed")
        if not self._admin:
            self._admin.append(make_admin(self._settings, self._troubles))
        answer = asyncio.wrap_future(question(self._admin[0]))
        # An answer that nobody waits for any more may fail unheard.
        answer.add_done_callback(lambda late: late.cancelled() or late.exception())
        self._asked += 1
        self._is_idle.clear()
        try:
            await self._wait_for(answer)
            found = answer.result()
        except KafkaException as error:
            raise self._troubles.reason_for(fault_of(error)) from error
        finally:
            self._asked -= 1
            if not self._asked:
                self._is_idle.set()
        self._troubles.clear()
        return found

    async def _wait_for(self, answer: asyncio.Future[Any]) -> None:
        """Wait until it is there; raise KafkaFault where none will come."""
        troubles = self._troubles
        since_s = troubles.now_s()
        # The library asks again and again, also where a password is refused.
        while not (answer.done() or self._is_closed) and troubles.now_s() - since_s < ASK_S:
            await asyncio.wait((answer,), timeout=_GLANCE_S)
            # The library calls its callbacks within this call alone.
            self._admin[0].poll(0)
            if not answer.done() and (fault := troubles.final_since(since_s)) is not None:
                raise fault
        if answer.done():
            return
        if self._is_closed:
            raise KafkaFault(LOST, "the journal is closed")
        raise troubles.reason_for(fault_of(TimeoutError()))

    # --- records ---------------------------------------------------------------------------------

    async def extent(self, topic: str, partition: int) -> tuple[int, int]:
        """Return the first record's offset, and that which the next one will have."""
        return await self._in_thread(lambda: self._extent(topic, partition))

    async def record(self, topic: str, partition: int, offset: int) -> FoundRecord | None:
        """Return the record at ``offset``; None if it is not there. Raises KafkaFault."""
        return (await self.records(topic, partition, (offset,)))[0]

    async def last_record(self, topic: str, partition: int) -> FoundRecord | None:
        """Return the newest record; None if there is none. Raises KafkaFault."""
        _, end = await self.extent(topic, partition)
        return await self.record(topic, partition, end - 1) if end else None

    async def records(
        self, topic: str, partition: int, offsets: Sequence[int]
    ) -> list[FoundRecord | None]:
        """Return the records at ``offsets``, which rise. Raises KafkaFault."""
        return await self._in_thread(lambda: self._records(topic, partition, offsets))

    async def _in_thread(self, call: Callable[[], ResultT]) -> ResultT:
        if self._is_closed:
            raise KafkaFault(LOST, "the journal is closed")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, call)
        except KafkaException as error:
            raise self._troubles.reason_for(fault_of(error)) from error
        except KafkaFault as fault:
            raise self._troubles.reason_for(fault) from fault

    def _opened_consumer(self) -> Any:
        if self._consumer is None:
            self._consumer = make_consumer(
                self._settings, self._troubles, _QUEUED_KBYTES, _FETCH_MS
            )
        return self._consumer

    def _extent(self, topic: str, partition: int) -> tuple[int, int]:
        return extent_of(self._opened_consumer(), TopicPartition(topic, partition), ASK_S)

    def _records(
        self, topic: str, partition: int, offsets: Sequence[int]
    ) -> list[FoundRecord | None]:
        low, high = self._extent(topic, partition)
        consumer = self._opened_consumer()
        found: list[FoundRecord | None] = []
        at = -1
        try:
            for offset in offsets:
                if not low <= offset < high:
                    found.append(None)
                    continue
                if offset != at:
                    consumer.assign([TopicPartition(topic, partition, offset)])
                message = self._next(consumer, topic, partition, offset)
                at = -1
                if message is not None and message.offset() == offset:
                    at = offset + 1
                    found.append(FoundRecord(message.value() or b"", message.leader_epoch()))
                else:
                    found.append(None)
        finally:
            consumer.unassign()
        return found

    def _next(self, consumer: Any, topic: str, partition: int, offset: int) -> Any:
        """Return the first message at ``offset`` or behind it; None if it is out of range."""
        until_s = time.monotonic() + ASK_S
        while (left_s := until_s - time.monotonic()) > 0:
            message = consumer.poll(left_s)
            if message is None:
                break
            error = message.error()
            if error is not None:
                if error.name() in OUT_OF_RANGE:
                    return None
                if not error.retriable():
                    raise fault_of(error)
                continue
            is_its = (message.topic(), message.partition()) == (topic, partition)
            if is_its and message.offset() >= offset:
                return message
        raise KafkaFault(LOST, "no answer in time")

    async def close(self) -> None:
        """End both clients, beside the loop: they may wait for a broker."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._is_idle.wait()

        def end() -> None:
            consumer, self._consumer = self._consumer, None
            if consumer is not None:
                consumer.close()
            self._admin.clear()

        ending = asyncio.get_running_loop().run_in_executor(self._thread, end)
        with suppress(TimeoutError, Exception):
            async with asyncio.timeout(ASK_S):
                await ending
        self._thread.shutdown(wait=False)


def _cut(place: TopicPartition, admin: Any) -> Future[Any]:
    answer: Future[Any] = admin.delete_records([place])[place]
    return answer
