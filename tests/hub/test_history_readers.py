"""Readers that begin before the ring: what they are handed, told and counted as. No sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from daemons import until
from fakes import FakeSink, frames_in, totals_of
from histories import (
    EPOCH,
    FIRST_US,
    FakeHistory,
    FollowingReader,
    deliver,
    journaled_topic,
    start_of,
    unavailable,
)
from stored_messages import StoredMessage

from clevrd.config import Config
from clevrd.core.beginning import After, Beginning, Last, Since
from clevrd.core.drop_strategy import CIRCUIT_BREAKER, DROP_OLDEST, DropStrategy
from clevrd.core.gap_log import GapLog
from clevrd.core.message_ids import id_at, rfc3339
from clevrd.core.publish_request import PublishRequest
from clevrd.core.stream_forms import NDJSON_BARE, SSE, StreamForm
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub import Hub, audience_of, history_readers
from clevrd.journal.records import line_of

TENANT = "default-tenant"


class World:
    """A hub with one journaled topic, of whose messages the ring has the newest."""

    def __init__(self, kept: int = 100, in_ring: int = 10, **settings: Any) -> None:
        self.hub = Hub(Config(**settings), asyncio.get_running_loop())
        self.history = FakeHistory()
        self.hub.keep_history(self.history)
        self.history.add(TENANT, "t", range(1, kept + 1))
        self.topic = journaled_topic(self.hub, "t", kept - in_ring)
        self.publish(in_ring)

    def publish(self, count: int) -> None:
        """Deliver messages, which the history has as well."""
        deliver(self.hub, self.topic, self.history, count)

    def subscribe(
        self, beginning: Beginning, *, has_notices: bool = True, room_bytes: int = 1 << 60
    ) -> tuple[Subscriber, FakeSink]:
        """Return a reader, and what it is written to."""
        sink = FakeSink(room_bytes)
        reader = Subscriber(sink, gaps=GapLog("t") if has_notices else None)
        topic = self.topic
        sink.on_pause = lambda: self.hub.paused(topic, reader)
        sink.on_resume = lambda: self.hub.resumed(topic, reader)
        self.hub.subscribe(topic, reader, beginning)
        return reader, sink


def unchunked(received: bytes, form: StreamForm | None) -> bytes:
    """Return a body without its chunks, which depend on how much is written at once."""
    if form is None or not form.is_chunked:
        return received
    body = b""
    while received:
        size, _, received = received.partition(b"\r\n")
        body += received[: int(size, 16)]
        received = received[int(size, 16) + 2 :]
    return body


async def settle() -> None:
    """Let everything happen that can."""
    for _ in range(200):
        await asyncio.sleep(0)


def read(sink: FakeSink) -> list[dict[str, Any]]:
    """Return all that was written, as JSON."""
    return [msgspec.json.decode(frame.data) for frame in frames_in(sink.received)]


def offsets(items: list[dict[str, Any]]) -> list[int]:
    """Return the offsets of the messages."""
    return [item["offset"] for item in items if "type" not in item]


async def test_reader_goes_from_the_history_over_to_the_ring_and_to_what_comes() -> None:
    """Everything behind its position comes, in order and once; it is told so first."""
    world = World(kept=100, in_ring=10)

    reader, sink = world.subscribe(After(40, EPOCH))
    counted = world.topic.subscribers, world.hub.reading_history
    _, *audience = audience_of(world.topic)
    await settle()
    world.publish(3)
    await settle()

    greeting, *messages = read(sink)
    assert greeting == {
        "type": "subscribed",
        "topic": "t",
        "epoch": EPOCH,
        "offset": 40,
        "recovered": True,
        "window": 1000,
    }
    assert offsets(messages) == list(range(41, 104))
    assert messages[0] == {
        "id": id_at(FIRST_US + 41),
        "topic": "t",
        "tenant_id": TENANT,
        "data": 41,
        "timestamp": messages[0]["timestamp"],
        "offset": 41,
    }
    assert counted == (1, 1)
    assert audience[:2] == [1, 1], "a subscriber that is behind"
    assert (world.topic.subscribers, world.hub.reading_history) == (1, 0)
    assert reader.is_live
    counts = world.topic.counts
    assert counts.offered == counts.delivered == 63 == reader.delivered
    assert world.topic.edge - reader.start == reader.delivered


@pytest.mark.parametrize("form", [None, NDJSON_BARE, SSE], ids=["frames", "lines", "events"])
async def test_message_has_the_bytes_that_it_had_live(form: StreamForm | None) -> None:
    """Whatever its topic's name, its data and its key are."""
    world = World(kept=0, in_ring=0)
    name = 'a "%d" \\ name, ümlaut'
    topic = journaled_topic(world.hub, name, 0)
    live, read = FakeSink(), FakeSink()
    world.hub.subscribe(topic, Subscriber(live, form=form), Last(0))
    for data, key in (
        (b"1", None),
        (b'{ "a" : [1, 2.50] }', "k\u00fc"),
        (b'"%b"' % (b"x" * 20_000), "k"),
    ):
        request = PublishRequest(name, msgspec.Raw(data), None, key)
        us = FIRST_US + topic.head
        line = line_of(request).rstrip(b"\n")
        world.history.put(TENANT, name, StoredMessage(topic.head + 1, us, us, line))
        world.hub.delivery.deliver(topic, topic.head + 1, (request,), ((id_at(us), rfc3339(us)),))
        await settle()
    hub = Hub(Config(), asyncio.get_running_loop())
    hub.keep_history(world.history)

    hub.subscribe(journaled_topic(hub, name, 3), Subscriber(read, form=form), Last(3))
    await settle()

    assert len(live.received) > 20_000
    assert unchunked(read.received, form) == unchunked(live.received, form)


