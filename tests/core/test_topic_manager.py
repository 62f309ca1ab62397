"""All topics together: who is who, the bounds on their number and memory, and idle eviction."""

from __future__ import annotations

from functools import partial
from itertools import count, pairwise

import pytest
from fakes import FakeSink, TopicDriver, at_once, frame_of, sink_of, totals_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from clevrd.core.drop_strategy import CIRCUIT_BREAKER, LATEST, DropStrategy
from clevrd.core.portions import ONE_PORTION, Weights
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import (
    MAX_REMEMBERED,
    UNMADE_S,
    TopicLimits,
    TopicManager,
)
from clevrd.errors import InvalidRequest, Unavailable

CREATED = "2026-01-31T12:00:00.000000Z"
HELD = 64 + FRAME_OVERHEAD_BYTES


def make_manager(weights: Weights = ONE_PORTION, **limits: float) -> TopicManager:
    """Return a manager without topics; every topic gets another epoch."""
    numbers = count(1)
    values: dict[str, float] = {"max_memory_bytes": 1 << 30, **limits}
    return TopicManager(
        TopicLimits(**values),  # type: ignore[arg-type]
        lambda: f"epoch{next(numbers)}",
        weights,
    )


def topic_of(manager: TopicManager, tenant: str, name: str, now_s: float = 0.0) -> Topic:
    """Return the topic, made if it was missing."""
    return manager.get_or_create(tenant, name, CREATED, now_s)


def fill(manager: TopicManager, topic: Topic, messages: int, size: int = 64) -> None:
    """Append ``messages`` of ``size`` bytes each."""
    for offset in range(topic.head + 1, topic.head + 1 + messages):
        manager.extend(topic, offset, [frame_of(offset, size)], 0.0)


def real_bytes(topic: Topic) -> int:
    """Return what the frames in the topic's ring hold, counted one by one."""
    frames = topic.ring.frames(topic.ring.first - 1, topic.ring.head)
    return sum(len(frame) + FRAME_OVERHEAD_BYTES for frame in frames)


# --- who is who ------------------------------------------------------------------------------


def test_topics_are_made_once() -> None:
    """The first mention makes a topic; it is the same one ever after."""
    manager = make_manager()

    missing = manager.find("acme", "orders")
    made = topic_of(manager, "acme", "orders")

    assert missing is None
    assert manager.find("acme", "orders") is made
    assert topic_of(manager, "acme", "orders") is made
    assert (made.tenant, made.name, made.created_at, made.epoch) == (
        "acme",
        "orders",
        CREATED,
        "epoch1",
    )
    assert list(manager) == [made]


def test_names_can_not_be_spelled_into_another_tenant() -> None:
    """Topics are keyed by two names, not by one joined from them."""
    manager = make_manager()

    topics = [topic_of(manager, "x", "a:b"), topic_of(manager, "x:a", "b")]
    fill(manager, topics[0], 1)

    assert topics[0] is not topics[1]
    assert [topic.head for topic in topics] == [1, 0]


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256])
def test_names_are_checked_when_a_topic_is_made(name: str) -> None:
    """No way in leads past the rules for names."""
    manager = make_manager()

    with pytest.raises(InvalidRequest):
        topic_of(manager, "acme", name)

    assert len(manager) == 0


def test_number_of_topics_is_bounded() -> None:
    """Over a tenant's share, or everyone's, only the topics there are can be used."""
    manager = make_manager(max_topics=3, max_topics_per_tenant=2)
    for name in ("a", "b"):
        topic_of(manager, "acme", name)

    with pytest.raises(
        Unavailable, match=r"Tenant acme has 2 topics \(CLEVRD_MAX_TOPICS_PER_TENANT"
    ):
        topic_of(manager, "acme", "c")
    topic_of(manager, "other", "a")
    with pytest.raises(Unavailable, match=r"The daemon has 3 topics \(CLEVRD_MAX_TOPICS\)"):
        topic_of(manager, "third", "a")

    assert topic_of(manager, "acme", "a") is manager.find("acme", "a")
    assert len(manager) == 3


# --- idle eviction ---------------------------------------------------------------------------


