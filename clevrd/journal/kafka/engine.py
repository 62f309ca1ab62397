"""KafkaEngine: the journal that several nodes share, in one topic of Kafka's, as a node sees it.

A record's position is its offset and one. Kafka takes any record; which ones count is decided by
what the log says of each, alike on all nodes (`stamps`). An append looks whether its own counts.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from clevrd.core.publish_request import decode_logged
from clevrd.errors import InvalidRequest, JournalUnavailable
from clevrd.journal.base import Checkpoint, Fenced, Placed, TailLost, Trimmed
from clevrd.journal.kafka.appending import Appender
from clevrd.journal.kafka.checkpoints import CheckpointStore, Entry
from clevrd.journal.kafka.library import (
    LOST,
    MISSING,
    TOO_LARGE,
    KafkaFault,
    Troubles,
    failed,
    sentence_of,
    too_large,
)
from clevrd.journal.kafka.questions import Questions
from clevrd.journal.kafka.reading import TICK_S, Arrived, LogReader, OutOfRange
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.kafka.stamps import is_of_topic, is_void, spell_stamp, stamp_in
from clevrd.journal.kafka.topic_state import (
    TopicState,
    checkpoints_config,
    refusal_of,
    refusal_of_checkpoints,
    topic_config,
    warnings_of,
)
from clevrd.journal.kept_checkpoints import FILL_BYTES
from clevrd.journal.records import is_foreign
from clevrd.journal.unseen_append import UnseenAppend

log = logging.getLogger(__name__)

# How long a start waits for a cluster that is not up yet.
START_S: Final = 20.0
_START_RETRY_S: Final = 0.3
# A topic that was just made is looked for so often, so long after each other.
_HEARD_TRIES: Final = 20
_HEARD_S: Final = 0.1
# The topic's id is asked for so often, and its configuration each so many times.
_LOOK_S: Final = 1.0
_LOOKS_FOR_CONFIG: Final = 30
# Looks after which an appended record should have been read by a reader that waits.
_DEAF_LOOKS: Final = 5
# An append that took longer may have been sent again, after a change of leaders: librdkafka waits
# 80 ms or more before it does that.
_SLOW_S: Final = 0.05
# Bytes of a record, as long as none was read.
_GUESSED_BYTES: Final = 1_000


class _Partition:
    """One partition's log."""

    def __init__(self, number: int) -> None:
        self.number = number
        # The leader's epoch of the newest record that is known.
        self.leader_epoch = 0
        # All records with this stamp before this offset count.
        self.proven_stamp = ""
        self.proven_end = 0
        self.proving = asyncio.Lock()
        # The offset behind the last record of this engine that was taken.
        self.unseen = UnseenAppend(_DEAF_LOOKS)
        # Records and bytes that were read, for their mean.
        self.records = 0
        self.bytes = 0

    @property
    def record_bytes(self) -> int:
        """Bytes of a record in the mean; 0 if none was read."""
        return self.bytes // self.records if self.records else 0


