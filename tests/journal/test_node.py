"""A node: publishes are answered when they come back from the log, and all nodes agree."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from daemons import until
from fakes import FakeSink
from memory_log import FULL, UNAVAILABLE, MemoryEngine, MemoryLog

from clevrd.config import Config
from clevrd.core.beginning import After
from clevrd.core.publish_request import PublishRequest
from clevrd.core.server_frames import headers_of
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import JournalFull, JournalUnavailable, Unavailable
from clevrd.hub import Hub, Published, audience_of
from clevrd.journal import node as node_module
from clevrd.journal import partition as partition_module
from clevrd.journal import record_writer
from clevrd.journal.base import Placed
from clevrd.journal.records import MAX_RECORD_BYTES, Header, Run, encode_record
from clevrd.tenants import Tenant

ALL = (("**",),)
TENANT = Tenant("default-tenant")


@asynccontextmanager
async def hub_on(
    log: MemoryLog,
    patterns: Sequence[tuple[str, ...]] = ALL,
    max_topics: int = 1_000,
    engine: MemoryEngine | None = None,
) -> AsyncIterator[Hub]:
    """Give a hub with a node on ``log``."""
    hub = Hub(
        Config(),
        asyncio.get_running_loop(),
        engine=engine or MemoryEngine(log),
        journaled=patterns,
        max_journaled_topics=max_topics,
    )
    assert hub.journal is not None
    await hub.journal.node.start()
    try:
        yield hub
    finally:
        hub.seal()
        await hub.journal.node.stop()


def request(data: str, topic: str = "t", key: str | None = None) -> PublishRequest:
    """Return a publish of ``data``, a string."""
    return PublishRequest(topic, msgspec.Raw(msgspec.json.encode(data)), key)


async def publish(hub: Hub, data: str, topic: str = "t", key: str | None = None) -> Published:
    """Publish and wait for the answer."""
    found = hub.topic(TENANT, topic)
    if key is None:
        answer: Any = hub.publish(found, request(data, topic))
    else:
        answer = hub.publish_once(TENANT, request(data, topic, key), key)
    return answer if isinstance(answer, Published) else await answer


def data_of(topic: Topic) -> list[tuple[int, str]]:
    """Return offset and data of all messages in the ring."""
    frames = topic.ring.frames(topic.first - 1, topic.head)
    found = [msgspec.json.decode(frame[frame.index(b"{") :]) for frame in frames]
    return [(each["offset"], each["data"]) for each in found]


async def test_cleared_topic_takes_no_room_from_later_publishes() -> None:
    async with hub_on(MemoryLog()) as hub:
        await publish(hub, "a")
        topic = hub.topic(TENANT, "t")
        clears = [hub.clearing.clear(topic) for _ in range(3)]
        await asyncio.gather(*[each for each in clears if isinstance(each, asyncio.Future)])
        assert hub.journal is not None
        node = hub.journal.node
        await until(lambda: not node.is_busy)
        # If each left some bytes there, publishes would wait for room for ever one day.
        assert node.view().pending_bytes == 0


class HeldEngine(MemoryEngine):
    """Hands back records that are not safe yet, as a Redis with replicas does."""

    answers_when_taken = True

    def __init__(self, log: MemoryLog) -> None:
        super().__init__(log)
        self.is_safe = asyncio.Event()
        self.is_safe.set()

    async def append(
        self, partition: int, record: bytes, stamp: str, placed: Sequence[Placed]
    ) -> None:
        """Append, and wait until it is safe."""
        await super().append(partition, record, stamp, placed)
        await self.is_safe.wait()


async def test_clear_is_answered_with_one_position_though_another_one_follows() -> None:
    """The epoch and the offset are of one moment: a later clear has an epoch of its own."""
    log = MemoryLog()
    engine = HeldEngine(log)
    async with hub_on(log, engine=engine) as one, hub_on(log) as two:
        await publish(one, "a")
        topic = one.topic(TENANT, "t")
        engine.is_safe.clear()
        due = one.clearing.clear(topic)
        assert isinstance(due, asyncio.Future)
        await until(lambda: one.topic(TENANT, "t").epoch != topic.epoch)
        first = one.topic(TENANT, "t").epoch
        await publish(two, "b")
        later = two.clearing.clear(two.topic(TENANT, "t"))
        assert isinstance(later, asyncio.Future)
        second = await later
        await until(lambda: one.topic(TENANT, "t").epoch == second.epoch)
        engine.is_safe.set()
        answer = await due

    assert (answer.epoch, answer.offset) == (first, 1)
    assert (answer.old_epoch, answer.old_offset) == (topic.epoch, 1)
    assert (second.old_epoch, second.old_offset, second.offset) == (first, 2, 2)


async def test_message_that_no_node_can_count_is_answered() -> None:
    """Where positions are lost for good a record is passed over until a new epoch begins."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        await publish(hub, "a")
        log.records[0] = [(5, b"what is left of the log")]
        log.stamp = "11"

        with pytest.raises(JournalUnavailable, match="may have been accepted"):
            await publish(hub, "b")
        answer = await publish(hub, "c")

        assert answer.offset == 1
        assert data_of(hub.topic(TENANT, "t")) == [(1, "c")]