async def test_what_the_ring_has_is_handed_over_at_once() -> None:
    """The history is asked for nothing."""
    world = World(kept=100, in_ring=10)

    _, last = world.subscribe(Last(10))
    _, after = world.subscribe(After(90, EPOCH))

    assert offsets(read(last)) == offsets(read(after)) == list(range(91, 101))
    await settle()
    assert not world.history.pages


async def test_last_messages_come_from_the_history_where_the_ring_has_fewer() -> None:
    """As many as were asked for, or as there are."""
    world = World(kept=100, in_ring=0)

    _, few = world.subscribe(Last(5))
    _, all_kept = world.subscribe(Last(1_000))
    await settle()

    assert read(few)[0]["offset"] == 95
    assert read(few)[0]["recovered"] is False
    assert offsets(read(few)) == list(range(96, 101))
    assert read(all_kept)[0]["offset"] == 0
    assert offsets(read(all_kept)) == list(range(1, 101))


async def test_since_looks_in_the_history() -> None:
    """A message's id begins behind it, a time with the first message from then on."""
    world = World(kept=100, in_ring=10)

    _, behind = world.subscribe(Since(id_at(FIRST_US + 50), is_time=False))
    _, at = world.subscribe(Since(id_at(FIRST_US + 50), is_time=True))
    _, start = world.subscribe(After(0))
    await settle()

    assert offsets(read(behind)) == list(range(51, 101))
    assert offsets(read(at)) == list(range(50, 101))
    assert offsets(read(start)) == list(range(1, 101))
    assert all(read(sink)[0]["recovered"] for sink in (behind, at, start))


# --- what is missing -----------------------------------------------------------------------------


async def test_messages_that_were_given_up_are_told_first() -> None:
    """A resume is told which offsets are gone; who asked for the last ones is not."""
    world = World(kept=100, in_ring=10)
    world.history.forget(TENANT, "t", upto=60)

    _, resumed = world.subscribe(After(40, EPOCH))
    _, latest = world.subscribe(Last(70))
    _, since = world.subscribe(Since(id_at(FIRST_US + 30), is_time=False))
    await settle()

    greeting, gap, *messages = read(resumed)
    assert (greeting["offset"], greeting["recovered"]) == (40, False)
    assert gap == {
        "type": "gap",
        "topic": "t",
        "from": 41,
        "to": 60,
        "count": 20,
        "reason": "retention",
    }
    assert offsets(messages) == list(range(61, 101))
    greeting, *messages = read(latest)
    assert (greeting["offset"], greeting["recovered"]) == (60, False)
    assert [item.get("type") for item in messages] == [None] * 40
    greeting, gap, *messages = read(since)
    assert (greeting["offset"], greeting["recovered"]) == (60, False)
    assert (gap["from"], gap["to"], gap["count"]) == (None, 60, None)
    assert offsets(messages) == list(range(61, 101))


