"""The fold: positions for the messages of one partition, by counting its records. Pure.

Every node reads the same records and has the same state behind each of them. So the state depends
on nothing but the records: not on a clock, not on a setting, not on what a node has lost.

A *stamp* names the incarnation of what accepts records. Another stamp means that records which some
nodes have read may be gone, so all begin a new partition epoch and count from 1 again. No position
of the old epoch is ever used for a second message: an engine takes no record with an old stamp.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from sys import intern
from typing import Final, NamedTuple

from clevrd.core.publish_request import PublishRequest, decode_logged
from clevrd.errors import InvalidRequest
from clevrd.journal.base import Checkpoint, Placed, TopicHead
from clevrd.journal.checkpoints import (
    VERSION,
    BadCheckpoint,
    FoldState,
    read_state,
    spell_keys,
    spell_state,
)
from clevrd.journal.epoch_names import partition_epoch_name
from clevrd.journal.folded import Cleared, Confirmed, Folded, Refused, Repeat
from clevrd.journal.logged_keys import LoggedKey, LoggedKeys
from clevrd.journal.read_again import ReadAgain
from clevrd.journal.records import (
    FOREIGN_TENANT,
    BadRecord,
    Header,
    Keyed,
    LaterVersion,
    Run,
    Seen,
    content_of,
    decode_header,
    digest_of,
    is_foreign,
)

# Writers whose last sequence is known. A writer is one start of a node, and retries within seconds.
# It is part of the format: nodes with other numbers would count differently.
MAX_WRITERS: Final = 1_024

# Records whose chain is remembered, for what other nodes say they have seen. A node that is further
# behind is not judged by its words, until it has caught up.
_REMEMBERED_CHAINS: Final = 1_024

# Foreign records that may wait for the next record of a node, which confirms them. Part of the
# format. A node appends a record as soon as it sees a foreign one, so far fewer wait but for a time
# without nodes.
MAX_WAITING: Final = 4_096
MAX_WAITING_BYTES: Final = 8 << 20

# Topics of a partition that may be cleared in one of its epochs; one more stays as it is. It is a
# part of the format.
MAX_CLEARED: Final = 10_000

# Topics, or entries of what is dropped, that are handled in one step: 0.2 ms.
_PER_STEP: Final = 1_000

_TopicSlot = tuple[str, str]


class _Waiting(NamedTuple):
    """A foreign record until the next record of a node."""

    position: int
    record: bytes
    request: PublishRequest


class _Epoch:
    """All that is counted since a partition's epoch began."""

    __slots__ = (
        "began_us",
        "chain",
        "chains",
        "changed",
        "cleared",
        "heads",
        "is_saved",
        "keys",
        "last_id_us",
        "name",
        "order",
        "previous",
        "time_us",
        "writers",
    )

    def __init__(self, name: str, began_us: int, keeps_topics: bool) -> None:
        self.name = name
        self.began_us = began_us
        # The log's time: that of the latest record, never counting back.
        self.time_us = began_us
        self.last_id_us = 0
        # A digest of all that was counted in this epoch, in which order and how.
        self.chain = zlib.crc32(name.encode())
        # The same behind each of the last records, by their positions.
        self.chains: OrderedDict[int, int] = OrderedDict()
        # Topics' heads, and the topics in the order of their first messages.
        self.heads: dict[_TopicSlot, int] = {}
        self.order: list[_TopicSlot] = []
        # Up to which offset topics were cleared, of those that ever were.
        self.cleared: dict[_TopicSlot, int] = {}
        # Heads that changed since the last checkpoint began; None unless the engine keeps topics.
        self.changed: dict[_TopicSlot, int] | None = {} if keeps_topics else None
        # Whether all topics were in a checkpoint of this epoch.
        self.is_saved = False
        # While a whole checkpoint is taken: heads as they were, of topics that changed meanwhile.
        self.previous: dict[_TopicSlot, int] | None = None
        # The last sequence of each writer, the latest writer last.
        self.writers: dict[str, int] = {}
        self.keys = LoggedKeys()

    def note_record(self, position: int, digest: str) -> None:
        """Add a record to the chain, when it is counted."""
        link = f"{position} {digest} {self.last_id_us}"
        self.chain = self.chains[position] = zlib.crc32(link.encode(), self.chain)
        if len(self.chains) > _REMEMBERED_CHAINS:
            self.chains.popitem(last=False)

    def note_writer(self, writer: str, sequence: int) -> None:
        """Note a writer's last record."""
        writers = self.writers
        writers.pop(writer, None)
        writers[writer] = sequence
        if len(writers) > MAX_WRITERS:
            del writers[next(iter(writers))]

    def clear_topics(self, header: Header) -> tuple[Cleared, ...]:
        """Clear the topics that a record names, as far as they have messages."""
        found = []
        for each in header.clears:
            slot = each.tenant, each.topic
            head = self.heads.get(slot, 0)
            is_known = slot in self.cleared
            if head == self.cleared.get(slot, 0) or (
                len(self.cleared) >= MAX_CLEARED and not is_known
            ):
                continue
            self.cleared[slot] = head
            found.append(Cleared(each.tenant, each.topic, head))
        return tuple(found)

    def has_seen(self, seen: Seen) -> bool:
        """Return whether a writer may have counted as we have, by what it says it has seen."""
        if not self.chains:
            return True
        position = int(seen.position)
        if position < next(iter(self.chains)):
            # It is of an epoch before, or too long ago.
            return True
        chain = self.chains.get(position)
        return chain is not None and seen.digest == f"{chain:08x}"

    def clear_some(self) -> bool:
        """Let go of some of it, when it is over; return whether any is left."""
        for each in (self.heads, self.changed, self.previous):
            if each:
                for _ in range(min(len(each), _PER_STEP)):
                    each.popitem()
                return True
        if self.order:
            del self.order[-_PER_STEP:]
            return True
        return self.keys.clear_some()


