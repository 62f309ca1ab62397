"""Topic: what readers are given when they join, keep up, lag, come back and leave."""

from __future__ import annotations

import gc
import weakref
from itertools import cycle, islice

import pytest
from fakes import FakeSink, TopicDriver, frame_of, make_topic, sink_of

from clevrd.core.budgets import Budget
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.subscriber import Subscriber

STRATEGIES = list(DropStrategy)


def live_readers(driver: TopicDriver, count: int) -> list[Subscriber]:
    """Join ``count`` readers that keep up."""
    return [driver.join(Subscriber(FakeSink())) for _ in range(count)]


# --- order and completeness ------------------------------------------------------------------


def test_readers_that_keep_up_get_everything() -> None:
    """Each message once, in order, to each; nothing is left to count."""
    driver = TopicDriver(make_topic())
    readers = live_readers(driver, 3)

    driver.send(50)

    assert [sink_of(reader).offsets for reader in readers] == [list(range(1, 51))] * 3
    assert (driver.topic.offered, driver.topic.delivered) == (150, 150)
    assert (driver.topic.queued(), driver.topic.losses.total, driver.topic.discarded) == (0, 0, 0)


def test_one_turns_messages_are_one_write() -> None:
    """Everything appended since the last round goes out joined, the same bytes to all."""
    driver = TopicDriver(make_topic())
    first, second = live_readers(driver, 2)

    driver.publish(10)
    driver.flush()

    assert len(sink_of(first).writes) == 1
    assert sink_of(first).writes[0] is sink_of(second).writes[0]


def test_single_frame_is_not_copied() -> None:
    """A round of one message hands out the ring's own bytes."""
    topic = make_topic()
    driver = TopicDriver(topic)
    (reader,) = live_readers(driver, 1)
    frame = frame_of(1)

    topic.extend(1, [frame], now_s=0.0)
    driver.flush()

    assert sink_of(reader).writes[0] is frame


def test_round_is_bounded_in_bytes() -> None:
    """A burst goes out in several rounds, each as large as allowed."""
    driver = TopicDriver(make_topic())
    (reader,) = live_readers(driver, 1)
    driver.publish(10, size_bytes=100)

    sizes = []
    while step := driver.begin(max_bytes=350):
        sizes.append(step.messages)

    assert sizes == [3, 3, 3, 1]
    assert sink_of(reader).offsets == list(range(1, 11))


def test_round_without_readers_joins_nothing() -> None:
    """While all readers lag, a round moves the edge and copies no bytes."""
    driver = TopicDriver(make_topic())
    (reader,) = live_readers(driver, 1)
    driver.block(reader)
    driver.publish(10)

    step = driver.begin()

    assert step is not None
    assert (step.start, step.end, step.payload) == (0, 10, b"")


def test_nothing_pending_is_no_round() -> None:
    """A round exists only where there is something to offer and somebody to offer it to."""
    driver = TopicDriver(make_topic())
    driver.publish(3)
    before = driver.begin()

    live_readers(driver, 1)

    assert before is None
    assert driver.begin() is None
    assert driver.topic.offered == 0


def test_messages_must_come_in_order() -> None:
    """An offset that doesn't follow the head is refused, and nothing is changed by it."""
    topic = make_topic()
    topic.extend(1, [frame_of(1)], now_s=0.0)

    for offset in (0, 1, 3):
        with pytest.raises(ValueError, match=f"message {offset} can't follow message 1"):
            topic.extend(offset, [frame_of(offset)], now_s=0.0)

    assert (topic.head, topic.published, len(topic.ring)) == (1, 1, 1)


# --- joining ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "first_given"), [(0, 101), (1, 100), (50, 51), (100, 21), (1_000, 21)]
)
def test_joining_gives_the_last_messages_then_what_comes(last: int, first_given: int) -> None:
    """As many as were asked for or as there are, oldest first, without a seam."""
    driver = TopicDriver(make_topic(ring_messages=80))
    driver.send(100)

    reader = driver.join(Subscriber(FakeSink()), last)
    driver.send(5)

    assert sink_of(reader).offsets == list(range(first_given, 106))