async def test_damaged_messages_are_told_at_their_place() -> None:
    """Holes at the beginning, in the middle and before the ring; who reads no notices sees none."""
    world = World(kept=100, in_ring=10)
    for offset in (41, 50, 51, 90):
        world.history.damage(TENANT, "t", offset)

    _, told = world.subscribe(After(40, EPOCH))
    _, plain = world.subscribe(After(40, EPOCH), has_notices=False)
    await settle()

    expected = [offset for offset in range(42, 101) if offset not in (50, 51, 90)]
    assert offsets(read(told)) == offsets(read(plain)) == expected
    items = read(told)
    assert (items[0]["offset"], items[0]["recovered"]) == (40, False)
    gaps = {item["from"]: (place, item) for place, item in enumerate(items) if "from" in item}
    assert [(gap["from"], gap["to"], gap["reason"]) for _, gap in gaps.values()] == [
        (41, 41, "damaged"),
        (50, 51, "damaged"),
        (90, 90, "damaged"),
    ]
    # Right before the message that follows.
    for place, gap in gaps.values():
        assert items[place + 1]["offset"] == gap["to"] + 1


async def test_unreadable_message_is_a_damaged_one() -> None:
    """A stored line that is no publish is left out, and told."""
    world = World(kept=100, in_ring=10)
    world.history.spoil(TENANT, "t", 45)

    _, sink = world.subscribe(After(40, EPOCH))
    await settle()

    assert offsets(read(sink)) == [*range(41, 45), *range(46, 101)]
    (gap,) = [item for item in read(sink) if item.get("type") == "gap"]
    assert (gap["from"], gap["to"], gap["reason"]) == (45, 45, "damaged")


async def test_history_that_has_nothing_is_a_gap() -> None:
    """All before the ring is told as given up."""
    world = World(kept=100, in_ring=10)
    world.history.forget(TENANT, "t", upto=100)

    _, sink = world.subscribe(After(40, EPOCH))
    await settle()

    greeting, gap, *messages = read(sink)
    assert (greeting["offset"], gap["from"], gap["to"]) == (40, 41, 90)
    assert gap["reason"] == "retention"
    assert offsets(messages) == list(range(91, 101))


async def test_position_of_another_epoch_begins_with_all_there_is() -> None:
    """What was between can't be known, and everything of this epoch follows."""
    world = World(kept=100, in_ring=10)
    world.history.forget(TENANT, "t", upto=20)

    _, sink = world.subscribe(After(40, "another"))
    await settle()

    greeting, gap, *messages = read(sink)
    assert (greeting["epoch"], greeting["offset"], greeting["recovered"]) == (EPOCH, 20, False)
    assert (gap["reason"], gap["from"], gap["to"], gap["count"]) == ("epoch", None, None, None)
    assert offsets(messages) == list(range(21, 101))


async def test_retention_that_overtakes_a_reader_is_told_where_the_reader_is() -> None:
    """A slow reader has the first messages; what it is too late for is a gap behind these."""
    world = World(kept=5_000, in_ring=10)

    _, sink = world.subscribe(After(0, EPOCH), room_bytes=100)
    await settle()
    had = offsets(read(sink))[-1]
    world.history.forget(TENANT, "t", upto=4_000)
    world.hub.delivery.history.pages.kept.drop_unused()  # type: ignore[union-attr]
    while sink.is_paused:
        sink.drain()
        await settle()

    items = read(sink)
    (gap,) = [item for item in items if item.get("type") == "gap"]
    assert (gap["from"], gap["reason"]) == (had + 1, "retention")
    assert gap["to"] >= 4_000
    assert offsets(items) == [*range(1, had + 1), *range(gap["to"] + 1, 5_001)]


# --- stalls, leaving, and many at once -----------------------------------------------------------


async def test_reader_that_stalls_in_the_middle_misses_nothing() -> None:
    """It is handed what its transport has room for, and goes on where it was."""
    world = World(kept=3_000, in_ring=10)

    reader, sink = world.subscribe(After(0, EPOCH), room_bytes=5_000)
    await settle()
    waiting = reader.delivered
    position = reader.position()
    while sink.is_paused:
        sink.drain()
        await settle()

    assert 0 < waiting == position < 3_000
    assert offsets(read(sink)) == list(range(1, 3_001))
    assert reader.is_live


async def test_stalled_reader_holds_no_page() -> None:
    """Pages are forgotten while readers stall, and read again when they go on."""
    world = World(kept=3_000, in_ring=10)
    history = world.hub.delivery.history
    assert history is not None

    _, sink = world.subscribe(After(0, EPOCH), room_bytes=100)
    await settle()
    history.pages.kept.drop_unused()

    assert len(history.pages.kept) == history.pages.kept.size_bytes == 0
    sink.room_bytes = 1 << 60
    sink.drain()
    await settle()
    assert offsets(read(sink)) == list(range(1, 3_001))


