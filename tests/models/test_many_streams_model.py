"""An EventSource with several topics and patterns, over random schedules.

It is cut in the middle of what was sent to it, comes back with the last id it read and nothing
else, stalls, is overtaken by retention and by daemons that begin anew. What it reads, from all its
connections together, is per topic and life what was published: in order and once, and what it can't
have is told before the message that follows.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from fakes import FakeSink, totals_of
from hypothesis import given, settings
from hypothesis import strategies as st
from time_limit import EndableLoop

from clevrd.config import Config
from clevrd.connections.many_subscriptions import ManySubscriptions, MemberSubscription
from clevrd.connections.stream import SubscriberStream
from clevrd.core.beginning import check_beginning
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.event_ids import event_ids_for
from clevrd.core.publish_request import PublishRequest
from clevrd.core.stream_forms import SSE_BARE, SlottedWrites
from clevrd.handlers.subscribe.endpoint import read_request
from clevrd.http_values import Request
from clevrd.hub import Hub
from clevrd.metrics.counters import Counters
from clevrd.tenants import Tenant

TENANT = Tenant("t")
NAMED = ("a", "b,/*")
FOUND = ("p.1", "p.2", "p.q,@/%2C*", "p.é.x")
TOPICS = (*NAMED, *FOUND)
QUERY = {"topic": list(NAMED), "pattern": ["p.*", "p.**"]}

TOPIC = st.sampled_from(TOPICS)
ROOM = st.sampled_from([600, 3_000, 10_000, 1 << 30])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), TOPIC, st.integers(1, 12)),
        st.tuples(st.just("publish"), TOPIC, st.just(80)),
        st.tuples(st.just("turn")),
        st.tuples(st.just("turn")),
        st.tuples(st.just("drain"), st.integers(100, 4_000)),
        st.tuples(st.just("read"), st.integers(0, 30)),
        st.tuples(st.just("come_back"), st.integers(0, 30)),
        st.tuples(st.just("cut"), st.integers(0, 30)),
        st.tuples(st.just("forget")),
        st.tuples(st.just("restart")),
    ),
    max_size=40,
)


class FakeTransport(FakeSink):
    """As much of a transport as a stream asks for."""

    def get_extra_info(self, name: str) -> object:
        """Return as much as is asked of a socket without TCP's options."""
        return SimpleNamespace(family=socket.AF_UNIX)


class FakeRegistry:
    """As much of the registry of connections as a stream asks for."""

    def __init__(self, event_writes: SlottedWrites) -> None:
        self.counters = Counters()
        self.event_writes = event_writes

    def add(self, stream: SubscriberStream) -> None:
        """Have the transport call the stream."""
        transport = cast(FakeTransport, stream.transport)
        transport.on_pause = stream.pause_writing
        transport.on_resume = stream.resume_writing

    def stalled(self, stream: SubscriberStream) -> None:
        """Nobody is cut here."""

    def moved(self, stream: SubscriberStream) -> None:
        """Nobody is cut here."""


class Place:
    """Where the client is in one topic."""

    def __init__(self, epoch: str, offset: int) -> None:
        self.epoch = epoch
        self.offset = offset