class KafkaEngine:
    """Engine of `journal/base` over a topic of Kafka's."""

    name = "kafka"
    keeps_topics = False
    is_shared = True
    # Nodes hear of themselves by empty records anyway.
    is_unsure = False
    # Consumers are given no record that is not on all replicas in sync.
    answers_when_taken = False
    # A broker has more to do for a record than other servers: beside one on the same two cores the
    # p50 of 20,000 messages a second is 12, 14 and 19 ms at 8, 4 and 2 ms.
    max_apart_s = 0.008

    def __init__(self, settings: KafkaSettings) -> None:
        """Make an engine; `open` connects it."""
        self.partitions = settings.partitions
        # The durability of the topic as it was seen last.
        self.durability = "memory"
        self._settings = settings
        self._topic = settings.address.topic
        # Tells this engine from those of other nodes.
        self._name = secrets.token_hex(8)
        self._partitions = [_Partition(number) for number in range(settings.partitions)]
        self._troubles = Troubles()
        # Set by open; None before it and after close.
        self._questions: Questions | None = None
        self._appender: Appender | None = None
        self._reader: LogReader | None = None
        self._stores: list[CheckpointStore] = []
        # The topic as it was last seen; None while it has to be asked about.
        self._state: TopicState | None = None
        # The id of the topic that is read.
        self._topic_id = ""
        self._looking = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    # --- Engine ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and check that this is a Kafka, and a topic, that can be used.

        Raises:
            ConfigError: a property or a file can't be used.
            JournalUnavailable: with a sentence that says what to do.
        """
        loop = asyncio.get_running_loop()
        settings, troubles = self._settings, self._troubles
        questions = self._questions = Questions(settings, troubles)
        appender = self._appender = Appender(settings, troubles, loop)
        self._reader = LogReader(settings, troubles, loop, self._judge)
        self._stores = [
            CheckpointStore(
                questions,
                partial(appender.append, settings.address.checkpoints),
                settings.address.checkpoints,
                each.number,
                self.partitions,
                self._name,
            )
            for each in self._partitions
        ]
        try:
            await self._check_until(loop.time() + START_S, loop)
        except BaseException:
            await self.close()
            raise
        self._tasks.append(loop.create_task(self._look_over()))
        self._tasks.append(loop.create_task(self._tick(self._reader)))

    async def stamp(self, partition: int) -> str:
        """Return the incarnation of what accepts records now."""
        state = await self._known_state()
        each = self._partitions[partition]
        return spell_stamp(state.topic_id, each.leader_epoch, is_kept=state.is_kept)

    async def append(
        self, partition: int, record: bytes, stamp: str, placed: Sequence[Placed]
    ) -> None:
        """Append ``record``: see `Engine.append`."""
        _, appender, reader = self._opened()
        if self._state is None:
            await self._known_state()
        state = self._state
        each = self._partitions[partition]
        if state is None or stamp != spell_stamp(
            state.topic_id, each.leader_epoch, is_kept=state.is_kept
        ):
            raise Fenced
        loop = asyncio.get_running_loop()
        sent_s, read_end = loop.time(), reader.end_of(partition)
        is_read = reader.is_reading(partition)
        taken = appender.append(self._topic, partition, record, is_read=is_read)
        if is_read:
            reader.expect(partition, record, taken)
        try:
            offset = await taken
        except KafkaFault as fault:
            raise self._append_error(fault, len(record)) from fault
        if offset < read_end:
            # The record is in a place that was read before: the topic is another one, or has lost
            # its end.
            self._state = None
            raise JournalUnavailable(
                f"The topic at {self._settings.shown} is shorter than it was; it is looked at anew."
            )
        each.unseen.position = max(each.unseen.position, offset + 1)
        is_slow = loop.time() - sent_s >= _SLOW_S
        if not await self._counts(each, offset, stamp, is_slow=is_slow):
            raise Fenced

    async def read(self, partition: int, after: int) -> list[tuple[int, bytes]]:
        """Return the next records behind ``after``; wait for one."""
        _, _, reader = self._opened()
        try:
            found = await reader.read(partition, after)
        except KafkaFault as fault:
            if fault.code == MISSING:
                self._state = None
            raise failed(self._troubles.reason_for(fault), self._settings.shown) from fault
        except OutOfRange as error:
            await self._judge_range(partition, after, error)
            raise Trimmed from error
        each = self._partitions[partition]
        each.records += len(found)
        each.bytes += sum(len(record) for _, record in found)
        return [(offset + 1, record) for offset, record in found]

    async def first(self, partition: int) -> int:
        """Return the oldest record's position; 1 where the log has its very first one."""
        first, _ = await self._extent(partition)
        return first + 1

    async def is_short(self, partition: int) -> bool:
        """Return whether the log has its first record, and takes FILL_BYTES at most."""
        first, end = await self._extent(partition)
        if first:
            return False
        entries = await self._entries(partition)
        known = self._partitions[partition].record_bytes
        record_bytes = known or (entries[0].record_bytes if entries else 0) or _GUESSED_BYTES
        return end * record_bytes <= FILL_BYTES

    async def digest(self, partition: int, position: int) -> str | None:
        """Return the CRC-32 of the record at ``position``; None if it is gone."""
        if position < 1:
            return None
        questions, _, _ = self._opened()
        try:
            found = await questions.record(self._topic, partition, position - 1)
        except KafkaFault as fault:
            raise failed(fault, self._settings.shown) from fault
        return None if found is None else f"{zlib.crc32(found.value):08x}"

    async def load_checkpoints(self, partition: int) -> list[Checkpoint]:
        """Return the whole checkpoints that are kept, newest first."""
        state = await self._known_state()
        try:
            return await self._stores[partition].load(state.topic_id)
        except KafkaFault as fault:
            raise failed(fault, self._settings.shown) from fault

    async def save_checkpoint(self, partition: int, checkpoint: Checkpoint) -> None:
        """Keep ``checkpoint``, unless another node has just saved one."""
        state = await self._known_state()
        record_bytes = self._partitions[partition].record_bytes
        reach = FILL_BYTES // (record_bytes or _GUESSED_BYTES)
        try:
            await self._stores[partition].save(checkpoint, state.topic_id, reach, record_bytes)
        except KafkaFault as fault:
            raise failed(fault, self._settings.shown) from fault

    def history(self) -> None:
        """Return None: nodes read the log alone."""

    def storage(self) -> None:
        """Return None: it has no files of its own."""

    async def close(self) -> None:
        """End all clients; a second call does nothing."""
        questions, self._questions = self._questions, None
        if questions is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        ends = [questions.close()]
        if self._reader is not None:
            ends.append(self._reader.close())
        if self._appender is not None:
            ends.append(self._appender.close())
        await asyncio.gather(*ends, return_exceptions=True)

    # --- appends ---------------------------------------------------------------------------------

    def _opened(self) -> tuple[Questions, Appender, LogReader]:
        if self._questions is None or self._appender is None or self._reader is None:
            raise JournalUnavailable("The journal is closed.")
        return self._questions, self._appender, self._reader

    def _append_error(self, fault: KafkaFault, size_bytes: int) -> Exception:
        _, appender, _ = self._opened()
        appender.note_fault(fault)
        if fault.code == TOO_LARGE:
            return too_large(appender.max_record_bytes, size_bytes)
        if fault.code == MISSING:
            self._state = None
        return failed(self._troubles.reason_for(fault), self._settings.shown)

    async def _counts(self, each: _Partition, offset: int, stamp: str, *, is_slow: bool) -> bool:
        """Return whether the record at ``offset``, which was just taken, counts.

        Raises:
            JournalUnavailable: that can't be found out.
        """
        _, _, reader = self._opened()
        if reader.is_reading(each.number):
            # One that does not come within a second is looked up alone.
            if await reader.arrives(each.number, offset):
                return not reader.is_void(each.number, offset)
        elif each.proven_stamp == stamp and not is_slow:
            return True
        async with each.proving:
            if each.proven_stamp == stamp and offset < each.proven_end:
                return True
            # Leaders' epochs rise with offsets, so one record shows it for all before it.
            end = each.unseen.position
            if await self._is_proof(each, end - 1, stamp):
                each.proven_stamp, each.proven_end = stamp, end
                return True
            return offset != end - 1 and await self._is_proof(each, offset, stamp)

    async def _is_proof(self, each: _Partition, offset: int, stamp: str) -> bool:
        """Return whether the record at ``offset`` has ``stamp``, and counts."""
        questions, _, _ = self._opened()
        try:
            found = await questions.record(self._topic, each.number, offset)
        except KafkaFault as fault:
            raise failed(fault, self._settings.shown) from fault
        if found is None:
            self._state = None
            return False
        self._note_leader(each, found.leader_epoch)
        is_its = stamp_in(found.value) == stamp
        return is_its and not is_void(found.value, self._topic_id, found.leader_epoch)

    def _judge(self, arrived: Arrived) -> bool:
        """Return whether a record that is read counts; called of each, on the loop."""
        each = self._partitions[arrived.partition]
        epoch = arrived.leader_epoch
        self._note_leader(each, epoch)
        if not is_void(arrived.value, self._topic_id, epoch):
            return True
        if not is_of_topic(arrived.value, self._topic_id):
            # The record may be of a topic that has taken the place of the one that is read.
            self._state = None
        log.debug("void record partition=%d offset=%d", arrived.partition, arrived.offset)
        return False

    def _note_leader(self, each: _Partition, epoch: int | None) -> None:
        if epoch is not None and epoch > each.leader_epoch:
            each.leader_epoch = epoch

    # --- reads -----------------------------------------------------------------------------------

    async def _judge_range(self, partition: int, after: int, error: OutOfRange) -> None:
        """Raise TailLost unless the topic is another one, or begins behind ``after``.

        It may end behind ``after`` again by now: others append.
        """
        topic_id = self._topic_id
        self._state = None
        await self._known_state()
        if self._topic_id != topic_id:
            return
        first, _ = await self._extent(partition)
        if after >= first:
            raise TailLost from error

    async def _extent(self, partition: int) -> tuple[int, int]:
        questions, _, _ = self._opened()
        try:
            return await questions.extent(self._topic, partition)
        except KafkaFault as fault:
            raise failed(fault, self._settings.shown) from fault

    async def _entries(self, partition: int) -> Sequence[Entry]:
        state = await self._known_state()
        try:
            return await self._stores[partition].entries(state.topic_id)
        except KafkaFault as fault:
            raise failed(fault, self._settings.shown) from fault

    # --- the topic -------------------------------------------------------------------------------

    async def _known_state(self) -> TopicState:
        """Return the topic as it is, asked about again where something has shown a need of it."""
        state = self._state
        if state is not None:
            return state
        async with self._looking:
            if self._state is not None:
                return self._state
            try:
                return await self._look()
            except KafkaFault as fault:
                raise failed(fault, self._settings.shown) from fault

    async def _look(self) -> TopicState:
        """Ask about the topic, and make it where it is missing; return it. Raises KafkaFault."""
        settings = self._settings
        checkpoints, partitions = settings.address.checkpoints, 2 * self.partitions
        config = topic_config(settings)
        state = await self._ensure(self._topic, self.partitions, settings.replicas, config)
        refusal = refusal_of(state, settings)
        if refusal is None:
            # The topic of checkpoints has as many copies as the log's, whoever made that: a start
            # needs both.
            replicas = settings.replicas or state.replicas
            config = checkpoints_config(settings, state)
            beside = await self._ensure(checkpoints, partitions, replicas, config)
            refusal = refusal_of_checkpoints(beside, checkpoints, partitions, settings)
        if refusal is not None:
            raise JournalUnavailable(refusal)
        if state.topic_id != self._topic_id:
            self._begin(state)
        self._state, self.durability = state, state.durability
        return state

    async def _ensure(
        self,
        name: str,
        partitions: int,
        replicas: int,
        config: Mapping[str, str],
    ) -> TopicState:
        questions, _, _ = self._opened()
        state = await questions.topic(name)
        if state is None:
            log.warning("making the kafka topic name=%s partitions=%d", name, partitions)
            await questions.make_topic(name, partitions, replicas, config)
            # The brokers have yet to hear of it.
            for _ in range(_HEARD_TRIES):
                state = await questions.topic(name)
                if state is not None:
                    break
                await asyncio.sleep(_HEARD_S)
        if state is None:
            raise KafkaFault(LOST, f"the topic {name} was made, and is not there yet")
        return state

    def _begin(self, state: TopicState) -> None:
        """Go over to a topic that was not read before: at the start, or since it was made again."""
        _, appender, reader = self._opened()
        if self._topic_id:
            log.warning("the kafka topic is another one id=%s", state.topic_id)
        self._topic_id = state.topic_id
        appender.renew(state.max_record_bytes)
        for each in self._partitions:
            each.leader_epoch = 0
            each.unseen.forget()
            each.proven_stamp = ""
        reader.renew(KafkaFault("OFFSET_OUT_OF_RANGE", "the topic was made again"))

    # --- at the start ----------------------------------------------------------------------------

    async def _check_until(self, until_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """Check all, again and again as long as what is wrong may pass by itself."""
        is_told = False
        while True:
            try:
                await self._check()
                return
            except KafkaFault as fault:
                if fault.is_final or loop.time() >= until_s:
                    raise JournalUnavailable(sentence_of(fault, self._settings.shown)) from fault
                if not is_told:
                    log.warning(
                        "waiting for kafka reason=%r", sentence_of(fault, self._settings.shown)
                    )
                    is_told = True
            await asyncio.sleep(_START_RETRY_S)

    async def _check(self) -> None:
        questions, _, _ = self._opened()
        state = await self._look()
        for warning in warnings_of(state, self._settings):
            log.warning("look at the journal's service why=%r", warning)
        for each in self._partitions:
            found = await questions.last_record(self._topic, each.number)
            if found is None:
                continue
            self._note_leader(each, found.leader_epoch)
            entries = await self._stores[each.number].entries(state.topic_id)
            if not entries and not _is_publish(found.value):
                raise JournalUnavailable(
                    f"The topic at {self._settings.shown} has records that are no publish objects,"
                    " so it is no journal; name another topic."
                )

    # --- all the time ----------------------------------------------------------------------------

    async def _tick(self, reader: LogReader) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            reader.tick()

    async def _look_over(self) -> None:
        """Notice a topic that was made again, and a reader that hears nothing."""
        looks = 0
        while True:
            await asyncio.sleep(_LOOK_S)
            looks += 1
            try:
                await self._look_at_topic(is_whole=looks % _LOOKS_FOR_CONFIG == 0)
                self._look_for_deaf()
            except (JournalUnavailable, KafkaFault) as error:
                log.debug("kafka topic not seen reason=%s", error)
            except Exception:
                # The next look is to come in any case.
                log.exception("kafka topic not seen")

    async def _look_at_topic(self, *, is_whole: bool) -> None:
        questions, _, _ = self._opened()
        if self._state is not None and not is_whole:
            if await questions.topic_id(self._topic) == self._topic_id:
                return
            self._state = None
        if self._state is None:
            await self._known_state()
            return
        # The state that is known stays until there is an answer: appends need it, and no answer may
        # come for as long as a broker is away.
        async with self._looking:
            try:
                await self._look()
            except JournalUnavailable:
                self._state = None
                raise

    def _look_for_deaf(self) -> None:
        _, _, reader = self._opened()
        for each in self._partitions:
            is_waiting = reader.is_reading(each.number)
            if each.unseen.is_deaf(reader.end_of(each.number), is_waiting=is_waiting):
                log.warning("kafka consumer made again partition=%d", each.number)
                reader.renew()
                return


def _is_publish(record: bytes) -> bool:
    """Return whether a record is a node's, or a foreign producer's publish."""
    if not is_foreign(record):
        return True
    try:
        decode_logged(record)
    except InvalidRequest:
        return False
    return True