def test_idle_topics_are_forgotten() -> None:
    """Those without readers and without use; their memory and their place are free again."""
    manager = make_manager(idle_s=60.0, max_topics_per_tenant=2)
    idle, used = topic_of(manager, "acme", "idle"), topic_of(manager, "acme", "used")
    fill(manager, idle, 3)
    manager.extend(used, 1, [frame_of(1)], 30.0)

    early = len(manager.evict_idle(59.9))
    late = len(manager.evict_idle(60.0))

    assert (early, late) == (0, 1)
    assert list(manager) == [used]
    assert manager.ring_bytes == HELD
    assert topic_of(manager, "acme", "another").head == 0


def test_topics_with_readers_are_never_idle() -> None:
    """A reader of a silent topic keeps it for as long as it stays."""
    manager = make_manager(idle_s=60.0)
    topic = topic_of(manager, "acme", "orders")
    fill(manager, topic, 1)
    reader = Subscriber(FakeSink())
    topic.join(reader, 0, 0.0)

    while_read = len(manager.evict_idle(1e6))
    topic.leave(reader, 1e6)

    assert while_read == 0
    assert len(manager.evict_idle(1e6 + 59.9)) == 0
    assert len(manager.evict_idle(1e6 + 60.0)) == 1


def test_name_that_was_only_read_is_forgotten_soon() -> None:
    """Reading what nobody publishes leaves nothing behind, and readers come back as they were."""
    manager = make_manager(idle_s=3600.0)
    topic = topic_of(manager, "acme", "quiet")
    reader = Subscriber(FakeSink())
    topic.join(reader, 0, 0.0)
    manager.evict_idle(1e3)
    while_read = len(manager)
    topic.leave(reader, 1e3)
    manager.note_left(topic)

    manager.evict_idle(1e3 + UNMADE_S - 0.1)
    before, told = len(manager), manager.evict_idle(1e3 + UNMADE_S)

    assert (while_read, before, told, len(manager)) == (1, 1, [], 0)
    # The same life, since nothing was in it; one with a message gets another the next time.
    again = topic_of(manager, "acme", "quiet", 2e3)
    assert (again.epoch, again.created_at) == (topic.epoch, topic.created_at)
    fill(manager, again, 1)
    assert len(manager.evict_idle(1e6)) == 1
    assert topic_of(manager, "acme", "quiet", 1e6).epoch != topic.epoch


def test_busy_topic_keeps_no_name_from_being_forgotten() -> None:
    """Neither one that is published to all the time, nor one that is read all the time."""
    manager = make_manager(idle_s=1.0)
    busy = topic_of(manager, "acme", "busy")
    read = topic_of(manager, "acme", "read")
    topic_of(manager, "acme", "ghost")
    fill(manager, busy, 1)
    for second in range(1, 8):
        manager.extend(busy, second + 1, [frame_of(second)], float(second))
        reader = Subscriber(FakeSink())
        read.join(reader, 0, float(second))
        manager.evict_idle(float(second))

    assert {topic.name for topic in manager} == {"busy", "read"}
    # And a topic that is gone is held by nothing.
    assert len(manager.evict_idle(1e3)) == 1
    assert not manager._unmade


def test_name_that_nobody_joined_is_forgotten_too() -> None:
    """A subscribe that was refused, or a poll with an answer at once, has begun it all the same."""
    manager = make_manager()
    for number in range(3):
        topic_of(manager, "acme", f"t{number}", float(number))
    made = topic_of(manager, "acme", "made", 1.0)
    fill(manager, made, 1)

    manager.evict_idle(1.0 + UNMADE_S)

    assert {topic.name for topic in manager} == {"t2", "made"}


def test_names_that_were_read_are_remembered_up_to_a_bound() -> None:
    """A client that makes up names fills no memory."""
    manager = make_manager()
    epochs = {}
    for number in range(MAX_REMEMBERED + 2):
        epochs[number] = topic_of(manager, str(number), "t").epoch
    for _ in range(MAX_REMEMBERED):
        manager.evict_idle(UNMADE_S)

    newest = MAX_REMEMBERED + 1
    assert len(manager) == 0
    assert topic_of(manager, str(newest), "t").epoch == epochs[newest]
    assert topic_of(manager, "0", "t").epoch != epochs[0]


