"""Each drop policy equals a plain bounded queue, message for message and count for count.

The queues below are eager: they are fed when a round begins, drop at once, and hold what they
hold whatever the ring does. The core is lazy; after every step both must agree on what was
delivered, what was lost and what waits.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from fakes import FakeSink, TopicDriver, make_topic, sink_of
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.budgets import Budget
from clevrd.core.drop_strategy import (
    CIRCUIT_BREAKER,
    DROP_NEWEST,
    DROP_OLDEST,
    LATEST,
    DropStrategy,
)
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES
from clevrd.core.subscriber import SLOW_MEMORY_S, Subscriber

# A step's name and arguments.
Step = tuple[str, tuple[Any, ...]]

THRESHOLD = 7
READERS = 3


class PlainRing:
    """The messages that are held: offsets and sizes, bounded by count and by bytes.

    And the keys of all there ever were.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.sizes: deque[int] = deque()
        self.keys: list[str] = []
        self.first = 1

    @property
    def head(self) -> int:
        return self.first + len(self.sizes) - 1

    def append(self, size: int, key: str) -> None:
        self.keys.append(key)
        self.sizes.append(size + FRAME_OVERHEAD_BYTES)
        while len(self.sizes) > 1 and self.is_over():
            self.evict()

    def is_over(self) -> bool:
        return len(self.sizes) > self.max_messages or sum(self.sizes) > self.max_bytes

    def evict(self) -> None:
        self.sizes.popleft()
        self.first += 1


class PlainQueue:
    """One reader's queue: what was offered to it and neither delivered nor dropped."""

    def __init__(self, strategy: DropStrategy, wanted: int | None, backlog: list[int]) -> None:
        self.strategy = strategy
        self.wanted = wanted
        self.waiting = deque(backlog)
        self.backlog_limit = len(backlog)
        self.offered = len(backlog)
        self.delivered: list[int] = []
        self.dropped = 0
        self.dropped_in_stall = 0
        self.last_drop_s = float("-inf")
        self.is_live = False
        self.discarded = 0
        self.is_half_open = False

    @property
    def reads_ring(self) -> bool:
        """Whether what the ring gives up is lost to it, unless it is being written."""
        return self.strategy is DROP_OLDEST and not self.is_live

    def window(self, cap: int) -> int:
        window = cap if self.wanted is None else min(cap, self.wanted)
        return max(window, self.backlog_limit)

    def offer(self, offset: int, cap: int, now_s: float) -> None:
        self.offered += 1
        self.waiting.append(offset)
        self.cut(cap, now_s)

    def miss(self, now_s: float) -> None:
        """The message was gone before it could be offered."""
        self.offered += 1
        self.lose(now_s)

    def cut(self, cap: int, now_s: float) -> None:
        """A queue that is too long drops at its own end; what is being written is no queue."""
        while not self.is_live and len(self.waiting) > self.window(cap):
            if self.strategy is DROP_OLDEST:
                self.waiting.popleft()
            else:
                self.waiting.pop()
            self.lose(now_s)

    def evict(self, first: int, now_s: float) -> None:
        """The ring moved on: what is read from it, and was not kept aside, is lost."""
        while self.waiting and self.waiting[0] < first:
            self.waiting.popleft()
            self.lose(now_s)

    def lose(self, now_s: float) -> None:
        self.dropped += 1
        self.dropped_in_stall += not self.is_live
        self.last_drop_s = now_s

    def deliver(self, count: int) -> None:
        self.delivered += [self.waiting.popleft() for _ in range(count)]

    def caught_up(self) -> None:
        self.is_live = True
        self.backlog_limit = self.dropped_in_stall = 0
        self.is_half_open = False

    def suspend(self) -> None:
        self.discarded += len(self.waiting)
        self.waiting.clear()

    def resume(self, missing: int, backlog: list[int], now_s: float) -> None:
        """Offered again: what is still there, and what is not."""
        self.offered += missing + len(backlog)
        for _ in range(missing):
            self.lose(now_s)
        self.waiting.extend(backlog)
        self.backlog_limit = len(backlog)
        self.dropped_in_stall = 0
        self.is_half_open = True