async def test_publish_is_answered_once_its_record_came_back() -> None:
    """Before that no reader has it, and the answer says that it is durable."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        log.goes_on.clear()
        topic = hub.topic(TENANT, "t")
        due = hub.publish(topic, request("a"))
        assert isinstance(due, asyncio.Future)
        await asyncio.sleep(0)
        before = due.done(), topic.head

        log.goes_on.set()
        answer = await due

        assert before == (False, 0)
        assert (answer.offset, answer.durable, answer.epoch) == (1, True, topic.epoch)
        assert data_of(topic) == [(1, "a")]


async def test_messages_that_come_while_a_record_is_on_its_way_go_together() -> None:
    """A hundred publishes take two records: the first one's, and that of all others."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        before = len(log.records[0])
        topic = hub.topic(TENANT, "t")

        answers = [hub.publish(topic, request(str(number))) for number in range(100)]
        await asyncio.sleep(0)
        offsets = [(await each).offset for each in answers if isinstance(each, asyncio.Future)]

        assert offsets == list(range(1, 101))
        assert len(log.records[0]) - before <= 2


async def test_node_that_hears_nothing_appends_and_hears_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A log that is silent gets an empty record after some looks, and not before."""
    monkeypatch.setattr(node_module, "LOOK_S", 0.01)
    log = MemoryLog()
    async with hub_on(log) as hub:
        before = len(log.records[0])

        await until(lambda: len(log.records[0]) >= before + 2)

        assert hub.journal is not None
        assert hub.journal.node.view().nodes == 1
        assert all(b"data" not in record for _, record in log.records[0])


async def test_publish_whose_record_only_another_nodes_checkpoint_has_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The record is found to be there, and not where its messages are: it may have been taken."""
    monkeypatch.setattr(record_writer, "AGAIN_S", 0.05)
    log = MemoryLog()
    async with hub_on(log) as one, hub_on(log) as two:
        assert one.journal is not None
        assert two.journal is not None
        reader = one.journal.node._readers[0]
        await reader.stop()
        due = one.publish(one.topic(TENANT, "t"), request("a"))
        assert isinstance(due, asyncio.Future)
        await until(lambda: two.topics.find(TENANT.name, "t") is not None)
        await two.journal.node._save_checkpoint(two.journal.node._partitions[0])
        # All that came before the checkpoint is gone from the log.
        oldest = log.checkpoints[0][-1].position
        log.records[0] = [each for each in log.records[0] if each[0] >= oldest]

        await reader.go_back()
        reader.start()

        with pytest.raises(JournalUnavailable, match="may have been accepted"):
            await due