def test_topic_made_anew_is_another_epoch() -> None:
    """Its offsets begin again, so positions of the old one must not fit."""
    manager = make_manager(idle_s=1.0)
    fill(manager, topic_of(manager, "acme", "orders"), 5)
    manager.evict_idle(1.0)

    topic = topic_of(manager, "acme", "orders")

    assert (topic.head, topic.epoch) == (0, "epoch2")
    assert at_once(manager.busiest(1)) == at_once(manager.busiest(9)) == [topic]


def test_totals_do_not_fall_with_eviction() -> None:
    """What evicted topics counted is kept, by reason too."""
    manager = make_manager(idle_s=1.0, ring_messages=10)
    topic = topic_of(manager, "acme", "orders")
    driver = TopicDriver(topic, partial(manager.extend, topic))
    reader = driver.join(Subscriber(FakeSink(), wanted_window=4))
    driver.send(5)
    driver.block(reader)
    driver.send(7)
    driver.publish(20)
    driver.flush()
    driver.leave(reader)

    manager.evict_idle(1.0)

    totals = totals_of(manager)
    assert totals.lost == {"slow_consumer": 9, "retention": 14, "memory": 0, "expired": 0}
    assert (totals.published, totals.offered, totals.delivered, totals.discarded) == (32, 32, 5, 4)


def test_sweep_cuts_what_was_pending() -> None:
    """What could not be given up while it was yet to be offered is, though nobody publishes."""
    manager = make_manager(max_memory_bytes=100 * HELD)
    topic = topic_of(manager, "acme", "orders")
    driver = TopicDriver(topic, partial(manager.extend, topic))
    reader = driver.join(Subscriber(FakeSink()))
    driver.publish(80)
    driver.flush()
    held_before = manager.ring_bytes

    manager.evict_idle(0.0)

    assert sink_of(reader).offsets == list(range(1, 81))
    assert held_before == 80 * HELD
    assert manager.ring_bytes == real_bytes(topic) == 54 * HELD


def test_sweep_looks_at_a_bounded_number_of_topics() -> None:
    """One after the other, so that in the end all have been looked at."""
    manager = make_manager(idle_s=60.0)
    topics = [topic_of(manager, "acme", f"topic{number}") for number in range(5)]
    for topic in topics:
        manager.extend(topic, 1, [frame_of(1)], 0.0)
    for topic in topics[::2]:
        manager.extend(topic, 2, [frame_of(2)], 60.0)

    evicted = [len(manager.evict_idle(100.0, at_most=2)) for _ in range(3)]

    assert evicted == [1, 1, 0]
    assert set(manager) == set(topics[::2])


def test_sweep_forgets_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To free all rings at once, and give them back to the machine, would be a pause."""
    monkeypatch.setattr("clevrd.core.topic_manager.FORGOTTEN_BYTES_PER_SWEEP", 2 * HELD)
    manager = make_manager(idle_s=60.0)
    for number in range(5):
        topic = topic_of(manager, "acme", f"topic{number}")
        manager.extend(topic, 1, [frame_of(1)], 0.0)

    evicted = [len(manager.evict_idle(100.0)) for _ in range(4)]

    assert evicted == [2, 2, 1, 0]


# --- who is busy -----------------------------------------------------------------------------


def test_busiest_are_those_of_all_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was busy when, few are kept in mind and none of the busiest is missing."""
    monkeypatch.setattr("clevrd.core.busy_topics._BUSY_TOPICS", 10)
    manager = make_manager()
    topics = [topic_of(manager, "acme", f"topic{number}") for number in range(100)]
    for number, topic in enumerate(topics):
        fill(manager, topic, 1 + number * 37 % 100)
    # Published to once, and read by many.
    driver = TopicDriver(topics[0], partial(manager.extend, topics[0]))
    readers = [driver.join(Subscriber(FakeSink())) for _ in range(500)]
    driver.send(1)
    read = at_once(manager.busiest(3))
    for reader in readers:
        driver.leave(reader)
    totals_of(manager)

    messages = [topic.published + topic.delivered for topic in at_once(manager.busiest(10))]

    assert read[0] is topics[0]
    assert at_once(manager.busiest(1)) == [topics[0]]
    assert messages == [502, *range(100, 91, -1)]
    assert len(manager._busy.topics) <= 20
    assert set(at_once(manager.busiest(1_000))) == set(topics)