class PlainNewest(PlainQueue):
    """A reader that while it is behind has the newest message of each key waiting, no others."""

    def __init__(self, keys: list[str], wanted: int | None, backlog: list[int]) -> None:
        super().__init__(LATEST, wanted, backlog)
        # By offset, from 1 on; the ring's own.
        self.keys = keys
        self.waiting = deque(self.newest())
        self.offered = len(self.waiting)

    @property
    def reads_ring(self) -> bool:
        return not self.is_live

    def newest(self) -> list[int]:
        return sorted({self.keys[offset - 1]: offset for offset in self.waiting}.values())

    def cut(self, cap: int, now_s: float) -> None:
        if self.is_live:
            return
        newest = self.newest()
        kept = newest[max(0, len(newest) - self.window(cap)) :]
        for _ in range(len(self.waiting) - len(kept)):
            self.lose(now_s)
        self.waiting = deque(kept)


class Lab:
    """The core and the plain queues side by side; every step goes to both, then they are compared.

    Readers are known by a number. A step for a reader that can't take it is no step.
    """

    def __init__(
        self, ring_messages: int, ring_bytes: int, window: int, may_half_open: bool
    ) -> None:
        self.topic = make_topic(
            ring_messages=ring_messages,
            ring_bytes=ring_bytes,
            window=window,
            trip_threshold=THRESHOLD,
        )
        self.driver = TopicDriver(self.topic)
        self.driver.may_half_open = may_half_open
        self.budget_bytes = self.topic.kept.budget.left_bytes
        self.ring = PlainRing(ring_messages, ring_bytes)
        self.edge = 0
        self.cap = min(window, ring_messages)
        self.readers: dict[int, Subscriber] = {}
        self.queues: dict[int, PlainQueue] = {}
        # Those whose circuit is open, which are in neither.
        self.suspended: dict[int, tuple[Subscriber, PlainQueue]] = {}
        # Of readers that left.
        self.offered = self.delivered = self.dropped = self.discarded = 0

    # --- steps -----------------------------------------------------------------------------------

    def join(self, who: int, strategy: DropStrategy, wanted: int | None, last: int) -> None:
        if who in self.readers or who in self.suspended:
            return
        first = max(self.ring.first, self.ring.head - last + 1)
        if not self.readers:
            self.edge = self.ring.head
        backlog = list(range(first, self.edge + 1))
        if strategy is LATEST:
            self.queues[who] = PlainNewest(self.ring.keys, wanted, backlog)
        else:
            self.queues[who] = PlainQueue(strategy, wanted, backlog)
        self.readers[who] = Subscriber(FakeSink(), strategy, wanted)
        self.topic.join(self.readers[who], last, self.driver.now_s)

    def publish(self, keys: str, size: int) -> None:
        for key in keys:
            self.driver.publish(1, size, key.strip())
            self.ring.append(size, key)
            self.follow_ring()

    def trim(self, max_bytes: int) -> None:
        self.topic.trim(max_bytes, self.driver.now_s)
        if not self.readers:
            self.edge = self.ring.head
        while self.ring.first <= self.edge and sum(self.ring.sizes) > max_bytes:
            self.ring.evict()
        self.follow_ring()

    def follow_ring(self) -> None:
        for queue in self.queues.values():
            if queue.reads_ring:
                queue.evict(self.ring.first, self.driver.now_s)

    def begin(self, max_bytes: int) -> None:
        self.finish()
        if not self.readers:
            self.edge = self.ring.head
        gone = max(0, self.ring.first - 1 - self.edge)
        expected_trips = len(self.driver.tripped)
        step = self.driver.begin(max_bytes)
        assert (step is None) == (self.ring.head == self.edge)
        if step is None:
            return
        assert step.start == self.edge + gone
        assert step.end == step.start + self.fitting(step.start, max_bytes)
        for queue in self.queues.values():
            for _ in range(gone):
                queue.miss(self.driver.now_s)
            for offset in range(step.start + 1, step.end + 1):
                queue.offer(offset, self.cap, self.driver.now_s)
        self.edge = step.end
        for who, queue in list(self.queues.items()):
            threshold = 1 if queue.is_half_open else THRESHOLD
            if queue.strategy is CIRCUIT_BREAKER and queue.dropped_in_stall >= threshold:
                expected_trips += 1
                assert self.readers[who] in self.driver.tripped
                self.trip(who)
        assert len(self.driver.tripped) == expected_trips

    def trip(self, who: int) -> None:
        if not self.driver.may_half_open:
            self.forget(who)
            return
        reader, queue = self.readers.pop(who), self.queues.pop(who)
        assert (queue.delivered or [0])[-1] <= reader.cursor
        assert not queue.waiting or reader.cursor < queue.waiting[0]
        queue.suspend()
        self.suspended[who] = reader, queue

    def resume(self, who: int) -> None:
        if who not in self.suspended:
            return
        if not self.readers:
            self.edge = self.ring.head
        reader, queue = self.suspended.pop(who)
        after = max(reader.cursor, min(self.edge, self.ring.first - 1))
        backlog = list(range(after + 1, self.edge + 1))
        queue.resume(after - reader.cursor, backlog, self.driver.now_s)
        self.readers[who], self.queues[who] = reader, queue
        self.topic.resume(reader, self.driver.now_s)

    def fitting(self, start: int, max_bytes: int) -> int:
        """Return how many frames after ``start`` fit, at least one."""
        sizes = list(self.ring.sizes)[start + 1 - self.ring.first :]
        count, total = 0, 0
        for size in sizes:
            total += size - FRAME_OVERHEAD_BYTES
            if count and total > max_bytes:
                break
            count += 1
        return count

    def write_next(self) -> None:
        before = {who: reader.delivered for who, reader in self.readers.items()}
        self.driver.write_next()
        for who, reader in self.readers.items():
            if reader.delivered != before[who]:
                self.queues[who].deliver(len(self.queues[who].waiting))

    def finish(self) -> None:
        self.driver.finish()
        for queue in self.queues.values():
            if queue.is_live:
                queue.deliver(len(queue.waiting))

    def block(self, who: int) -> None:
        queue = self.queues.get(who)
        if queue is None or not queue.is_live:
            return
        self.driver.block(self.readers[who])
        queue.is_live = False
        if queue.strategy is LATEST:
            # What is superseded is no loss to the ring.
            queue.cut(self.cap, self.driver.now_s)
        queue.evict(self.ring.first, self.driver.now_s)
        queue.cut(self.cap, self.driver.now_s)

    def read(self, who: int, max_bytes: int) -> None:
        queue = self.queues.get(who)
        if queue is None or queue.is_live:
            return
        reader = self.readers[who]
        before = reader.delivered
        self.driver.read_once(reader, max_bytes)
        count = reader.delivered - before
        if queue.waiting:
            # Fewer than would fit are given where what was kept ends and the ring goes on.
            assert count > 0
            assert count == 1 or len(sink_of(reader).writes[-1]) <= max_bytes
            queue.deliver(count)
        else:
            assert count == 0
            queue.caught_up()

    def catch_up(self, who: int) -> None:
        while who in self.queues and not self.queues[who].is_live:
            self.read(who, 1 << 30)

    def window(self, cap: int) -> None:
        self.topic.set_window(cap, self.driver.now_s)
        self.cap = min(cap, self.ring.max_messages)
        for queue in self.queues.values():
            queue.cut(self.cap, self.driver.now_s)

    def leave(self, who: int) -> None:
        if who in self.suspended:
            self.readers[who], self.queues[who] = self.suspended.pop(who)
        if who in self.readers:
            self.driver.leave(self.readers[who])
            self.forget(who)

    def view(self) -> None:
        """Somebody looks at /metrics, which settles: it must make no difference."""
        self.topic.settle(self.driver.now_s)
        self.topic.slow_count(self.driver.now_s)

    def tick(self, seconds: float) -> None:
        self.finish()  # A round takes milliseconds.
        self.driver.now_s += seconds

    def forget(self, who: int) -> None:
        """Compare the final counts of a reader that has left."""
        reader, queue = self.readers.pop(who), self.queues.pop(who)
        assert not reader.is_joined
        assert reader.delivered == len(queue.delivered)
        assert reader.dropped == queue.dropped
        assert reader.discarded == queue.discarded + len(queue.waiting)
        self.offered += queue.offered
        self.delivered += reader.delivered
        self.dropped += reader.dropped
        self.discarded += reader.discarded

    # --- comparison ------------------------------------------------------------------------------

    def compare(self) -> None:
        topic = self.topic
        assert topic.ring.first == self.ring.first
        assert topic.head == self.ring.head
        assert topic.ring.size_bytes == sum(self.ring.sizes)
        assert topic.subscribers == len(self.readers) + len(self.suspended)
        assert {*topic.live, *topic.lagging} == {*self.readers.values()}
        for who, reader in self.readers.items():
            self.compare_reader(reader, self.queues[who])
        self.compare_sums()

    def compare_reader(self, reader: Subscriber, queue: PlainQueue) -> None:
        topic = self.topic
        assert sink_of(reader).offsets == queue.delivered
        assert reader.delivered == len(queue.delivered)
        assert reader.dropped + reader.overflow(topic) == queue.dropped
        assert reader.queued(topic) == len(queue.waiting)
        assert reader.is_live == queue.is_live
        assert reader.drops_in_stall(topic) == queue.dropped_in_stall
        assert queue.offered == (
            len(queue.delivered) + queue.dropped + queue.discarded + len(queue.waiting)
        )
        assert queue.offered == topic.edge - reader.start
        if self.driver.now_s - queue.last_drop_s < SLOW_MEMORY_S:
            assert reader.is_slow(topic, self.driver.now_s)

    def compare_sums(self) -> None:
        topic = self.topic
        unsettled = sum(reader.overflow(topic) for reader in self.readers.values())
        readers = [*self.readers.values(), *(reader for reader, _ in self.suspended.values())]
        queues = [*self.queues.values(), *(queue for _, queue in self.suspended.values())]
        assert topic.offered == self.offered + sum(queue.offered for queue in queues)
        assert topic.delivered == self.delivered + sum(reader.delivered for reader in readers)
        assert topic.losses.total == self.dropped + sum(reader.dropped for reader in readers)
        assert topic.discarded == self.discarded + sum(queue.discarded for queue in queues)
        assert topic.queued() == sum(len(queue.waiting) for queue in self.queues.values())
        lost = topic.losses.total + unsettled
        assert topic.offered == topic.delivered + lost + topic.discarded + topic.queued()
        assert topic.losses.memory == 0

    def run(self, steps: list[Step]) -> None:
        for name, arguments in steps:
            getattr(self, name)(*arguments)
            self.compare()
        for who in [*self.readers, *self.suspended]:
            self.leave(who)
            self.compare()
        assert not self.topic.newest.readers
        assert self.topic.kept.budget.left_bytes == self.budget_bytes


