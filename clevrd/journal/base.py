"""The promises of an engine of the journal, and the values that it is given.

An engine keeps one log in each of its partitions. It knows neither topics' rings nor readers, and
gives messages no offsets: that is done by the fold, on every node alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec

from clevrd.metrics.journal import JournalStorage


class Placed(msgspec.Struct, frozen=True, gc=False):
    """Messages of one topic with consecutive offsets, at their place in the order."""

    tenant: str
    topic: str
    # The partition's, by which the topic's is named: see `epoch_names.topic_epoch`.
    partition_epoch: str
    # The first one's offset; the others follow it.
    offset: int
    count: int
    # The first one's id, in microseconds since 1970; the next one's is ``id_step`` more.
    id_us: int
    id_step: int
    # The writer's clock, microseconds since 1970, kept from going back.
    time_us: int
    # The first one's line in its record, counted from 0.
    line: int
    # Where the lines of its run begin in the record, their bytes, and how many of these lines come
    # before the first one's.
    at_bytes: int
    size_bytes: int
    skip: int


class StoredRun(msgspec.Struct, frozen=True, gc=False):
    """Messages with consecutive offsets, as they are read back from a history."""

    # The first one's offset; the others follow it.
    offset: int
    count: int
    # The first one's id, in microseconds since 1970; the next one's is ``id_step`` more.
    id_us: int
    id_step: int
    time_us: int
    # A line for each message: a publish object and a line feed.
    lines: bytes


class TopicHead(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """How many messages a topic has had in its partition's epoch: its newest one's offset."""

    tenant: str
    topic: str
    head: int


class Checkpoint(msgspec.Struct, frozen=True):
    """The fold's state behind one record, from which a node goes on without reading all before."""

    # The last record that is counted in it, and that record's CRC-32 (8 hexadecimal digits).
    position: int
    digest: str
    partition_epoch: str
    # All but the topics, as the fold spells it.
    state: bytes
    # Topics whose head has changed since the checkpoint that was saved before this one, and all
    # topics if there was none in this epoch, or if the engine does not keep topics.
    topics: Sequence[TopicHead]
    # ``topics`` are all that there are: topics that were saved before are gone.
    is_whole: bool


class Extent(msgspec.Struct, frozen=True, gc=False):
    """The part of a topic's epoch that a history holds."""

    # The oldest message's offset; one more than the newest one's where there is none.
    first: int
    # The newest message's offset; 0 before the first message ever.
    head: int


class Fenced(Exception):
    """The log has another stamp now than the record that was to be appended; nothing was taken."""


class Trimmed(Exception):
    """Records that were to be read are gone, as retention wants it, or by somebody's hand."""


class TailLost(Trimmed):
    """The newest records are gone, which were read: positions must not go on from before them."""


class Engine(Protocol):
    """A log in partitions. Positions rise within a partition; they are not consecutive.

    All methods are called from the event loop, and none holds it.
    """

    # As in the configuration: sqlite, redis, nats, kafka.
    name: str
    # Fixed when the log is made.
    partitions: int
    # Whether a checkpoint brings changed topics alone, since the engine keeps the others.
    keeps_topics: bool
    # Whether other nodes may append to the log too.
    is_shared: bool
    # Whether records are read before they are what `durability` says: then publishers are
    # answered when `append` has returned as well.
    answers_when_taken: bool
    # How far apart a partition's records of a few publishes are at most, while messages come fast:
    # the dearer a record is, the longer it waits for company.
    max_apart_s: float

    @property
    def durability(self) -> str:
        """The worst that an acknowledged record survives: "fsync", "os", or another promise.

        It may change with the stamp.
        """
        ...

    @property
    def is_unsure(self) -> bool:
        """Whether something went wrong, so that a record is wanted soon, even an empty one.

        Nothing else shows publishers and subscribers whether the log goes on.
        """
        ...

    async def open(self) -> None:
        """Connect, and check that the log is one that this engine can go on with.

        Raises:
            JournalUnavailable: with a sentence that says what to do.
        """

    async def stamp(self, partition: int) -> str:
        """Return the incarnation of what accepts records now; hexadecimal digits.

        It differs whenever a record that was accepted before may be gone.
        """

    async def append(
        self, partition: int, record: bytes, stamp: str, placed: Sequence[Placed]
    ) -> None:
        """Append ``record``, and return once it is as durable as the engine promises.

        Args:
            stamp: what `stamp` returned when the record was made.
            placed: what the fold makes of the record, if no other is accepted before it. For an
                engine that has no other writer and keeps a history; others ignore it.

        Raises:
            Fenced: the log has another stamp by now.
            JournalFull: there is no room; the record was not taken.
            JournalUnavailable: it may have been taken, or not; `read` shows it if it was.
        """

    async def read(self, partition: int, after: int) -> list[tuple[int, bytes]]:
        """Return the next records behind position ``after``, with their positions; wait for one.

        Only records that are durable are returned, unless `answers_when_taken`.

        Raises:
            JournalUnavailable: the engine is away; the caller tries again.
            Trimmed: records behind ``after`` are gone.
            TailLost: those before ``after`` are, too, and the stamp may be what it was.
        """

    async def first(self, partition: int) -> int:
        """Return the oldest record's position; one more than the last one's if there is none.

        It is 1 at most if the log still has its very first record, or had none.
        """

    async def is_short(self, partition: int) -> bool:
        """Return whether a start may read the whole log, which has its very first record.

        It is asked of engines without a history, whose nodes fill their rings from the log.
        """

    async def digest(self, partition: int, position: int) -> str | None:
        """Return the CRC-32 of the record at ``position`` (8 hex digits); None if it is gone."""

    async def load_checkpoints(self, partition: int) -> list[Checkpoint]:
        """Return the whole checkpoints that are kept, newest first."""

    async def save_checkpoint(self, partition: int, checkpoint: Checkpoint) -> None:
        """Keep ``checkpoint``.

        An engine that keeps topics adds them to those that it has, and has one checkpoint. The
        others forget the oldest of more than five.
        """

    def history(self) -> History | None:
        """Return the history that it keeps by topic and offset; None if it keeps none."""

    def storage(self) -> JournalStorage | None:
        """Return the figures of its files; None if it keeps none of its own."""

    async def close(self) -> None:
        """Finish what was begun, and close; a second call does nothing."""


@runtime_checkable
class History(Protocol):
    """Messages by topic and offset, for engines that keep them so. No method holds the loop."""

    async def extent(self, partition_epoch: str, tenant: str, topic: str) -> Extent | None:
        """Return what is kept of the topic in this epoch; None if nothing ever was."""

    async def page(
        self,
        partition_epoch: str,
        tenant: str,
        topic: str,
        after: int,
        max_messages: int,
        max_bytes: int,
    ) -> list[StoredRun]:
        """Return messages behind offset ``after``, in order; at least one if any is kept there.

        A message that is damaged, or gone, is left out: its offset is missing.
        """

    async def last_before(self, partition_epoch: str, tenant: str, topic: str, id_us: int) -> int:
        """Return the offset of the newest message kept whose id is below ``id_us``; 0 without."""
