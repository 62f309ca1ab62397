"""Node: writes this process's messages into the log, reads the log, and delivers what it counts.

A message has its place when its record comes back from the log, so that all nodes find the same
order. How records are counted is decided in `fold`, and what a record holds in `batches`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Final, Protocol

from clevrd.core.journal_place import JournalPlace, TopicStart
from clevrd.core.message_ids import MessageIds, rfc3339
from clevrd.core.publish_request import PublishRequest, decode_publish
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, InvalidRequest, JournalUnavailable, ShuttingDown
from clevrd.journal.base import Engine, Fenced, Placed
from clevrd.journal.batches import Batch, MakeAnswer, Pending, Stamp, take_batch
from clevrd.journal.fold import Fold, Folded, partition_of, topic_epoch

log = logging.getLogger(__name__)

# Bytes of messages that may wait for their place in one partition; publishes beyond wait for room.
MAX_PENDING_BYTES: Final = 8 << 20
# How long a record that does not come back is sent again before its publishers hear of it.
GIVE_UP_S: Final = 5.0
# How long the node waits before it asks an engine again that is away; the wait doubles up to the
# second figure.
RETRY_S: Final = 0.05
MAX_RETRY_S: Final = 1.0
# A checkpoint is made after so long, or so many records.
CHECKPOINT_S: Final = 10.0
CHECKPOINT_RECORDS: Final = 10_000
# How long a start waits for the end of the log.
START_S: Final = 600.0


class Deliverer(Protocol):
    """Takes messages whose place in their topic is known for good."""

    def deliver(
        self, topic: Topic, offset: int, requests: Sequence[PublishRequest], stamps: Sequence[Stamp]
    ) -> None:
        """Append ``topic``'s messages from ``offset`` on; readers are offered them soon."""

    async def room(self, topic: Topic) -> None:
        """Wait until ``topic`` takes another run of messages."""


class Topics(Protocol):
    """The topics that are in use."""

    def find(self, tenant: str, name: str) -> Topic | None:
        """Return the topic, None when it is not in use."""

    def begin_anew(self, partition: int) -> None:
        """Let all topics of ``partition`` that are in use begin the epoch that it has now."""


class Figures:
    """Counters of a node; they only rise."""

    __slots__ = ("failed", "fenced", "foreign", "messages", "records", "retries", "unreadable")

    def __init__(self) -> None:
        # Records of this node that came back, and their messages.
        self.records = 0
        self.messages = 0
        # Records that were sent again, and messages that were given up.
        self.retries = 0
        self.failed = 0
        # Records of this node that met another stamp of the log.
        self.fenced = 0
        # Records of foreign producers, and records that could not be read.
        self.foreign = 0
        self.unreadable = 0


class _Partition:
    """One partition: its fold, and this node's messages on their way into it."""

    __slots__ = (
        "batch",
        "come_back",
        "fold",
        "has_pending",
        "number",
        "pending",
        "pending_bytes",
        "records_at_checkpoint",
        "records_folded",
        "sequence",
        "undelivered",
        "waiters",
    )

    def __init__(self, number: int, fold: Fold, come_back: asyncio.Future[None]) -> None:
        self.number = number
        self.fold = fold
        # Publishes that are in no record yet, in the order of arrival.
        self.pending: deque[Pending] = deque()
        # Bytes of these, and of the record that is on its way.
        self.pending_bytes = 0
        self.has_pending = asyncio.Event()
        # The record that is on its way: its publishes, its sequence, and whether it came back.
        self.batch: Batch | None = None
        self.sequence = 0
        self.come_back = come_back
        # Publishes that wait for pending_bytes to fall, in the order of arrival.
        self.waiters: deque[asyncio.Future[None]] = deque()
        # Topics whose messages are counted and not delivered yet, with the first one's offset.
        self.undelivered: dict[tuple[str, str], int] = {}
        self.records_folded = 0
        self.records_at_checkpoint = 0