def test_joining_between_append_and_round_repeats_nothing() -> None:
    """What was appended but not offered comes with the next round, not with the catch-up too."""
    driver = TopicDriver(make_topic())
    live_readers(driver, 1)
    driver.send(10)
    driver.publish(5)

    reader = driver.join(Subscriber(FakeSink()), last=8)
    driver.flush()

    assert sink_of(reader).offsets == list(range(8, 16))


def test_joining_during_a_round_repeats_nothing() -> None:
    """Who joins while others are still being written to reads up to the round's edge itself."""
    driver = TopicDriver(make_topic())
    live_readers(driver, 3)
    driver.publish(5)
    driver.begin()
    driver.write_next()

    reader = driver.join(Subscriber(FakeSink()), last=2)
    driver.finish()
    driver.send(1)

    assert sink_of(reader).offsets == [4, 5, 6]


def test_joining_in_a_flood_misses_and_repeats_nothing() -> None:
    """Readers join at every point of a flood; each sees an unbroken run from where it joined."""
    driver = TopicDriver(make_topic())
    readers: list[Subscriber] = []

    for turn in range(60):
        driver.publish(turn % 4)
        readers.append(driver.join(Subscriber(FakeSink()), last=turn % 7))
        driver.publish(turn % 3)
        driver.begin(max_bytes=200)
        readers.append(driver.join(Subscriber(FakeSink()), last=turn % 5))
        driver.write_next()
    driver.flush()

    for reader in readers:
        offsets = sink_of(reader).offsets
        assert offsets == list(range(reader.start + 1, driver.topic.head + 1))


def test_reader_that_is_behind_can_not_be_live() -> None:
    """A round would pass it over without a word, so that is refused."""
    driver = TopicDriver(make_topic())
    driver.send(3)
    reader = Subscriber(FakeSink())
    driver.topic.join(reader, 3, now_s=0.0)

    with pytest.raises(ValueError, match="3 messages of 'topic' wait"):
        driver.topic.mark_live(reader)

    assert not reader.is_live


# --- lagging ---------------------------------------------------------------------------------


def test_reader_that_fills_up_reads_on_where_it_stopped() -> None:
    """A pause in the middle of a write costs a reader within its window nothing."""
    driver = TopicDriver(make_topic())
    healthy = driver.join(Subscriber(FakeSink()))
    slow = driver.join(Subscriber(FakeSink(room_bytes=200)))

    for _ in range(20):
        driver.send(3)
        sink_of(slow).drain(max_bytes=100)
    while sink_of(slow).is_paused:
        sink_of(slow).drain(max_bytes=100)

    assert sink_of(healthy).offsets == list(range(1, 61))
    assert sink_of(slow).offsets == list(range(1, 61))
    assert slow.dropped == 0


def test_blocked_reader_is_left_alone() -> None:
    """Nothing is written to a reader that can't take more, and its cursor stays."""
    driver = TopicDriver(make_topic())
    (reader,) = live_readers(driver, 1)
    driver.send(2)

    driver.block(reader)
    driver.send(50)

    assert sink_of(reader).offsets == [1, 2]
    assert (reader.cursor, reader.lag(driver.topic)) == (2, 50)


def test_reader_that_blocks_during_a_round_is_passed_over() -> None:
    """It left the live set before its turn; it gets the round by reading."""
    driver = TopicDriver(make_topic())
    first, second = live_readers(driver, 2)
    driver.publish(3)
    driver.begin()

    driver.block(second)
    driver.finish()
    before = sink_of(second).offsets
    driver.unblock(second)

    assert before == []
    assert sink_of(first).offsets == sink_of(second).offsets == [1, 2, 3]