async def test_reader_that_leaves_in_the_middle_is_gone() -> None:
    """It is handed nothing more, before its first page, between two, and in its retries."""
    world = World(kept=3_000, in_ring=10)
    history = world.hub.delivery.history
    assert history is not None

    world.history.is_open.clear()
    waiting, none = world.subscribe(After(0, EPOCH))
    await settle()
    world.hub.unsubscribe(world.topic, waiting)
    world.history.is_open.set()
    stalled, some = world.subscribe(After(0, EPOCH), room_bytes=100)
    await settle()
    world.hub.unsubscribe(world.topic, stalled)
    had = len(some.received)
    some.drain()
    await settle()

    assert none.received == b""
    assert len(some.received) == had
    assert (len(history), world.hub.subscribers, world.topic.subscribers) == (0, 0, 0)
    counts = world.topic.counts
    assert counts.offered == counts.delivered == stalled.delivered


async def test_reader_that_leaves_gives_its_page_back() -> None:
    """A page that nobody is in the middle of can be forgotten."""
    world = World(kept=3_000, in_ring=0)
    history = world.hub.delivery.history
    assert history is not None
    reader, _ = world.subscribe(After(0, EPOCH))
    while not any(page.users for page in history.pages.kept._topics):  # noqa: ASYNC110  # turn by turn
        await asyncio.sleep(0)

    world.hub.unsubscribe(world.topic, reader)
    history.pages.kept.drop_unused()

    assert len(history.pages.kept) == 0


async def test_thousand_readers_share_pages_and_few_ask_at_once() -> None:
    """Readers that come back to places near each other cost some reads in all."""
    world = World(kept=3_000, in_ring=0)

    found = [world.subscribe(After(3_000 - number % 50, EPOCH)) for number in range(1_000)]
    await settle()

    assert len(world.history.pages) <= 2
    for number, (reader, sink) in enumerate(found):
        assert reader.is_live
        assert offsets(read(sink)) == list(range(3_001 - number % 50, 3_001))


async def test_requests_at_once_are_bounded_and_portions_take_turns() -> None:
    """One topic after the other is read, each portion's in its turn."""
    world = World(kept=10, in_ring=0)
    topics = []
    for number in range(200):
        name = f"t{number}"
        world.history.add(TENANT, name, range(1, 4))
        topics.append(journaled_topic(world.hub, name, 3))
    world.history.is_open.clear()

    sinks = []
    for topic in topics:
        sinks.append(FakeSink())
        world.hub.subscribe(topic, Subscriber(sinks[-1]), Last(3))
    await settle()
    held = world.history.under_way
    world.history.is_open.set()
    await settle()

    assert held == world.history.most_under_way == 64
    assert [offsets(read(sink)) for sink in sinks] == [[1, 2, 3]] * 200


# --- a history that fails ------------------------------------------------------------------------


async def test_history_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its readers stay, and go on when it is there again."""
    monkeypatch.setattr(history_readers, "RETRY_S", 0.001)
    world = World(kept=100, in_ring=10)
    world.history.error = unavailable()

    reader, sink = world.subscribe(After(40, EPOCH))
    _, since = world.subscribe(Since(id_at(FIRST_US + 50), is_time=False))
    await until(lambda: len(world.history.pages) >= 3 and world.history.look_ups >= 3)
    assert sink.received == since.received == b""
    assert sink.closed is None
    world.history.error = None
    await until(lambda: reader.is_live)
    await until(lambda: offsets(read(since)) == list(range(51, 101)))

    assert offsets(read(sink)) == list(range(41, 101))


async def test_readers_of_a_history_that_stays_away_are_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After half a minute they are to come back later."""
    monkeypatch.setattr(history_readers, "RETRY_S", 0.001)
    monkeypatch.setattr(history_readers, "GIVE_UP_S", 0.02)
    world = World(kept=100, in_ring=10)
    world.history.error = unavailable()

    _, sink = world.subscribe(After(40, EPOCH))
    await until(lambda: sink.closed is not None)

    assert sink.closed == (1013, "unavailable")
    assert (world.hub.subscribers, world.hub.reading_history) == (0, 0)


