"""KafkaReader: reads a topic of Kafka in a consumer group.

The group shares out the topic's partitions to the processes that have the source, so that each
partition has one reader. Offsets are committed behind records that are done with, explicitly. The
library is synchronous, so each call is made in a thread, one at a time; its callbacks come within
these calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from confluent_kafka import Consumer, KafkaException, TopicPartition

from clevrd.core.message_headers import headers_of_record
from clevrd.errors import ConfigError
from clevrd.journal.kafka.leaders import extent_of, fault_about
from clevrd.journal.kafka.library import (
    LOST,
    MISSING,
    KafkaFault,
    Troubles,
    client_properties,
    fault_of,
    sentence_of,
)
from clevrd.journal.kafka.questions import Questions
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.scheduling.beside_loop import in_daemon_thread
from clevrd.sources.progress import Progress
from clevrd.sources.reading import READING, STANDBY, SourceTrouble, Status
from clevrd.sources.records import Record
from clevrd.sources.settings import SourceEntry
from clevrd.sources.starts import EARLIEST, LATEST

log = logging.getLogger(__name__)

# The rights that a user of the cluster has to have.
RIGHTS: Final = "Describe and Read on the topic, and Read on the group"

# Records of one read; bytes that the library fetches ahead.
_MAX_COUNT: Final = 256
_QUEUED_KBYTES: Final = 2_048
_WAIT_S: Final = 0.5
# How long a question to the brokers may take, and how often it is asked whether they are there
# while nothing comes.
_ASK_S: Final = 5.0
_LOOK_S: Final = 3.0
# How long an end waits for the brokers.
_CLOSE_S: Final = 3.0
# Milliseconds after which the brokers give the partitions of a process that is gone to others.
_SESSION_MS: Final = 10_000
# Milliseconds that a commit may take before partitions are given back.
_SOCKET_MS: Final = 10_000
# Names of librdkafka's for a position that the topic has no more, or has not yet.
_OUT_OF_RANGE: Final = frozenset({"_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE", "_LOG_TRUNCATION"})
_TRIMMED: Final = "the topic gave up its oldest records"

T = TypeVar("T")


class KafkaReader:
    """`Reader` of `sources/reading` over a topic of Kafka."""

    def __init__(self, entry: SourceEntry, settings: KafkaSettings, progress: Progress) -> None:
        """Make a reader.

        Raises:
            ConfigError: a property or a file can't be used.
        """
        self._topic = entry.place.stream
        self._group = entry.group_name
        self._start = entry.beginning
        self._shown = settings.shown
        self._progress = progress
        self._settings = settings
        self._troubles = Troubles()
        # Set by open, None after close. Used in one thread at a time.
        self._consumer: Any = None
        # The offset behind what is done with, by partition, of those that are this process's; and
        # those of them that are not committed yet. Changed while no call is under way, or by
        # callbacks within a call.
        self._next: dict[int, int] = {}
        self._dirty: set[int] = set()
        # Records that were returned and are not done with, and by partition the offset behind the
        # last one; the latter is changed where `_next` is.
        self._under_way = 0
        self._ahead: dict[int, int] = {}
        # Whether the group has said which partitions are this process's.
        self._is_assigned = False
        self._is_paused = False
        # The topic was seen missing, or is another one, so all its records are new; of another one
        # the group knows nothing, whatever it has kept.
        self._was_missing = self._is_another = False
        # The topic's id, as it was seen last; empty before that, and where it was missing.
        self._topic_id = ""
        # Set by open, None after close.
        self._questions: Questions | None = None
        # Records that came while others waited.
        self._held: list[Any] = []
        self._looked_s = 0.0
        self.status: Status | None = None
        # A mistake in a property is one of the configuration, and told before the start.
        self._make().close()

    # --- Reader ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Join the group."""
        self._next.clear()
        self._dirty.clear()
        self._held.clear()
        self._ahead.clear()
        self._under_way = 0
        self._is_assigned = self._is_paused = False
        # Nothing is asked yet: the first read finds out whether the brokers, the topic and the
        # group are there for this user.
        self.status, self._looked_s = None, 0.0
        self._consumer = self._make()
        self._questions = Questions(self._settings, self._troubles)
        try:
            await self._in_thread(self._subscribe)
        except KafkaFault as fault:
            raise self._trouble(fault) from fault

    async def read(self) -> Sequence[Record]:
        """Return the next records; wait for one, at most about half a second."""
        try:
            messages = await self._in_thread(self._read)
            if messages:
                self.status = READING
            elif not self._under_way:
                await self._look()
            for message in messages:
                self._ahead[message.partition()] = message.offset() + 1
            self._under_way += len(messages)
            return [_record_of(message) for message in messages]
        except KafkaFault as fault:
            raise self._trouble(fault) from fault

    def done(self, records: Sequence[Record]) -> None:
        """Note that these are done with."""
        for record in records:
            partition, _, offset = record.position.partition(":")
            if int(partition) in self._next:
                self._next[int(partition)] = int(offset) + 1
                self._dirty.add(int(partition))
        if records:
            self._progress.position = records[-1].position
            self._under_way -= len(records)
            if not self._under_way:
                self._ahead.clear()

    async def hold(self) -> None:
        """Stay a member of the group, without reading on."""
        try:
            await self._in_thread(self._poll_paused)
        except KafkaFault as fault:
            raise self._trouble(fault) from fault

    async def close(self) -> None:
        """Commit what is done with, and leave the group."""
        consumer, self._consumer = self._consumer, None
        questions, self._questions = self._questions, None
        try:
            # The group is left first: questions may wait for a broker that is away.
            if consumer is not None:
                await self._leave(consumer)
        finally:
            if questions is not None:
                await questions.close()

    async def _leave(self, consumer: Any) -> None:
        def leave() -> None:
            with suppress(KafkaException, KafkaFault, RuntimeError):
                self._commit(consumer, waits=True)
            with suppress(KafkaException, RuntimeError):
                consumer.close()

        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await in_daemon_thread(leave, asyncio.get_running_loop(), "clevrd-source")

    # --- in the thread ---------------------------------------------------------------------------

    async def _in_thread(self, call: Callable[[Any], T]) -> T:
        """Run ``call`` with the consumer beside the loop; raises KafkaFault."""
        consumer = self._consumer
        if consumer is None:
            raise KafkaFault(LOST, "the connection is closed")
        loop = asyncio.get_running_loop()
        try:
            return await in_daemon_thread(lambda: call(consumer), loop, "clevrd-source")
        except (KafkaException, RuntimeError) as error:
            raise fault_of(error) from error

    def _make(self) -> Any:
        properties = {
            # Properties that the settings may change.
            "session.timeout.ms": _SESSION_MS,
            "socket.timeout.ms": _SOCKET_MS,
            "fetch.wait.max.ms": 500,
            **client_properties(self._settings, self._troubles),
            "group.id": self._group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "allow.auto.create.topics": False,
            "on_commit": self._committed,
            "fetch.error.backoff.ms": 100,
            "queued.max.messages.kbytes": _QUEUED_KBYTES,
        }
        try:
            return Consumer(properties)
        except (KafkaException, ValueError, TypeError) as error:
            text = fault_of(error).text or str(error)
            raise ConfigError(f"The properties for Kafka can't be used: {text}.") from error

    def _subscribe(self, consumer: Any) -> None:
        consumer.subscribe([self._topic], on_assign=self._assigned, on_revoke=self._revoked)

    def _read(self, consumer: Any) -> list[Any]:
        """Commit what is done with, and return the messages that come."""
        self._commit(consumer)
        if self._is_paused:
            consumer.resume(self._own())
            self._is_paused = False
        if self._held:
            held, self._held = self._held, []
            return held
        return self._consume(consumer, _MAX_COUNT, 0.0 if self._under_way else _WAIT_S)

    def _poll_paused(self, consumer: Any) -> None:
        if not self._is_paused:
            consumer.pause(self._own())
            self._is_paused = True
        self._held += self._consume(consumer, 1, 0.0)

    def _consume(self, consumer: Any, count: int, timeout_s: float) -> list[Any]:
        messages = []
        try:
            found = consumer.consume(count, timeout_s)
        except KafkaFault as fault:
            # It is of `_assigned`, in which the brokers can't be asked anew.
            raise fault_about(consumer, self._topic, fault) from fault
        for message in found:
            error = message.error()
            if error is None:
                messages.append(message)
            elif error.name() in _OUT_OF_RANGE and message.partition() in self._next:
                self._find_again(consumer, message.partition())
            else:
                raise fault_of(error)
        self._note_lag(consumer, messages)
        return messages

    def _commit(self, consumer: Any, *, waits: bool = False) -> None:
        """Have the group keep what is done with, and with ``waits`` wait until it has it."""
        dirty = [each for each in self._dirty if each in self._next]
        self._dirty.clear()
        if not dirty:
            return
        offsets = [TopicPartition(self._topic, each, self._next[each]) for each in dirty]
        try:
            consumer.commit(offsets=offsets, asynchronous=not waits)
        except KafkaException as error:
            self._committed(error.args[0], offsets)

    def _committed(self, error: Any, _offsets: Any) -> None:
        """Log what the group did not keep; the records are read again, and known by their keys.

        Their partitions are another process's by now, or the brokers are away.
        """
        if error is not None:
            log.info("offsets not committed group=%s reason=%s", self._group, fault_of(error))

    def _own(self) -> list[TopicPartition]:
        return [TopicPartition(self._topic, each) for each in self._next]

    # --- partitions ------------------------------------------------------------------------------

    def _assigned(self, consumer: Any, partitions: Sequence[TopicPartition]) -> None:
        """Begin to read partitions, in a callback of the library's.

        An exception of the library's own does not come through it whole: what `consume` raises then
        is no exception to Python 3.11, which no `except` catches, and whose thread ends unheard.
        """
        try:
            self._begin(consumer, partitions)
        except KafkaException as error:
            raise fault_of(error) from error

    def _begin(self, consumer: Any, partitions: Sequence[TopicPartition]) -> None:
        """Begin to read partitions where the group is; where it has not been, as it is told."""
        self._is_assigned = True
        found = consumer.committed(list(partitions), timeout=_ASK_S) if partitions else []
        fresh = []
        for each in found:
            if each.error is not None:
                raise KafkaException(each.error)
            low, high = consumer.get_watermark_offsets(each, timeout=_ASK_S)
            if each.offset < 0 or self._is_another:
                each.offset = self._first_offset(consumer, each, low, high)
                fresh.append(each)
            else:
                each.offset = self._within(each.offset, low, high)
            self._next[each.partition] = each.offset
        consumer.assign(found)
        if fresh:
            # Positions of new partitions are kept at once, so that a restart before their first
            # record goes on here.
            self._dirty.update(each.partition for each in fresh)
            self._commit(consumer, waits=True)
        if found:
            self._was_missing = self._is_another = False
        log.info(
            "source has partitions group=%s topic=%s partitions=%s",
            self._group,
            self._topic,
            sorted(self._next),
        )

    def _revoked(self, consumer: Any, partitions: Sequence[TopicPartition]) -> None:
        self._commit(consumer, waits=True)
        for each in partitions:
            self._next.pop(each.partition, None)
            self._ahead.pop(each.partition, None)
        self._held = [each for each in self._held if each.partition() in self._next]

    def _first_offset(self, consumer: Any, place: TopicPartition, low: int, high: int) -> int:
        start = self._start
        if start.end == EARLIEST or self._was_missing:
            return low
        if start.end == LATEST:
            return high
        if start.since_ms is not None:
            asked = TopicPartition(self._topic, place.partition, start.since_ms)
            (found,) = consumer.offsets_for_times([asked], timeout=_ASK_S)
            if found.error is not None:
                raise KafkaException(found.error)
            return high if found.offset < 0 else int(found.offset)
        return min(max(int(start.position), low), high)

    def _within(self, offset: int, low: int, high: int) -> int:
        """Return where to go on that was at ``offset``; count what is gone."""
        if offset < low:
            self._progress.note_lost(low - offset, _TRIMMED)
            return low
        if offset > high and self._was_missing:
            # The topic was made anew, and the group has kept what it knew of the old one.
            return low
        if offset > high:
            self._progress.note_lost(None, "the topic is shorter than it was")
            return high
        return offset

    def _find_again(self, consumer: Any, partition: int) -> None:
        """Go on where the topic has records, since it has none at the position."""
        place = TopicPartition(self._topic, partition)
        low, high = extent_of(consumer, place, _ASK_S)
        # Records that are under way there move the position when they are done with.
        offsets = self._ahead if partition in self._ahead else self._next
        place.offset = offsets[partition] = self._within(offsets[partition], low, high)
        consumer.seek(place)

    def _note_lag(self, consumer: Any, messages: Sequence[Any]) -> None:
        if not self._next:
            self._progress.lag = None
            return
        ahead = {**self._next, **self._ahead}
        for message in messages:
            ahead[message.partition()] = message.offset() + 1
        lag = self._under_way + len(messages)
        for partition, offset in ahead.items():
            place = TopicPartition(self._topic, partition)
            _, high = consumer.get_watermark_offsets(place, cached=True)
            lag += max(0, high - offset)
        self._progress.lag = lag

    # --- trouble ---------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Ask now and then whether the brokers and the topic are there; raises KafkaFault."""
        if self.status is None or self.status[0] != "away":
            self.status = self._standing()
        loop = asyncio.get_running_loop()
        if loop.time() - self._looked_s < _LOOK_S:
            return
        self._looked_s = loop.time()
        try:
            found = None if self._questions is None else await self._questions.topic_id(self._topic)
        except KafkaFault as fault:
            trouble = self._trouble(fault)
            if trouble.state != "away":
                raise
            # The library connects again by itself, and stays the member of the group that it is.
            self._progress.errors += 1
            self.status = (trouble.state, str(trouble))
            return
        if found is None:
            raise KafkaFault(MISSING, "")
        self._note_topic(found)
        self.status = self._standing()

    def _note_topic(self, topic_id: str) -> None:
        """Raise SourceTrouble if the topic is another one, so that it is read from its beginning.

        The consumer goes on at its offset, as if nothing had happened, if the topic has it.
        """
        known, self._topic_id = self._topic_id, topic_id
        if known not in ("", topic_id):
            self._was_missing = self._is_another = True
            raise SourceTrouble(
                "missing",
                f"The topic in Kafka at {self._shown} was made anew; it is read from its"
                " beginning.",
                soon=True,
            )

    def _standing(self) -> Status | None:
        """Return whether this process reads, where the group has said so."""
        if not self._is_assigned:
            return None
        return READING if self._next else STANDBY

    def _trouble(self, fault: KafkaFault) -> SourceTrouble:
        if fault.code == MISSING:
            self._was_missing, self._topic_id = True, ""
            return SourceTrouble(
                "missing",
                f"Kafka at {self._shown} has no such topic; it is read from its beginning as soon"
                " as there is one.",
                soon=True,
            )
        fault = self._troubles.reason_for(fault)
        if fault.code.endswith("AUTHORIZATION_FAILED"):
            return SourceTrouble(
                "refused",
                f"Kafka at {self._shown} does not allow its user what a source needs"
                f" ({fault.text.rstrip('.')}); it is: {RIGHTS}.",
            )
        sentence = sentence_of(fault, self._shown).replace("[journal.kafka]", "kafka")
        return SourceTrouble(
            "refused" if fault.is_final else "away", sentence.replace("the journal", "a source")
        )


def _record_of(message: Any) -> Record:
    try:
        headers = {name: value or b"" for name, value in message.headers() or ()}
    except UnicodeDecodeError:
        # Kafka takes any bytes for a header's name, and the library hands over none of them then.
        headers = None
    value = message.value()
    return Record(
        f"{message.partition()}:{message.offset()}",
        value,
        message.key(),
        headers=headers,
        # CloudEvents Kafka binding §3.2.3: values are UTF-8 as they are.
        carried=headers_of_record(headers, "ce_", is_encoded=False) if headers else None,
        is_deletion=value is None,
    )
