"""Many subscriptions on one connection, over random schedules.

A connection that names topics and patterns, stalls, drains and changes its mind must have, for each
topic and each of its lives, exactly what was published: once and in order, or told as lost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import pytest
from fakes import FakeSink, frames_in, totals_of
from hypothesis import given
from hypothesis import strategies as st
from time_limit import EndableLoop

from clevrd.config import Config
from clevrd.connections.many_subscriptions import (
    ManySubscriptions,
    MemberSubscription,
    PatternSubscription,
)
from clevrd.core.beginning import Last
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.event_ids import EventIdSlot
from clevrd.core.notices import ErrorNotice, Forgotten, Notice
from clevrd.core.publish_request import PublishRequest
from clevrd.core.subscription import DeliveryOptions, PatternBeginning
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, InvalidRequest
from clevrd.hub import Hub
from clevrd.tenants import Tenant

TENANT = Tenant("t")
TOPICS = ("a.1", "a.2", "a.b.1", "c")
PATTERNS = ("a.*", "a.**", "*.*.1")

TOPIC = st.sampled_from(TOPICS)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), TOPIC, st.integers(1, 12)),
        st.tuples(st.just("subscribe"), TOPIC, st.sampled_from([None, 1, 3])),
        st.tuples(st.just("unsubscribe"), TOPIC),
        st.tuples(st.just("watch"), st.sampled_from(PATTERNS), st.sampled_from([None, 2])),
        st.tuples(st.just("unwatch"), st.sampled_from(PATTERNS)),
        st.tuples(st.just("drain"), st.integers(100, 4000)),
        st.tuples(st.just("forget")),
        st.tuples(st.just("turn")),
    ),
    max_size=40,
)


class FakeConnection(FakeSink):
    """A connection with many subscriptions and a transport of 1,500 bytes."""

    keeps_positions: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(room_bytes=1_500)
        self.refusals: list[ClevrdError | ErrorNotice] = []
        self.ends: dict[tuple[str, str], int] = {}

    def topic_subscription(
        self,
        hub: Hub,
        topic: Topic,
        options: DeliveryOptions,
        pattern: PatternSubscription | None,
        slot: EventIdSlot | None,
    ) -> MemberSubscription:
        """Return a reader that writes here."""
        return MemberSubscription(hub, topic, self, options, pattern)

    def tell(self, notice: Notice, event_id: bytes) -> None:
        """Remember a refusal, and where a topic ended; the frames are what counts otherwise."""
        if isinstance(notice, ErrorNotice):
            self.refusals.append(notice)
        elif isinstance(notice, Forgotten):
            self.ends[notice.topic, notice.epoch] = notice.offset

    def refuse(self, error: ClevrdError) -> None:
        """Remember it."""
        self.refusals.append(error)

    def found_all(self) -> None:
        """Do nothing: the frames are what counts here."""


class World:
    """A hub, one connection, and what was published of each life of a topic."""

    def __init__(self, strategy: DropStrategy) -> None:
        config = Config(
            ring_messages=100,
            catch_up_messages=5,
            circuit_breaker_threshold=3,
            # It is never broken, which would be the end of the connection.
            circuit_breaker_openings=1_000,
        )
        # Two hours idle, and no timer that runs by itself: `forget` decides.
        self.hub = Hub(config, asyncio.get_running_loop())
        self.connection = FakeConnection()
        self.subscriptions = ManySubscriptions(
            self.hub, TENANT, self.connection, limit=100, has_notices=True
        )
        self.connection.on_pause = self.subscriptions.pause_delivery
        self.connection.on_resume = self.subscriptions.resume_delivery
        self.strategy = strategy
        self.heads: dict[tuple[str, str], int] = {}

    def publish(self, name: str, count: int) -> None:
        """Publish some messages in one turn."""
        topic = self.hub.topic(TENANT, name)
        for _ in range(count):
            self.hub.publish(topic, PublishRequest(name, msgspec.Raw(b'"12345678"')))
        self.heads[name, topic.epoch] = topic.head

    def subscribe(self, name: str, window: int | None) -> None:
        """Name a topic."""
        options = DeliveryOptions(self.strategy, window, True)
        self.subscriptions.subscribe_topic(name, options, Last(5))

    def unsubscribe(self, name: str) -> None:
        """Have no more of a topic."""
        self.subscriptions.unsubscribe_topic(name)

    def watch(self, pattern: str, window: int | None) -> None:
        """Name a pattern."""
        options = DeliveryOptions(self.strategy, window, True)
        self.subscriptions.subscribe_pattern(pattern, options, PatternBeginning(Last(5)))

    def unwatch(self, pattern: str) -> None:
        """Have no more of a pattern."""
        self.subscriptions.unsubscribe_pattern(pattern)

    def drain(self, size: int) -> None:
        """Let the peer read."""
        self.connection.drain(size)

    def forget(self) -> None:
        """Forget topics that nobody uses, as after an hour."""
        for topic in self.hub.topics.evict_idle(float("inf")):
            self.hub.patterns.topic_forgotten(topic)

    async def turn(self) -> None:
        """Let everything happen that was put off."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def read_all(self) -> None:
        """Let the peer read all there is; what that makes room for may fill the transport again."""
        await self.turn()
        while self.connection.buffered_bytes:
            self.drain(1 << 30)
            await self.turn()

    async def do(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Take one step; a refusal is an answer."""
        if name == "turn":
            await self.turn()
            return
        if name == "forget":
            # Nothing is put off for as long as it takes until nobody misses a topic.
            await self.turn()
        step: Callable[..., None] = getattr(self, name)
        try:
            step(*arguments)
        except InvalidRequest:
            # Twice, or not at all: what was there stays as it was.
            return

    def messages(self) -> list[tuple[str, int]]:
        """Return topic and offset of every message that was written."""
        frames = [json.loads(bytes(raw.data)) for raw in frames_in(self.connection.received)]
        return [(frame["topic"], frame["offset"]) for frame in frames if "id" in frame]

    def follow(self) -> dict[tuple[str, str], int]:
        """Read all frames as a client does; return its positions by topic and epoch.

        Fails on a message or a gap that does not follow the position before it.
        """
        epochs: dict[str, str] = {}
        positions: dict[tuple[str, str], int] = {}
        for raw in frames_in(self.connection.received):
            frame = json.loads(bytes(raw.data))
            name = frame["topic"]
            if frame.get("type") == "subscribed":
                epochs[name] = frame["epoch"]
                positions[name, frame["epoch"]] = frame["offset"]
                continue
            key = (name, epochs[name])
            if frame.get("type") == "gap":
                assert frame["from"] == positions[key] + 1
                assert frame["count"] == frame["to"] - frame["from"] + 1
                positions[key] = frame["to"]
            else:
                assert frame["offset"] == positions[key] + 1
                positions[key] = frame["offset"]
        return positions


@given(STEPS, st.sampled_from(DropStrategy))
def test_connection_has_or_knows_everything(
    steps: list[tuple[Any, ...]], strategy: DropStrategy
) -> None:
    """Per topic and life nothing is missing in silence, twice or out of order; in the end all is
    there, and the hub's sums are what they must be.
    """

    async def run() -> None:
        world = World(strategy)
        for name, *arguments in steps:
            await world.do(name, tuple(arguments))
        await world.read_all()
        # One more message of each shows every hole there is.
        for name in TOPICS:
            world.publish(name, 1)
        await world.read_all()

        told = world.follow()
        have = world.subscriptions.positions()

        for name, position in have.items():
            key = (name, position.epoch)
            assert told[key] == position.offset == world.heads[key]
        assert world.connection.refusals == []
        # What was forgotten had been given whole.
        assert all(world.heads.get(key, 0) == end for key, end in world.connection.ends.items())
        assert world.hub.subscribers == len(have)
        totals = totals_of(world.hub.topics)
        lost = sum(totals.lost.values())
        assert totals.offered == totals.delivered + lost + totals.discarded + totals.queued
        world.subscriptions.unsubscribe()
        assert world.hub.subscribers == 0
        assert len(world.hub.patterns) == 0

    with asyncio.Runner(loop_factory=EndableLoop) as runner:
        runner.run(run())


@pytest.mark.parametrize("way", ["subscribe", "found", "made"])
async def test_topic_joined_while_the_transport_is_full_waits_as_the_others_do(way: str) -> None:
    """Named, found by a pattern or begun meanwhile: no message of it is written before a drain."""
    world = World(DropStrategy.DROP_OLDEST)
    world.subscribe("c", None)
    if way != "made":
        world.publish("a.1", 5)
    else:
        world.watch("a.*", None)
    world.publish("c", 30)
    await world.turn()
    assert world.subscriptions.is_paused

    if way == "subscribe":
        world.subscribe("a.1", None)
    elif way == "found":
        world.watch("a.*", None)
    else:
        world.publish("a.1", 5)
    await world.turn()
    world.publish("a.1", 1)
    await world.turn()
    while_full = [topic for topic, _ in world.messages()]
    await world.read_all()
    afterwards = [offset for topic, offset in world.messages() if topic == "a.1"]

    assert set(while_full) == {"c"}
    assert afterwards == [1, 2, 3, 4, 5, 6]