async def test_records_stay_within_their_bound() -> None:
    """Messages of 2 MiB in all take several records, none over the bound, in order."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        log.goes_on.clear()
        topics = [hub.topic(TENANT, f"t.{number}") for number in range(8)]
        due = [
            hub.publish(topics[number % 8], request("x" * 8_000, f"t.{number % 8}"))
            for number in range(256)
        ]
        log.goes_on.set()
        await asyncio.gather(*(each for each in due if isinstance(each, asyncio.Future)))

        sizes = [len(record) for _, record in log.records[0]]
        assert max(sizes) <= MAX_RECORD_BYTES
        assert [topic.head for topic in topics] == [32] * 8


async def test_two_nodes_give_every_message_the_same_position() -> None:
    """Each has the other's messages, in one order."""
    log = MemoryLog(partitions=4)
    async with hub_on(log) as one, hub_on(log) as other:
        names = [f"t.{number}" for number in range(6)]
        for hub in (one, other):
            for name in names:
                hub.topic(TENANT, name)

        answers = await asyncio.gather(
            *(
                publish(hub, f"{who}{number}", names[number % 6])
                for number in range(60)
                for who, hub in (("a", one), ("b", other))
            )
        )
        await until(
            lambda: all(
                hub.topic(TENANT, name).head == 20 for hub in (one, other) for name in names
            )
        )

        assert all(each.durable for each in answers)
        for name in names:
            mine, theirs = one.topic(TENANT, name), other.topic(TENANT, name)
            assert data_of(mine) == data_of(theirs)
            assert (mine.epoch, mine.created_at) == (theirs.epoch, theirs.created_at)


async def test_restart_goes_on_behind_the_last_message() -> None:
    """Epoch and offsets are those of the process before, with a checkpoint and without one."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        first = await publish(hub, "a")
    log.checkpoints.clear()
    async with hub_on(log) as hub:
        second = await publish(hub, "b")
    async with hub_on(log) as hub:
        third = await publish(hub, "c")

    assert [each.offset for each in (first, second, third)] == [1, 2, 3]
    assert first.epoch == second.epoch == third.epoch
    assert first.message_id < second.message_id < third.message_id


async def test_record_whose_answer_was_lost_counts_once() -> None:
    """It is sent again with its sequence, and the fold leaves the second one out."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        log.faults = [(UNAVAILABLE, True), (UNAVAILABLE, False)]
        first = await publish(hub, "a")
        second = await publish(hub, "b")
        third = await publish(hub, "c")

        assert [each.offset for each in (first, second, third)] == [1, 2, 3]
        assert data_of(hub.topic(TENANT, "t")) == [(1, "a"), (2, "b"), (3, "c")]


async def test_publish_fails_when_the_log_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that it may have been accepted, which it was; later publishes follow it."""
    monkeypatch.setattr(node_module, "GIVE_UP_S", 0.0)
    monkeypatch.setattr(node_module, "LOOK_S", 0.01)
    log = MemoryLog()
    async with hub_on(log) as hub:
        assert hub.journal is not None
        log.goes_on.clear()
        first = asyncio.ensure_future(publish(hub, "a"))
        with pytest.raises(JournalUnavailable, match="may have been accepted"):
            await first
        with pytest.raises(JournalUnavailable, match="was not accepted"):
            await publish(hub, "b")
        is_well = hub.journal.node.is_well
        monkeypatch.undo()
        log.goes_on.set()

        answer = await publish(hub, "c")

        assert not is_well
        assert (answer.offset, hub.journal.node.is_well) == (2, True)
        assert data_of(hub.topic(TENANT, "t")) == [(1, "a"), (2, "c")]


async def test_errors_of_an_outage_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """No publisher's error holds the frames of those before it, however long the log is away."""
    monkeypatch.setattr(node_module, "GIVE_UP_S", 0.0)
    monkeypatch.setattr(node_module, "LOOK_S", 0.01)
    log = MemoryLog()
    async with hub_on(log) as hub:
        log.goes_on.clear()
        depths = []
        for number in range(5):
            with pytest.raises(JournalUnavailable) as caught:
                await publish(hub, str(number))
            depths.append(len(caught.traceback))
        log.goes_on.set()

    assert max(depths[1:]) == min(depths[1:])


async def test_full_log_refuses_and_goes_on_when_there_is_room() -> None:
    """Nothing of a refused record is counted."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        log.faults = [(FULL, False)]
        with pytest.raises(JournalFull):
            await publish(hub, "a")

        answer = await publish(hub, "b")

        assert (answer.offset, data_of(hub.topic(TENANT, "t"))) == (1, [(1, "b")])


async def test_other_stamp_begins_another_epoch() -> None:
    """A log that lost its tail goes on at offset 1 of an epoch that no client knows."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        first = await publish(hub, "a")
        log.lose(0, 1, "11")

        second = await publish(hub, "b")
        topic = hub.topic(TENANT, "t")

        assert (first.offset, second.offset) == (1, 1)
        assert first.epoch != second.epoch == topic.epoch
        assert data_of(topic) == [(1, "b")]


