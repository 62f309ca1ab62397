"""RecordReader: reads one partition of the log, counts its records, delivers and answers.

How records are counted is decided in `fold`; its class says what a reader asks of the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from typing import Any, Final, Protocol, TypeVar

from clevrd.core.message_ids import MessageIds
from clevrd.core.publish_request import PublishRequest, decode_logged
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, InvalidRequest, Unavailable
from clevrd.journal.base import Checkpoint, Engine, Placed, TailLost, Trimmed
from clevrd.journal.batches import Batch, Pending, PendingClear, Stamp, give_answer
from clevrd.journal.checkpoints import BadCheckpoint
from clevrd.journal.epoch_names import topic_epoch
from clevrd.journal.folded import Confirmed, Folded
from clevrd.journal.left_out import LeftOut
from clevrd.journal.partition import MAX_RETRY_S, RETRY_S, Counters, Partition, unsure

log = logging.getLogger(__name__)

StepT = TypeVar("StepT")

# Topics, or keys, are restored in steps; the loop is given to others after so many.
STEPS_PER_TURN: Final = 5

# At the bound on cleared topics a client is told to come back after so long: there are fewer when a
# log's epoch ends, or never.
_CLEARED_RETRY_S: Final = 60.0


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

    def make(self, tenant: str, name: str, head: int, time_us: int) -> Topic | None:
        """Return a topic that goes on behind offset ``head``; None if it is not to be kept here.

        Args:
            time_us: the time of the message that makes it.
        """

    async def begin_anew(self, partition: int) -> None:
        """Let topics of ``partition`` that are in use begin the epoch that it has now."""

    def clear(self, tenant: str, name: str) -> None:
        """Let the topic begin the epoch that it has now, without the messages of before."""

    async def go_on(self, partition: int) -> None:
        """Let topics of ``partition`` that are in use go on at the heads that it has now.

        Messages were counted that are never delivered here: their readers are told a gap.
        """


class RecordReader:
    """The reader of one partition."""

    def __init__(
        self,
        partition: Partition,
        engine: Engine,
        writer: str,
        topics: Topics,
        deliverer: Deliverer,
        counters: Counters,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        count_background_error: Callable[[], None],
        now_s: Callable[[], float],
        *,
        max_run: int,
    ) -> None:
        """Make the reader.

        Args:
            writer: the node's name in its records.
            spawn: runs a coroutine as a task, and tells of its failure.
            max_run: messages that one topic takes at once.
        """
        self._partition = partition
        self._engine = engine
        self._writer = writer
        self._topics = topics
        self._deliverer = deliverer
        self._counters = counters
        self._spawn = spawn
        self._count_background_error = count_background_error
        self._now_s = now_s
        self._max_run = max_run
        # Messages that no history keeps are kept in rings, whether anybody uses their topic or not.
        self._makes_topics = engine.history() is None
        self._ids = MessageIds()
        self._left_out = LeftOut(partition.number, now_s)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Read on, from where the fold is."""
        self._task = self._spawn(self._run())

    async def stop(self) -> None:
        """End reading; a record that is being delivered is read again later."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Fold what the log has, as it comes, and deliver it."""
        partition, engine = self._partition, self._engine
        wait_s = RETRY_S
        while True:
            try:
                records = await engine.read(partition.number, partition.fold.position)
                partition.read_trouble = None
                await self._fold(records)
                wait_s = RETRY_S
            except TailLost:
                log.error("the log has lost its newest records partition=%d", partition.number)
                partition.lost_epoch = partition.fold.readers_epoch
                partition.wants_reset = True
                await self._rewind_until_done()
                partition.send_soon()
            except Trimmed:
                log.warning("records are gone unread partition=%d", partition.number)
                await self._rewind_until_done()
            except ClevrdError as error:
                partition.read_trouble = error
                log.debug("journal can't be read partition=%d reason=%s", partition.number, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_RETRY_S)

    async def _fold(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Count and deliver ``records``, until the log is to be read from another place."""
        partition = self._partition
        fold = partition.fold
        for position, record in records:
            is_own = record is partition.sent
            if not is_own and fold.has_other_stamp(record):
                if not await self._is_still_there():
                    await self._rewind()
                    return
                if not fold.is_settled:
                    fold.go_to_settled(record)
                    return
            readers_epoch = fold.readers_epoch
            # An engine that other nodes use too hands back a copy of what was sent.
            header = partition.sent_header if is_own or record == partition.sent else None
            folded = fold.apply(position, record, header)
            partition.records_folded += 1
            if folded.placed or folded.confirmed or folded.is_new_epoch:
                partition.changes += 1
            if folded.is_new_epoch:
                if fold.readers_epoch != partition.lost_epoch:
                    partition.lost_epoch = ""
                # The epoch in which records were lost may be read again from its beginning.
                partition.wants_reset = bool(partition.lost_epoch)
                if fold.readers_epoch != readers_epoch:
                    await self._topics.begin_anew(partition.number)
            try:
                await self._take(folded, record)
            except Exception as error:
                # One record's fault must not keep all that follow from their readers.
                self._count_background_error()
                log.exception("record not delivered position=%d", position)
                if partition.batch is not None and not folded.foreign:
                    partition.batch.fail(error)
            is_back = folded.writer == self._writer and folded.sequence == partition.sequence
            # The batch counts as on its way until here, for a stop too.
            if is_back and not partition.come_back.done():
                partition.come_back.set_result(None)
            if folded.contradicts and not await self._settle_contradiction(position):
                return

    # --- where to read ---------------------------------------------------------------------------

    async def go_back(self, *, is_start: bool = False) -> bool:
        """Begin at a checkpoint whose record is still what it was, or at the log's beginning.

        Return whether positions are known from there on.

        That is the newest checkpoint where a history has the messages before it. Without one it is
        the newest that this node has read up to, so that its readers miss nothing; or else, and at
        a start, as far back as the log is kept for that.
        """
        partition, engine = self._partition, self._engine
        number, fold = partition.number, partition.fold
        partition.arrives_with = partition.sequence + 1
        candidates: Sequence[Checkpoint] = await engine.load_checkpoints(number)
        if self._makes_topics:
            read_upto = 0 if is_start else fold.position
            if await self._restore([each for each in candidates if each.position <= read_upto]):
                return True
            # The other checkpoints hold messages that this node has not delivered, and its own ones
            # too.
            candidates = () if await engine.is_short(number) else candidates[::-1]
        if await self._restore(candidates):
            return True
        first = await engine.first(number)
        is_complete = first <= 1
        fold.begin_again(0 if is_complete else first - 1, is_complete=is_complete)
        return is_complete

    async def _restore(self, checkpoints: Sequence[Checkpoint]) -> bool:
        """Go to the first of ``checkpoints`` that can be used; return whether there is one."""
        number, fold = self._partition.number, self._partition.fold
        for checkpoint in checkpoints:
            if await self._engine.digest(number, checkpoint.position) != checkpoint.digest:
                continue
            try:
                await in_turns(fold.restore(checkpoint))
            except BadCheckpoint as error:
                log.warning("checkpoint not used partition=%d reason=%s", number, error)
                continue
            await self._follow()
            return True
        return False

    async def look_for_loss(self) -> None:
        """Read again if the log has lost what was read: its end may lie before our position.

        Without this the reader would wait behind records that are gone, and leave out those that
        take their positions.
        """
        if not await self._is_still_there():
            await self.stop()
            try:
                await self._rewind_until_done()
            finally:
                self.start()

    async def _is_still_there(self) -> bool:
        """Whether the log still has the last record of a node that was folded."""
        fold = self._partition.fold
        if not fold.settled_digest:
            return True
        found = await self._engine.digest(self._partition.number, fold.settled_position)
        return found == fold.settled_digest

    async def _rewind(self) -> None:
        """Read again from a checkpoint of which nothing is lost."""
        self._counters.rewinds += 1
        log.warning("the log is read again partition=%d", self._partition.number)
        if not await self.go_back():
            self._partition.wants_reset = True
            self._partition.send_soon()
        if self._partition.fold.is_behind:
            # An own record shows where the log ends.
            self._partition.send_soon()

    async def _rewind_until_done(self) -> None:
        """Rewind, as often as the engine is away meanwhile."""
        while True:
            try:
                await self._rewind()
                return
            except ClevrdError:
                await asyncio.sleep(MAX_RETRY_S)

    async def _settle_contradiction(self, position: int) -> bool:
        """Read again where another node has counted otherwise; a second time begin a new epoch.

        Return whether reading goes on where it is.
        """
        partition = self._partition
        if not partition.wants_reset and partition.contradicted_at != position:
            partition.contradicted_at = position
            await self._rewind()
            return False
        # Reading goes on, or the record that begins the new epoch would never be reached.
        partition.wants_reset = True
        partition.send_soon()
        return True

    async def _follow(self) -> None:
        """Let topics go on where a checkpoint has brought them."""
        fold = self._partition.fold
        if fold.epoch == fold.readers_epoch:
            await self._topics.go_on(self._partition.number)

    # --- what a record brings --------------------------------------------------------------------

    async def _take(self, folded: Folded, record: bytes) -> None:
        """Deliver the messages of a record, and answer its publishers if they are this node's."""
        partition, fold = self._partition, self._partition.fold
        if folded.writer and not partition.number:
            partition.nodes.note(folded.writer, folded.version, self._now_s())
        if folded.bad is not None:
            self._counters.unreadable += 1
            self._left_out.note(fold.position, folded.bad)
        elif folded.foreign:
            self._counters.foreign += 1
            if partition.batch is None:
                # The next record confirms it; without publishers an empty one does.
                partition.send_soon()
        is_lost = bool(partition.lost_epoch) and fold.readers_epoch == partition.lost_epoch
        for confirmed in () if is_lost else folded.confirmed:
            await self._deliver_foreign(confirmed)
        batch = None
        if folded.writer == self._writer and folded.sequence == partition.sequence:
            batch = partition.batch
            if fold.is_behind and folded.sequence >= partition.arrives_with:
                fold.arrive()
                await self._follow()
        if folded.is_retry:
            if batch is not None and not partition.held:
                # A checkpoint of another node had it already: its messages are there, but nobody
                # knows where.
                self._counters.failed += batch.fail(unsure())
            return
        if batch is None:
            if not (folded.is_again or is_lost):
                await self._deliver_others(folded.placed, record)
                self._clear(folded)
            return
        if is_lost:
            self._counters.failed += batch.fail(unsure())
            return
        if not folded.partition_epoch:
            # The record was passed over: positions are not known before a new epoch begins.
            self._counters.failed += batch.fail(unsure())
            return
        self._counters.records += 1
        for placed in folded.placed:
            self._counters.messages += placed.count
            await self._deliver_own(placed, batch, is_again=folded.is_again)
        if not folded.is_again:
            self._clear(folded)
        self._answer_uncounted(folded, batch)
        self._answer_clears(batch)

    def _clear(self, folded: Folded) -> None:
        for each in folded.cleared:
            self._topics.clear(each.tenant, each.topic)

    def _answer_clears(self, batch: Batch) -> None:
        """Answer with the position behind which each topic's messages come now.

        A topic of a new epoch has lost what was there before, though nothing was cleared in it.
        """
        fold = self._partition.fold
        for part in batch.parts.values():
            if not isinstance(part, PendingClear):
                continue
            slot = part.topic.tenant, part.topic.name
            upto = fold.cleared(*slot)
            if upto == fold.head(*slot):
                part.epoch = topic_epoch(fold.epoch, *slot, upto)
                self._answer(part, upto, ())
            elif not part.answer.done():
                part.answer.set_exception(
                    Unavailable(
                        "The journal has as many cleared topics as it may have, so this one stays"
                        " as it is; publish to another topic.",
                        _CLEARED_RETRY_S,
                        bound="cleared_topics",
                    )
                )

    def _answer_uncounted(self, folded: Folded, batch: Batch) -> None:
        """Answer publishes whose idempotency key was there before."""
        for repeat in folded.repeats:
            stamps = [self._ids.spell(repeat.id_us, repeat.time_us)]
            self._answer(batch.parts[repeat.line], repeat.offset, stamps, is_repeated=True)
        for refused in folded.refused:
            answer = batch.parts[refused.line].answer
            if not answer.done():
                answer.set_exception(
                    InvalidRequest(
                        "The idempotency key was used for another message in this topic; use a new"
                        " key for each new message."
                    )
                )

    async def _deliver_own(self, placed: Placed, batch: Batch, *, is_again: bool) -> None:
        """Deliver messages of this node, whose requests are at hand, and answer them."""
        topic = None if is_again else self._topic_of(placed)
        stamps = self._stamps_of(placed)
        line, end = placed.line, placed.line + placed.count
        while line < end:
            first = line - placed.line
            parts, requests = _parts_from(batch, line, end, self._max_run)
            line += len(requests)
            offset = placed.offset + first
            own = stamps[first : first + len(requests)]
            if topic is not None:
                await self._deliver(topic, offset, requests, own)
            if len(parts) == 1:
                self._answer(parts[0], offset, own)
                continue
            at = 0
            for part in parts:
                count = len(part.requests)
                self._answer(part, offset + at, own[at : at + count])
                at += count

    def _answer(
        self, part: Pending, offset: int, stamps: Sequence[Stamp], *, is_repeated: bool = False
    ) -> None:
        """Answer a publish whose messages have their place, now or when they are safe."""
        held = self._partition.held
        if held is None:
            give_answer(part, offset, stamps, is_repeated)
        else:
            held.append((part, offset, stamps, is_repeated))

    async def _deliver_others(self, placed: Sequence[Placed], record: bytes) -> None:
        """Deliver messages that another node wrote, to topics that are in use here."""
        for each in placed:
            topic = self._topic_of(each)
            if topic is None:
                # Nobody uses the topic here; the history has its messages.
                continue
            lines = record[each.at_bytes : each.at_bytes + each.size_bytes].split(b"\n")
            lines = lines[each.skip : each.skip + each.count]
            stamps = self._stamps_of(each)
            for start in range(0, each.count, self._max_run):
                end = start + self._max_run
                requests = [decode_logged(line) for line in lines[start:end]]
                await self._deliver(topic, each.offset + start, requests, stamps[start:end])

    async def _deliver_foreign(self, confirmed: Confirmed) -> None:
        placed = confirmed.placed
        topic = self._topic_of(placed)
        if topic is not None:
            stamps = self._stamps_of(placed)
            await self._deliver(topic, placed.offset, (confirmed.request,), stamps)

    def _topic_of(self, placed: Placed) -> Topic | None:
        """Return the topic that takes these messages here, made if it has to be."""
        topic = self._topics.find(placed.tenant, placed.topic)
        if topic is not None:
            # A record that begins a new epoch confirms foreign ones in the epoch before.
            place = topic.journal
            is_its = place is not None and place.partition_epoch == placed.partition_epoch
            return topic if is_its else None
        if self._makes_topics:
            epoch = self._partition.fold.readers_epoch
            if placed.partition_epoch == epoch == self._partition.fold.epoch:
                return self._topics.make(
                    placed.tenant, placed.topic, placed.offset - 1, placed.time_us
                )
        return None

    async def _deliver(
        self,
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
        if placed.count == 1:
            return [self._ids.spell(placed.id_us, placed.time_us)]
        return self._ids.spell_run(placed.id_us, placed.count, placed.id_step, placed.time_us)


async def in_turns(steps: Iterator[StepT]) -> StepT | None:
    """Take all ``steps``, a few in a turn of the loop; return what the last one yields."""
    last: StepT | None = None
    try:
        for count, step in enumerate(steps, 1):
            last = step
            if count % STEPS_PER_TURN == 0:
                await asyncio.sleep(0)
    finally:
        # A checkpoint that was begun and not finished would keep others from being taken.
        if isinstance(steps, Generator):
            steps.close()
    return last


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
