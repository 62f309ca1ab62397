"""A log that loses what it had acknowledged, and nodes that fold it. No loop, no engine, no clock.

The log is what an engine shows of a broker: see `clevrd.journal.base`. The nodes do what is asked
of a node in `clevrd.journal.fold.Fold`, and nothing more. `Witness` knows each message by its
number, and notes which positions were given to it by anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from clevrd.core.publish_request import PublishRequest
from clevrd.journal.base import Checkpoint, Placed, TopicHead
from clevrd.journal.epoch_names import topic_epoch
from clevrd.journal.fold import Fold
from clevrd.journal.folded import Folded
from clevrd.journal.records import (
    FOREIGN_TENANT,
    BadRecord,
    Clear,
    Header,
    Keyed,
    Run,
    content_of,
    decode_header,
    digest_of,
    encode_record,
    is_foreign,
    line_of,
)

KEEP_KEYS_MS = 60_000
MAX_KEYS = 1_000
NOON_US = 1_790_000_000_000_000
# A record has so many messages at most.
BATCH = 4

# An epoch, an offset and an id.
Place = tuple[str, int, int]


class Publish(NamedTuple):
    """A message to be published; its number is its data."""

    number: int
    topic: str
    key: str | None

    @property
    def request(self) -> PublishRequest:
        """The publish as a request."""
        return PublishRequest(self.topic, msgspec.Raw(b"%d" % self.number), self.key)


def number_of(line: bytes) -> int:
    """Return which message a line holds."""
    return int(msgspec.json.decode(line)["data"])


class Log:
    """One partition of a broker's log."""

    def __init__(self) -> None:
        # All records but lost ones, with their positions, and how many of the first are removed.
        self.records: list[tuple[int, bytes]] = []
        self.removed = 0
        self.stamps = 1
        self.checkpoints: list[Checkpoint] = []
        # Records on their way, with the stamps that they are to be checked against.
        self.under_way: list[tuple[bytes, str]] = []

    @property
    def stamp(self) -> str:
        """The present incarnation's."""
        return f"{self.stamps:08x}"

    @property
    def last(self) -> int:
        """The position of the newest record."""
        return self.records[-1][0] if self.records else 0

    @property
    def removed_to(self) -> int:
        """The position of the newest record that was removed."""
        return self.records[self.removed - 1][0] if self.removed else 0

    def append(self, record: bytes, stamp: str | None, skip: int = 0) -> bool:
        """Append a record, a position or more behind the last; return False if it is fenced."""
        if stamp not in (None, self.stamp):
            return False
        self.records.append((self.last + 1 + skip, record))
        return True

    def read(self, after: int, count: int) -> list[tuple[int, bytes]]:
        """Return the next records."""
        return [each for each in self.records[self.removed :] if each[0] > after][:count]

    def digest(self, position: int) -> str | None:
        """Return a record's digest if it is still there."""
        for at, record in self.records[self.removed :]:
            if at == position:
                return digest_of(record)
        return None

    def fail_over(self, lost: int) -> None:
        """Lose the last records, though they were acknowledged, and get another stamp."""
        keep = max(self.removed, len(self.records) - lost)
        del self.records[keep:]
        self.stamps += 1

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, and four older ones."""
        self.checkpoints = [checkpoint, *self.checkpoints[:4]]


class Store:
    """The checkpoint of an engine that keeps topics."""

    def __init__(self) -> None:
        self._newest: Checkpoint | None = None
        self._topics: dict[tuple[str, str], int] = {}

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep the checkpoint, with the topics that were in others."""
        if checkpoint.is_whole:
            self._topics.clear()
        for each in checkpoint.topics:
            self._topics[each.tenant, each.topic] = each.head
        self._newest = checkpoint

    def load(self) -> list[Checkpoint]:
        """Return the whole checkpoint, if there is one."""
        if self._newest is None:
            return []
        topics = [TopicHead(*slot, head) for slot, head in self._topics.items()]
        return [msgspec.structs.replace(self._newest, topics=topics, is_whole=True)]


class Witness:
    """Everything that anybody was given or told, by position."""

    def __init__(self) -> None:
        self._named: dict[tuple[str, int], tuple[int, int]] = {}
        self.numbers = 0

    def next_number(self) -> int:
        """Return a number that no message has."""
        self.numbers += 1
        return self.numbers

    def see(self, place: Place, number: int) -> None:
        """Note that somebody has message ``number`` at ``place``."""
        epoch, offset, id_us = place
        there = self._named.setdefault((epoch, offset), (number, id_us))
        assert there == (number, id_us), f"{place} names {number} and {there}"