# The key of each message to publish; a blank is none. Some are rare.
KEYS = st.text("aaabbcdefg  ", min_size=1, max_size=8)
SIZES = st.sampled_from([64, 64, 100, 700])
BYTES = st.one_of(st.just(1 << 30), st.integers(64, 2_000))
WINDOWS = st.one_of(st.integers(1, 12), st.just(100))
WHO = st.integers(0, READERS - 1)


def steps_for(strategies: list[DropStrategy]) -> st.SearchStrategy[list[Step]]:
    """Return schedules of steps; those that move messages come more often than the others."""
    wanted = st.one_of(st.none(), st.integers(0, 12))
    join = st.tuples(
        st.just("join"), st.tuples(WHO, st.sampled_from(strategies), wanted, st.integers(0, 30))
    )
    publish = st.tuples(st.just("publish"), st.tuples(KEYS, SIZES))
    begin = st.tuples(st.just("begin"), st.tuples(BYTES))
    read = st.tuples(st.just("read"), st.tuples(WHO, BYTES))
    block = st.tuples(st.just("block"), st.tuples(WHO))
    catch_up = st.tuples(st.sampled_from(["catch_up", "resume"]), st.tuples(WHO))
    rare = st.one_of(
        st.tuples(st.just("leave"), st.tuples(WHO)),
        st.tuples(st.just("window"), st.tuples(WINDOWS)),
        st.tuples(st.just("trim"), st.tuples(st.integers(0, 2_000))),
        st.tuples(st.sampled_from(["write_next", "finish", "view"]), st.just(())),
        st.tuples(st.just("tick"), st.tuples(st.sampled_from([1.0, 5.0, SLOW_MEMORY_S]))),
    )
    some = st.one_of(publish, begin, publish, begin, block, read, catch_up, join, rare, rare)
    # Lists are short unless they have to be long, and a stall takes many steps. What fails then
    # shrinks by turning steps into none.
    long_lists = st.lists(st.one_of(st.none(), some), min_size=60, max_size=120)
    schedules = st.one_of(st.lists(some, max_size=10), long_lists)
    joins = st.lists(join, max_size=READERS)
    return st.builds(list.__add__, joins, schedules.map(lambda steps: [*filter(None, steps)]))


