"""Readers of a history, of a ring and of new epochs, over random schedules.

Whatever the history has lost, and whenever, a reader has of each epoch what was asked for: once and
in order, or is told that it is missing, truly.
"""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import patch

import msgspec
from fakes import FakeSink, frames_in, totals_of
from histories import FIRST_US, FakeHistory, FollowingReader, deliver, journaled_topic, start_of
from histories import unavailable as away
from hypothesis import given
from hypothesis import strategies as st
from time_limit import EndableLoop

from clevrd.config import Config
from clevrd.core.beginning import After, Beginning, Last, Since
from clevrd.core.gap_log import GapLog
from clevrd.core.message_ids import id_at
from clevrd.core.topic import Topic
from clevrd.hub import Hub, history_readers

TENANT = "default-tenant"

OFFSET = st.integers(0, 150)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 12)),
        st.tuples(st.just("after"), OFFSET, st.booleans(), st.sampled_from([300, 4_000, 1 << 30])),
        st.tuples(st.just("last"), OFFSET, st.booleans(), st.sampled_from([300, 4_000, 1 << 30])),
        st.tuples(st.just("since"), OFFSET, st.booleans(), st.sampled_from([300, 4_000, 1 << 30])),
        st.tuples(st.just("drain"), st.integers(0, 9)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("forget"), OFFSET),
        st.tuples(st.just("damage"), OFFSET),
        st.tuples(st.just("drop_pages")),
        st.tuples(st.just("fail"), st.booleans()),
        st.tuples(st.just("turns"), st.integers(1, 30)),
        st.tuples(st.just("new_epoch")),
    ),
    max_size=30,
)


class Asked:
    """A reader, what it asked for, and what it read."""

    def __init__(self, reader: FollowingReader, beginning: Beginning, topic: Topic) -> None:
        self.reader = reader
        self.beginning = beginning
        self.epoch = topic.epoch
        self.head = topic.head
        self.has_left = False

    @property
    def sink(self) -> FakeSink:
        """Where it is written to."""
        assert isinstance(self.reader.sink, FakeSink)
        return self.reader.sink