class _Draft:
    """The changes that a record makes in an epoch; nothing is changed before `commit`."""

    __slots__ = (
        "_header",
        "_heads",
        "_id_step",
        "_keys",
        "_last_id_us",
        "_partition",
        "_time_us",
        "epoch",
        "placed",
        "refused",
        "repeats",
    )

    def __init__(self, epoch: _Epoch, header: Header, partition: int, partitions: int) -> None:
        self.epoch = epoch
        self._header = header
        self._partition = partition
        self._id_step = partitions
        time_us = header.time_us
        self._time_us = time_us if time_us > epoch.time_us else epoch.time_us
        self._last_id_us = epoch.last_id_us
        # The changed heads, and the new keys.
        self._heads: dict[_TopicSlot, int] = {}
        self._keys: dict[tuple[str, str, str], LoggedKey] = {}
        self.placed: list[Placed] = []
        self.repeats: list[Repeat] = []
        self.refused: list[Refused] = []

    def is_of(self, epoch: _Epoch, header: Header) -> bool:
        """Return whether this was made in ``epoch`` of the record with this very ``header``."""
        return self.epoch is epoch and self._header is header

    def count(self, runs: Sequence[Run], keyed: Sequence[Keyed], lines_at: int) -> None:
        """Count the messages of ``runs``, whose lines begin at byte ``lines_at``."""
        line = 0
        if not keyed:
            for run in runs:
                self._place(run, line, line, run.count, lines_at)
                line += run.count
                lines_at += run.size_bytes
            return
        # The keys of the runs before.
        used = 0
        for run in runs:
            end = line + run.count
            first = line
            while used < len(keyed) and keyed[used].line < end:
                each = keyed[used]
                used += 1
                if self._is_new(run, each):
                    # It is counted here, so that a repeat in the same record finds its place.
                    self._place(run, line, first, each.line + 1 - first, lines_at)
                    self._remember(run, each)
                else:
                    self._place(run, line, first, each.line - first, lines_at)
                first = each.line + 1
            self._place(run, line, first, end - first, lines_at)
            line = end
            lines_at += run.size_bytes

    def commit(self) -> None:
        """Make it the epoch's."""
        epoch = self.epoch
        epoch.time_us = self._time_us
        epoch.last_id_us = self._last_id_us
        heads, changed = epoch.heads, epoch.changed
        for slot, head in self._heads.items():
            before = heads.get(slot)
            if before is None:
                # The same tenant's topics have its name in common: 63 bytes of each.
                slot = intern(slot[0]), slot[1]
                epoch.order.append(slot)
            elif epoch.previous is not None:
                epoch.previous.setdefault(slot, before)
            heads[slot] = head
            if changed is not None:
                changed[slot] = head
        for entry in self._keys.values():
            epoch.keys.add(entry, self._time_us, self._header.max_keys)

    def _place(self, run: Run, run_line: int, first: int, count: int, at_bytes: int) -> None:
        """Give ``count`` messages of ``run`` their places, from line ``first`` of the record on."""
        if not count:
            return
        slot = run.tenant, run.topic
        head = self._heads.get(slot)
        if head is None:
            head = self.epoch.heads.get(slot, 0)
        id_us = self._last_id_us + self._id_step
        if id_us < self._time_us:
            # The first of this partition's ids that is not before the time.
            id_us = self._time_us + (self._partition - self._time_us) % self._id_step
        offset, first_us, line = head + 1, id_us, first
        last = self.placed[-1] if self.placed else None
        if (
            last is not None
            and (last.at_bytes, last.line + last.count) == (at_bytes, first)
            and last.id_us + last.count * self._id_step == id_us
        ):
            # Messages with keys are counted one by one. Messages of a run that follow each other
            # have one place all the same, since each place has a checksum over the whole run.
            offset, first_us, line = last.offset, last.id_us, last.line
            del self.placed[-1]
        self.placed.append(
            Placed(
                run.tenant,
                run.topic,
                self.epoch.name,
                offset,
                head + 1 + count - offset,
                first_us,
                self._id_step,
                self._time_us,
                line,
                at_bytes,
                run.size_bytes,
                line - run_line,
            )
        )
        self._heads[slot] = head + count
        self._last_id_us = id_us + (count - 1) * self._id_step

    def _is_new(self, run: Run, keyed: Keyed) -> bool:
        """Return whether the key is free; note a repeat, or a message that is refused."""
        slot = run.tenant, run.topic, keyed.key
        first = self._keys.get(slot) or self.epoch.keys.find(slot, self._time_us)
        if first is None:
            return True
        if first.content != keyed.content:
            self.refused.append(Refused(keyed.line, run.tenant, run.topic))
        else:
            self.repeats.append(
                Repeat(keyed.line, run.tenant, run.topic, first.offset, first.id_us, first.time_us)
            )
        return False

    def _remember(self, run: Run, keyed: Keyed) -> None:
        """Keep the key of the message that was counted last."""
        header = self._header
        if header.keep_keys_ms <= 0 or header.max_keys <= 0:
            return
        entry = LoggedKey(
            intern(run.tenant),
            run.topic,
            keyed.key,
            keyed.content,
            self._heads[run.tenant, run.topic],
            self._last_id_us,
            self._time_us,
            self._time_us + header.keep_keys_ms * 1_000,
        )
        self._keys[entry.slot] = entry