class Node:
    """One process's part in the log."""

    def __init__(
        self,
        engine: Engine,
        topics: Topics,
        deliverer: Deliverer,
        loop: asyncio.AbstractEventLoop,
        wall_us: Callable[[], int],
        count_background_error: Callable[[], None],
        *,
        max_run: int,
        keep_keys_s: float,
        max_keys: int,
    ) -> None:
        """Make a node; `start` connects it.

        Args:
            max_run: messages that one topic takes at once.
            keep_keys_s: how long idempotency keys are remembered, by the log's time.
            max_keys: idempotency keys that a partition remembers at most.
        """
        self._engine = engine
        self._topics = topics
        self._deliverer = deliverer
        self._loop = loop
        self._wall_us = wall_us
        self._count_background_error = count_background_error
        self._max_run = max_run
        self.writer = secrets.token_hex(8)
        self.figures = Figures()
        self._spell = MessageIds().spell
        self._is_durable = engine.durability != "os"
        count = engine.partitions
        self._partitions = [
            _Partition(number, Fold(number, count, keep_keys_s, max_keys), loop.create_future())
            for number in range(count)
        ]
        self._tasks: list[asyncio.Task[None]] = []
        # True once no message is accepted any more; set by seal, for good.
        self._is_sealed = False

    # --- publishing ------------------------------------------------------------------------------

    def start_of(self, tenant: str, name: str) -> TopicStart:
        """Return what the topic begins with in this process."""
        partition = self._partition_of(tenant, name)
        fold = partition.fold
        head = partition.undelivered.get((tenant, name), fold.head(tenant, name) + 1) - 1
        return TopicStart(
            topic_epoch(fold.epoch, tenant, name),
            rfc3339(fold.epoch_began_us),
            head,
            JournalPlace(partition.number, fold.epoch, self._is_durable),
        )

    def has_room(self, place: JournalPlace) -> bool:
        """Return whether messages for ``place`` are taken now, and none wait for room."""
        partition = self._partitions[place.partition]
        return partition.pending_bytes < MAX_PENDING_BYTES and not partition.waiters

    async def room_for(self, place: JournalPlace) -> None:
        """Wait until messages for ``place`` are taken, behind all that have waited longer."""
        partition = self._partitions[place.partition]
        waiters = partition.waiters
        me = self._loop.create_future()
        waiters.append(me)
        self._wake_waiters(partition)
        try:
            await me
        except asyncio.CancelledError:
            if me.done() and not me.cancelled():
                self._wake_waiters(partition)
            raise
        finally:
            if me in waiters:
                waiters.remove(me)

    def submit(
        self,
        topic: Topic,
        place: JournalPlace,
        requests: Sequence[PublishRequest],
        make_answer: MakeAnswer,
        key: str | None = None,
    ) -> asyncio.Future[Any]:
        """Have ``requests`` appended to ``topic``; return the answer, which is due.

        Args:
            place: the topic's.
            requests: at most ``max_run`` messages.
            make_answer: called once the messages have their place and are delivered.
            key: an idempotency key, for one message.

        Raises:
            ShuttingDown: after `seal`.
        """
        if self._is_sealed:
            raise ShuttingDown
        partition = self._partitions[place.partition]
        content = "" if key is None else _digest(requests[0])
        answer: asyncio.Future[Any] = self._loop.create_future()
        pending = Pending(topic, requests, make_answer, answer, key, content)
        partition.pending.append(pending)
        partition.pending_bytes += pending.size_bytes
        if partition.batch is None:
            partition.has_pending.set()
        return answer

    @property
    def topics(self) -> int:
        """How many topics the log has messages of."""
        return sum(len(each.fold) for each in self._partitions)

    @property
    def is_busy(self) -> bool:
        """Whether any message waits for its place."""
        return any(each.pending or each.batch is not None for each in self._partitions)

    def seal(self) -> None:
        """Accept no message from here on."""
        self._is_sealed = True

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the engine, and read the log to its end.

        Raises:
            JournalUnavailable: with a sentence that says what to do.
        """
        await self._engine.open()
        try:
            for partition in self._partitions:
                await self._restore(partition)
            self._tasks = [self._spawn(self._read(each)) for each in self._partitions]
            self._tasks += [self._spawn(self._write(each)) for each in self._partitions]
            # An empty record begins the log's epoch, if it is new, and shows where the log ends.
            await asyncio.wait_for(
                asyncio.gather(*(self._send(each, Batch(())) for each in self._partitions)), START_S
            )
        except BaseException:
            await self.crash()
            raise
        self._tasks.append(self._spawn(self._save_checkpoints()))

    async def stop(self) -> None:
        """Save a checkpoint and close the engine; messages on their way fail.

        The caller has sealed the node, and has waited as long as it could while `is_busy`.
        """
        await self._end_tasks()
        for partition in self._partitions:
            try:
                await self._save_checkpoint(partition)
            except ClevrdError as error:
                log.warning("checkpoint not saved reason=%s", error)
        await self._engine.close()

    async def crash(self) -> None:
        """End as a killed process does: without a checkpoint."""
        self.seal()
        await self._end_tasks()
        await self._engine.close()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for partition in self._partitions:
            self._fail_all(partition)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._count_background_error()
            log.error("journal stopped reason=%r", error, exc_info=error)

    async def _restore(self, partition: _Partition) -> None:
        """Go on from the newest checkpoint whose record is still what it was."""
        for checkpoint in await self._engine.load_checkpoints(partition.number):
            found = await self._engine.digest(partition.number, checkpoint.position)
            if found == checkpoint.digest:
                partition.fold.restore(checkpoint)
                return

    # --- writing ---------------------------------------------------------------------------------

    async def _write(self, partition: _Partition) -> None:
        """Send one record at a time, each with all that has come while the last was on its way."""
        while True:
            await partition.has_pending.wait()
            partition.has_pending.clear()
            while partition.pending:
                await self._send(partition, take_batch(partition.pending))

    async def _send(self, partition: _Partition, batch: Batch) -> None:
        """Send ``batch`` until it comes back; fail its publishes after GIVE_UP_S."""
        partition.batch = batch
        partition.come_back = self._loop.create_future()
        try:
            await self._send_until_back(partition, batch)
        except ClevrdError as error:
            self.figures.failed += len(batch.lines)
            batch.fail(error)
            if not batch.lines:
                raise
        finally:
            partition.batch = None
            partition.pending_bytes -= batch.size_bytes
            self._wake_waiters(partition)

    async def _send_until_back(self, partition: _Partition, batch: Batch) -> None:
        until_s = self._loop.time() + GIVE_UP_S
        wait_s = RETRY_S
        number = partition.number
        stamp = await self._engine.stamp(number)
        record, placed = self._record_of(partition, batch, stamp)
        while True:
            try:
                await self._engine.append(number, record, stamp, placed)
                await asyncio.wait_for(asyncio.shield(partition.come_back), GIVE_UP_S)
                return
            except Fenced:
                self.figures.fenced += 1
                stamp = await self._engine.stamp(number)
                record, placed = self._record_of(partition, batch, stamp)
            except (JournalUnavailable, TimeoutError) as error:
                if partition.come_back.done():
                    return
                if self._loop.time() >= until_s:
                    raise JournalUnavailable(
                        "The journal does not answer, so the message may have been accepted, or"
                        " not; send it again with an idempotency_key to have it once."
                    ) from error
                self.figures.retries += 1
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_RETRY_S)

    def _record_of(
        self, partition: _Partition, batch: Batch, stamp: str
    ) -> tuple[bytes, Sequence[Placed]]:
        partition.sequence += 1
        header = batch.header(stamp, self.writer, partition.sequence, self._wall_us())
        return batch.record(header), partition.fold.plan(header)

    def _wake_waiters(self, partition: _Partition) -> None:
        # Whoever is woken appends at once, so one is woken for each record's worth of room.
        waiters = partition.waiters
        room_bytes = MAX_PENDING_BYTES - partition.pending_bytes
        while waiters and room_bytes > 0:
            woken = waiters.popleft()
            if not woken.done():
                woken.set_result(None)
                room_bytes -= MAX_PENDING_BYTES // 32

    def _fail_all(self, partition: _Partition) -> None:
        error = ShuttingDown()
        if partition.batch is not None:
            partition.batch.fail(error)
        for each in partition.pending:
            if not each.answer.done():
                each.answer.set_exception(error)
        partition.pending.clear()

    # --- reading ---------------------------------------------------------------------------------

    async def _read(self, partition: _Partition) -> None:
        """Fold what the log has, as it comes, and deliver it."""
        wait_s = RETRY_S
        while True:
            try:
                records = await self._engine.read(partition.number, partition.fold.position)
            except JournalUnavailable as error:
                log.debug("journal can't be read partition=%d reason=%s", partition.number, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_RETRY_S)
                continue
            wait_s = RETRY_S
            for position, record in records:
                folded = partition.fold.apply(position, record)
                partition.records_folded += 1
                await self._take(partition, folded, record)

    async def _take(self, partition: _Partition, folded: Folded, record: bytes) -> None:
        """Deliver the messages of a record, and answer its publishers if they are this node's."""
        if folded.bad is not None:
            self.figures.unreadable += 1
            log.error(
                "record left out partition=%d position=%d reason=%s",
                partition.number,
                partition.fold.position,
                folded.bad,
            )
            return
        if folded.is_new_epoch:
            self._topics.begin_anew(partition.number)
        batch = None
        if folded.writer == self.writer and folded.sequence == partition.sequence:
            batch = partition.batch
            if not partition.come_back.done():
                partition.come_back.set_result(None)
        if folded.is_retry:
            return
        if batch is None:
            if folded.foreign:
                self.figures.foreign += 1
            await self._deliver_of_others(partition, folded.placed, record)
            return
        self.figures.records += 1
        for placed in folded.placed:
            self.figures.messages += placed.count
            await self._deliver_own(partition, placed, batch)
        for repeat in folded.repeats:
            part = batch.parts[repeat.line]
            self._answer(part, repeat.offset, [self._spell(repeat.id_us, repeat.id_us)], True)
        for line in folded.refused:
            batch.parts[line.line].answer.set_exception(
                InvalidRequest(
                    "The idempotency key was used for another message in this topic;"
                    " use a new key for each new message."
                )
            )

    async def _deliver_own(self, partition: _Partition, placed: Placed, batch: Batch) -> None:
        """Deliver messages of this node, whose requests are at hand, and answer them."""
        topic = self._topics.find(placed.tenant, placed.topic)
        stamps = self._stamps_of(placed)
        line, end = placed.line, placed.line + placed.count
        while line < end:
            part = batch.parts[line]
            count = len(part.requests)
            first = line - placed.line
            offset = placed.offset + first
            own = stamps[first : first + count]
            if topic is not None:
                await self._deliver(partition, topic, placed, offset, part.requests, own)
            self._answer(part, offset, own, False)
            line += count

    async def _deliver_of_others(
        self, partition: _Partition, placed: Sequence[Placed], record: bytes
    ) -> None:
        for each in placed:
            topic = self._topics.find(each.tenant, each.topic)
            if topic is None:
                # Nobody uses it here; the history has its messages.
                continue
            lines = record[each.at_bytes : each.at_bytes + each.size_bytes].splitlines()
            stamps = self._stamps_of(each)
            requests = [decode_publish(line) for line in lines[each.skip : each.skip + each.count]]
            for start in range(0, each.count, self._max_run):
                end = start + self._max_run
                await self._deliver(
                    partition,
                    topic,
                    each,
                    each.offset + start,
                    requests[start:end],
                    stamps[start:end],
                )

    async def _deliver(
        self,
        partition: _Partition,
        topic: Topic,
        placed: Placed,
        offset: int,
        requests: Sequence[PublishRequest],
        stamps: Sequence[Stamp],
    ) -> None:
        slot = (topic.tenant, topic.name)
        partition.undelivered[slot] = offset
        await self._deliverer.room(topic)
        del partition.undelivered[slot]
        # The topic may have been forgotten, and made again behind these messages, meanwhile.
        if topic.ring.head + 1 == offset:
            self._deliverer.deliver(topic, offset, requests, stamps)

    def _stamps_of(self, placed: Placed) -> list[Stamp]:
        spell, time_us, step = self._spell, placed.time_us, placed.id_step
        first = placed.id_us
        return [
            spell(id_us, time_us) for id_us in range(first, first + placed.count * step, step)
        ]

    def _answer(
        self, part: Pending, offset: int, stamps: Sequence[Stamp], is_repeated: bool
    ) -> None:
        if not part.answer.done():
            part.answer.set_result(part.make_answer(part.topic, offset, stamps, is_repeated))

    # --- checkpoints -----------------------------------------------------------------------------

    async def _save_checkpoints(self) -> None:
        jitter_s = secrets.randbelow(1000) / 1000
        while True:
            await asyncio.sleep(CHECKPOINT_S + jitter_s)
            for partition in self._partitions:
                try:
                    await self._save_checkpoint(partition)
                except ClevrdError as error:
                    log.warning("checkpoint not saved reason=%s", error)

    async def _save_checkpoint(self, partition: _Partition) -> None:
        if partition.records_folded == partition.records_at_checkpoint:
            return
        partition.records_at_checkpoint = partition.records_folded
        steps = partition.fold.checkpoint(is_whole=not self._engine.keeps_topics)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                checkpoint = end.value
                break
            await asyncio.sleep(0)
        await self._engine.save_checkpoint(partition.number, checkpoint)

    def _partition_of(self, tenant: str, name: str) -> _Partition:
        return self._partitions[partition_of(tenant, name, len(self._partitions))]


def _digest(request: PublishRequest) -> str:
    """Return what tells a message from another one under the same key."""
    key = b"" if request.key is None else request.key.encode()
    return blake2b(b"%b\0%b" % (bytes(request.data), key), digest_size=8).hexdigest()