class Reader:
    """The messages that a node gave the readers of one topic: one epoch after the other."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.epoch = ""
        self.head = 0
        self._last_id_us = 0
        # Epochs that it has left, and the messages of the present one.
        self._left: set[str] = set()
        self._has: set[int] = set()

    def enter(self, epoch: str, head: int = 0) -> None:
        """Be told that there is another epoch, and go on behind ``head``."""
        if epoch == self.epoch:
            # Messages that are passed over are told as a gap.
            self.head = max(self.head, head)
            return
        assert epoch not in self._left, "an epoch came back"
        self._left.add(self.epoch)
        self.epoch = epoch
        self.head = head
        self._last_id_us = 0
        self._has.clear()

    def take(self, place: Place, number: int, is_keyed: bool) -> None:
        """Be given a message."""
        epoch, offset, id_us = place
        assert epoch == self.epoch, "a message of another epoch"
        if offset <= self.head:
            return
        assert offset == self.head + 1, "a message was left out"
        assert id_us > self._last_id_us, "an id did not rise"
        assert is_keyed or number not in self._has, "a message came twice in an epoch"
        self.head = offset
        self._last_id_us = id_us
        self._has.add(number)


class Told(NamedTuple):
    """An answer to a publisher, and the record that it was made of."""

    position: int
    record: bytes
    line: int
    place: Place


class InFlight(NamedTuple):
    """A record that a node has sent and not seen yet."""

    header: Header
    record: bytes
    publishes: list[Publish]


FoldFactory = Callable[..., Fold]


class Node:
    """One process after the other that folds the log, answers publishers and gives readers."""

    def __init__(
        self, log: Log, witness: Witness, name: str, make_fold: FoldFactory, keeps_topics: bool
    ) -> None:
        self.log = log
        self.witness = witness
        self.name = name
        self.skew_us = 0
        self.told: list[Told] = []
        self.contradictions = 0
        self._make_fold = make_fold
        # An engine that keeps topics has one writer, so the store is the node's own.
        self._store = Store() if keeps_topics else None
        self._starts = 0
        self.start()

    def start(self) -> None:
        """Begin as a new process, with nothing but what the log and the checkpoints say."""
        self._starts += 1
        self.writer = f"{self.name}{self._starts:x}"
        self._sequence = 0
        self.stamp = self.log.stamp
        self.queue: list[Publish] = []
        # Topics that the next record clears, behind its messages.
        self.to_clear: list[str] = []
        self.in_flight: InFlight | None = None
        self._inbox: list[tuple[int, bytes]] = []
        self._readers: dict[str, Reader] = {}
        self._contradicted_at = 0
        self._wants_reset = False
        # From this sequence on an own record shows that the log's end was reached.
        self._arrives_with = 0
        self._taking: Iterator[Checkpoint | None] | None = None
        self.fold = self._make_fold(
            0, 3, keeps_topics=self._store is not None, is_complete=not self.log.removed
        )
        self._fetched = self.log.removed_to
        for checkpoint in self._usable():
            self._restore(checkpoint)
            break

    @property
    def readers(self) -> list[Reader]:
        """Return the readers of all topics."""
        return [*self._readers.values()]

    # --- publishing ------------------------------------------------------------------------------

    def publish(self, publish: Publish) -> None:
        """Accept a message, to be sent later."""
        self.queue.append(publish)

    def send(self, now_us: int, *, arrives: bool = True, is_late: bool = False) -> None:
        """Send the record in flight again, or a new one of what is queued; an empty one at worst.

        Args:
            arrives: the engine takes it. It never acknowledges: a lost acknowledgement is the same.
            is_late: it is on its way for some time.
        """
        if self.in_flight is None or self.in_flight.header.stamp != self.stamp:
            self.in_flight = self._make(now_us)
        if is_late:
            self.log.under_way.append((self.in_flight.record, self.stamp))
        elif arrives and not self.log.append(self.in_flight.record, self.stamp):
            self.stamp = self.log.stamp

    def give_up(self) -> None:
        """Answer the publishers of the record in flight that it may have been accepted."""
        self.in_flight = None

    def _make(self, now_us: int) -> InFlight:
        """Return a record of what was in flight, with a new stamp, or of what is queued."""
        before = self.in_flight
        is_reset = self._wants_reset
        if before is not None:
            publishes, clears = before.publishes, before.header.clears
        else:
            clears = tuple(Clear(FOREIGN_TENANT, topic) for topic in self.to_clear)
            self.to_clear.clear()
            publishes, self.queue = self.queue[:BATCH], self.queue[BATCH:]
            publishes.sort(key=lambda publish: publish.topic)
            self._sequence += 1
        lines = [line_of(each.request, each.key) for each in publishes]
        runs: list[Run] = []
        keyed: list[Keyed] = []
        for number, (each, line) in enumerate(zip(publishes, lines, strict=True)):
            if runs and runs[-1].topic == each.topic:
                last = runs.pop()
                count, size_bytes = last.count + 1, last.size_bytes + len(line)
            else:
                count, size_bytes = 1, len(line)
            runs.append(Run(FOREIGN_TENANT, each.topic, count, size_bytes))
            if each.key is not None:
                keyed.append(Keyed(number, each.key, content_of(each.request)))
        header = Header(
            self.stamp,
            self.writer,
            self._sequence,
            self.fold.time_after(self.stamp, now_us + self.skew_us, is_reset=is_reset),
            tuple(runs),
            tuple(keyed),
            self.fold.seen(self.stamp),
            is_reset,
            KEEP_KEYS_MS,
            MAX_KEYS,
            clears=clears,
        )
        return InFlight(header, encode_record(header, lines), publishes)

    # --- reading ---------------------------------------------------------------------------------

    def fetch(self, count: int) -> None:
        """Read the next records; they are applied later."""
        if self.log.removed_to > self._fetched:
            # Records are gone that were not read.
            self.go_back()
        records = self.log.read(self._fetched, count)
        if records:
            self._inbox += records
            self._fetched = records[-1][0]
        elif not self._inbox and not self._is_still_there():
            self.go_back()
        elif not self._inbox and not self.fold.is_known and self.log.removed:
            self._wants_reset = True

    def apply(self, count: int) -> None:
        """Apply records that were read."""
        for _ in range(count):
            if not self._inbox:
                return
            position, record = self._inbox.pop(0)
            if self.fold.has_other_stamp(record):
                if not self._is_still_there():
                    self.go_back()
                    return
                if not self.fold.is_settled:
                    self.fold.go_to_settled(record)
                    self._fetch_from(self.fold.position)
                    return
            self._apply(position, record)

    def catch_up(self) -> None:
        """Read all that there is."""
        for _ in range(1_000):
            self.fetch(100)
            if not self._inbox:
                return
            self.apply(100)
        raise AssertionError("a node never reaches the log's end")

    @property
    def is_at_rest(self) -> bool:
        """Whether it knows all, and waits for nothing."""
        fold = self.fold
        has_work = self.in_flight is not None or bool(self.queue) or self.needs_record
        return fold.is_known and not has_work

    @property
    def needs_record(self) -> bool:
        """Whether it appends a record by itself."""
        return self._wants_reset or self.fold.is_behind or self.fold.waiting > 0

    def go_back(self) -> None:
        """Go back to a checkpoint whose record is there, or to the log's beginning."""
        usable = [*self._usable()]
        if usable:
            self._restore(usable[0])
        else:
            removed_to = self.log.removed_to
            self.fold.begin_again(removed_to, is_complete=not self.log.removed)
            self._fetch_from(removed_to)
        self._arrives_with = self._sequence + 1

    def _is_still_there(self) -> bool:
        fold = self.fold
        return not fold.settled_digest or (
            self.log.digest(fold.settled_position) == fold.settled_digest
        )

    def _usable(self) -> Iterator[Checkpoint]:
        kept = self.log.checkpoints if self._store is None else self._store.load()
        for checkpoint in kept:
            if self.log.digest(checkpoint.position) == checkpoint.digest:
                yield checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        for _ in self.fold.restore(checkpoint):
            pass
        self._fetch_from(self.fold.position)
        self._follow()

    def _fetch_from(self, position: int) -> None:
        self._inbox.clear()
        self._fetched = position

    def _follow(self) -> None:
        """Tell readers what they are not given: they go on at the fold's heads."""
        fold = self.fold
        if fold.epoch == fold.readers_epoch:
            for reader in self._readers.values():
                epoch = topic_epoch(fold.epoch, FOREIGN_TENANT, reader.topic)
                reader.enter(epoch, fold.head(FOREIGN_TENANT, reader.topic))

    def _apply(self, position: int, record: bytes) -> None:
        fold = self.fold
        planned = self._plan(position, record)
        heads = {topic: fold.head(FOREIGN_TENANT, topic) for topic in self._readers}
        was_in = fold.readers_epoch
        folded = fold.apply(position, record)
        assert planned is None or planned == folded.placed
        lines = lines_of(record)
        for each in folded.confirmed:
            number = number_of(each.record)
            assert number_of(b'{"data":%b}' % bytes(each.request.data)) == number
            self._deliver(each.placed, [number], each.request.idempotency_key is not None)
        if folded.is_new_epoch and fold.readers_epoch != was_in:
            for reader in self._readers.values():
                reader.enter(topic_epoch(fold.epoch, FOREIGN_TENANT, reader.topic))
        if not folded.is_again:
            for placed in folded.placed:
                numbers = lines[placed.line : placed.line + placed.count]
                self._deliver(placed, numbers, is_keyed=bool(header_of(record).keyed))
        assert folded.is_new_epoch or all(
            fold.head(FOREIGN_TENANT, topic) >= head for topic, head in heads.items()
        )
        self._answer(position, record, folded)
        self.contradictions += folded.contradicts
        if folded.contradicts and not self._wants_reset:
            # The second time it is not this node's reading that went wrong.
            self._wants_reset = self._contradicted_at == position
            self._contradicted_at = position
            if not self._wants_reset:
                self.go_back()
        elif fold.is_known and folded.is_new_epoch:
            self._wants_reset = False

    def _plan(self, position: int, record: bytes) -> tuple[Placed, ...] | None:
        """Return what is planned for the record, if it can be read."""
        header = header_of(record)
        if header.writer == "":
            return None
        lines_at = len(record) - sum(run.size_bytes for run in header.runs)
        return self.fold.plan(header, lines_at, position)

    def _deliver(self, placed: Placed, numbers: list[int], is_keyed: bool) -> None:
        epoch = topic_epoch(placed.partition_epoch, placed.tenant, placed.topic)
        reader = self._readers.get(placed.topic)
        if reader is None:
            # Its first readers begin here.
            reader = self._readers[placed.topic] = Reader(placed.topic)
            reader.enter(epoch, placed.offset - 1)
        elif epoch != reader.epoch:
            reader.enter(epoch)
        for number, place in zip(numbers, places_of(placed), strict=True):
            self.witness.see(place, number)
            reader.take(place, number, is_keyed)

    def _answer(self, position: int, record: bytes, folded: Folded) -> None:
        """Answer the publishers of an own record."""
        sent = self.in_flight
        if sent is None or (folded.writer, folded.sequence) != (self.writer, self._sequence):
            return
        self.in_flight = None
        if self.fold.is_behind and self._sequence >= self._arrives_with:
            self.fold.arrive()
            self._follow()
        if folded.is_retry:
            # The first one was passed over, with a checkpoint: its places are not known.
            return
        answers = {
            line: place
            for placed in folded.placed
            for line, place in enumerate(places_of(placed), placed.line)
        }
        for repeat in folded.repeats:
            epoch = topic_epoch(folded.partition_epoch, repeat.tenant, repeat.topic)
            answers[repeat.line] = epoch, repeat.offset, repeat.id_us
        assert len(answers) + len(folded.refused) in (0, len(sent.publishes))
        for line, place in answers.items():
            publish = sent.publishes[line]
            self.witness.see(place, publish.number)
            self.told.append(Told(position, record, line, place))

    # --- checkpoints -----------------------------------------------------------------------------

    def step_checkpoint(self) -> None:
        """Take a checkpoint, step by step."""
        if self._taking is None:
            self._taking = self.fold.checkpoint()
        try:
            taken = next(self._taking)
        except StopIteration:
            self._taking = None
            return
        if taken is not None:
            self._taking = None
            if self._store is None:
                self.log.save(taken)
            else:
                self._store.save(taken)

    def finish_checkpoint(self) -> None:
        """Take the rest of the checkpoint that was begun."""
        while self._taking is not None:
            self.step_checkpoint()


def header_of(record: bytes) -> Header:
    """Return a record's header; one without a writer if it has none that can be read."""
    if not is_foreign(record):
        try:
            return decode_header(record)[0]
        except BadRecord:
            pass
    return Header("", "", 0, 0)


def lines_of(record: bytes) -> list[int]:
    """Return the messages in a node's record."""
    try:
        _, lines_at = decode_header(record)
    except BadRecord:
        return []
    return [number_of(line) for line in record[lines_at:].splitlines()]


def places_of(placed: Placed) -> list[Place]:
    """Return the place of each message."""
    epoch = topic_epoch(placed.partition_epoch, placed.tenant, placed.topic)
    return [
        (epoch, placed.offset + number, placed.id_us + number * placed.id_step)
        for number in range(placed.count)
    ]


def summary(fold: Fold) -> Any:
    """Return all of a fold's state, for comparison with another's."""
    (*_, checkpoint) = fold.checkpoint(is_whole=True)
    assert checkpoint is not None
    return msgspec.structs.replace(checkpoint, topics=sorted(checkpoint.topics, key=str))
