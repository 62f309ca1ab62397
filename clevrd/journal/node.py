"""Node: this process's part in the log: what publishing and the daemon ask, and its life.

A message has its place when its record comes back from the log, so that all nodes find the same
order. Records are sent by `record_writer`, and read by `record_reader`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Final

from clevrd import __version__
from clevrd.core.journal_place import JournalPlace, TopicStart
from clevrd.core.message_ids import rfc3339
from clevrd.core.publish_request import PublishRequest
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, JournalFull, JournalUnavailable, ShuttingDown
from clevrd.journal.base import Checkpoint, Engine
from clevrd.journal.batches import Batch, MakeAnswer, MakeCleared, Pending, PendingClear
from clevrd.journal.epoch_names import topic_epoch
from clevrd.journal.fold import Fold
from clevrd.journal.pace import Pace
from clevrd.journal.partition import MAX_PENDING_BYTES, OK, Counters, Partition
from clevrd.journal.record_reader import Deliverer, RecordReader, Topics, in_turns
from clevrd.journal.record_writer import RecordWriter
from clevrd.journal.records import content_of, partition_of
from clevrd.metrics.journal import JournalFigures

log = logging.getLogger(__name__)

# A checkpoint is made after so long, or so many records.
CHECKPOINT_S: Final = 10.0
CHECKPOINT_RECORDS: Final = 10_000
# The same where records came that have changed nothing: the log gives up old records, and a
# checkpoint among them.
IDLE_CHECKPOINT_S: Final = 300.0
# How long a record may take to come back before its publishers hear of it.
GIVE_UP_S: Final = 5.0
# Seconds between two looks: whether a checkpoint is due, and whether anything comes from the log.
LOOK_S: Final = 1.0
# After so many looks without a record the node sends one of its own.
SILENT_LOOKS: Final = 5
# A node shows itself to the others so often, and counts those that it has seen for so long.
SHOW_S: Final = 20.0
SEEN_S: Final = 60.0
# Topics in one step of going over all: 0.1 ms for the comparison of tenants and names.
NAMES_PER_STEP: Final = 1_000
# How long a start waits for the end of the log.
START_S: Final = 600.0
# Looks at a start for which the engine says that it can't be used, until the log says so, and until
# the start is given up. Leaders of Kafka and NATS are chosen within 20 s.
TROUBLED_LOOKS: Final = 5
REFUSED_LOOKS: Final = 30


class Silence:
    """How long nothing has been read from a partition, in looks at it."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self._records = -1
        self._looks = 0

    def lasts(self, looks: int) -> bool:
        """Look; return whether nothing has come for so many looks, and begin to count again."""
        records = self.partition.records_folded
        if records != self._records or self.partition.is_busy:
            self._records, self._looks = records, 0
            return False
        self._looks += 1
        if self._looks < looks:
            return False
        self._looks = 0
        return True


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
        self._loop = loop
        self._count_background_error = count_background_error
        # Names this start of this process in its records.
        self.writer = secrets.token_hex(8)
        self.counters = Counters()
        self._jitter_s = secrets.randbelow(1000) / 1000
        self._has_history = engine.history() is not None
        # Each list has an entry for each partition of the log.
        self._partitions: list[Partition] = []
        self._readers: list[RecordReader] = []
        self._writers: list[RecordWriter] = []
        pace = Pace(engine.partitions, engine.max_apart_s)
        for number in range(engine.partitions):
            fold = Fold(number, engine.partitions, keeps_topics=engine.keeps_topics)
            partition = Partition(number, fold, loop)
            reader = RecordReader(
                *(partition, engine, self.writer, topics, deliverer, self.counters),
                *(self._spawn, count_background_error, loop.time),
                max_run=max_run,
            )
            writer = RecordWriter(
                *(partition, engine, self.writer, self.counters, pace, loop, wall_us),
                *(reader.look_for_loss, count_background_error),
                keep_keys_ms=int(keep_keys_s * 1000),
                max_keys=max_keys,
            )
            self._partitions.append(partition)
            self._readers.append(reader)
            self._writers.append(writer)
        self._tasks: list[asyncio.Task[None]] = []
        # Partitions whose last checkpoint was not saved, as the log says already.
        self._unsaved: set[int] = set()
        # When a checkpoint was saved last, on the loop's clock; None before the first.
        self._checkpoint_saved_s: float | None = None
        # True once no message is accepted any more; set by seal, for good.
        self._is_sealed = False

    # --- publishing ------------------------------------------------------------------------------

    def start_of(self, tenant: str, name: str) -> TopicStart:
        """Return the state in which a topic begins in this process."""
        partition = self._partitions[partition_of(tenant, name, len(self._partitions))]
        fold = partition.fold
        cleared = fold.cleared(tenant, name)
        return TopicStart(
            topic_epoch(fold.epoch, tenant, name, cleared),
            rfc3339(fold.epoch_began_us),
            fold.head(tenant, name),
            JournalPlace(
                *(partition.number, fold.epoch, self._is_durable, self._has_history),
                *(self._engine.is_shared, cleared),
            ),
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
        partition.wake_waiters()
        try:
            await me
        except asyncio.CancelledError:
            if me.done() and not me.cancelled():
                partition.wake_waiters()
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
        partition.pending_bytes += pending.cost_bytes
        if partition.woken is not None:
            partition.wake()
        return answer

    def submit_clear(
        self, topic: Topic, place: JournalPlace, make_cleared: MakeCleared
    ) -> asyncio.Future[Any]:
        """Have ``topic`` cleared behind all that is submitted before; return the answer.

        Args:
            make_cleared: called once the topic is cleared.

        Raises:
            ShuttingDown: after `seal`.
        """
        if self._is_sealed:
            raise ShuttingDown
        partition = self._partitions[place.partition]
        answer: asyncio.Future[Any] = self._loop.create_future()
        pending = PendingClear(topic, make_cleared, answer)
        partition.pending.append(pending)
        partition.pending_bytes += pending.cost_bytes
        if partition.woken is not None:
            partition.wake()
        return answer

    def seal(self) -> None:
        """Accept no message from here on."""
        self._is_sealed = True

    @property
    def _is_durable(self) -> bool:
        """Whether an answered message outlives a power cut."""
        return self._engine.durability == "fsync"

    # --- figures ---------------------------------------------------------------------------------

    @property
    def topics(self) -> int:
        """How many topics the log has messages of."""
        return sum(each.fold.topics for each in self._partitions)

    @property
    def is_well(self) -> bool:
        """Whether publishes to journaled topics are taken."""
        return all(each.state == OK for each in self._partitions)

    @property
    def is_busy(self) -> bool:
        """Whether any message waits for its place."""
        return any(each.is_busy for each in self._partitions)

    def names(self) -> Iterator[Sequence[tuple[str, str]]]:
        """Yield tenants and names of all topics that have messages, NAMES_PER_STEP at a time.

        Topics whose first message comes meanwhile are among them, or not.
        """
        for partition in self._partitions:
            start = 0
            while names := partition.fold.names(start, NAMES_PER_STEP):
                yield names
                start += len(names)

    def view(self) -> JournalFigures:
        """Return the figures as they are now."""
        counted = self.counters
        saved_s = self._checkpoint_saved_s
        now_s = self._loop.time()
        versions = self._versions()
        places = tuple(each.view(now_s) for each in self._partitions)
        return JournalFigures(
            engine=self._engine.name,
            durability=self._engine.durability,
            state=next((each.state for each in self._partitions if each.state != OK), OK),
            partitions=len(places),
            places=places,
            lag_s=max(each.lag_s for each in places),
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
            nodes=sum(versions.values()),
            node_versions=versions,
            checkpoint_age_s=None if saved_s is None else round(now_s - saved_s, 3),
            storage=self._engine.storage(),
        )

    def _versions(self) -> dict[str, int]:
        """Return how many nodes have shown themselves lately, this one included, by version."""
        nodes = self._partitions[0].nodes
        nodes.forget_before(self._loop.time() - SEEN_S)
        return nodes.versions(self.writer, __version__)

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the engine, and read the log to its end.

        Raises:
            JournalUnavailable: with a sentence that says what to do.
        """
        await self._engine.open()
        try:
            for reader in self._readers:
                await reader.go_back(is_start=True)
                reader.start()
            self._tasks = [self._spawn(writer.run()) for writer in self._writers]
            # An empty record begins the log's epoch, if it is new, and shows where the log ends.
            async with asyncio.timeout(START_S):
                await self._find_ends()
        except TimeoutError as error:
            await self.crash()
            raise JournalUnavailable(
                f"The journal could not be read to its end within {START_S:g} s; see whether its"
                " disk or its server is too slow, or keep less in it (retention)."
            ) from error
        except JournalFull as error:
            await self.crash()
            raise JournalUnavailable(
                "The journal has no room, so it can't be started; free some space."
            ) from error
        except BaseException:
            await self.crash()
            raise
        self._tasks.append(self._spawn(self._save_checkpoints()))
        self._tasks.append(self._spawn(self._watch()))
        if self._engine.is_shared:
            self._tasks.append(self._spawn(self._beat()))

    async def stop(self) -> None:
        """Save a checkpoint and close the engine; messages on their way fail.

        The caller has sealed the node, and has waited as long as it could while `is_busy`.
        """
        try:
            await self._end_tasks()
            for partition in self._partitions:
                await self._save_checkpoint(partition)
        finally:
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
        for reader in self._readers:
            await reader.stop()
        for partition in self._partitions:
            Batch(tuple(partition.pending)).fail(ShuttingDown())
            partition.pending.clear()

    async def _find_ends(self) -> None:
        """Find the ends of all partitions; raise why the engine can't be used, if it says so."""
        ends = asyncio.gather(*map(self._find_end, self._partitions, self._writers))
        refusal = self._loop.create_task(self._refusal())
        try:
            await asyncio.wait((ends, refusal), return_when=asyncio.FIRST_COMPLETED)
            if not ends.done():
                raise refusal.result()
            ends.result()
        finally:
            ends.cancel()
            refusal.cancel()
            await asyncio.gather(ends, refusal, return_exceptions=True)

    async def _refusal(self) -> Exception:
        """Return why the engine takes or gives no record, once it has said so for long enough."""
        troubled_looks = 0
        while True:
            await asyncio.sleep(LOOK_S)
            troubles = [each.trouble or each.read_trouble for each in self._partitions]
            trouble = next(filter(None, troubles), None)
            troubled_looks = 0 if trouble is None else troubled_looks + 1
            if trouble is None:
                continue
            if troubled_looks == TROUBLED_LOOKS:
                log.warning("waiting for the journal reason=%s", trouble)
            if troubled_looks >= REFUSED_LOOKS:
                return trouble

    async def _find_end(self, partition: Partition, writer: RecordWriter) -> None:
        """Read the partition to its end, and see that messages can be counted from there on."""
        await writer.send(Batch(()))
        if not partition.fold.is_known:
            log.warning(
                "no checkpoint and no beginning of the log; a new epoch begins partition=%d",
                partition.number,
            )
            self.counters.resets += 1
            await writer.send(Batch((), is_reset=True))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._count_background_error()
            log.error("journal stopped reason=%r", error, exc_info=error)

    async def _beat(self) -> None:
        """Append an empty record where nothing was read for some seconds, and so hear of oneself.

        A record that does not come back shows that this node reads nothing any more, though its
        connection may look well. Nodes are seen by others in the first partition, and in each
        partition an own record shows now and then how far behind its end reading is.
        """
        silences = [Silence(each) for each in self._partitions]
        shown_s = self._loop.time()
        while True:
            await asyncio.sleep(LOOK_S)
            for silence in silences:
                partition = silence.partition
                # The end of a fault is found soon, though nobody publishes.
                is_down = partition.state != OK and not partition.is_busy
                if silence.lasts(SILENT_LOOKS) or is_down:
                    partition.send_soon()
            now_s = self._loop.time()
            if now_s - shown_s >= SHOW_S + self._jitter_s:
                shown_s = now_s
                for partition in self._partitions:
                    if not partition.number or now_s - partition.sent_at_s >= SHOW_S:
                        partition.send_soon()

    # --- checkpoints -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Answer publishes whose record does not come back, and try an engine that is not well."""
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = self._loop.time()
            for partition in self._partitions:
                if partition.batch is not None and now_s - partition.sent_at_s >= GIVE_UP_S:
                    self.counters.failed += partition.give_up()
                elif partition.state != OK or self._engine.is_unsure:
                    # Without a publish nobody would find that it is well again, or not.
                    partition.send_soon()

    async def _save_checkpoints(self) -> None:
        """Save checkpoints as they are due, those of all nodes at different times."""
        saved_s = idle_s = self._loop.time()
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = self._loop.time()
            is_due = now_s - saved_s >= CHECKPOINT_S + self._jitter_s
            is_idle_due = now_s - idle_s >= IDLE_CHECKPOINT_S
            for partition in self._partitions:
                behind = partition.records_folded - partition.records_at_checkpoint
                is_changed = partition.changes != partition.changes_at_checkpoint
                if behind >= CHECKPOINT_RECORDS or is_idle_due or (is_due and is_changed):
                    await self._save_checkpoint(partition)
            if is_due:
                saved_s = self._loop.time()
            if is_idle_due:
                idle_s = saved_s = self._loop.time()

    async def _save_checkpoint(self, partition: Partition) -> None:
        """Save a checkpoint, if anything has changed; log why where that fails."""
        if partition.records_folded == partition.records_at_checkpoint:
            return
        records, changes = partition.records_folded, partition.changes
        is_whole = partition.needs_whole_checkpoint or not self._engine.keeps_topics
        partition.needs_whole_checkpoint = True
        try:
            checkpoint = await in_turns(partition.fold.checkpoint(is_whole=is_whole))
            if isinstance(checkpoint, Checkpoint):
                await self._engine.save_checkpoint(partition.number, checkpoint)
                partition.needs_whole_checkpoint = False
                self._unsaved.discard(partition.number)
                self._checkpoint_saved_s = self._loop.time()
        except ClevrdError as error:
            if partition.number not in self._unsaved:
                log.warning("checkpoint not saved partition=%d reason=%s", partition.number, error)
            self._unsaved.add(partition.number)
            return
        partition.records_at_checkpoint = records
        partition.changes_at_checkpoint = changes