class World:
    """A hub with one topic, its history, and its readers."""

    def __init__(self, kept: int, in_ring: int, ring: int) -> None:
        self.hub = Hub(Config(ring_messages=ring), asyncio.get_running_loop())
        self.history = FakeHistory()
        self.hub.keep_history(self.history)
        self.history.add(TENANT, "t", range(1, kept + 1), epoch="p0")
        self.epochs = 0
        # Messages that were there before the ring began.
        self.kept = kept
        self.topic = journaled_topic(self.hub, "t", kept, epoch="e0", partition_epoch="p0")
        # Epoch -> its newest offset, offsets that were lost there, and up to which all were given
        # up.
        self.heads = {"e0": kept}
        self.damaged: dict[str, set[int]] = {"e0": set()}
        self.given_up = {"e0": 0}
        self.asked: list[Asked] = []
        self.publish(in_ring)

    @property
    def partition_epoch(self) -> str:
        """The partition's epoch."""
        return f"p{self.epochs}"

    def publish(self, count: int) -> None:
        """Publish so many messages, as far as the ring takes them."""
        for _ in range(count):
            if self.hub.delivery.makes_room(self.topic):
                deliver(self.hub, self.topic, self.history, 1)
        self.heads[self.topic.epoch] = self.topic.head

    def subscribe(self, beginning: Beginning, has_notices: bool, room_bytes: int) -> None:
        """Add one more reader."""
        sink = FakeSink(room_bytes)
        reader = FollowingReader(self.hub, self.topic, sink, GapLog("t") if has_notices else None)
        self.asked.append(Asked(reader, beginning, self.topic))
        self.hub.subscribe(self.topic, reader, beginning)

    async def do(self, name: str, *arguments: Any) -> None:
        """Take one step."""
        head = self.topic.head
        match name, *arguments:
            case "publish", count:
                self.publish(count)
            case "after", offset, has_notices, room:
                self.subscribe(After(offset % (head + 1), self.topic.epoch), has_notices, room)
            case "last", count, has_notices, room:
                self.subscribe(Last(count), has_notices, room)
            case "since", offset, has_notices, room:
                # The ids of all epochs rise alike here; none of the topic's is as old as the epoch.
                message_id = id_at(FIRST_US + offset)
                self.subscribe(Since(message_id, is_time=room == 300), has_notices, room)
            case "drain", number:
                if number < len(self.asked):
                    self.asked[number].sink.drain()
            case "leave", number:
                if number < len(self.asked):
                    self.leave(self.asked[number])
            case "forget", upto:
                upto = min(upto, head)
                self.history.forget(TENANT, "t", upto, epoch=self.partition_epoch)
                self.given_up[self.topic.epoch] = max(upto, self.given_up[self.topic.epoch])
            case "damage", offset:
                if self.history.damage(TENANT, "t", offset, epoch=self.partition_epoch):
                    self.damaged[self.topic.epoch].add(offset)
            case "drop_pages", *_:
                assert self.hub.delivery.history is not None
                self.hub.delivery.history.pages.kept.drop_unused()
            case "fail", fails:
                self.history.error = away() if fails else None
            case "turns", count:
                for _ in range(count):
                    await asyncio.sleep(0)
            case _:
                self.begin_anew()

    def begin_anew(self) -> None:
        """Begin a new epoch."""
        self.epochs += 1
        epoch = f"e{self.epochs}"
        self.topic = self.hub.begin_anew(self.topic, start_of(0, epoch, self.partition_epoch))
        self.heads[epoch], self.damaged[epoch], self.given_up[epoch] = 0, set(), 0

    def leave(self, asked: Asked) -> None:
        """End a reader."""
        asked.has_left = True
        self.hub.unsubscribe(asked.reader.topic, asked.reader)

    async def finish(self) -> None:
        """Let every reader read all there is."""
        self.history.error = None
        self.publish(1)
        for _ in range(2_000):
            for asked in self.asked:
                asked.sink.room_bytes = 1 << 30
                asked.sink.drain()
            await asyncio.sleep(0)
            if all(asked.reader.is_live or asked.has_left for asked in self.asked):
                return
            if not self.hub.reading_history:
                continue
            # Retries wait for a time.
            await asyncio.sleep(0.001)
        raise AssertionError("a reader is not served")

    def check(self, asked: Asked) -> None:
        """Compare what a reader read with what there was."""
        items = [msgspec.json.decode(frame.data) for frame in frames_in(asked.sink.received)]
        if asked.reader.gaps is None:
            self.check_plain(asked, items)
            return
        epoch, position, owes_gap = "", -1, False
        greetings = 0
        for item in items:
            kind = item.get("type")
            if kind == "subscribed":
                if not greetings:
                    self.check_beginning(asked, item)
                greetings += 1
                assert item["epoch"] != epoch
                is_resumed = epoch or not isinstance(asked.beginning, Last)
                owes_gap = bool(is_resumed) and not item["recovered"]
                epoch, position = item["epoch"], item["offset"]
            elif kind == "gap":
                self.check_gap(item, epoch, position)
                owes_gap = False
                position = position if item["to"] is None else item["to"]
            else:
                assert not owes_gap
                assert item["offset"] == position + 1
                assert item["data"] == position + 1
                position += 1
        if not asked.has_left:
            assert (epoch, position) == (self.topic.epoch, self.topic.head)
            counted = asked.reader.delivered + asked.reader.dropped + asked.reader.discarded
            assert self.topic.edge - asked.reader.start == counted

    def check_beginning(self, asked: Asked, greeting: dict[str, Any]) -> None:
        """Compare where a reader began with what it asked for, unless the epoch was over."""
        if greeting["epoch"] != asked.epoch:
            return
        offset, given_up = greeting["offset"], self.given_up[asked.epoch]
        match asked.beginning:
            case Last(count):
                wanted = max(0, asked.head - count)
                # Nothing that was kept is left out, and nothing is added.
                assert wanted <= offset
                assert offset <= max(wanted, given_up)
            case After(wanted):
                assert offset == wanted
            case Since(message_id, is_time):
                first = next(
                    (each for each in range(1, 500) if id_at(FIRST_US + each) >= message_id), 500
                )
                # A time, or an id older than all, is the place before a message; another id is one.
                is_message = not is_time and id_at(FIRST_US + first) == message_id
                wanted = first if is_message else first - 1
                gone = self.damaged[asked.epoch]
                # Offsets that are gone are as well before the place as behind it.
                assert offset <= max(wanted, given_up)
                assert all(
                    each in gone or each <= given_up or each > asked.head
                    for each in range(offset + 1, min(wanted, asked.head) + 1)
                )

    def check_gap(self, gap: dict[str, Any], epoch: str, position: int) -> None:
        """Fail unless what a gap says is true."""
        if gap["reason"] == "epoch":
            assert (gap["from"], gap["to"], gap["count"]) == (None, None, None)
            return
        if gap["from"] is None:
            assert (gap["reason"], gap["count"]) == ("retention", None)
            assert gap["to"] == position <= self.given_up[epoch]
            return
        assert gap["from"] == position + 1
        assert gap["count"] == gap["to"] - gap["from"] + 1 > 0
        offsets = range(gap["from"], gap["to"] + 1)
        if gap["reason"] == "damaged":
            # A page that was read before is a true one too.
            given_up = self.given_up[epoch]
            assert all(each in self.damaged[epoch] or each <= given_up for each in offsets)
        else:
            assert gap["reason"] in ("retention", "slow_consumer")
            # What was in the ring may have been given up there, under a reader that lagged.
            was_in_ring = epoch != "e0" or gap["to"] > self.kept
            is_gone = epoch != self.topic.epoch or gap["to"] < self.topic.first
            assert (is_gone and was_in_ring) or gap["to"] <= self.given_up[epoch]

    def check_plain(self, asked: Asked, items: list[dict[str, Any]]) -> None:
        """Offsets only rise in an epoch, and what is missing was lost."""
        assert all("type" not in item for item in items)
        offsets = [item["offset"] for item in items]
        # Where an offset is not higher a new epoch began.
        began = [at for at in range(1, len(offsets)) if offsets[at] <= offsets[at - 1]]
        assert len(began) <= self.epochs
        last = offsets[began[-1] :] if began else offsets
        if not asked.has_left:
            assert not last or last[-1] == self.topic.head