class World:
    """A daemon, what was published of each life of a topic, and one client."""

    def __init__(self, strategy: DropStrategy, last: int, room_bytes: int) -> None:
        self.strategy = strategy
        # What the URL begins with.
        self.last = last
        self.query = {**QUERY, "last": [str(last)], "policy": [strategy.value]}
        # (topic, epoch) -> newest offset.
        self.heads: dict[tuple[str, str], int] = {}
        self.stream: SubscriberStream | None = None
        self.writes = SlottedWrites()
        self.room_bytes = room_bytes
        self.transport = FakeTransport(room_bytes)
        # What has arrived and was not read.
        self.unread = b""
        self.last_id = ""
        # By topic, as of what was read over this connection; and as of the last id.
        self.places: dict[str, Place] = {}
        # Topics that were greeted over this connection, and those of which a gap must be told next.
        self.greeted: set[str] = set()
        self.owes_gap: set[str] = set()
        # The patterns have found all that there was: what is in no id began later.
        self.has_watched = False
        # Where named topics begin for who has no position in them.
        self.beginnings: dict[str, int] = {}
        self.new_daemon()

    def new_daemon(self) -> None:
        """Begin a process that knows of no topic."""
        config = Config(
            ring_messages=100,
            catch_up_messages=5,
            circuit_breaker_threshold=3,
            # It is never broken, which would be an end of its own.
            circuit_breaker_openings=1_000,
        )
        self.hub = Hub(config, asyncio.get_running_loop())

    # --- steps -----------------------------------------------------------------------------------

    def publish(self, name: str, count: int) -> None:
        """Publish some messages in one turn."""
        topic = self.hub.topic(TENANT, name)
        for _ in range(count):
            self.hub.publish(topic, PublishRequest(name, msgspec.Raw(b'"id: 12\\n"'), name))
        self.heads[name, topic.epoch] = topic.head

    def drain(self, size: int) -> None:
        """Let the client's kernel take some."""
        self.transport.drain(size)

    def read(self, count: int) -> None:
        """Let the client read some events."""
        self.unread += self.transport.received
        self.transport.writes = []
        while count and b"\n\n" in self.unread:
            count -= 1
            event, _, self.unread = self.unread.partition(b"\n\n")
            self.take(event.decode())

    def cut(self, count: int) -> None:
        """Read some, and lose the connection and the rest."""
        self.read(count)
        if self.stream is not None:
            self.stream.stop_delivery()
            self.stream = None
        self.unread = b""
        self.transport = FakeTransport(self.room_bytes)

    def come_back(self, count: int) -> None:
        """Be cut, and be where the last id says."""
        self.cut(count)
        headers = {"accept": "text/event-stream"}
        if self.last_id:
            headers["last-event-id"] = self.last_id
        request = Request("GET", "/subscribe", headers)
        wanted = read_request(
            *(request, self.query, 5, self.hub.wall_us()), is_events=True, takes_any_id=True
        )
        self.places = places_of(self.last_id)
        self.greeted, self.owes_gap = set(), set()
        self.has_watched = "*" in self.last_id.split(",")
        for name, beginning in wanted.topics.items():
            topic = self.hub.topic(TENANT, name)
            check_beginning(topic, beginning)
            self.beginnings[name] = max(topic.ring.first - 1, topic.head - self.last)
        self.stream = SubscriberStream(
            cast(Any, FakeRegistry(self.writes)), cast(Any, self.transport), TENANT, SSE_BARE
        )
        subscriptions: ManySubscriptions[MemberSubscription] = ManySubscriptions(
            *(self.hub, TENANT, self.stream, 100),
            has_notices=wanted.options.has_notices,
            ids=event_ids_for(wanted),
        )
        self.stream.subscribe(subscriptions, wanted, b"")

    async def forget(self) -> None:
        """Forget topics that nobody uses, as after an hour: nothing is put off for so long."""
        await self.turn()
        for topic in self.hub.topics.evict_idle(float("inf")):
            self.hub.patterns.topic_forgotten(topic)

    def restart(self) -> None:
        """Lose the daemon and what was under way; every life ends."""
        self.cut(0)
        self.new_daemon()

    async def turn(self) -> None:
        """Let everything happen that was put off."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def read_all(self) -> None:
        """Let the client read all there is; what that makes room for may fill its transport."""
        await self.turn()
        while True:
            self.read(1 << 30)
            if not self.transport.buffered_bytes:
                return
            self.drain(1 << 30)
            await self.turn()

    # --- what the client makes of it -------------------------------------------------------------

    def take(self, event: str) -> None:
        """Check one event against what was read before, and against what was published."""
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        frame = json.loads(fields["data"])
        kind = frame.get("type")
        assert fields.get("event") == kind
        if kind == "watching":
            # The last pattern's is the first with a star.
            assert "id" in fields or not self.places
        elif kind == "subscribed":
            self.take_greeting(frame)
        elif kind == "gap":
            self.take_gap(frame)
        elif kind == "forgotten":
            gone = self.places.pop(frame["topic"])
            assert (gone.epoch, gone.offset) == (frame["epoch"], frame["offset"])
            assert gone.offset == self.heads[frame["topic"], gone.epoch], "all of it was given"
            self.greeted.discard(frame["topic"])
        else:
            assert kind is None, "no topic is refused"
            self.take_message(frame)
        if "id" in fields:
            self.take_id(fields["id"], frame.get("topic"))

    def take_greeting(self, frame: dict[str, Any]) -> None:
        name, epoch, offset = frame["topic"], frame["epoch"], frame["offset"]
        known = self.places.get(name)
        assert name not in self.greeted, "once in each life"
        if known is not None and frame["recovered"]:
            assert (known.epoch, known.offset) == (epoch, offset)
        elif known is not None:
            assert known.epoch != epoch or offset >= known.offset
            self.owes_gap.add(name)
        elif name in NAMED:
            # A snapshot passes over what is superseded.
            begins = self.beginnings[name]
            assert offset == begins or (self.strategy is DropStrategy.LATEST and offset > begins)
        elif self.has_watched:
            # It began while nobody looked.
            assert offset == 0
            if not frame["recovered"]:
                self.owes_gap.add(name)
        self.greeted.add(name)
        self.places[name] = Place(epoch, offset)

    def take_gap(self, frame: dict[str, Any]) -> None:
        place = self.places[frame["topic"]]
        self.owes_gap.discard(frame["topic"])
        if frame["to"] is None:
            assert frame["reason"] == "epoch"
            return
        assert frame["from"] == place.offset + 1
        assert frame["count"] == frame["to"] - frame["from"] + 1 > 0
        place.offset = frame["to"]

    def take_message(self, frame: dict[str, Any]) -> None:
        name = frame["topic"]
        place = self.places[name]
        assert name in self.greeted, "the greeting is first"
        assert name not in self.owes_gap, "who did not recover is told what is missing first"
        assert frame["offset"] == place.offset + 1 <= self.heads[name, place.epoch]
        place.offset += 1

    def take_id(self, text: str, name: str | None) -> None:
        """Check that the id says where the client is in every topic that it has begun to read."""
        said = places_of(text)
        assert not self.has_watched or "*" in text.split(",")
        self.has_watched = "*" in text.split(",")
        assert name is None or name not in self.owes_gap
        for each, have in self.places.items():
            # Until a gap was told an id holds the place before it; what was forgotten is in none.
            if each in self.owes_gap or each not in said:
                continue
            assert (said[each].epoch, said[each].offset) == (have.epoch, have.offset)
        assert {each for each in self.places if each not in self.greeted} <= said.keys()
        self.last_id = text


def places_of(text: str) -> dict[str, Place]:
    """Return where an id says that its reader is: the test's own reading of it."""
    places = {}
    for entry in filter(None, text.split(",")):
        if entry == "*":
            continue
        position, _, name = entry.partition("@")
        if not name:
            position, _, index = entry.partition("/")
            name = NAMED[int(index)]
        epoch, _, offset = position.partition(":")
        places[msgspec.json.decode(f'"{unescaped(name)}"')] = Place(epoch, int(offset))
    return places