LABS = st.builds(
    Lab,
    ring_messages=st.sampled_from([1_000, 1_000, 20, 8, 3, 1]),
    ring_bytes=st.sampled_from([1 << 30, 1 << 30, 3_000, 1_000, 300]),
    window=WINDOWS,
    may_half_open=st.booleans(),
)


@pytest.mark.parametrize("strategy", DropStrategy, ids=lambda strategy: strategy.value)
def test_policy_equals_plain_queue(strategy: DropStrategy) -> None:
    """Whatever happens, a reader is given, and loses, what a plain bounded queue would."""

    @given(lab=LABS, steps=steps_for([strategy]))
    def holds(lab: Lab, steps: list[Step]) -> None:
        lab.run(steps)

    holds()


@given(lab=LABS, steps=steps_for(list(DropStrategy)))
def test_policies_do_not_disturb_each_other(lab: Lab, steps: list[Step]) -> None:
    """Readers of different policies on one topic each still equal their own plain queue."""
    lab.run(steps)


def lagging_reader(
    strategy: DropStrategy, *, window: int, trip_threshold: int = 100
) -> tuple[TopicDriver, Subscriber]:
    """Return a driver and a reader that has been given nothing yet and is blocked."""
    driver = TopicDriver(make_topic(window=window, trip_threshold=trip_threshold))
    reader = driver.join(Subscriber(FakeSink(), strategy))
    driver.block(reader)
    return driver, reader


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [(DROP_OLDEST, [8, 9, 10]), (DROP_NEWEST, [1, 2, 3]), (CIRCUIT_BREAKER, [1, 2, 3])],
)
def test_full_window_keeps_the_policys_end(strategy: DropStrategy, kept: list[int]) -> None:
    """Of ten messages, a window of three keeps the newest or the oldest three."""
    driver, reader = lagging_reader(strategy, window=3)

    driver.send(10)
    driver.unblock(reader)

    assert sink_of(reader).offsets == kept
    assert reader.dropped == 7


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [(DROP_OLDEST, [9, 10]), (DROP_NEWEST, [1, 2]), (CIRCUIT_BREAKER, [1, 2])],
)
def test_shrunken_window_drops_at_once(strategy: DropStrategy, kept: list[int]) -> None:
    """A reader that lags when the window shrinks loses what is beyond it then, not later."""
    driver, reader = lagging_reader(strategy, window=10)
    driver.send(10)

    driver.topic.set_window(2, now_s=0.0)
    dropped = reader.dropped
    driver.topic.set_window(10, now_s=0.0)
    driver.unblock(reader)

    assert dropped == 8
    assert sink_of(reader).offsets == kept