def test_few_topics_are_all_listed() -> None:
    """Also those where nothing ever happened."""
    manager = make_manager()
    topics = [topic_of(manager, "acme", f"topic{number}") for number in range(4)]
    fill(manager, topics[2], 1)

    listed = at_once(manager.busiest(100))

    assert listed[0] is topics[2]
    assert set(listed) == set(topics)


# --- memory ----------------------------------------------------------------------------------


def test_all_rings_together_are_bounded_and_the_largest_gives() -> None:
    """A flood on one topic costs that topic its past, not the small ones theirs."""
    manager = make_manager(max_memory_bytes=100 * HELD)
    small, large = topic_of(manager, "acme", "small"), topic_of(manager, "acme", "large")
    fill(manager, small, 5)

    fill(manager, large, 1_000)

    assert manager.ring_bytes == real_bytes(small) + real_bytes(large)
    assert manager.ring_bytes <= manager.max_ring_bytes == 60 * HELD
    assert len(small.ring) == 5
    assert large.head == 1_000
    assert len(large.ring) >= 0.9 * 60 - 5 - 1


def test_equally_large_rings_give_alike() -> None:
    """None is emptied for the others' sake."""
    manager = make_manager(max_memory_bytes=100 * HELD)
    topics = [topic_of(manager, "acme", f"topic{number}") for number in range(4)]

    for _ in range(100):
        for topic in topics:
            fill(manager, topic, 1)

    lengths = [len(topic.ring) for topic in topics]
    assert min(lengths) >= 0.9 * 60 / 4 - 1
    assert sum(lengths) <= 60


def test_topics_of_one_message_are_bounded_too() -> None:
    """A single message is not sacred: otherwise a thousand topics would have no bound."""
    manager = make_manager(max_memory_bytes=100 * HELD)

    for number in range(1_000):
        fill(manager, topic_of(manager, "acme", f"topic{number}"), 1)

    assert manager.ring_bytes == sum(map(real_bytes, manager))
    assert 0.9 * 60 * HELD - HELD <= manager.ring_bytes <= 60 * HELD


def test_very_many_rings_are_cut_a_few_at_a_time() -> None:
    """A publish pays for some of them, by half at most; the next one goes on."""
    manager = make_manager(max_memory_bytes=20_000 * HELD)
    topics = [topic_of(manager, "acme", f"topic{number}") for number in range(3_000)]
    for topic in topics:
        fill(manager, topic, 4)

    fill(manager, topics[0], 1)
    after_one = [len(topic.ring) for topic in topics]
    for _ in range(5):
        for topic in topics:
            fill(manager, topic, 1)
            assert manager.ring_bytes <= manager.max_ring_bytes

    assert sum(length < 4 for length in after_one) <= 256
    assert min(after_one) == 2
    assert manager.ring_bytes == sum(map(real_bytes, manager))
    assert min(len(topic.ring) for topic in topics) >= 1


# --- everything at once ----------------------------------------------------------------------

TRIPS_AT = 5


