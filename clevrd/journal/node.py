"""Node: writes this process's messages into the log, reads the log, and delivers what it counts.

A message has its place when its record comes back from the log, so that all nodes find the same
order. How records are counted is decided in `fold`, and what a record holds in `batches`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from clevrd.core.journal_place import JournalPlace, TopicStart
from clevrd.core.message_ids import MessageIds, rfc3339
from clevrd.core.publish_request import PublishRequest, decode_publish
from clevrd.core.topic import Topic, newest_epoch_of
from clevrd.errors import (
    ClevrdError,
    InvalidRequest,
    JournalFull,
    JournalUnavailable,
    ShuttingDown,
)
from clevrd.journal.base import Checkpoint, Engine, Fenced, Placed
from clevrd.journal.batches import Batch, MakeAnswer, Pending, Stamp, take_batch
from clevrd.journal.checkpoints import BadCheckpoint
from clevrd.journal.fold import Fold, Folded, topic_epoch
from clevrd.journal.records import content_of, partition_of
from clevrd.metrics.journal import JournalFigures

log = logging.getLogger(__name__)

StepT = TypeVar("StepT")

# Bytes of messages that may wait for their place in one partition; publishes beyond wait for room.
MAX_PENDING_BYTES: Final = 8 << 20
# How long a record that does not come back is sent again before its publishers hear of it.
GIVE_UP_S: Final = 5.0
# How long the node waits before it asks an engine again that is away; the wait doubles up to the
# second figure.
RETRY_S: Final = 0.05
MAX_RETRY_S: Final = 1.0
# Records of a few publishes are so far apart. A record costs 150 us here and in the engine: at
# 20,000 messages a second records that follow each other at once, of 6 messages each, would cost
# three times as much for each message as those of 20.
APART_S: Final = 0.001
FEW: Final = 16
# A checkpoint is made after so long, or so many records.
CHECKPOINT_S: Final = 10.0
CHECKPOINT_RECORDS: Final = 10_000
# How long a start waits for the end of the log.
START_S: Final = 600.0
# States of the journal, as its publishers find it.
OK: Final = "ok"
FULL: Final = "full"
UNAVAILABLE: Final = "unavailable"
# A node begins a new epoch for all at most once in so many seconds.
RESET_EVERY_S: Final = 60.0
# Topics, or keys, are restored in steps; the loop is given to others after so many.
STEPS_PER_TURN: Final = 5


class Deliverer(Protocol):
    """Takes messages whose place in their topic is known for good."""

    def deliver(
        self, topic: Topic, offset: int, requests: Sequence[PublishRequest], stamps: Sequence[Stamp]
    ) -> None:
        """Append ``topic``'s messages from ``offset`` on; readers are offered them soon."""

    def makes_room(self, topic: Topic) -> bool:
        """Return whether ``topic`` takes another run of messages now."""

    async def room(self, topic: Topic) -> None:
        """Wait until it does."""


class Topics(Protocol):
    """The topics that are in use."""

    def find(self, tenant: str, name: str) -> Topic | None:
        """Return the topic, None when it is not in use."""

    def begin_anew(self, partition: int) -> None:
        """Let all topics of ``partition`` that are in use begin the epoch that it has now."""


class Figures:
    """Counters of a node; they only rise."""

    __slots__ = (
        "failed",
        "fenced",
        "foreign",
        "messages",
        "records",
        "resets",
        "retries",
        "rewinds",
        "unreadable",
    )

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
        # Times that the node went back to a checkpoint, since the log had lost what it had read or
        # was counted otherwise by another node; and epochs that it began for all.
        self.rewinds = 0
        self.resets = 0