@pytest.mark.parametrize("strategy", [DROP_NEWEST, CIRCUIT_BREAKER])
def test_kept_messages_outlive_the_ring(strategy: DropStrategy) -> None:
    """Who keeps the oldest still gets them when the ring has long moved on."""
    driver = TopicDriver(make_topic(ring_messages=5, window=5))
    reader = driver.join(Subscriber(FakeSink(), strategy))
    driver.block(reader)

    driver.send(50)
    driver.unblock(reader)

    assert driver.topic.ring.first == 46
    assert sink_of(reader).offsets == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("strategy", [DROP_NEWEST, CIRCUIT_BREAKER])
def test_round_that_the_ring_gave_up_in_part(strategy: DropStrategy) -> None:
    """Who blocks before its turn in such a round still keeps the oldest of what is left of it."""
    driver = TopicDriver(make_topic(ring_messages=10, window=3))
    reader = driver.join(Subscriber(FakeSink(), strategy))
    driver.publish(10)
    driver.begin()

    driver.publish(4)
    driver.block(reader)
    driver.unblock(reader)

    assert sink_of(reader).offsets == [5, 6, 7]
    assert driver.topic.losses.slow_consumer == 7


def test_window_wanted_is_capped_by_the_window_allowed() -> None:
    """A reader gets the window it asked for, up to what is allowed now."""
    modest, greedy = (
        Subscriber(FakeSink(), wanted_window=5),
        Subscriber(FakeSink(), wanted_window=50),
    )

    assert [modest.window(20), greedy.window(20)] == [5, 20]
    assert [modest.window(3), greedy.window(3)] == [3, 3]


def test_catch_up_may_exceed_the_window_once() -> None:
    """Catch-up that was asked for is given whole; later stalls have the usual window."""
    driver = TopicDriver(make_topic(window=3))
    driver.send(20)
    reader = driver.join(Subscriber(FakeSink()), last=10)

    driver.block(reader)
    driver.send(10)
    driver.unblock(reader)

    assert sink_of(reader).offsets == [*range(11, 21), 28, 29, 30]