class TopicsUnderPressure(RuleBasedStateMachine):
    """Many readers of mixed policies on two topics, with too little memory of every kind.

    What a reader is given can't be foretold here; that it is in order, given once, and that all
    else is accounted for, can.
    """

    @initialize(
        acme_weight=st.sampled_from([0.0, 0.1, 1.0, 9.0]),
        memory=st.integers(1_500, 12_000),
        ring_messages=st.integers(2, 25),
        ring_bytes=st.sampled_from([500, 2_000, 1 << 20]),
        window=st.integers(1, 15),
        joined=st.lists(
            st.tuples(st.integers(0, 1), st.sampled_from(list(DropStrategy))),
            min_size=4,
            max_size=8,
        ),
    )
    def make_topics(
        self,
        acme_weight: float,
        memory: int,
        ring_messages: int,
        ring_bytes: int,
        window: int,
        joined: list[tuple[int, DropStrategy]],
    ) -> None:
        self.manager = make_manager(
            Weights({"acme": acme_weight}, 1.0) if acme_weight else ONE_PORTION,
            max_memory_bytes=memory,
            ring_messages=ring_messages,
            ring_bytes=ring_bytes,
            circuit_breaker_threshold=TRIPS_AT,
            idle_s=0.0,
        )
        self.budget_bytes = self.manager.kept.left_bytes
        topics = [topic_of(self.manager, tenant, "orders") for tenant in ("acme", "other")]
        for topic in topics:
            topic.set_window(window, 0.0)
        self.drivers = [TopicDriver(topic, partial(self.manager.extend, topic)) for topic in topics]
        # Readers that are joined -> how much they were offered, reckoned here.
        self.offered: list[dict[Subscriber, int]] = [{}, {}]
        self.offered_ever = [0, 0]
        for which, strategy in joined:
            self.join(which, strategy, wanted=None, last=0)

    def pick(self, which: int, who: int) -> Subscriber | None:
        readers = list(self.offered[which])
        return readers[who % len(readers)] if readers else None

    which = st.integers(0, 1)
    who = st.integers(0, 9)
    message_bytes = st.sampled_from([64, 100, 700])
    read_bytes = st.sampled_from([1, 200, 1 << 20])

    @rule(which=which, messages=st.integers(1, 6), size=message_bytes)
    def publish(self, which: int, messages: int, size: int) -> None:
        self.drivers[which].publish(messages, size)
        manager = self.manager
        pending = sum(topic.pending_bytes for topic in manager)
        assert manager.ring_bytes <= manager.max_ring_bytes + pending

    @rule(which=which, max_bytes=read_bytes)
    def begin_round(self, which: int, max_bytes: int) -> None:
        driver, offered = self.drivers[which], self.offered[which]
        before = driver.topic.edge
        tripped = len(driver.tripped)
        step = driver.begin(max_bytes)
        if step is None:
            return
        for reader in offered:
            offered[reader] += step.end - before
            self.offered_ever[which] += step.end - before
        for reader in driver.tripped[tripped:]:
            assert reader.dropped_in_stall >= TRIPS_AT
            self.forget(which, reader)
        for reader in offered:
            if reader.strategy is CIRCUIT_BREAKER:
                assert reader.drops_in_stall(driver.topic) < TRIPS_AT

    @rule(which=which, messages=st.integers(1, 12), size=message_bytes)
    def send(self, which: int, messages: int, size: int) -> None:
        for _ in range(messages):
            self.publish(which, 1, size)
            self.begin_round(which, 1 << 20)
            self.finish(which)

    @rule(which=which)
    def write_next(self, which: int) -> None:
        self.drivers[which].write_next()

    @rule(which=which)
    def finish(self, which: int) -> None:
        self.drivers[which].finish()

    @rule(
        which=which,
        strategy=st.sampled_from(list(DropStrategy)),
        wanted=st.one_of(st.none(), st.integers(0, 20)),
        last=st.integers(0, 30),
    )
    def join(self, which: int, strategy: DropStrategy, wanted: int | None, last: int) -> None:
        topic = self.drivers[which].topic
        reader = Subscriber(FakeSink(), strategy, wanted)
        first = max(topic.ring.first, topic.head - last + 1)
        backlog = max(0, topic.edge - first + 1)
        if strategy is LATEST:
            # Nothing here has a key: the newest is all it wants of them.
            backlog = min(backlog, 1)
        topic.join(reader, last, 0.0)
        self.offered[which][reader] = backlog
        self.offered_ever[which] += backlog

    @rule(which=which, who=who)
    def block(self, which: int, who: int) -> None:
        if reader := self.pick(which, who):
            self.drivers[which].topic.mark_lagging(reader)

    @rule(which=which, who=who, max_bytes=read_bytes)
    def read(self, which: int, who: int, max_bytes: int) -> None:
        reader = self.pick(which, who)
        if reader and not reader.is_live:
            self.drivers[which].read_once(reader, max_bytes)

    @rule(which=which, who=who)
    def catch_up(self, which: int, who: int) -> None:
        reader = self.pick(which, who)
        if reader and not reader.is_live:
            self.drivers[which].catch_up(reader)

    @rule(which=which, who=who)
    def leave(self, which: int, who: int) -> None:
        if reader := self.pick(which, who):
            self.drivers[which].leave(reader)
            self.forget(which, reader)

    @rule(window=st.integers(1, 30))
    def set_window(self, window: int) -> None:
        for topic in self.manager:
            topic.set_window(window, 0.0)

    @rule(acme_weight=st.sampled_from([0.0, 0.1, 1.0, 9.0]))
    def share_out(self, acme_weight: float) -> None:
        self.manager.share_out(Weights({"acme": acme_weight}, 1.0) if acme_weight else ONE_PORTION)

    @rule(which=which)
    def look(self, which: int) -> None:
        self.drivers[which].topic.settle(0.0)

    @precondition(lambda self: any(self.offered))
    @rule(which=which)
    def all_leave(self, which: int) -> None:
        for reader in list(self.offered[which]):
            self.drivers[which].leave(reader)
            self.forget(which, reader)

    def forget(self, which: int, reader: Subscriber) -> None:
        offered = self.offered[which].pop(reader)
        self.check_order(reader)
        assert offered == reader.delivered + reader.dropped + reader.discarded
        assert (reader.kept, reader.kept_messages) == ((), 0)

    def check_order(self, reader: Subscriber) -> None:
        given = sink_of(reader).offsets
        assert len(given) == reader.delivered
        assert all(earlier < later for earlier, later in pairwise([reader.start, *given]))

    @invariant()
    def readers_are_accounted_for(self) -> None:
        for driver, offered in zip(self.drivers, self.offered, strict=True):
            topic = driver.topic
            assert {*topic.live, *topic.lagging} == offered.keys()
            for reader, count_offered in offered.items():
                self.check_order(reader)
                lost = reader.dropped + reader.overflow(topic)
                assert count_offered == reader.delivered + lost + reader.queued(topic)

    @invariant()
    def topics_are_accounted_for(self) -> None:
        for driver, ever in zip(self.drivers, self.offered_ever, strict=True):
            topic = driver.topic
            unsettled = sum(reader.overflow(topic) for reader in topic.lagging)
            lost = topic.losses.total + unsettled
            assert topic.offered == ever
            assert ever == topic.delivered + lost + topic.discarded + topic.queued()
            waiting = topic.ring.frames(max(topic.edge, topic.ring.first - 1), topic.head)
            if topic.ring.first - 1 <= topic.edge:
                assert topic.pending_bytes == sum(len(f) + FRAME_OVERHEAD_BYTES for f in waiting)

    @invariant()
    def memory_is_accounted_for(self) -> None:
        manager = self.manager
        assert manager.ring_bytes == sum(map(real_bytes, manager))
        for portion in manager.portions:
            own = [topic for topic in manager if topic.portion is portion]
            assert portion.ring_bytes == sum(map(real_bytes, own))
            assert portion.kept.taken_bytes == sum(topic.kept.size_bytes for topic in own)
            assert portion.topics == len(own)
            assert set(portion.kept.holders) == {
                topic
                for topic in own
                if any(reader.policy.keeps_oldest for reader in topic.lagging)
            }
        held = sum(topic.kept.size_bytes for topic in manager)
        assert manager.kept.left_bytes == self.budget_bytes - held >= 0
        for offered in self.offered:
            for reader in offered:
                assert reader.kept_messages == sum(upto - after for after, upto in reader.kept)

    @invariant()
    def sums_are_those_of_all_topics(self) -> None:
        totals, topics = totals_of(self.manager), list(self.manager)
        assert totals.published == sum(topic.published for topic in topics)
        assert totals.offered == sum(topic.offered for topic in topics)
        assert totals.delivered == sum(topic.delivered for topic in topics)
        assert totals.discarded == sum(topic.discarded for topic in topics)
        assert sum(totals.lost.values()) == sum(topic.losses.total for topic in topics)
        assert totals.queued == sum(topic.queued() for topic in topics)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for which in (0, 1):
            self.all_leave(which)
            topic = self.drivers[which].topic
            assert topic.offered == topic.delivered + topic.losses.total + topic.discarded
        assert self.manager.kept.left_bytes == self.budget_bytes
        self.manager.evict_idle(UNMADE_S)
        assert len(self.manager) == 0
        assert self.manager.ring_bytes == 0


test_topics_under_pressure = TopicsUnderPressure.TestCase
