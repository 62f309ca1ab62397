"""No position ever names two messages, whatever a log loses: three nodes over random schedules.

A broker fails over and loses records that it had acknowledged and that some nodes had read; records
arrive twice, late or never, and old ones are removed, read or not; foreign producers write without
a stamp; checkpoints get lost; processes die, and their clocks differ. Each node is compared with
the others and with `Counted`, which knows the whole log and has no checkpoints.

A long run: HYPOTHESIS_PROFILE=long pytest --timeout=0 -o faulthandler_timeout=0 with this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from journal_world import (
    NOON_US,
    Log,
    Node,
    Place,
    Publish,
    Witness,
    header_of,
    lines_of,
    number_of,
    summary,
)

from clevrd.core.publish_request import decode_publish
from clevrd.journal.epoch_names import partition_epoch_name, topic_epoch
from clevrd.journal.fold import Fold
from clevrd.journal.folded import Folded
from clevrd.journal.records import FOREIGN_TENANT, Header, is_foreign
from clevrd.journal.writer_sequences import WriterSequences

NODES = 3
TOPICS = ("a", "b", "c")


class Counted:
    """A log, counted in the plainest way: all records, one message after the other."""

    def __init__(self, records: list[tuple[int, bytes]]) -> None:
        self.places: list[tuple[Place, int]] = []
        # By the record's position and the line.
        self.of_line: dict[tuple[int, int], Place] = {}
        self._stamp = ""
        self._waiting: list[tuple[int, bytes]] = []
        for position, record in records:
            self._count(position, record)

    def head(self, epoch: str) -> int:
        """Return the newest offset in a topic's epoch."""
        return max((place[1] for place, _ in self.places if place[0] == epoch), default=0)

    def _begin(self, header: Header, position: int, reason: str) -> None:
        self.epoch = partition_epoch_name(header, position, reason)
        self._time_us = header.time_us
        self._last_id_us = 0
        self._heads: dict[str, int] = {}
        self.cleared: dict[str, int] = {}
        self._writers: dict[str, int] = {}
        # Until when, the message and its place.
        self._keys: dict[tuple[str, str], tuple[int, int, Place]] = {}

    def _count(self, position: int, record: bytes) -> None:
        if is_foreign(record):
            if b"data" in record:
                self._waiting.append((position, record))
            return
        header = header_of(record)
        if not header.writer:
            return
        if header.stamp != self._stamp:
            self._stamp = header.stamp
            self._begin(header, position, "stamp")
        for at, foreign in self._waiting:
            self._time_us = max(self._time_us, header.time_us)
            topic, key = topic_and_key(foreign)
            self._message(header, topic, key, number_of(foreign), (at, 0))
        self._waiting.clear()
        if header.is_reset:
            self._begin(header, position, "reset")
        if header.sequence <= self._writers.get(header.writer, 0):
            return
        self._writers[header.writer] = header.sequence
        self._time_us = max(self._time_us, header.time_us)
        topics = [run.topic for run in header.runs for _ in range(run.count)]
        keys = {keyed.line: keyed.key for keyed in header.keyed}
        for line, (topic, number) in enumerate(zip(topics, lines_of(record), strict=True)):
            self._message(header, topic, keys.get(line), number, (position, line))
        for clear in header.clears:
            if clear.topic in self._heads:
                self.cleared[clear.topic] = self._heads[clear.topic]

    def _message(
        self, header: Header, topic: str, key: str | None, number: int, line: tuple[int, int]
    ) -> None:
        if key is not None and (topic, key) in self._keys:
            until_us, first, place = self._keys[topic, key]
            if self._time_us < until_us:
                if first == number:
                    self.of_line[line] = place
                return
        self._heads[topic] = self._heads.get(topic, 0) + 1
        self._last_id_us = max(self._last_id_us + 3, -(-self._time_us // 3) * 3)
        epoch = topic_epoch(self.epoch, FOREIGN_TENANT, topic)
        place = epoch, self._heads[topic], self._last_id_us
        self.places.append((place, number))
        self.of_line[line] = place
        if key is not None:
            until_us = self._time_us + header.keep_keys_ms * 1_000
            self._keys[topic, key] = until_us, number, place


def topic_and_key(foreign: bytes) -> tuple[str, str | None]:
    """Return what a foreign record says of its message."""
    request = decode_publish(foreign)
    return request.topic, request.idempotency_key


# It ends at the first violation: nobody reads the schedule.
UNSHRUNK = settings(
    max_examples=1_000, phases=[Phase.generate], report_multiple_bugs=False, derandomize=True
)

WHICH = st.integers(0, NODES - 1)
FEW = st.integers(1, 3)
KEYS = st.sampled_from([None, None, "k", "l"])


class NodesOverALog(RuleBasedStateMachine):
    """Three nodes, one log, and all that can go wrong."""

    make_fold: Callable[..., Fold] = Fold

    @initialize(keeps_topics=st.booleans())
    def begin(self, keeps_topics: bool) -> None:
        self.now_us = NOON_US
        self.log = Log()
        self.witness = Witness()
        self.nodes = [
            Node(self.log, self.witness, name, type(self).make_fold, keeps_topics)
            for name in "ABC"[:NODES]
        ]
        # The last message of each key in a topic, to be repeated.
        self.keyed: dict[tuple[str, str], Publish] = {}

    @rule(who=WHICH, topics=st.text("abc", min_size=1, max_size=5))
    def publish(self, who: int, topics: str) -> None:
        for topic in topics:
            self.nodes[who].publish(Publish(self.witness.next_number(), topic, None))

    @rule(who=WHICH, topic=st.sampled_from(TOPICS), key=KEYS, is_repeat=st.booleans())
    def publish_keyed(self, who: int, topic: str, key: str | None, is_repeat: bool) -> None:
        message = Publish(self.witness.next_number(), topic, key)
        if key is not None:
            if is_repeat:
                message = self.keyed.setdefault((topic, key), message)
            self.keyed[topic, key] = message
        self.nodes[who].publish(message)

    @rule(who=WHICH, topics=st.lists(st.sampled_from([*TOPICS, "none"]), max_size=2))
    def clear(self, who: int, topics: list[str]) -> None:
        """The next record of a node clears topics behind its messages."""
        self.nodes[who].to_clear += topics

    @rule(who=WHICH, how=st.sampled_from(["arrives"] * 4 + ["is lost", "is late"]))
    def send(self, who: int, how: str) -> None:
        self.tick(1)
        self.nodes[who].send(self.now_us, arrives=how == "arrives", is_late=how == "is late")

    @rule(who=WHICH, count=FEW)
    def read(self, who: int, count: int) -> None:
        self.nodes[who].fetch(count)
        self.nodes[who].apply(count)

    @rule(who=WHICH)
    def send_and_read_all(self, who: int) -> None:
        self.tick(1)
        self.nodes[who].send(self.now_us)
        self.nodes[who].catch_up()

    @rule(who=WHICH, count=FEW)
    def fetch(self, who: int, count: int) -> None:
        self.nodes[who].fetch(count)

    @rule(who=WHICH)
    def read_all(self, who: int) -> None:
        self.nodes[who].catch_up()

    @precondition(lambda self: any(node.in_flight for node in self.nodes))
    @rule(who=WHICH)
    def give_up(self, who: int) -> None:
        self.nodes[who].give_up()

    @precondition(lambda self: any(node.stamp != self.log.stamp for node in self.nodes))
    @rule(who=WHICH)
    def learn_stamp(self, who: int) -> None:
        self.nodes[who].stamp = self.log.stamp

    @precondition(lambda self: self.log.under_way)
    @rule(first=st.booleans())
    def arrive_late(self, first: bool) -> None:
        self.log.append(*self.log.under_way.pop(0 if first else -1))

    @precondition(lambda self: self.log.records and not is_foreign(self.log.records[-1][1]))
    @rule()
    def arrive_again(self) -> None:
        """The newest record comes a second time, with the stamp that it was sent with."""
        record = self.log.records[-1][1]
        self.log.append(record, header_of(record).stamp)

    @rule(topic=st.sampled_from(TOPICS), key=KEYS)
    def produce_foreign(self, topic: str, key: str | None) -> None:
        number = self.witness.next_number()
        if key is not None:
            message = self.keyed.setdefault((topic, key), Publish(number, topic, key))
            number = message.number
        idempotency = f',"idempotency_key":"{key}"' if key else ""
        record = f'{{"data":{number},"topic":"{topic}"{idempotency}}}'.encode()
        self.log.append(record, None)

    @precondition(lambda self: len(self.log.records) % 5 == 4)
    @rule(record=st.sampled_from([b"", b"{}", b"clevrd1 00000000 [1]\n", b"clevrd2 x"]))
    def produce_bad(self, record: bytes) -> None:
        self.log.append(record, None, skip=2)

    @rule(lost=st.integers(0, 6))
    def fail_over(self, lost: int) -> None:
        self.log.fail_over(lost)

    @rule(who=WHICH, lost=FEW)
    def fail_over_behind_a_reader(self, who: int, lost: int) -> None:
        """A node has read what is lost, and another fills its place at once."""
        self.nodes[who].catch_up()
        self.log.fail_over(lost)
        other = self.nodes[who - 1]
        other.stamp = self.log.stamp
        other.send(self.now_us)

    @precondition(lambda self: self.log.removed < len(self.log.records))
    @rule(count=st.integers(1, 9))
    def remove_oldest(self, count: int) -> None:
        self.log.removed = min(len(self.log.records), self.log.removed + count)

    @rule(who=WHICH)
    def step_checkpoint(self, who: int) -> None:
        self.nodes[who].step_checkpoint()

    @rule(who=WHICH)
    def save_checkpoint(self, who: int) -> None:
        self.nodes[who].step_checkpoint()
        self.nodes[who].finish_checkpoint()

    @precondition(lambda self: self.log.checkpoints)
    @rule(count=st.integers(1, 5))
    def lose_checkpoints(self, count: int) -> None:
        del self.log.checkpoints[:count]

    @rule(who=WHICH)
    def restart(self, who: int) -> None:
        self.nodes[who].start()

    @rule(who=WHICH, skew_s=st.sampled_from([-3_600, -1, 0, 2, 7_200]))
    def skew(self, who: int, skew_s: int) -> None:
        self.nodes[who].skew_us = skew_s * 1_000_000

    @rule(seconds=st.sampled_from([1, 30, 61]))
    def tick(self, seconds: int) -> None:
        self.now_us += seconds * 1_000_000

    def settle(self) -> None:
        """Let the log be as it is, and everybody read it to its end."""
        self.log.under_way.clear()
        for _ in range(100):
            for node in self.nodes:
                node.catch_up()
            if all(node.is_at_rest for node in self.nodes):
                break
            self.tick(1)
            for node in self.nodes:
                if not node.is_at_rest:
                    node.send(self.now_us)
        else:
            raise AssertionError("the nodes do not come to rest")

    def teardown(self) -> None:
        """In the end all have read the same, and it is what the log has."""
        if not hasattr(self, "nodes"):
            return
        # Each says twice what it has seen, so that whoever has counted otherwise is found.
        for _ in range(2):
            for node in self.nodes:
                node.send(self.now_us)
            self.settle()
        for node in self.nodes:
            node.finish_checkpoint()
        first, *others = (summary(node.fold) for node in self.nodes)
        for other in others:
            assert other == first
        counted = Counted(self.log.records)
        for place, number in counted.places:
            self.witness.see(place, number)
        for node in self.nodes:
            assert node.fold.epoch == counted.epoch
            for reader in node.readers:
                assert reader.epoch == topic_epoch(counted.epoch, FOREIGN_TENANT, reader.topic)
                assert reader.head == counted.head(reader.epoch)
            for topic in TOPICS:
                epoch = topic_epoch(counted.epoch, FOREIGN_TENANT, topic)
                assert node.fold.head(FOREIGN_TENANT, topic) == counted.head(epoch)
                cleared = node.fold.cleared(FOREIGN_TENANT, topic)
                assert cleared == counted.cleared.get(topic, 0)
            self.check_told(node, counted)
            assert not node.contradictions

    def check_told(self, node: Node, counted: Counted) -> None:
        """A publisher was told the place that its message has, if its record is still there."""
        there = dict(self.log.records)
        for told in node.told:
            if there.get(told.position) == told.record:
                assert counted.of_line.get((told.position, told.line)) == told.place


TestNodesOverALog = NodesOverALog.TestCase
TestNodesOverALog.settings = settings(max_examples=max(200, settings().max_examples))


# --- broken folds ---------------------------------------------------------------------------------


class WithoutStamp(Fold):
    """All records are of one incarnation of the log."""

    def has_other_stamp(self, record: bytes) -> bool:
        return False

    def _epoch_for(self, header: Header, position: int) -> Any:
        self.stamp = self.stamp and header.stamp
        return super()._epoch_for(header, position)


class WithoutLook(Fold):
    """A node never looks whether the log still has what it has read."""

    def has_other_stamp(self, record: bytes) -> bool:
        return False


class WithWriters(Fold):
    """A new epoch knows the sequences of the one before."""

    def _new_epoch(self, header: Header, position: int, reason: str) -> Any:
        epoch = super()._new_epoch(header, position, reason)
        epoch.writers = WriterSequences(self._epoch.writers.rows())
        return epoch


class WithKeys(Fold):
    """A new epoch knows the idempotency keys of the one before."""

    def _new_epoch(self, header: Header, position: int, reason: str) -> Any:
        epoch = super()._new_epoch(header, position, reason)
        epoch.keys = self._epoch.keys
        return epoch


class WithCounts(Fold):
    """A new epoch counts on, and only sequences and keys are cleared."""

    def _new_epoch(self, header: Header, position: int, reason: str) -> Any:
        epoch = super()._new_epoch(header, position, reason)
        epoch.heads.update(self._epoch.heads.by_slot)
        return epoch


class WithIds(Fold):
    """A new epoch's ids go on where those of the one before ended."""

    def _new_epoch(self, header: Header, position: int, reason: str) -> Any:
        epoch = super()._new_epoch(header, position, reason)
        epoch.last_id_us = self._epoch.last_id_us
        return epoch


class WithForeignAtOnce(Fold):
    """Foreign records do not wait for a stamp."""

    def _wait(self, position: int, record: bytes) -> Folded:
        folded = super()._wait(position, record)
        if self._foreign.waiting and self.is_known:
            folded = msgspec.structs.replace(folded, confirmed=self._confirm_at_bound())
        return folded


class WithoutReadingAgain(Fold):
    """Records behind the settled one are not read again when the stamp changes."""

    @property
    def is_settled(self) -> bool:
        return True


class WithOldReaders(Fold):
    """Readers are taken to be wherever the fold reads."""

    @property
    def readers_epoch(self) -> str:
        return self.epoch


class WithGuesses(Fold):
    """A log without its beginning is counted from what is left of it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["is_complete"] = True
        super().__init__(*arguments, **options)

    def begin_again(self, after: int, *, is_complete: bool) -> None:
        super().begin_again(after, is_complete=True)


class WithoutRepeatedResets(Fold):
    """A reset that is a retry is none."""

    def _fold(
        self, position: int, digest: str, header: Header, lines_at: int, planned: Any = None
    ) -> Folded:
        is_retry = self._epoch.writers.have(header.writer, header.sequence)
        if header.stamp == self.stamp and is_retry:
            header = msgspec.structs.replace(header, is_reset=False)
            planned = None
        return super()._fold(position, digest, header, lines_at, planned)


@pytest.mark.parametrize(
    "broken",
    [
        *(WithoutStamp, WithoutLook, WithKeys, WithCounts, WithIds),
        *(WithForeignAtOnce, WithoutReadingAgain, WithGuesses, WithoutRepeatedResets),
        # 13 s each, where the others take 2.
        *(pytest.param(each, marks=pytest.mark.long) for each in (WithWriters, WithOldReaders)),
    ],
)
def test_model_finds_a_broken_fold(broken: type[Fold]) -> None:
    """Each part of the design is needed: without it a few hundred schedules find a violation."""
    machine = type(broken.__name__, (NodesOverALog,), {"make_fold": broken})

    with pytest.raises((AssertionError, IndexError)):
        run_state_machine_as_test(machine, settings=UNSHRUNK)
