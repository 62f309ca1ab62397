"""Circuits of circuit_breaker subscribers: they open, are half-open, close again, or break.

What holds over random schedules is in test_policies.py and test_positions_model.py.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any
from unittest.mock import patch

import pytest
from clients import (
    PING,
    RECORD,
    SMALL_BUFFERS,
    RawSubscriber,
    client_of,
    publishing,
    raw_subscriber,
    read_to_the_end,
    subscribe,
)
from daemons import Daemon, running, until
from fakes import FakeSink, TopicDriver, frame_of, make_topic, sink_of
from streams import EVENTS, LINES, open_stream
from world import World, payload_at

from clevrd.core.beginning import Last
from clevrd.core.circuit import CircuitBudget
from clevrd.core.drop_strategy import CIRCUIT_BREAKER
from clevrd.core.gap_log import GapLog
from clevrd.core.subscriber import Subscriber
from clevrd.hub import readers
from clevrd.tenants import Tenant

BREAKS: dict[str, Any] = {**SMALL_BUFFERS, "circuit_breaker_threshold": 50}
TENANT = Tenant("default-tenant")
QUERY = "topic=t&policy=circuit_breaker&buffer=20&control=1&last=0"


# --- the budget ----------------------------------------------------------------------------------


def test_budget_counts_openings_within_its_period() -> None:
    """Three in a minute, the fourth is too many; what is a minute old counts no more."""
    budget = CircuitBudget(openings=3, period_s=60.0, open_s=30.0)
    openings: tuple[float, ...] = ()

    for now_s in (0.0, 10.0, 59.9):
        openings = budget.spend(openings, now_s) or ()

    assert openings == (0.0, 10.0, 59.9)
    assert budget.spend(openings, 59.9) is None
    assert budget.spend(openings, 60.0) == (10.0, 59.9, 60.0)


def test_budget_without_openings_allows_none() -> None:
    """Then the policy is to disconnect."""
    assert CircuitBudget(0, 60.0, 30.0).spend((), 0.0) is None


# --- a topic -------------------------------------------------------------------------------------


def opened_circuit(**settings: Any) -> tuple[TopicDriver, Subscriber]:
    """Return a driver and a reader that was given 1 and 2 and whose circuit opened at 11."""
    driver = TopicDriver(make_topic(**{"window": 4, "trip_threshold": 5, **settings}))
    driver.may_half_open = True
    reader = driver.join(Subscriber(FakeSink(), CIRCUIT_BREAKER))
    driver.send(2)
    driver.block(reader)
    driver.send(9)
    assert driver.tripped == [reader]
    return driver, reader


def test_open_circuit_costs_nothing_and_keeps_its_place() -> None:
    """Nothing is offered to it, nothing kept for it; it is subscribed, and slow."""
    driver, reader = opened_circuit(ring_messages=6)
    topic = driver.topic
    offered = topic.offered

    driver.send(20)

    assert topic.offered == offered
    assert (topic.queued(), topic.kept.size_bytes, topic.pending) == (0, 0, 0)
    assert (topic.subscribers, topic.slow_count(driver.now_s), len(topic.lagging)) == (1, 1, 0)
    assert reader.position() == 2


def test_closing_circuit_replays_what_the_ring_has() -> None:
    """All of it, also beyond the window; it is offered again, and counted as such."""
    driver, reader = opened_circuit()
    driver.send(20)

    driver.unblock(reader)

    assert sink_of(reader).offsets == list(range(1, 32))
    assert reader.is_live
    assert (reader.dropped, reader.discarded, reader.delivered) == (5, 4, 31)
    assert driver.topic.offered == 40


def test_closing_circuit_loses_what_the_ring_gave_up() -> None:
    """It is counted by its reason, though it was offered when nobody listened."""
    driver, reader = opened_circuit(ring_messages=10)
    driver.send(20)

    driver.unblock(reader)

    assert sink_of(reader).offsets == [1, 2, *range(22, 32)]
    assert driver.topic.losses.retention == 19


def test_half_open_circuit_opens_with_the_next_drop() -> None:
    """Until it is up to date once, a single message beyond its window is enough."""
    driver, reader = opened_circuit()
    reader.is_blocked = False
    driver.topic.resume(reader, driver.now_s)
    driver.read_once(reader, max_bytes=64)

    # Ten waited; the backlog it was resumed with is its window until it is up to date.
    driver.send(1)
    opened_within = len(driver.tripped)
    driver.send(1)

    assert opened_within == 1
    assert driver.tripped == [reader, reader]
    assert reader.position() == 3


def test_circuit_that_caught_up_is_closed() -> None:
    """Then a stall has its whole threshold again."""
    driver, reader = opened_circuit()
    driver.unblock(reader)

    driver.block(reader)
    driver.send(8)

    assert driver.tripped == [reader]
    driver.send(1)
    assert driver.tripped == [reader, reader]


def test_holes_that_are_given_after_all_are_not_told() -> None:
    """What it was to be told when its circuit opened is no hole once it is replayed."""
    driver = TopicDriver(make_topic(window=4, trip_threshold=5))
    driver.may_half_open = True
    reader = driver.join(Subscriber(FakeSink(), CIRCUIT_BREAKER, gaps=GapLog("t")))
    driver.block(reader)
    driver.send(6)
    driver.topic.settle(driver.now_s)
    assert reader.gaps is not None
    noted = len(reader.gaps)
    driver.send(3)

    # Each place among the deliveries is passed, the one of the hole too.
    reader.is_blocked = False
    driver.topic.resume(reader, driver.now_s)
    position = reader.position()
    driver.catch_up(reader, max_bytes=64)

    assert driver.tripped == [reader]
    assert (noted, len(reader.gaps), position) == (1, 0, 0)
    assert sink_of(reader).writes == [frame_of(offset) for offset in range(1, 10)]


# --- the hub -------------------------------------------------------------------------------------


def test_circuit_of_a_reader_that_is_not_blocked_closes_by_itself() -> None:
    """A reader as fast as we are can be overrun between its turns; no transport wakes it."""
    world = World(ring=1_000, window=3, threshold=3)
    sink = FakeSink()
    reader = Subscriber(sink, CIRCUIT_BREAKER)
    world.publish("a" * 100, 1)
    with (
        patch.object(readers, "CATCH_UP_BYTES", 350),
        patch.object(world.hub.delivery.readers.queue, "units_per_turn", 2_800),
    ):
        world.hub.subscribe(world.topic, reader, Last(100))
        world.publish("a" * 300, 1)
        world.loop.run()

    received, place, count = sink.received, 0, 0
    while place < len(received):
        _, place = payload_at(received, place)
        count += 1
    assert world.hub.counters.circuits_opened == 1
    assert (world.hub.open_circuits, count, reader.is_live) == (0, 400, True)


def test_thousands_of_circuits_break_a_bounded_number_at_a_time() -> None:
    """A close is a write: after so many of them others get a turn."""
    world = World(ring=1_000, window=3, threshold=3)
    sinks = [FakeSink() for _ in range(600)]
    for sink in sinks:
        reader = Subscriber(sink, CIRCUIT_BREAKER)
        world.hub.subscribe(world.topic, reader, Last(0))
        world.hub.paused(world.topic, reader)
    world.publish("a" * 20, 1)
    world.loop.run()
    opened = world.hub.open_circuits

    world.loop.now_s = 30.0
    world.hub.break_overdue_circuits()
    at_once = sum(sink.closed is not None for sink in sinks)
    world.loop.run()

    assert (opened, world.hub.open_circuits, world.hub.subscribers) == (600, 0, 0)
    assert 0 < at_once <= 256
    assert [sink.closed for sink in sinks] == [(4101, "circuit_open")] * 600


def test_each_circuit_ends_at_its_own_time() -> None:
    """The one that opened first stands for all: when it has ended, the next one does."""
    world = World(ring=1_000, window=3, threshold=3)
    sinks = [FakeSink() for _ in range(3)]
    for number, sink in enumerate(sinks):
        world.loop.now_s = float(number)
        reader = Subscriber(sink, CIRCUIT_BREAKER)
        world.hub.subscribe(world.topic, reader, Last(0))
        world.hub.paused(world.topic, reader)
        world.publish("a" * 20, 1)
        world.loop.run()
    deadlines = world.hub.delivery.circuits._deadlines
    ended = []

    for now_s in (29.9, 30.1, 31.1, 32.1):
        world.loop.now_s = now_s
        deadlines.run_due()
        ended.append(sum(sink.closed is not None for sink in sinks))

    assert ended == [0, 1, 2, 3]
    assert len(deadlines) == 0


# --- over the wire -------------------------------------------------------------------------------


async def open_circuit(daemon: Daemon, more: int = 300) -> None:
    """Publish until a circuit opens, and some more."""
    async with publishing(daemon.port) as publisher:
        while not daemon.hub.open_circuits:
            await publisher.send("t", 10, RECORD)
        await publisher.send("t", more, RECORD)


async def read_upto(reader: RawSubscriber, offset: int) -> list[dict[str, Any]]:
    """Return the frames up to message ``offset``."""
    frames = [await reader.message()]
    while frames[-1].get("offset") != offset:
        frames.append(await reader.message())
    return frames


async def test_open_circuit_closes_when_the_socket_drains() -> None:
    """Its subscriber misses nothing that the ring has, and /metrics said what was going on."""
    async with (
        running(**BREAKS) as daemon,
        await raw_subscriber(daemon.port, QUERY, receive_bytes=4096) as reader,
    ):
        await open_circuit(daemon)
        while_open = await daemon.get_json("/metrics")
        frames = await read_upto(reader, daemon.hub.topic(TENANT, "t").head)
        await until(lambda: daemon.only_reader().is_live)
        afterwards = await daemon.get_json("/metrics")

    assert frames[0]["type"] == "subscribed"
    assert [frame["offset"] for frame in frames[1:]] == list(range(1, len(frames)))
    assert while_open["open_circuits"] == while_open["topics"][0]["open_circuits"] == 1
    assert while_open["total_subscribers"] == while_open["slow_subscribers"] == 1
    assert while_open["connections"]["closed"] == {}
    assert afterwards["open_circuits"] == 0
    assert afterwards["connections"]["circuits_opened"] == 1
    for sums in (while_open["messages"], afterwards["messages"]):
        lost = sum(sums["dropped"].values()) + sums["discarded"]
        assert sums["offered"] == sums["delivered"] + lost + sums["queued"]
        assert sums["dropped"]["slow_consumer"] >= 50


async def test_every_answer_counts_a_reader_with_an_open_circuit() -> None:
    """A publish, a batch and a publish socket say the same of the same topic."""
    async with (
        running(**BREAKS) as daemon,
        await raw_subscriber(daemon.port, QUERY, receive_bytes=4096),
        client_of(f"{daemon.ws_url}/publish") as socket,
    ):
        await open_circuit(daemon)
        single = await daemon.publish("t", 1)
        items = b'{"topic":"t","data":1}\n'
        async with daemon.http.post(f"{daemon.url}/publish/batch", data=items) as response:
            (batch,) = (await response.json())["results"]
        await socket.send('{"topic":"t","data":1,"ref":1}')
        framed = json.loads(await socket.recv())
        assert daemon.hub.open_circuits == 1

    assert [answer["subscribers"] for answer in (single, batch, framed)] == [1, 1, 1]


async def test_what_the_ring_gave_up_meanwhile_is_told() -> None:
    """One gap, for want of retention, before the first message that is there."""
    async with (
        running(**BREAKS, ring_messages=100) as daemon,
        await raw_subscriber(daemon.port, QUERY, receive_bytes=4096) as reader,
    ):
        await open_circuit(daemon)
        frames = await read_upto(reader, daemon.hub.topic(TENANT, "t").head)
        figures = await daemon.get_json("/metrics")

    (gap,) = (frame for frame in frames if frame.get("type") == "gap")
    place = frames.index(gap)
    assert gap["reason"] == "retention"
    assert (frames[place - 1]["offset"], frames[place + 1]["offset"]) == (
        gap["from"] - 1,
        gap["to"] + 1,
    )
    assert figures["messages"]["dropped"]["retention"] == gap["count"]


async def test_spent_budget_breaks_the_circuit() -> None:
    """One opening is allowed here: who stalls again before it is up to date is closed."""
    async with (
        running(**BREAKS, circuit_breaker_openings=1) as daemon,
        subscribe(
            daemon.ws_url, stalls=True, buffer=20, policy="circuit_breaker", last=0
        ) as reader,
        publishing(daemon.port) as publisher,
    ):
        await open_circuit(daemon)
        while daemon.hub.open_circuits:
            await reader.recv()
        while daemon.hub.subscribers:
            await publisher.send("t", 100, RECORD)

        _, code, reason = await read_to_the_end(reader)

    assert (code, reason) == (4101, "circuit_open")


async def test_stop_does_not_wait_for_an_open_circuit_and_tells_its_place() -> None:
    """Its subscriber can come back for what it was not given."""
    async with (
        running(**BREAKS) as daemon,
        await raw_subscriber(daemon.port, QUERY, receive_bytes=4096) as reader,
    ):
        await open_circuit(daemon)
        stopping = asyncio.create_task(daemon.server.stop())
        goodbye = await reader.goodbye()
        reader.writer.close()
        await stopping

    texts = [frame.payload for frame in goodbye.before if frame.opcode != PING]
    *frames, going_away = map(json.loads, texts)
    assert goodbye.code == 1012
    assert going_away["positions"]["t"]["offset"] == frames[-1]["offset"]
    assert [frame["offset"] for frame in frames] == list(range(len(frames)))


@pytest.mark.parametrize(("policy", "is_kept"), [("circuit_breaker", True), ("drop_oldest", False)])
@pytest.mark.parametrize("topics", ["topic=t", "topic=t&topic=other"])
@pytest.mark.parametrize("accept", [None, EVENTS, LINES])
async def test_open_circuit_has_its_time_on_every_transport(
    accept: str | None, topics: str, policy: str, is_kept: bool
) -> None:
    """Whatever else is cut for silence: a reader that stalls in an open circuit is not."""
    query = f"{topics}&policy={policy}&buffer=20"
    async with AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(
            running(**BREAKS, ping_interval_s=600.0, pong_timeout_s=300.0)
        )
        if accept is None:
            stalled = raw_subscriber(daemon.port, query, receive_bytes=4096)
            await stack.enter_async_context(await stalled)
        else:
            opening = open_stream(daemon.port, accept, query, receive_bytes=4096)
            await stack.enter_async_context(await opening)
        publisher = await stack.enter_async_context(publishing(daemon.port))
        (topic,) = [topic for topic in daemon.hub.topics if topic.name == "t"]
        while not topic.lagging and not daemon.hub.open_circuits:
            await publisher.send("t", 10, RECORD)
        await publisher.send("t", 200, RECORD)
        circuits = daemon.hub.open_circuits

        # Two intervals, by hand.
        for _ in range(50):
            daemon.server.connections.ping_due()
        for _ in range(8):
            daemon.server.connections.look_at_stalls()

        await until(lambda: len(daemon.server.connections) == is_kept)
    assert circuits == is_kept
    assert daemon.hub.counters.pings_cut == (not is_kept)


@pytest.mark.parametrize("openings", [0, 3])
async def test_two_hundred_opening_circuits_leave_nothing_behind(openings: int) -> None:
    """Whether they break or stay open, when all have gone everything is given back."""
    async with running(**BREAKS, circuit_breaker_openings=openings, ring_messages=100) as daemon:
        budget_bytes = daemon.hub.topics.kept.left_bytes
        readers = [await raw_subscriber(daemon.port, QUERY, receive_bytes=4096) for _ in range(200)]
        async with publishing(daemon.port) as publisher:
            await publisher.send("t", 500, RECORD)
            await until(lambda: daemon.hub.open_circuits == (200 if openings else 0))
        for reader in readers:
            reader.vanish()
        await until(lambda: daemon.hub.subscribers == 0)
        (topic,) = daemon.hub.topics

        assert (daemon.hub.open_circuits, topic.subscribers, topic.pending) == (0, 0, 0)
        assert daemon.hub.topics.kept.left_bytes == budget_bytes