def test_reader_that_recovers_during_a_round_gets_it_once() -> None:
    """It read the round itself, so the round's own write is not for it any more."""
    driver = TopicDriver(make_topic())
    _, second = live_readers(driver, 2)
    driver.publish(3)
    driver.begin()

    driver.block(second)
    driver.unblock(second)
    driver.finish()
    driver.send(1)

    assert sink_of(second).offsets == [1, 2, 3, 4]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_burst_larger_than_the_ring_is_counted(strategy: DropStrategy) -> None:
    """What the ring gives up before a round could offer it is lost to all, and said so."""
    given = 1 if strategy is DropStrategy.LATEST else 10
    driver = TopicDriver(make_topic(ring_messages=10))
    healthy = driver.join(Subscriber(FakeSink(), strategy))
    stalled = driver.join(Subscriber(FakeSink(), strategy))
    driver.block(stalled)

    driver.publish(25)
    driver.flush()
    driver.unblock(stalled)

    assert sink_of(healthy).offsets == list(range(16, 26))
    assert sink_of(stalled).offsets == list(range(26 - given, 26))
    assert (healthy.dropped, stalled.dropped) == (15, 25 - given)
    assert driver.topic.losses.retention == 30
    assert driver.topic.offered == 50


@pytest.mark.parametrize(("window", "slow", "retention"), [(10, 20, 5), (100, 0, 25)])
def test_losses_are_counted_by_reason(window: int, slow: int, retention: int) -> None:
    """Beyond the window is the reader's doing; within it, the ring's."""
    driver = TopicDriver(make_topic(window=window, ring_bytes=5 * (64 + 56)))
    (reader,) = live_readers(driver, 1)
    driver.block(reader)

    driver.send(30)
    driver.unblock(reader)

    assert sink_of(reader).offsets == list(range(26, 31))
    assert driver.topic.losses.slow_consumer == slow
    assert driver.topic.losses.retention == retention


def test_keeping_costs_nothing_while_a_burst_is_pending() -> None:
    """A burst of many ring turns asks the stalled readers for their frames once, not each time."""
    asked = 0

    class CountingReader(Subscriber):
        def room(self, cap: int) -> int:
            nonlocal asked
            asked += 1
            return super().room(cap)

    driver = TopicDriver(make_topic(ring_messages=10))
    driver.block(driver.join(CountingReader(FakeSink(), DropStrategy.DROP_NEWEST)))
    driver.send(5)

    driver.publish(500)

    assert asked == 1


@pytest.mark.parametrize("strategy", [DropStrategy.DROP_NEWEST, DropStrategy.CIRCUIT_BREAKER])
def test_readers_that_stall_together_are_kept_for_together(strategy: DropStrategy) -> None:
    """The ring is read once for a hundred of them, and what they keep is there once."""
    reads: list[tuple[int, int]] = []

    class CountingRing(RecentMessageCache):
        def frames(self, after: int, upto: int) -> list[bytes]:
            reads.append((after, upto))
            return super().frames(after, upto)

    topic = make_topic(ring_messages=50, window=20)
    topic.ring = CountingRing(50, 1 << 30)
    driver = TopicDriver(topic)
    readers = [driver.join(Subscriber(FakeSink(), strategy)) for _ in range(100)]
    for reader in readers:
        driver.block(reader)
    driver.send(50)
    reads.clear()

    driver.publish(1)
    seen, kept_bytes = list(reads), topic.kept.size_bytes
    for reader in readers:
        driver.unblock(reader)

    assert seen == [(0, 20)]
    assert kept_bytes == 20 * 120
    assert [sink_of(reader).offsets for reader in readers] == [list(range(1, 21))] * 100
    assert topic.kept.size_bytes == 0


def test_readers_that_stall_one_after_the_other_are_asked_in_turn() -> None:
    """What is far from leaving the ring is not looked at yet; all get what they keep."""
    asked: list[Subscriber] = []

    class CountingReader(Subscriber):
        def room(self, cap: int) -> int:
            asked.append(self)
            return super().room(cap)

    driver = TopicDriver(make_topic(ring_messages=80, window=5))
    readers = [driver.join(CountingReader(FakeSink(), DropStrategy.DROP_NEWEST)) for _ in range(80)]
    for reader in readers:
        driver.block(reader)
        driver.send(1)

    driver.send(1)
    at_first = list(asked)
    driver.send(200)
    for reader in readers:
        driver.unblock(reader)

    assert at_first == readers[:12]
    for number, reader in enumerate(readers):
        given = sink_of(reader).offsets
        assert given == list(range(1, number + 6))