async def test_every_answer_names_the_epoch_that_its_offset_is_in() -> None:
    """A run that meets another stamp on its way is answered in the new epoch, as batches say it."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        await publish(hub, "a")
        topic = hub.topic(TENANT, "t")
        before = topic.epoch
        log.goes_on.clear()
        due = hub.publish_run(topic, [request("b"), request("c")])
        await asyncio.sleep(0)
        log.lose(0, 1, "22")
        log.goes_on.set()
        assert isinstance(due, asyncio.Future)
        offset, _ = await due

        assert (offset, audience_of(topic)[0]) == (1, hub.topic(TENANT, "t").epoch)
        assert audience_of(topic)[0] != before


async def test_pattern_reader_is_told_of_a_topic_that_is_used_again() -> None:
    """A topic that was forgotten, or left out at a limit, comes with its next message."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        await publish(hub, "a", "orders.1")
    async with hub_on(log) as hub:
        told: list[str] = []

        class Told:
            def topic_made(self, topic: Topic) -> None:
                told.append(f"made {topic.name} behind {topic.first - 1}")

            def topic_found(self, topic: Topic) -> None:
                told.append(f"found {topic.name}")

            def topic_forgotten(self, topic: Topic) -> None:
                told.append(f"forgotten {topic.name}")

            def found_all(self) -> None:
                told.append("all")

        # As at a limit on topics, or when it has not been used for long.
        hub.patterns.stored = None
        hub.topics._forget(hub.topic(TENANT, "orders.1"))
        hub.patterns.add(TENANT.name, ("orders", "*"), Told())
        await until(lambda: bool(told))

        await publish(hub, "b", "orders.1")
        await until(lambda: len(told) == 2)

    assert told == ["all", "made orders.1 behind 1"]


async def test_key_holds_over_restarts_and_for_other_nodes() -> None:
    """A repeat gets the first position, whichever node it comes to."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        first = await publish(hub, "a", key="k")
    async with hub_on(log) as one, hub_on(log) as other:
        again = await publish(one, "a", key="k")
        elsewhere = await publish(other, "a", key="k")

    assert [each.offset for each in (first, again, elsewhere)] == [1, 1, 1]
    assert [each.repeated for each in (first, again, elsewhere)] == [False, True, True]
    assert first.message_id == again.message_id == elsewhere.message_id


async def test_topics_beside_the_patterns_are_this_process_alone() -> None:
    """They are answered at once, and the log has nothing of them."""
    log = MemoryLog()
    async with hub_on(log, (("orders", "*"),)) as hub:
        before = len(log.records[0])
        answer = hub.publish(hub.topic(TENANT, "chat"), request("a", "chat"))
        kept = await publish(hub, "b", "orders.1")

        assert isinstance(answer, Published)
        assert (answer.durable, kept.durable) == (False, True)
        assert len(log.records[0]) == before + 1


async def test_publishes_beyond_the_bound_wait_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes on their way are bounded; a publish that waits goes on when others came back."""
    for module in (node_module, partition_module):
        monkeypatch.setattr(module, "MAX_PENDING_BYTES", 1_000)
    log = MemoryLog()
    async with hub_on(log) as hub:
        log.goes_on.clear()
        topic = hub.topic(TENANT, "t")
        due: list[Any] = [hub.publish(topic, request("x" * 1_000))]
        must_wait = hub.must_wait(topic)
        waiting = [
            asyncio.ensure_future(hub.publish_later(TENANT, topic, request(str(number))))
            for number in range(5)
        ]
        await asyncio.sleep(0)
        begun = len(due)

        log.goes_on.set()
        answers = [await each for each in [*due, *[await each for each in waiting]]]

        assert (must_wait, begun) == (True, 1)
        assert [each.offset for each in answers] == [1, 2, 3, 4, 5, 6]