def unescaped(name: str) -> str:
    """Return ``name`` without its percent signs, as JSON would spell it."""
    return bytes.fromhex(
        "".join(
            part[1:] if part.startswith("%") else part.encode().hex() for part in _escapes(name)
        )
    ).decode()


def _escapes(name: str) -> list[str]:
    parts = name.split("%")
    return [parts[0], *(piece for part in parts[1:] for piece in (f"%{part[:2]}", part[2:]))]


@pytest.mark.timeout(0 if settings().max_examples > 1_000 else 120)
@settings(max_examples=max(300, settings().max_examples))
@given(STEPS, st.sampled_from(DropStrategy), st.sampled_from([0, 3, 500]), ROOM)
def test_event_source_with_many_topics_has_or_knows_everything(
    steps: list[tuple[Any, ...]], strategy: DropStrategy, last: int, room_bytes: int
) -> None:
    """Whatever happens: nothing lost in silence, twice or out of order, in no topic."""

    async def run() -> None:
        world = World(strategy, last, room_bytes)
        world.come_back(0)
        for name, *arguments in steps:
            step: Callable[..., Any] = getattr(world, name)
            done = step(*arguments)
            if done is not None:
                await done
        if world.stream is None:
            world.come_back(0)
        await world.read_all()
        # One more message of each shows every hole there is.
        for name in TOPICS:
            world.publish(name, 1)
        await world.read_all()

        assert world.owes_gap == set()
        for name in TOPICS:
            place, topic = world.places[name], world.hub.topic(TENANT, name)
            assert (place.epoch, place.offset) == (topic.epoch, topic.head)
        # And the last id says just that.
        said = places_of(world.last_id)
        assert {name: at.offset for name, at in said.items()} == {
            name: world.hub.topic(TENANT, name).head for name in TOPICS
        }
        totals = totals_of(world.hub.topics)
        lost = sum(totals.lost.values())
        assert totals.offered == totals.delivered + lost + totals.discarded + totals.queued
        world.cut(0)
        assert world.hub.subscribers == 0
        assert len(world.hub.patterns) == 0

    with asyncio.Runner(loop_factory=EndableLoop) as runner:
        runner.run(run())