@pytest.mark.parametrize("may_half_open", [False, True])
def test_circuits_open_a_bounded_number_at_a_time(may_half_open: bool) -> None:
    """Thousands of them don't hold the loop; those that wait come with rounds of their own."""
    driver = TopicDriver(make_topic(window=3, trip_threshold=5))
    driver.may_half_open = may_half_open
    topic = driver.topic
    for _ in range(600):
        driver.block(driver.join(Subscriber(FakeSink(), DropStrategy.CIRCUIT_BREAKER)))
    stays = driver.join(Subscriber(FakeSink()))
    driver.publish(10)

    opened = []
    while topic.needs_round:
        before = len(driver.tripped)
        driver.begin()
        opened.append(len(driver.tripped) - before)
        driver.finish()

    assert sum(opened) == 600
    assert 0 < max(opened) <= 256
    assert driver.begin() is None
    assert list(topic.live) == [stays]
    assert sink_of(stays).offsets == list(range(1, 11))


# --- pending, trimming -----------------------------------------------------------------------


def test_pending_counts_what_is_yet_to_be_offered() -> None:
    """In messages and in bytes; nothing is pending while nobody reads."""
    driver = TopicDriver(make_topic(ring_messages=20))
    driver.publish(3)
    seen = [(driver.topic.pending, driver.topic.pending_bytes)]
    (reader,) = live_readers(driver, 1)

    driver.publish(10)
    seen.append((driver.topic.pending, driver.topic.pending_bytes))
    driver.begin(max_bytes=4 * 64)
    seen.append((driver.topic.pending, driver.topic.pending_bytes))
    driver.publish(100)
    driver.begin(max_bytes=64)
    seen.append((driver.topic.pending, driver.topic.pending_bytes))
    driver.leave(reader)
    seen.append((driver.topic.pending, driver.topic.pending_bytes))

    assert seen == [(0, 0), (10, 1_200), (6, 720), (19, 19 * 120), (0, 0)]


def test_trim_spares_what_is_yet_to_be_offered() -> None:
    """Memory is taken from what readers were already offered, down to nothing."""
    driver = TopicDriver(make_topic())
    (reader,) = live_readers(driver, 1)
    driver.send(10)
    driver.publish(5)

    freed = driver.topic.trim(0, now_s=0.0)
    driver.flush()

    assert freed == 10 * 120
    assert sink_of(reader).offsets == list(range(1, 16))
    assert driver.topic.trim(0, now_s=0.0) == 5 * 120
    assert len(driver.topic.ring) == 0


def test_trim_takes_from_lagging_readers_by_policy() -> None:
    """DROP_OLDEST loses what is trimmed; who keeps the oldest has kept it."""
    driver = TopicDriver(make_topic())
    oldest = driver.join(Subscriber(FakeSink(), DropStrategy.DROP_OLDEST))
    newest = driver.join(Subscriber(FakeSink(), DropStrategy.DROP_NEWEST))
    for reader in (oldest, newest):
        driver.block(reader)
    driver.send(10)

    driver.topic.trim(3 * 120, now_s=0.0)
    for reader in (oldest, newest):
        driver.unblock(reader)

    assert sink_of(oldest).offsets == [8, 9, 10]
    assert sink_of(newest).offsets == list(range(1, 11))


# --- leaving ---------------------------------------------------------------------------------


def test_leaving_discards_what_waits() -> None:
    """What a reader within its window was not given is neither delivered nor dropped."""
    driver = TopicDriver(make_topic(window=5))
    (reader,) = live_readers(driver, 1)
    driver.send(2)
    driver.block(reader)
    driver.send(9)

    driver.leave(reader)
    driver.leave(reader)

    assert (reader.delivered, reader.dropped, reader.discarded) == (2, 4, 5)
    assert driver.topic.discarded == 5
    assert driver.topic.subscribers == 0