@given(
    st.integers(0, 140),
    st.integers(0, 12),
    st.sampled_from([12, 40, 1_000]),
    st.sets(st.integers(0, 40), max_size=8),
    STEPS,
)
def test_reader_has_or_knows_everything(
    kept: int, in_ring: int, ring: int, damaged_back: set[int], steps: list[tuple[Any, ...]]
) -> None:
    """Nothing is missing in silence, twice, out of order or untrue; the sums are right."""

    async def run() -> None:
        world = World(kept, in_ring, ring)
        for back in damaged_back:
            await world.do("damage", kept - back)
        for name, *arguments in steps:
            await world.do(name, *arguments)
        await world.finish()

        for asked in world.asked:
            world.check(asked)
        staying = sum(not asked.has_left for asked in world.asked)
        assert (world.hub.subscribers, world.topic.subscribers) == (staying, staying)
        assert (world.hub.reading_history, len(world.hub.delivery.new_epochs)) == (0, 0)
        totals = totals_of(world.hub.topics)
        lost = sum(totals.lost.values())
        assert totals.offered == totals.delivered + lost + totals.discarded + totals.queued
        for asked in world.asked:
            world.leave(asked)
        assert world.hub.subscribers == 0
        world.hub.stop()

    with (
        patch.object(history_readers, "RETRY_S", 0.0001),
        asyncio.Runner(loop_factory=EndableLoop) as runner,
    ):
        runner.run(run())
