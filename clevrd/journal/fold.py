"""The fold: positions for the messages of one partition, by counting its records. Pure.

Every node reads the same records and has the same state behind each of them. So the state depends
on nothing but the records: not on a clock, not on a setting, not on what a node has lost.

A *stamp* names the incarnation of what accepts records. Another stamp means that records which some
nodes have read may be gone, so all begin a new partition epoch and count from 1 again. No position
of the old epoch is ever used for a second message: an engine takes no record with an old stamp.

The rules for a record of a node, in this order (`Fold._fold`):

1. If its stamp is another one than the last record's, it begins a new partition epoch.
2. Foreign records that wait have their places now, before it, in that epoch (`foreign_records`).
3. If it is a reset, it begins a new partition epoch, even if it is a retry.
4. If its writer's sequence was counted in this epoch, it is a retry, and is skipped
   (`writer_sequences`).
5. Each message whose idempotency key is used is a repeat, or refused: it is not counted
   (`logged_keys`). Each other one has the next offset of its topic, and the next id (`draft`).
6. Topics that it names are cleared, behind its messages (`cleared_topics`).

All that is counted in an epoch is a `partition_epoch`; what a record has changed is a `folded`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clevrd.core.publish_request import decode_logged
from clevrd.errors import InvalidRequest
from clevrd.journal.base import Checkpoint, Placed
from clevrd.journal.checkpoints import BadCheckpoint, read_state
from clevrd.journal.draft import Draft
from clevrd.journal.epoch_checkpoint import epoch_of, fill_epoch, state_of, take_epoch
from clevrd.journal.epoch_names import partition_epoch_name
from clevrd.journal.folded import Cleared, Confirmed, Folded
from clevrd.journal.foreign_records import ForeignRecord, ForeignRecords
from clevrd.journal.partition_epoch import PartitionEpoch
from clevrd.journal.read_again import ReadAgain
from clevrd.journal.records import (
    MAX_FOREIGN_BYTES,
    BadRecord,
    Header,
    LaterVersion,
    Seen,
    decode_header,
    digest_of,
    is_foreign,
)


class Fold:
    """The positions of one partition's messages, record by record.

    A record costs 8 us with one message, 11 with 20 of one topic, 31 with one of each of 20
    topics, and 124 with 1,000 of one topic (230 bytes each), mostly for two checksums; a message
    with a key 2 us more. A topic takes 190 bytes, or 240 if the engine keeps topics. (CPython 3.11,
    CPU time.)

    How a node uses it:

    - It begins at a checkpoint (`restore`), or at the log's very first record. If records are gone
      before the first one that it can read, ``is_complete`` is false: then positions are not known
      (`is_known`), and messages are passed over, until a record begins a new epoch for all. A node
      that has read all and still does not know appends a record with ``is_reset``.
    - Before it applies a record that `has_other_stamp`, it asks the engine whether the last record
      of a node that was folded is still there (`settled_position`, `settled_digest`). If so, and it
      has read others behind that one (it `is_settled` no more), it reads these again, as they may
      be other ones by now (`go_to_settled`), and then applies the record, if it is still the same.
      If it is not there, this state holds messages that the log has lost: the node goes back to a
      checkpoint whose record is still there, or to the log's beginning (`begin_again`). It asks the
      same when nothing comes for some seconds, since the log may have become shorter.
    - A node that went back reads messages again. It delivers what `is_again` does not forbid, if it
      is behind the head that the topic's readers know. Where it went back further than this process
      had ever read (`is_behind`), it appends a record, and calls `arrive` when that comes.
    - Whenever `readers_epoch` has changed otherwise than by a record with `is_new_epoch`, or a
      checkpoint has moved a head on in that epoch, readers are told a gap: they go on at `head`.
    - A record that `contradicts` says that its writer has counted otherwise, though nothing told
      either that records were lost. Which one is right can't be known from here, and if each fold
      began a new epoch by itself, those that agree with the writer would not. So it is told and
      changes nothing. The node goes back to a checkpoint and reads again; if the contradiction is
      still there it appends a record with ``is_reset``, which is the same for all.
    """

    def __init__(
        self,
        partition: int,
        partitions: int,
        *,
        keeps_topics: bool = False,
        is_complete: bool = True,
    ) -> None:
        """Begin before the first record.

        Args:
            keeps_topics: checkpoints go to an engine that keeps topics: see `base.Engine`.
            is_complete: the first record that is applied is the first that the log ever had.
        """
        self._partition = partition
        self._partitions = partitions
        self._keeps_topics = keeps_topics
        self._is_complete = is_complete
        # The last record that was read; the next one is behind it.
        self.position = 0
        # The last record of a node, and its CRC-32: those behind it have changed nothing yet, so
        # checkpoints are of the state behind this one. A lost record of a node can't come again,
        # since it has the old stamp; the same foreign record can.
        self.settled_position = 0
        self.settled_digest = ""
        self._note_stamp("")
        self._epoch = _no_epoch()
        # The record for which those that wait were read again; empty without.
        self._read_again_for = b""
        self._foreign = ForeignRecords()
        # Whether a checkpoint is being taken.
        self._is_taken = False
        # The plan of the next record in this epoch, until any record is read.
        self._planned: Draft | None = None
        # Whether the engine may have topics of another history than this fold's.
        self._has_taken = False
        self._again = ReadAgain(is_complete=is_complete)
        # Epochs that are over, and still to be let go: a million topics are freed in parts.
        self._over: list[PartitionEpoch] = []
        # Counters; they only rise.
        self.bad_records = 0
        self.retries = 0

    @property
    def epoch(self) -> str:
        """The partition's epoch; empty as long as it is not known."""
        return self._epoch.name

    @property
    def epoch_began_us(self) -> int:
        """The log time at which the epoch began, in microseconds since 1970."""
        return self._epoch.began_us

    @property
    def is_known(self) -> bool:
        """Whether messages can be given their positions."""
        return bool(self._epoch.name)

    @property
    def last_id_us(self) -> int:
        """The last id that was given in this epoch; 0 before the first."""
        return self._epoch.last_id_us

    @property
    def time_us(self) -> int:
        """The log's time: that of the latest record, microseconds since 1970."""
        return self._epoch.time_us

    @property
    def is_settled(self) -> bool:
        """Whether the last record that was read is one of a node."""
        return self.position == self.settled_position

    @property
    def waiting(self) -> int:
        """How many foreign records wait for the next record of a node; an empty one will do."""
        return len(self._foreign.waiting)

    @property
    def topics(self) -> int:
        """How many topics have messages in this epoch."""
        return len(self._epoch.heads.by_slot)

    def head(self, tenant: str, topic: str) -> int:
        """Return the offset of the topic's newest message in this epoch; 0 before the first."""
        return self._epoch.heads.by_slot.get((tenant, topic), 0)

    def cleared(self, tenant: str, topic: str) -> int:
        """Return the offset up to which a topic was cleared in this epoch; 0 if it never was."""
        return self._epoch.cleared.upto((tenant, topic))

    def names(self, start: int, count: int) -> Sequence[tuple[str, str]]:
        """Return tenants and names of topics that have messages, in the order of their first ones.

        Args:
            start: how many topics to pass over.
            count: how many to return at most; a thousand take 3 us.
        """
        return self._epoch.heads.order[start : start + count]

    def seen(self, stamp: str) -> Seen | None:
        """Return what the header of the next record with ``stamp`` says of this node.

        A node that has yet to learn of a new stamp says nothing: it knows the epoch before.
        """
        return self._epoch.chain.seen() if stamp == self.stamp else None

    def time_after(self, stamp: str, clock_us: int, *, is_reset: bool = False) -> int:
        """Return the time for the next record's header: ``clock_us``, or later.

        A new epoch's ids begin at its first record's time, since nodes that have lost what was
        before must count the same. So the record that begins one has a time behind all ids before.
        """
        if stamp != self.stamp or is_reset:
            return max(clock_us, self._epoch.last_id_us + self._partitions)
        return clock_us

    def has_other_stamp(self, record: bytes) -> bool:
        """Return whether ``record`` has another stamp than the last one of a node; see the class.

        As a rule it looks at some bytes only.
        """
        if (
            record.startswith(self._usual, 17)
            or is_foreign(record)
            or record == self._read_again_for
        ):
            return False
        try:
            header, _ = decode_header(record)
        except BadRecord:
            return False
        # Before the first stamp there is nothing that could be gone, but what is not settled.
        return header.stamp != self.stamp if self.stamp else not self.is_settled

    def plan(
        self, header: Header, lines_at: int, position: int | None = None
    ) -> tuple[Placed, ...]:
        """Return what `apply` will place of a record if it is the next; nothing is changed.

        Args:
            lines_at: the byte at which its lines begin: its size less that of its runs.
            position: the one that it will have; the next one if it is not given.
        """
        if position is None:
            position = self.position + 1
        epoch = self._epoch_for(header, position)
        if header.is_reset:
            draft = self._draft(self._new_epoch(header, position, "reset"), header)
        else:
            draft = self._draft(epoch, header)
            if epoch.name:
                self._foreign.count(draft)
        epoch = draft.epoch
        if not epoch.name or epoch.writers.have(header.writer, header.sequence):
            return ()
        draft.count(header.runs, header.keyed, lines_at)
        if epoch is self._epoch and not self._foreign.waiting:
            self._planned = draft
        return tuple(draft.placed)

    def apply(
        self, position: int, record: bytes, known: tuple[Header, int] | None = None
    ) -> Folded:
        """Count ``record``, the next one that is read; return what has changed.

        A record that can't be read is counted as bad, and changes no position.

        Args:
            known: its header and where its lines begin, if these very bytes were made of them.

        Raises:
            ValueError: it is not behind the last one, which is a mistake of the caller's.
        """
        if position <= self.position:
            raise ValueError(f"the record at {position} does not come after {self.position}")
        if self._over:
            self._clear_some()
        self.position = position
        planned, self._planned = self._planned, None
        if known is not None:
            return self._fold(position, digest_of(record), *known, planned)
        if is_foreign(record):
            return self._wait(position, record)
        try:
            header, lines_at = decode_header(record)
        except BadRecord as error:
            return self._pass_over(error)
        return self._fold(position, digest_of(record), header, lines_at)

    def checkpoint(self, *, is_whole: bool = False) -> Iterator[Checkpoint | None]:
        """Take a checkpoint of the state at the first step, in steps of less than 1 ms.

        Between the steps records may be applied. One is taken at a time. Each step yields None,
        and the last one the checkpoint; there is none while positions are not known. The caller
        keeps it until the engine has taken it, since the next one is of what changed behind it; if
        it gives up, the next one has to be whole.

        Args:
            is_whole: put in all topics, though the engine may have them.
        """
        epoch = self._epoch
        if not epoch.name:
            return
        if self._is_taken:
            raise RuntimeError("another checkpoint of this partition is being taken")
        position, digest = self.settled_position, self.settled_digest
        state = state_of(epoch, self._partition, self._partitions, self.stamp)
        self._is_taken = self._has_taken = True
        try:
            taken = yield from take_epoch(epoch, state, is_whole=is_whole)
        finally:
            self._is_taken = False
        yield Checkpoint(position, digest, state.epoch, taken.state, taken.topics, taken.is_whole)

    def restore(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Go on from ``checkpoint``, in steps; what is given then is valid behind the last one.

        Raises:
            BadCheckpoint: it can't be used; the fold is as it was.
        """
        state, key_lists = read_state(checkpoint.state)
        if (state.partition, state.partitions) != (self._partition, self._partitions):
            raise BadCheckpoint(
                "it is of another partition, or of a log with another number of them"
            )
        if state.epoch != checkpoint.partition_epoch or not state.epoch or not checkpoint.is_whole:
            raise BadCheckpoint("its parts do not belong together")
        epoch = epoch_of(state, keeps_topics=self._keeps_topics)
        yield from fill_epoch(epoch, checkpoint.topics, key_lists)
        # A checkpoint that was taken may be saved after this one, and be of what was lost.
        epoch.heads.is_saved = self._keeps_topics and not self._has_taken
        self._leave_for(epoch)
        self._again.go_to(epoch.name, checkpoint.position)
        self._note_stamp(state.stamp)
        self._go_to(checkpoint.position, checkpoint.digest)

    def begin_again(self, after: int, *, is_complete: bool) -> None:
        """Go back to the log's beginning, where no checkpoint can be used.

        Args:
            after: the position behind which records can be read; 0 if ``is_complete``.
            is_complete: as in `__init__`.
        """
        self._is_complete = is_complete
        self._leave_for(_no_epoch())
        self._again.go_to("", after)
        self._note_stamp("")
        self._go_to(after, "")

    def go_to_settled(self, record: bytes) -> None:
        """Go back to the last record of a node, to read the foreign ones behind it again.

        Args:
            record: the one that `has_other_stamp`. When it is read again, it has no more.
        """
        self._go_to(self.settled_position, self.settled_digest)
        self._read_again_for = record

    @property
    def readers_epoch(self) -> str:
        """The partition epoch that readers are in: behind `epoch` while records are read again."""
        return self._again.readers_epoch

    @property
    def is_behind(self) -> bool:
        """Whether readers are given nothing new before the log's end is reached: see `arrive`."""
        return self._again.is_behind

    def arrive(self) -> None:
        """Note that the log's end was reached: an own record came that was made `is_behind`."""
        if self.is_known:
            self._again.arrive(self.epoch, self.position)

    def _fold(
        self,
        position: int,
        digest: str,
        header: Header,
        lines_at: int,
        planned: Draft | None = None,
    ) -> Folded:
        """Count a record of a node, by the six rules at the top.

        Args:
            planned: the last plan, if nothing was read since.
        """
        epoch = self._epoch_for(header, position)
        is_new_epoch = epoch is not self._epoch
        contradicts = not (
            is_new_epoch or header.is_reset or header.seen is None or epoch.chain.has(header.seen)
        )
        # Rule 1, another stamp.
        if is_new_epoch:
            self._begin(epoch, position)
        if header.stamp != self.stamp:
            self._note_stamp(header.stamp)
        # Rule 2, foreign records.
        confirmed = self._confirm_all(header) if self._foreign.waiting else ()
        if header.is_reset:
            # Rule 3. For a node that begins to read here a retry is the first one.
            is_new_epoch = True
            epoch = self._new_epoch(header, position, "reset")
            self._begin(epoch, position)
        cleared: tuple[Cleared, ...] = ()
        is_retry = epoch.writers.have(header.writer, header.sequence)
        if is_retry:
            # Rule 4. Its messages have the places that they were given then.
            self.retries += 1
            draft = self._draft(epoch, header)
        else:
            # Rules 5 and 6.
            draft = self._count(epoch, header, lines_at, planned)
            epoch.writers.note(header.writer, header.sequence)
            if header.clears and epoch.name:
                cleared = epoch.cleared.clear(header.clears, epoch.heads.by_slot)
        if epoch.name:
            epoch.chain.add(position, digest, epoch.last_id_us)
        self.settled_position = position
        self.settled_digest = digest
        self._read_again_for = b""
        return Folded(
            tuple(draft.placed),
            tuple(draft.repeats),
            tuple(draft.refused),
            confirmed,
            epoch.name,
            is_new_epoch,
            epoch.name != self.readers_epoch,
            header.writer,
            header.sequence,
            is_retry,
            False,
            contradicts,
            header.version,
            cleared=cleared,
        )

    def _epoch_for(self, header: Header, position: int) -> PartitionEpoch:
        """Return the epoch that a record belongs to by its stamp: the present one, or a new one."""
        if header.stamp == self.stamp or not (self.stamp or self._is_complete):
            return self._epoch
        return self._new_epoch(header, position, "stamp")

    def _new_epoch(self, header: Header, position: int, reason: str) -> PartitionEpoch:
        """Return the epoch that a record begins; it depends on nothing before that record."""
        name = partition_epoch_name(header, position, reason)
        return PartitionEpoch(name, header.time_us, keeps_topics=self._keeps_topics)

    def _count(
        self, epoch: PartitionEpoch, header: Header, lines_at: int, planned: Draft | None
    ) -> Draft:
        """Give a record's messages their places, for good; none as long as positions are not known.

        Args:
            planned: the last plan; it is taken if it is of this record.
        """
        if planned is not None and planned.is_of(epoch, header):
            draft = planned
        else:
            draft = self._draft(epoch, header)
            if not epoch.name:
                return draft
            draft.count(header.runs, header.keyed, lines_at)
        draft.commit()
        return draft

    def _draft(self, epoch: PartitionEpoch, header: Header) -> Draft:
        return Draft(epoch, header, self._partition, self._partitions)

    def _begin(self, epoch: PartitionEpoch, position: int) -> None:
        """Begin ``epoch`` with the record at ``position``."""
        self._leave_for(epoch)
        self._again.begin_epoch(epoch.name, position)

    def _leave_for(self, epoch: PartitionEpoch) -> None:
        """Make ``epoch`` the present one; the one before is let go in parts."""
        self._over.append(self._epoch)
        self._epoch = epoch

    def _wait(self, position: int, record: bytes) -> Folded:
        """Keep a foreign record until a record of a node confirms it.

        It has no stamp. If it were counted at once, it could be given the place of a message that
        was lost just before it, and that some nodes have delivered.
        """
        if len(record) > MAX_FOREIGN_BYTES:
            large = (
                f"{len(record)} bytes of another program, which may write {MAX_FOREIGN_BYTES} at"
                " once; send less, or publish it by clevrd"
            )
            return self._pass_over(BadRecord(large), foreign=True)
        try:
            request = decode_logged(record)
        except InvalidRequest as error:
            return self._pass_over(error, foreign=True)
        self._foreign.add(ForeignRecord(position, record, request))
        confirmed = self._confirm_at_bound() if self._foreign.are_too_many else ()
        return Folded(confirmed=confirmed, partition_epoch=self._epoch.name, foreign=True)

    def _confirm_at_bound(self) -> tuple[Confirmed, ...]:
        """Count foreign records without waiting longer: no node has appended for a long time."""
        newest = self._foreign.waiting[-1]
        confirmed = self._confirm_all(Header(self.stamp, "", 0, self._epoch.time_us))
        self.settled_position = self.position
        self.settled_digest = digest_of(newest.record)
        return confirmed

    def _confirm_all(self, header: Header) -> tuple[Confirmed, ...]:
        """Count the foreign records that wait, for good; return those that readers are given.

        The stamp is known now of what accepted them, or came later.
        """
        epoch = self._epoch
        confirmed: tuple[Confirmed, ...] = ()
        if epoch.name:
            draft = self._draft(epoch, header)
            confirmed = self._foreign.count(draft)
            draft.commit()
            for each in self._foreign.waiting:
                epoch.chain.add(each.position, digest_of(each.record), epoch.last_id_us)
        self._foreign.clear()
        return confirmed if epoch.name == self.readers_epoch else ()

    def _note_stamp(self, stamp: str) -> None:
        """Go by the stamp of the last record of a node."""
        self.stamp = stamp
        # The bytes behind the checksum of a record that has it.
        self._usual = b'["%b",' % stamp.encode("utf-8", "surrogatepass")

    def _go_to(self, position: int, digest: str) -> None:
        """Go on behind the record of a node at ``position``."""
        self.position = self.settled_position = position
        self.settled_digest = digest
        self._read_again_for = b""
        self._foreign.clear()

    def _pass_over(self, error: Exception, *, foreign: bool = False) -> Folded:
        """Count a record as bad; it is in nobody's chain, so a node that can read it differs."""
        self.bad_records += 1
        return Folded(
            partition_epoch=self._epoch.name,
            foreign=foreign,
            bad=str(error),
            is_later=isinstance(error, LaterVersion),
        )

    def _clear_some(self) -> None:
        """Let go of some of the epochs that are over; one of which a checkpoint is taken stays."""
        oldest = self._over[0]
        if not (oldest.heads.is_being_taken or oldest.clear_some()):
            del self._over[0]


def _no_epoch() -> PartitionEpoch:
    """Return the epoch of a fold that does not know positions yet."""
    return PartitionEpoch("", 0, keeps_topics=False)