async def test_errors_of_a_history_are_no_errors_of_its_readers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bug, or a value that is none, is logged and tried again like an engine that is away."""
    monkeypatch.setattr(history_readers, "RETRY_S", 0.001)
    world = World(kept=100, in_ring=10)
    world.history.error = ZeroDivisionError("a bug")

    reader, _ = world.subscribe(After(40, EPOCH))
    await until(lambda: len(world.history.pages) >= 2)
    world.history.error = None
    await until(lambda: reader.is_live)


# --- a new epoch ---------------------------------------------------------------------------------

NEW = "ba9876543210"


def follower(
    world: World,
    beginning: Beginning,
    policy: DropStrategy = DROP_OLDEST,
    room_bytes: int = 1 << 60,
) -> tuple[FollowingReader, FakeSink]:
    """Return a reader that can follow, and what it is written to."""
    sink = FakeSink(room_bytes)
    reader = FollowingReader(world.hub, world.topic, sink, GapLog("t"), policy)
    world.hub.subscribe(world.topic, reader, beginning)
    return reader, sink


def begin_anew(world: World, epoch: str = NEW) -> Topic:
    """Begin a new epoch under the readers, of which the history has nothing yet."""
    world.topic = world.hub.begin_anew(world.topic, start_of(0, epoch, f"partition of {epoch}"))
    return world.topic


async def test_every_reader_is_told_of_a_new_epoch_and_goes_on_in_it() -> None:
    """Readers that are live, lag, are suspended, read the history, or have not begun there."""
    world = World(kept=3_000, in_ring=300, circuit_breaker_threshold=1)
    live, live_sink = follower(world, Last(0))
    lagging, lagging_sink = follower(world, Last(300), room_bytes=1_000)
    suspended, suspended_sink = follower(world, Last(0), CIRCUIT_BREAKER, room_bytes=200)
    in_history, history_sink = follower(world, After(0, EPOCH), room_bytes=1_000)
    await settle()
    suspended.wanted_window = 1
    world.publish(1)
    await settle()
    world.publish(10)
    await settle()
    world.history.is_open.clear()
    assert world.hub.delivery.history is not None
    world.hub.delivery.history.pages.kept.drop_unused()
    waiting, waiting_sink = follower(world, After(7, EPOCH))
    new, new_sink = follower(world, Last(5_000))
    old = world.topic
    assert suspended in old.suspended
    assert lagging in old.lagging
    assert old.history is not None
    assert list(old.history.readers) == [in_history, waiting, new]

    topic = begin_anew(world)
    world.history.is_open.set()
    world.publish(2)
    await settle()
    for sink in (lagging_sink, suspended_sink, history_sink):
        sink.room_bytes = 1 << 60
        sink.drain()
    await settle()
    world.publish(1)
    await settle()

    assert (topic.epoch, topic.head, old.subscribers, topic.subscribers) == (NEW, 3, 0, 6)
    assert all(reader.is_live for reader in (live, lagging, suspended, in_history, waiting, new))
    for sink in (live_sink, lagging_sink, suspended_sink, history_sink, waiting_sink):
        *before, greeting, gap, first, second, third = read(sink)
        assert all(item.get("epoch") in (None, EPOCH) for item in before)
        assert (greeting["type"], greeting["epoch"], greeting["offset"]) == ("subscribed", NEW, 0)
        assert greeting["recovered"] is False
        assert (gap["type"], gap["reason"], gap["to"]) == ("gap", "epoch", None)
        assert offsets([first, second, third]) == [1, 2, 3]
    greeting, *messages = read(new_sink)
    assert (greeting["epoch"], greeting["offset"]) == (NEW, 0)
    assert offsets(messages) == [1, 2, 3]
    totals = totals_of(world.hub.topics)
    assert totals.offered == totals.delivered + sum(totals.lost.values()) + totals.discarded
    assert world.hub.subscribers == 6
    for reader in (live, lagging, suspended, in_history, waiting, new):
        counted = reader.delivered + reader.dropped + reader.discarded
        assert topic.edge - reader.start == counted


async def test_two_new_epochs_at_once_are_told_as_one() -> None:
    """A reader goes over to the newest."""
    world = World(kept=20, in_ring=10)
    _, sink = follower(world, Last(0))

    begin_anew(world)
    last = begin_anew(world, "third")
    await settle()

    assert [item.get("epoch") for item in read(sink)] == [EPOCH, "third", None]
    assert last.subscribers == 1
    assert len(world.hub.topics) == 1


async def test_late_reader_of_a_new_epoch_has_all_of_it() -> None:
    """More came in the new epoch than the ring holds before it was the reader's turn."""
    world = World(kept=20, in_ring=10, ring_messages=5)
    _, sink = follower(world, Last(0))

    begin_anew(world)
    world.publish(12)
    await settle()

    assert offsets(read(sink)) == list(range(1, 13))


async def test_outlived_topic_is_not_swept_again() -> None:
    """The sweep forgets the new topic alone, when that is idle."""
    world = World(kept=20, in_ring=10)
    begin_anew(world)

    world.hub.topics.evict_idle(world.hub.now_s() + 10_000)
    again = world.hub.topics.evict_idle(world.hub.now_s() + 20_000)

    assert again == []
    assert len(world.hub.topics) == 0