class _Partition:
    """One partition: its fold, and this node's messages on their way into it."""

    __slots__ = (
        "batch",
        "come_back",
        "fold",
        "is_contradicted",
        "must_reset",
        "must_send",
        "needs_whole",
        "number",
        "pending",
        "pending_bytes",
        "reading",
        "records_at_checkpoint",
        "records_folded",
        "reset_at_s",
        "sent_s",
        "sequence",
        "waiters",
        "woken",
    )

    def __init__(self, number: int, fold: Fold, come_back: asyncio.Future[None]) -> None:
        self.number = number
        self.fold = fold
        # Publishes that are in no record yet, in the order of arrival.
        self.pending: deque[Pending] = deque()
        # Bytes of these, and of the record that is on its way.
        self.pending_bytes = 0
        # Done when there is something to send; None while the writer does not wait for it.
        self.woken: asyncio.Future[None] | None = None
        # An empty record is to be sent.
        self.must_send = False
        # The record that is on its way: its publishes, its sequence, and whether it came back.
        self.batch: Batch | None = None
        self.sequence = 0
        # When the last record with messages was sent, by a clock that counts within a turn.
        self.sent_s = 0.0
        self.come_back = come_back
        # Publishes that wait for pending_bytes to fall, in the order of arrival.
        self.waiters: deque[asyncio.Future[None]] = deque()
        # The task that reads the log; None before the start.
        self.reading: asyncio.Task[None] | None = None
        self.records_folded = 0
        self.records_at_checkpoint = 0
        # The last checkpoint was not taken, so the next one has to be whole.
        self.needs_whole = False
        # Another node has counted otherwise, and the log is being read again; and a new epoch is to
        # begin, since that did not help.
        self.is_contradicted = False
        self.must_reset = False
        # When the node last began a new epoch here, on the loop's clock.
        self.reset_at_s = -RESET_EVERY_S


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
        self._precise_s = time.perf_counter
        self._count_background_error = count_background_error
        self._max_run = max_run
        self._keep_keys_ms = int(keep_keys_s * 1000)
        self._max_keys = max_keys
        self.writer = secrets.token_hex(8)
        self.figures = Figures()
        self._spell = MessageIds().spell
        self._is_durable = engine.durability != "os"
        self._has_history = engine.history() is not None
        count = engine.partitions
        # One for each partition of the log.
        self._partitions = [
            _Partition(number, self._new_fold(number), loop.create_future())
            for number in range(count)
        ]
        self._tasks: list[asyncio.Task[None]] = []
        # The outcome of the last record that was sent.
        self._state = OK
        # When a checkpoint was saved last, on the loop's clock; None before the first.
        self._checkpoint_saved_s: float | None = None
        # True once no message is accepted any more; set by seal, for good.
        self._is_sealed = False

    # --- publishing ------------------------------------------------------------------------------

    def start_of(self, tenant: str, name: str) -> TopicStart:
        """Return what the topic begins with in this process."""
        partition = self._partition_of(tenant, name)
        fold = partition.fold
        return TopicStart(
            topic_epoch(fold.epoch, tenant, name),
            rfc3339(fold.epoch_began_us),
            fold.head(tenant, name),
            JournalPlace(partition.number, fold.epoch, self._is_durable, self._has_history),
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
        content = "" if key is None else content_of(requests[0])
        answer: asyncio.Future[Any] = self._loop.create_future()
        pending = Pending(topic, requests, make_answer, answer, key, content)
        partition.pending.append(pending)
        partition.pending_bytes += pending.size_bytes
        if partition.woken is not None:
            _wake(partition)
        return answer

    @property
    def topics(self) -> int:
        """How many topics the log has messages of."""
        return sum(each.fold.topics for each in self._partitions)

    def view(self) -> JournalFigures:
        """Return the figures as they are now."""
        counted = self.figures
        saved_s = self._checkpoint_saved_s
        return JournalFigures(
            engine=self._engine.name,
            durability=self._engine.durability,
            state=self._state,
            partitions=len(self._partitions),
            topics=self.topics,
            records=counted.records,
            messages=counted.messages,
            pending_bytes=sum(each.pending_bytes for each in self._partitions),
            retries=counted.retries,
            failed=counted.failed,
            foreign=counted.foreign,
            unreadable=counted.unreadable,
            rewinds=counted.rewinds,
            resets=counted.resets,
            checkpoint_age_s=None if saved_s is None else self._loop.time() - saved_s,
            storage=self._engine.storage(),
        )

    @property
    def is_well(self) -> bool:
        """Whether publishes to journaled topics are taken."""
        return self._state == OK

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
                await self._go_back(partition)
            for partition in self._partitions:
                partition.reading = self._spawn(self._read(partition))
            self._tasks = [self._spawn(self._write(each)) for each in self._partitions]
            # An empty record begins the log's epoch, if it is new, and shows where the log ends.
            async with asyncio.timeout(START_S):
                await asyncio.gather(*(self._find_end(each) for each in self._partitions))
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
            await self._stop_reading(partition)
            self._fail_all(partition)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._count_background_error()
            log.error("journal stopped reason=%r", error, exc_info=error)

    async def _find_end(self, partition: _Partition) -> None:
        """Read the partition to its end, and see that messages can be counted from there on."""
        await self._send(partition, Batch(()))
        if not partition.fold.is_known:
            log.warning(
                "no checkpoint and no beginning of the log partition=%d; a new epoch begins",
                partition.number,
            )
            await self._send(partition, Batch((), is_reset=True))

    async def _go_back(self, partition: _Partition) -> None:
        """Begin at the newest checkpoint whose record is still what it was, or at the beginning."""
        number = partition.number
        is_complete = await self._engine.first(number) <= 1
        partition.fold = self._new_fold(number, is_complete)
        for checkpoint in await self._engine.load_checkpoints(number):
            found = await self._engine.digest(number, checkpoint.position)
            if checkpoint.position and found != checkpoint.digest:
                continue
            try:
                await self._in_turns(partition.fold.restore(checkpoint))
            except BadCheckpoint as error:
                log.warning("checkpoint not used partition=%d reason=%s", number, error)
                partition.fold = self._new_fold(number, is_complete)
                continue
            return

    def _new_fold(self, number: int, is_complete: bool = True) -> Fold:
        return Fold(
            number,
            self._engine.partitions,
            keeps_topics=self._engine.keeps_topics,
            is_complete=is_complete,
        )

    async def _in_turns(self, steps: Iterator[StepT]) -> StepT | None:
        """Take all ``steps``, a few in a turn of the loop; return what the last one yields."""
        last: StepT | None = None
        for count, step in enumerate(steps, 1):
            last = step
            if count % STEPS_PER_TURN == 0:
                await asyncio.sleep(0)
        return last

    # --- writing ---------------------------------------------------------------------------------

    async def _write(self, partition: _Partition) -> None:
        """Send one record at a time, each with all that has come while the last was on its way."""
        while True:
            if not (partition.pending or partition.must_send):
                partition.woken = self._loop.create_future()
                await partition.woken
            if partition.must_send:
                partition.must_send = False
                # An empty record confirms foreign records, or begins a new epoch.
                with suppress(ClevrdError):
                    await self._send(partition, Batch((), is_reset=self._must_reset(partition)))
            while partition.pending:
                if len(partition.pending) < FEW:
                    # At most a millisecond more, and only right behind another record.
                    wait_s = partition.sent_s + APART_S - self._precise_s()
                    if wait_s > 0.0:
                        await asyncio.sleep(wait_s)
                partition.sent_s = self._precise_s()
                await self._send(partition, take_batch(partition.pending))

    async def _send(self, partition: _Partition, batch: Batch) -> None:
        """Send ``batch`` until it comes back; fail its publishes after GIVE_UP_S."""
        partition.batch = batch
        partition.come_back = self._loop.create_future()
        try:
            await self._send_until_back(partition, batch)
            self._note_state(OK)
        except ClevrdError as error:
            self._note_state(FULL if isinstance(error, JournalFull) else UNAVAILABLE, error)
            self.figures.failed += len(batch.lines)
            batch.fail(error)
            if not batch.lines:
                raise
        except asyncio.CancelledError:
            batch.fail(ShuttingDown())
            raise
        except Exception as error:
            # A mistake of ours in one record must not keep all later ones from being sent.
            self._count_background_error()
            log.exception("record not sent partition=%d", partition.number)
            batch.fail(error)
        finally:
            partition.batch = None
            partition.pending_bytes -= batch.size_bytes
            self._wake_waiters(partition)

    def _note_state(self, state: str, error: Exception | None = None) -> None:
        if state != self._state:
            self._state = state
            if error is None:
                log.warning("the journal takes messages again")
            else:
                log.error("the journal takes no messages state=%s reason=%s", state, error)

    async def _send_until_back(self, partition: _Partition, batch: Batch) -> None:
        until_s = self._loop.time() + GIVE_UP_S
        wait_s = RETRY_S
        number = partition.number
        stamp = await self._stamp(partition)
        record, placed = self._record_of(partition, batch, stamp)
        while True:
            try:
                await self._engine.append(number, record, stamp, placed)
                if not partition.come_back.done():
                    # Not by `wait_for`, which in Python 3.11 can lose a cancellation.
                    async with asyncio.timeout(GIVE_UP_S):
                        await asyncio.shield(partition.come_back)
                return
            except Fenced:
                self.figures.fenced += 1
                stamp = await self._stamp(partition)
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

    async def _stamp(self, partition: _Partition) -> str:
        """Return the log's stamp; if it is new here, look first whether records are gone."""
        stamp = await self._engine.stamp(partition.number)
        if partition.fold.stamp not in ("", stamp):
            await self._look_for_loss(partition)
        return stamp

    def _record_of(
        self, partition: _Partition, batch: Batch, stamp: str
    ) -> tuple[bytes, Sequence[Placed]]:
        partition.sequence += 1
        fold = partition.fold
        header = batch.header(
            stamp,
            self.writer,
            partition.sequence,
            fold.time_after(stamp, self._wall_us(), is_reset=batch.is_reset),
            fold.seen(stamp),
            self._keep_keys_ms,
            self._max_keys,
        )
        record = batch.record(header)
        return record, fold.plan(header, len(record) - batch.size_bytes)

    def _wake_waiters(self, partition: _Partition) -> None:
        # A publish that is woken appends at once, so each is reckoned with a run of messages.
        waiters = partition.waiters
        room_bytes = MAX_PENDING_BYTES - partition.pending_bytes
        while waiters and room_bytes > 0:
            woken = waiters.popleft()
            if not woken.done():
                woken.set_result(None)
                room_bytes -= MAX_PENDING_BYTES // 32

    def _fail_all(self, partition: _Partition) -> None:
        for each in partition.pending:
            if not each.answer.done():
                each.answer.set_exception(ShuttingDown())
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
                fold = partition.fold
                if fold.has_other_stamp(record) and await self._has_lost_records(partition):
                    await self._rewind(partition)
                    break
                folded = fold.apply(position, record)
                partition.records_folded += 1
                try:
                    await self._take(partition, folded, record)
                except Exception as error:
                    # One record's fault must not keep all that follow from their readers.
                    self._count_background_error()
                    log.exception("record not delivered position=%d", position)
                    if partition.batch is not None and not folded.foreign:
                        partition.batch.fail(error)
                if folded.contradicts and not await self._settle_contradiction(partition):
                    break

    async def _look_for_loss(self, partition: _Partition) -> None:
        """Read again if the log has lost what was read: its end may lie before our position.

        Without this the reader would wait behind records that are gone, and leave out those that
        take their positions.
        """
        if await self._has_lost_records(partition):
            await self._stop_reading(partition)
            await self._rewind(partition)
            partition.reading = self._spawn(self._read(partition))

    async def _stop_reading(self, partition: _Partition) -> None:
        """End the task that reads; a record that is being delivered is read again later."""
        if partition.reading is not None:
            partition.reading.cancel()
            await asyncio.gather(partition.reading, return_exceptions=True)

    async def _has_lost_records(self, partition: _Partition) -> bool:
        """Whether the log has lost the record that was folded last."""
        fold = partition.fold
        if not fold.position:
            return False
        return await self._engine.digest(partition.number, fold.position) != fold.digest

    async def _rewind(self, partition: _Partition) -> None:
        """Read again from a checkpoint of which nothing is lost."""
        self.figures.rewinds += 1
        log.warning("the log has lost records; reading again partition=%d", partition.number)
        await self._go_back(partition)

    async def _settle_contradiction(self, partition: _Partition) -> bool:
        """Read again where another node has counted otherwise; a second time begin a new epoch.

        Return whether reading goes on where it is.
        """
        if not partition.is_contradicted:
            partition.is_contradicted = True
            await self._rewind(partition)
            return False
        partition.is_contradicted = False
        partition.must_reset = True
        _send_soon(partition)
        return True

    def _must_reset(self, partition: _Partition) -> bool:
        now_s = self._loop.time()
        if not partition.must_reset or now_s - partition.reset_at_s < RESET_EVERY_S:
            return False
        partition.must_reset = False
        partition.reset_at_s = now_s
        self.figures.resets += 1
        log.warning(
            "nodes have counted differently; a new epoch begins partition=%d", partition.number
        )
        return True

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
        if folded.foreign:
            self.figures.foreign += 1
            if partition.fold.waiting == 1 and partition.batch is None:
                # The next record confirms it; without publishers an empty one does.
                _send_soon(partition)
        if folded.is_new_epoch:
            self._topics.begin_anew(partition.number)
        for each in folded.confirmed:
            await self._deliver_of_others(partition, [each.placed], each.record)
        batch = None
        if folded.writer == self.writer and folded.sequence == partition.sequence:
            batch = partition.batch
            if not partition.come_back.done():
                partition.come_back.set_result(None)
        if folded.is_retry:
            return
        if batch is None:
            await self._deliver_of_others(partition, folded.placed, record)
            return
        self.figures.records += 1
        for placed in folded.placed:
            self.figures.messages += placed.count
            await self._deliver_own(partition, placed, batch)
        for repeat in folded.repeats:
            part = batch.parts[repeat.line]
            stamps = [self._spell(repeat.id_us, repeat.time_us)]
            self._answer(part, repeat.offset, stamps, is_repeated=True)
        for refused in folded.refused:
            answer = batch.parts[refused.line].answer
            if not answer.done():
                answer.set_exception(
                    InvalidRequest(
                        "The idempotency key was used for another message in this topic; use a new"
                        " key for each new message."
                    )
                )

    async def _deliver_own(self, partition: _Partition, placed: Placed, batch: Batch) -> None:
        """Deliver messages of this node, whose requests are at hand, and answer them."""
        topic = self._topics.find(placed.tenant, placed.topic)
        stamps = self._stamps_of(placed)
        line, end = placed.line, placed.line + placed.count
        while line < end:
            first = line - placed.line
            parts, requests = _parts_from(batch, line, end, self._max_run)
            line += len(requests)
            offset = placed.offset + first
            own = stamps[first : first + len(requests)]
            if topic is not None:
                await self._deliver(partition, topic, offset, requests, own)
            if len(parts) == 1:
                self._answer(parts[0], offset, own)
                continue
            at = 0
            for part in parts:
                count = len(part.requests)
                self._answer(part, offset + at, own[at : at + count])
                at += count

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
                    each.offset + start,
                    requests[start:end],
                    stamps[start:end],
                )

    async def _deliver(
        self,
        partition: _Partition,
        topic: Topic,
        offset: int,
        requests: Sequence[PublishRequest],
        stamps: Sequence[Stamp],
    ) -> None:
        if not self._deliverer.makes_room(topic):
            await self._deliverer.room(topic)
        # The topic may have been made, behind these messages, since the record was counted.
        if topic.ring.head + 1 == offset:
            self._deliverer.deliver(topic, offset, requests, stamps)

    def _stamps_of(self, placed: Placed) -> list[Stamp]:
        spell, time_us, step = self._spell, placed.time_us, placed.id_step
        first = placed.id_us
        return [spell(id_us, time_us) for id_us in range(first, first + placed.count * step, step)]

    def _answer(
        self, part: Pending, offset: int, stamps: Sequence[Stamp], *, is_repeated: bool = False
    ) -> None:
        if not part.answer.done():
            topic = newest_epoch_of(part.topic)
            part.answer.set_result(part.make_answer(topic, offset, stamps, is_repeated))

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
        is_whole = partition.needs_whole or not self._engine.keeps_topics
        partition.needs_whole = True
        checkpoint = await self._in_turns(partition.fold.checkpoint(is_whole=is_whole))
        if isinstance(checkpoint, Checkpoint):
            await self._engine.save_checkpoint(partition.number, checkpoint)
            partition.needs_whole = False
            self._checkpoint_saved_s = self._loop.time()

    def _partition_of(self, tenant: str, name: str) -> _Partition:
        return self._partitions[partition_of(tenant, name, len(self._partitions))]


def _wake(partition: _Partition) -> None:
    """Wake the task that writes, if it waits for something to send."""
    woken, partition.woken = partition.woken, None
    if woken is not None and not woken.done():
        woken.set_result(None)


def _send_soon(partition: _Partition) -> None:
    """Have an empty record sent, or one with messages if there are some."""
    partition.must_send = True
    _wake(partition)


def _parts_from(
    batch: Batch, line: int, end: int, most: int
) -> tuple[list[Pending], Sequence[PublishRequest]]:
    """Return publishes of ``batch`` from ``line`` on, and all their messages, ``most`` of them.

    One publish is returned at least, and none that begins at line ``end``.
    """
    part = batch.parts[line]
    count = len(part.requests)
    if line + count == end or count >= most:
        return [part], part.requests
    parts = [part]
    requests = list(part.requests)
    while (line := line + count) < end:
        part = batch.parts[line]
        count = len(part.requests)
        if len(requests) + count > most:
            break
        parts.append(part)
        requests += part.requests
    return parts, requests