class Fold:
    """The positions of one partition's messages, record by record.

    A record costs 11 us with one message, 24 with 20 of one topic, 39 with one of each of 20
    topics, and 184 with 1,000 of one topic (240 bytes each), mostly for two checksums; a message
    with a key 5 us more. A topic takes 190 bytes, or 240 if the engine keeps topics. (CPython 3.11,
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
        self._epoch = self._no_epoch()
        # The record for which those that wait were read again; empty without.
        self._read_again_for = b""
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        # Whether a checkpoint is being taken.
        self._is_taken = False
        # The plan of the next record in this epoch, until any record is read.
        self._planned: _Draft | None = None
        # Whether the engine may have topics of another history than this fold's.
        self._has_taken = False
        self._again = ReadAgain(is_complete=is_complete)
        # Epochs that are over, and still to be let go: a million topics are freed in parts.
        self._over: list[_Epoch] = []
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
        return len(self._waiting)

    @property
    def topics(self) -> int:
        """How many topics have messages in this epoch."""
        return len(self._epoch.heads)

    def head(self, tenant: str, topic: str) -> int:
        """Return the offset of the topic's newest message in this epoch; 0 before the first."""
        return self._epoch.heads.get((tenant, topic), 0)

    def cleared(self, tenant: str, topic: str) -> int:
        """Return the offset up to which a topic was cleared in this epoch; 0 if it never was."""
        return self._epoch.cleared.get((tenant, topic), 0)

    def names(self, start: int, count: int) -> Sequence[tuple[str, str]]:
        """Return tenants and names of topics that have messages, in the order of their first ones.

        Args:
            start: how many topics to pass over.
            count: how many to return at most; a thousand take 3 us.
        """
        return self._epoch.order[start : start + count]

    def seen(self, stamp: str) -> Seen | None:
        """Return what the header of the next record with ``stamp`` says of this node.

        A node that has yet to learn of a new stamp says nothing: it knows the epoch before.
        """
        if stamp != self.stamp or not self._epoch.chains:
            return None
        position = next(reversed(self._epoch.chains))
        return Seen(str(position), f"{self._epoch.chains[position]:08x}")

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
                self._confirm(draft)
        if not draft.epoch.name or self._is_retry(header, draft.epoch):
            return ()
        draft.count(header.runs, header.keyed, lines_at)
        if draft.epoch is self._epoch and not self._waiting:
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
        state = FoldState(
            VERSION,
            self._partition,
            self._partitions,
            self.stamp,
            epoch.name,
            epoch.began_us,
            epoch.time_us,
            epoch.last_id_us,
            next(reversed(epoch.chains)),
            epoch.chain,
            tuple(epoch.writers.items()),
            len(epoch.keys),
            tuple((*slot, upto) for slot, upto in epoch.cleared.items()),
        )
        key_lists = epoch.keys.snapshot()
        is_whole = is_whole or not epoch.is_saved
        changed = epoch.changed
        if changed is not None:
            epoch.changed = {}
        topics: list[TopicHead] = []
        self._is_taken = self._has_taken = True
        epoch.is_saved = False
        try:
            yield from (
                self._all_topics(epoch, topics)
                if is_whole or changed is None
                else self._changed_topics(changed, topics)
            )
            lines = [spell_state(state)]
            for keys in key_lists:
                lines.append(spell_keys(keys))
                yield None
            epoch.is_saved = changed is not None
        finally:
            self._is_taken = False
        yield Checkpoint(
            position, digest, state.epoch, b"\n".join(lines), topics, is_whole or changed is None
        )

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
        epoch = _Epoch(state.epoch, state.epoch_began_us, self._keeps_topics)
        epoch.time_us = state.time_us
        epoch.last_id_us = state.last_id_us
        epoch.chain = epoch.chains[state.chain_position] = state.chain
        epoch.writers = dict(state.writers)
        epoch.cleared = {(tenant, topic): upto for tenant, topic, upto in state.cleared}
        for first in range(0, len(checkpoint.topics), _PER_STEP):
            for topic in checkpoint.topics[first : first + _PER_STEP]:
                slot = intern(topic.tenant), topic.topic
                epoch.heads[slot] = topic.head
                epoch.order.append(slot)
            yield
        for keys in key_lists:
            for key in keys:
                epoch.keys.put(key)
            yield
        # A checkpoint that was taken may be saved after this one, and be of what was lost.
        epoch.is_saved = self._keeps_topics and not self._has_taken
        self._begin(epoch)
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
        self._begin(self._no_epoch())
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
        planned: _Draft | None = None,
    ) -> Folded:
        """Count a record of a node.

        Args:
            planned: the last plan, if nothing was read since.
        """
        epoch = self._epoch_for(header, position)
        is_new_epoch = epoch is not self._epoch
        contradicts = not (
            is_new_epoch or header.is_reset or header.seen is None or epoch.has_seen(header.seen)
        )
        if is_new_epoch:
            self._begin(epoch)
            self._again.begin_epoch(epoch.name, position)
        if header.stamp != self.stamp:
            self._note_stamp(header.stamp)
        is_planned = planned is not None and planned.is_of(epoch, header)
        draft = planned if planned is not None and is_planned else self._draft(epoch, header)
        confirmed: tuple[Confirmed, ...] = ()
        if self._waiting:
            # They are counted now that the stamp is known of what accepted them, or came later.
            if epoch.name:
                confirmed = self._confirm_all(draft)
                draft = self._draft(epoch, header)
            self._stop_waiting()
        if header.is_reset:
            # Even if it is a retry: for a node that begins to read here it is the first one.
            is_new_epoch = True
            epoch = self._new_epoch(header, position, "reset")
            self._begin(epoch)
            self._again.begin_epoch(epoch.name, position)
            draft = self._draft(epoch, header)
        is_retry = self._is_retry(header, epoch)
        cleared: tuple[Cleared, ...] = ()
        if is_retry:
            self.retries += 1
        else:
            if epoch.name:
                if not is_planned:
                    draft.count(header.runs, header.keyed, lines_at)
                draft.commit()
            epoch.note_writer(header.writer, header.sequence)
            if header.clears and epoch.name:
                cleared = epoch.clear_topics(header)
        if epoch.name:
            epoch.note_record(position, digest)
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

    def _epoch_for(self, header: Header, position: int) -> _Epoch:
        """Return the epoch that a record belongs to by its stamp: the present one, or a new one."""
        if header.stamp == self.stamp or not (self.stamp or self._is_complete):
            return self._epoch
        return self._new_epoch(header, position, "stamp")

    def _new_epoch(self, header: Header, position: int, reason: str) -> _Epoch:
        """Return the epoch that a record begins; it depends on nothing before that record."""
        name = partition_epoch_name(header, position, reason)
        return _Epoch(name, header.time_us, self._keeps_topics)

    def _is_retry(self, header: Header, epoch: _Epoch) -> bool:
        """Return whether a writer's record, or one behind it, was counted before."""
        return header.sequence <= epoch.writers.get(header.writer, 0)

    def _no_epoch(self) -> _Epoch:
        return _Epoch("", 0, False)

    def _begin(self, epoch: _Epoch) -> None:
        """Make ``epoch`` the present one."""
        self._over.append(self._epoch)
        self._epoch = epoch

    def _draft(self, epoch: _Epoch, header: Header) -> _Draft:
        return _Draft(epoch, header, self._partition, self._partitions)

    def _confirm(self, draft: _Draft) -> tuple[Confirmed, ...]:
        """Count in ``draft`` the foreign records that wait."""
        confirmed = []
        for position, record, request in self._waiting:
            draft.count(*_as_runs(record, request))
            if draft.placed:
                confirmed.append(Confirmed(position, record, request, draft.placed.pop()))
        draft.repeats.clear()
        draft.refused.clear()
        return tuple(confirmed)

    def _confirm_all(self, draft: _Draft) -> tuple[Confirmed, ...]:
        """Count the foreign records that wait, for good; return those that readers are given."""
        confirmed = self._confirm(draft)
        draft.commit()
        for each in self._waiting:
            draft.epoch.note_record(each.position, digest_of(each.record))
        return confirmed if draft.epoch.name == self.readers_epoch else ()

    def _wait(self, position: int, record: bytes) -> Folded:
        """Keep a foreign record until a record of a node confirms it.

        It has no stamp. If it were counted at once, it could be given the place of a message that
        was lost just before it, and that some nodes have delivered.
        """
        try:
            request = decode_logged(record)
        except InvalidRequest as error:
            return self._pass_over(error, foreign=True)
        self._waiting.append(_Waiting(position, record, request))
        self._waiting_bytes += len(record)
        confirmed: tuple[Confirmed, ...] = ()
        if len(self._waiting) >= MAX_WAITING or self._waiting_bytes >= MAX_WAITING_BYTES:
            confirmed = self._confirm_at_bound()
        return Folded(confirmed=confirmed, partition_epoch=self._epoch.name, foreign=True)

    def _confirm_at_bound(self) -> tuple[Confirmed, ...]:
        """Count foreign records without waiting longer: no node has appended for a long time."""
        epoch = self._epoch
        confirmed: tuple[Confirmed, ...] = ()
        if epoch.name:
            draft = self._draft(epoch, Header(self.stamp, "", 0, epoch.time_us))
            confirmed = self._confirm_all(draft)
        self.settled_position = self.position
        self.settled_digest = digest_of(self._waiting[-1].record)
        self._stop_waiting()
        return confirmed

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
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0

    def _pass_over(self, error: Exception, *, foreign: bool = False) -> Folded:
        """Count a record as bad; it is in nobody's chain, so a node that can read it differs."""
        self.bad_records += 1
        return Folded(
            partition_epoch=self._epoch.name,
            foreign=foreign,
            bad=str(error),
            is_later=isinstance(error, LaterVersion),
        )

    def _all_topics(self, epoch: _Epoch, topics: list[TopicHead]) -> Iterator[None]:
        """Add all topics to ``topics``, with their heads as they are at the first step."""
        previous: dict[_TopicSlot, int] = {}
        epoch.previous = previous
        heads = epoch.heads
        count = len(epoch.order)
        try:
            for first in range(0, count, _PER_STEP):
                topics.extend(
                    TopicHead(*slot, previous.get(slot) or heads[slot])
                    for slot in epoch.order[first : min(first + _PER_STEP, count)]
                )
                yield
        finally:
            epoch.previous = None

    def _changed_topics(
        self, changed: dict[_TopicSlot, int], topics: list[TopicHead]
    ) -> Iterator[None]:
        while changed:
            for _ in range(min(len(changed), _PER_STEP)):
                slot, head = changed.popitem()
                topics.append(TopicHead(*slot, head))
            yield

    def _clear_some(self) -> None:
        """Let go of some of the epochs that are over; one of which a checkpoint is taken stays."""
        oldest = self._over[0]
        if oldest.previous is None and not oldest.clear_some():
            del self._over[0]


def _as_runs(record: bytes, request: PublishRequest) -> tuple[Sequence[Run], Sequence[Keyed], int]:
    """Return a foreign record as a run of one message."""
    run = Run(FOREIGN_TENANT, request.topic, 1, len(record))
    if request.idempotency_key is None:
        return (run,), (), 0
    return (run,), (Keyed(0, request.idempotency_key, content_of(request)),), 0