def test_circuit_opens_in_the_round_that_reaches_the_threshold() -> None:
    """A stalled CIRCUIT_BREAKER is closed with the hundredth drop, not before and not later."""
    driver, reader = lagging_reader(CIRCUIT_BREAKER, window=10, trip_threshold=100)

    driver.send(109)
    tripped_before = list(driver.tripped)
    driver.send(1)

    assert tripped_before == []
    assert driver.tripped == [reader]
    assert sink_of(reader).closed == (4101, "circuit_open")


def test_circuit_forgets_drops_once_caught_up() -> None:
    """Only drops within one stall open the circuit: a reader that recovers starts anew."""
    driver, reader = lagging_reader(CIRCUIT_BREAKER, window=10, trip_threshold=100)

    for _ in range(5):
        driver.send(109)
        driver.unblock(reader)
        driver.block(reader)

    assert driver.tripped == []
    assert reader.dropped == 5 * 99


def test_circuit_counts_what_a_long_catch_up_allowed_no_longer() -> None:
    """The larger window of a long catch-up doesn't put the alarm of the next stall off."""
    driver = TopicDriver(make_topic(window=10, trip_threshold=20))
    driver.send(500)
    reader = Subscriber(FakeSink(), CIRCUIT_BREAKER)
    driver.topic.join(reader, 500, now_s=0.0)
    # Half read when the alarm is reached and reckoned anew.
    driver.read_once(reader, max_bytes=64 * 250)
    driver.send(300)
    driver.catch_up(reader)

    driver.block(reader)
    driver.send(30)

    assert driver.tripped == [reader]


@pytest.mark.parametrize("strategy", [DROP_OLDEST, DROP_NEWEST])
def test_slow_ends_ten_seconds_after_the_last_loss(strategy: DropStrategy) -> None:
    """A stalled reader is slow while it loses messages and for ten seconds after, no longer."""
    driver, _ = lagging_reader(strategy, window=3)
    driver.send(3)
    before = driver.topic.slow_count(0.0)

    driver.send(1)
    after = [driver.topic.slow_count(now_s) for now_s in (0.0, 9.9, 10.0)]

    assert (before, after) == (0, [1, 1, 0])


def test_looking_does_not_make_a_reader_slow() -> None:
    """When a loss is settled changes nothing about when it happened."""
    driver, _ = lagging_reader(DROP_OLDEST, window=3)
    driver.send(10)

    driver.topic.settle(now_s=60.0)

    assert driver.topic.slow_count(now_s=60.0) == 0


def test_reader_that_recovers_is_well_again() -> None:
    """A reader that only lagged within its window was never slow, one that dropped is for 10 s."""
    driver, reader = lagging_reader(DROP_OLDEST, window=3)
    driver.send(4)

    driver.unblock(reader)

    assert driver.topic.slow_count(now_s=9.0) == 1
    assert driver.topic.slow_count(now_s=10.0) == 0
    assert driver.topic.slow_count(now_s=9.0) == 0  # No longer even looked at.


def test_large_round_costs_a_live_reader_nothing() -> None:
    """A round may carry more messages than the window allows: who keeps up gets them all."""
    driver = TopicDriver(make_topic(window=3))
    reader = driver.join(Subscriber(FakeSink()))

    driver.publish(100)
    driver.flush()

    assert sink_of(reader).offsets == list(range(1, 101))
    assert reader.dropped == 0


def test_spent_budget_refuses_the_newest_and_is_counted() -> None:
    """What the budget for kept frames can't pay for is lost, and what it paid comes back."""
    budget = Budget(3 * (64 + FRAME_OVERHEAD_BYTES))
    driver = TopicDriver(make_topic(ring_messages=5, window=5, budget=budget))
    reader = driver.join(Subscriber(FakeSink(), DROP_NEWEST))
    driver.block(reader)

    driver.send(10)
    driver.unblock(reader)

    assert sink_of(reader).offsets == [1, 2, 3]
    assert driver.topic.losses.memory == 4  # 4 and 5, later 6 and 7; 8 to 10 had no room.
    assert budget.left_bytes == 3 * (64 + FRAME_OVERHEAD_BYTES)


def test_spent_budget_opens_the_circuit_in_time() -> None:
    """Drops for want of memory count, although the window has room."""
    driver = TopicDriver(
        make_topic(ring_messages=10, window=10, trip_threshold=5, budget=Budget(0))
    )
    reader = driver.join(Subscriber(FakeSink(), CIRCUIT_BREAKER))
    driver.block(reader)

    driver.send(10)
    tripped_before = list(driver.tripped)
    driver.send(1)

    assert tripped_before == []
    assert driver.tripped == [reader]