def test_leaving_during_a_round_discards_it() -> None:
    """Who goes before its turn comes was offered the round, and not given it; none is dropped."""
    driver = TopicDriver(make_topic(window=3))
    first, second = live_readers(driver, 2)
    driver.publish(10)
    driver.begin()

    driver.leave(second)
    driver.finish()

    assert (second.delivered, second.dropped, second.discarded) == (0, 0, 10)
    assert first.delivered == 10


def test_leaving_within_the_write_counts_the_write() -> None:
    """A transport that breaks in the middle of a round has been handed that round."""
    driver = TopicDriver(make_topic())
    reader = driver.join(Subscriber(FakeSink(room_bytes=100)))
    sink_of(reader).on_pause = lambda: driver.leave(reader)

    driver.publish(3)
    driver.flush()

    assert (reader.delivered, reader.discarded) == (3, 0)
    assert driver.topic.offered == driver.topic.delivered == 3


def test_last_reader_takes_the_pending_with_it() -> None:
    """When nobody is left nothing is offered; who comes later finds it in the ring."""
    driver = TopicDriver(make_topic())
    (reader,) = live_readers(driver, 1)
    driver.publish(5)

    driver.leave(reader)
    late = driver.join(Subscriber(FakeSink()), last=3)

    assert driver.begin() is None
    assert reader.discarded == 0
    assert sink_of(late).offsets == [3, 4, 5]


@pytest.mark.parametrize("stays", [0, 1, 3])
def test_topic_forgets_readers_that_left(stays: int) -> None:
    """Thousands come and go on a silent topic; it holds on to none, whoever else stays."""
    budget = Budget(1 << 20)
    driver = TopicDriver(make_topic(ring_messages=20, window=10, budget=budget))
    driver.send(20)
    staying = [Subscriber(FakeSink(), strategy) for strategy in STRATEGIES[:stays]]
    for reader in staying:
        driver.block(driver.join(reader))
    gone: list[weakref.ref[FakeSink]] = []

    for turn, strategy in enumerate(islice(cycle(STRATEGIES), 3_000)):
        sink = FakeSink()
        gone.append(weakref.ref(sink))
        reader = Subscriber(sink, strategy)
        if turn % 2:
            driver.topic.join(reader, 20, now_s=0.0)
        else:
            driver.block(driver.join(reader, last=turn % 20))
        driver.leave(reader)
        del sink, reader
    gc.collect()

    assert [ref for ref in gone if ref() is not None] == []
    alarms = driver.topic._alarms
    assert alarms is not None
    assert len(alarms) <= 2 * stays + 16
    assert budget.left_bytes == 1 << 20
    assert driver.topic.subscribers == stays


def test_kept_frames_are_paid_back_when_readers_leave() -> None:
    """The budget is whole again after stalled readers of every policy have gone."""
    budget = Budget(1 << 20)
    driver = TopicDriver(make_topic(ring_messages=10, window=10, budget=budget))
    readers = [driver.join(Subscriber(FakeSink(), strategy)) for strategy in STRATEGIES * 3]
    for reader in readers:
        driver.block(reader)
    driver.send(50)
    spent = (1 << 20) - budget.left_bytes

    for reader in readers:
        driver.leave(reader)

    assert spent == 10 * 120  # The six that keep the oldest share what they keep.
    assert budget.left_bytes == 1 << 20


def test_one_stalled_reader_costs_the_others_nothing() -> None:
    """A stall, its drops and its end are nobody else's."""
    driver = TopicDriver(make_topic(ring_messages=30, window=5))
    healthy = live_readers(driver, 3)
    stalled = [driver.join(Subscriber(FakeSink(), strategy)) for strategy in STRATEGIES]
    for reader in stalled:
        driver.block(reader)

    driver.send(100)
    for reader in stalled:
        driver.unblock(reader)
    driver.send(1)

    assert [sink_of(reader).offsets for reader in healthy] == [list(range(1, 102))] * 3
    assert [reader.dropped for reader in healthy] == [0, 0, 0]