async def test_stop_fails_what_has_no_place_yet() -> None:
    """Its publisher hears that it may have been accepted, and nothing hangs."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        log.goes_on.clear()
        due = hub.publish(hub.topic(TENANT, "t"), request("a"))
        await asyncio.sleep(0)
    assert isinstance(due, asyncio.Future)
    with pytest.raises(JournalUnavailable, match="may have been accepted"):
        await due
    log.goes_on.set()


async def test_reader_gets_messages_of_every_node() -> None:
    """A reader on one node gets a publish to the other one."""
    log = MemoryLog()
    async with hub_on(log) as one, hub_on(log) as other:
        sink = FakeSink()
        reader = Subscriber(sink)
        hub_topic = one.topic_to_read(TENANT, "t")
        one.subscribe(hub_topic, reader, After(0))

        await publish(other, "a")
        await until(lambda: bool(sink.received))

        assert b'"data":"a"' in sink.received


async def test_headers_reach_the_readers_of_every_node() -> None:
    """A node's own, another's, a later version's and a foreign record's, as far as known here."""
    line = b'{"topic":"t","data":"e","headers":{"ce-id":"3","baggage":"x"}}\n'
    log = MemoryLog()
    async with hub_on(log) as one, hub_on(log) as other:
        topics = [each.topic(TENANT, "t") for each in (one, other)]
        own = msgspec.structs.replace(request("a"), headers={"ce-id": "1"})
        answer: Any = one.publish(topics[0], own)
        await answer
        log.accept(0, b'{"topic":"t","data":"b","headers":{"ce-id":"2","baggage":"x"}}')
        log.accept(0, b'{"topic":"t","data":"c","headers":5}')
        await log.wake()
        await publish(other, "d")
        run = Run("default-tenant", "t", 1, len(line))
        log.accept(0, encode_record(Header(log.stamp, "later", 1, 1, (run,)), [line]))
        await log.wake()
        await until(lambda: all(topic.head == 5 for topic in topics))

        for topic in topics:
            frames = topic.ring.frames(topic.first - 1, topic.head)
            wanted = [b'{"ce-id":"1"}', b'{"ce-id":"2"}', b"", b"", b'{"ce-id":"3"}']
            assert [headers_of(frame) for frame in frames] == wanted


async def test_topics_of_the_journal_are_bounded() -> None:
    """A topic more than may have messages is refused; those that have some go on."""
    async with hub_on(MemoryLog(), max_topics=1) as hub:
        await publish(hub, "a", "one")
        with pytest.raises(Unavailable, match="max_topics"):
            hub.topic(TENANT, "two")

        answer = await publish(hub, "b", "one")

        assert answer.offset == 2


async def test_foreign_record_counts_and_broken_one_is_left_out() -> None:
    """A plain publish object in the log is delivered; a record that can't be read stops nothing."""
    log = MemoryLog()
    async with hub_on(log) as hub:
        topic = hub.topic(TENANT, "t")
        log.accept(0, b'{"topic":"t","data":"theirs"}')
        log.accept(0, b"clevrd1 00000000 [broken")
        log.accept(0, b"clevrd9 from the future")
        log.accept(0, b"not even JSON")
        await log.wake()

        answer = await publish(hub, "ours")

        assert hub.journal is not None
        assert (answer.offset, hub.journal.node.counters.unreadable) == (2, 3)
        assert data_of(topic) == [(1, "theirs"), (2, "ours")]


class RefusingEngine(MemoryEngine):
    """Opens, and refuses to take records, or to hand them out."""

    def __init__(self, log: MemoryLog, *, takes: bool) -> None:
        super().__init__(log)
        self._takes = takes

    async def append(
        self, partition: int, record: bytes, stamp: str, placed: Sequence[Placed]
    ) -> None:
        """Append, or say why not."""
        if not self._takes:
            raise JournalUnavailable("Its user may not write; allow it.")
        await super().append(partition, record, stamp, placed)

    async def read(self, partition: int, after: int) -> list[tuple[int, bytes]]:
        """Say why not."""
        raise JournalUnavailable("Its user may not read; allow it.")


@pytest.mark.parametrize(("takes", "why"), [(False, "may not write"), (True, "may not read")])
async def test_start_is_given_up_where_the_engine_says_that_it_cannot_be_used(
    takes: bool, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the reason soon, and so has who started it; it does not wait in silence."""
    monkeypatch.setattr(node_module, "LOOK_S", 0.0)
    log = MemoryLog()
    engine = RefusingEngine(log, takes=takes)

    with pytest.raises(JournalUnavailable, match=why):
        async with hub_on(log, engine=engine):
            pass

    assert engine.is_closed
    told = [each.getMessage() for each in caplog.records if "waiting" in each.getMessage()]
    assert len(told) == 1
    assert why in told[0]
