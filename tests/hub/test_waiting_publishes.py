"""Publishes that wait for room in a topic: served in the order in which they came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import msgspec
from daemons import FakeStats, until
from fakes import FakeSink, frames_in

from clevrd.config import Config
from clevrd.control.adaptive_throttler import ThrottleSample
from clevrd.core.beginning import Last
from clevrd.core.publish_request import PublishRequest, decode_publish
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.handlers.publish.run import RunPublisher
from clevrd.hub import Hub, PublishAnswer, Published, Run
from clevrd.hub.rounds import WRITES_PER_SLICE
from clevrd.tenants import Tenant
from clevrd.tenants.tenant import Limits

TENANT = Tenant("acme")
# A quarter of them may be pending.
RING = 400


class Crowd:
    """A hub with one topic, of so many readers that none of them is written to at once."""

    def __init__(self, ring_bytes: int = 64 << 20) -> None:
        config = Config(
            ring_messages=RING,
            ring_bytes=ring_bytes,
            max_message_bytes=1 << 18,
            throttle_scope="global",
        )
        self.hub = Hub(config, asyncio.get_running_loop(), stats=FakeStats())
        self.topic: Topic = self.hub.topic(TENANT, "t")
        self.sink = FakeSink()
        for sink in [self.sink, *(FakeSink() for _ in range(WRITES_PER_SLICE))]:
            self.hub.subscribe(self.topic, Subscriber(sink), Last(0))
        self.tasks: list[asyncio.Task[PublishAnswer]] = []
        self.arrived = 0

    def arrive(self, count: int = 1, size: int = 1) -> None:
        """Publish so many, each as a handler does: now if that may be, else later."""
        for _ in range(count):
            self.arrived += 1
            data = json.dumps([self.arrived, "x" * size]).encode()
            request = PublishRequest("t", msgspec.Raw(data))
            if self.hub.must_wait(self.topic):
                later = self.hub.publish_later(TENANT, self.topic, request)
                self.tasks.append(asyncio.create_task(later))
            else:
                self.hub.publish(self.topic, request)

    def seen(self) -> list[int]:
        """Return which publishes a reader was given, by when they arrived."""
        frames = frames_in(self.sink.received)
        return [json.loads(bytes(frame.data))["data"][0] for frame in frames]


class ListedOutcomes:
    """What became of each item, as lists."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.refusals: list[ClevrdError] = []

    def run_published(
        self, topic: Topic, run: Sequence[PublishRequest], offset: int, ids: list[str]
    ) -> None:
        """Note a run's offsets."""
        self.offsets.extend(range(offset, offset + len(ids)))

    def run_is_due(
        self, topic: Topic, run: Sequence[PublishRequest], known: asyncio.Future[Run]
    ) -> None:
        """Fail: here every answer is known at once."""
        raise AssertionError

    def published(self, request: PublishRequest, answer: Published) -> None:
        """Note an offset."""
        self.offsets.append(answer.offset)

    def is_due(self, request: PublishRequest, known: asyncio.Future[Published]) -> None:
        """Fail, as above."""
        raise AssertionError

    def refused(self, error: ClevrdError, item: bytes) -> None:
        """Note a refusal."""
        self.refusals.append(error)


async def test_newcomer_never_overtakes_who_waits() -> None:
    """Some in every turn, before, while and after others wait: delivered as they came."""
    crowd = Crowd()

    crowd.arrive(RING)
    for _ in range(300):
        await asyncio.sleep(0)
        crowd.arrive(7)
    await asyncio.gather(*crowd.tasks)
    await until(lambda: crowd.topic.pending == 0)

    assert len(crowd.tasks) > RING
    assert crowd.seen() == list(range(1, crowd.arrived + 1))
    assert (crowd.hub.publishing.waiting.lines, crowd.hub.publishing.waiting.count) == ({}, 0)


async def test_who_finds_its_room_taken_keeps_its_place() -> None:
    """Room is granted by count and may be short in bytes: the next round's is for who was first."""
    crowd = Crowd(ring_bytes=1 << 20)

    for turn in range(100):
        crowd.arrive(10, size=60_000 if turn % 3 == 0 else 100)
        await asyncio.sleep(0)
    await asyncio.gather(*crowd.tasks)
    await until(lambda: crowd.topic.pending == 0)

    assert len(crowd.tasks) > 100
    assert crowd.seen() == list(range(1, crowd.arrived + 1))


async def test_who_gives_up_passes_its_turn_on() -> None:
    """A publish that is cancelled while it waits holds up nobody."""
    crowd = Crowd()
    crowd.arrive(RING // 4)
    # The round has begun and is not yet written to all.
    await asyncio.sleep(0)
    crowd.arrive(RING // 4 + 5)
    await asyncio.sleep(0)
    assert len(crowd.hub.publishing.waiting.lines[crowd.topic]) == 5

    for task in crowd.tasks[:4]:
        task.cancel()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)
    await until(lambda: crowd.topic.pending == 0)

    first = RING // 2
    assert crowd.seen() == [*range(1, first + 1), first + 5]
    assert (crowd.hub.publishing.waiting.lines, crowd.hub.publishing.waiting.count) == ({}, 0)


async def test_run_that_waited_is_published_whole() -> None:
    """A publisher of many items waits once for all that go together, not once for each."""
    crowd = Crowd()
    crowd.arrive(RING // 4)
    outcomes = ListedOutcomes()
    publisher = RunPublisher(crowd.hub, TENANT, decode_publish, outcomes)
    items = [b'{"topic":"t","data":%d}' % number for number in range(50)]
    items += [b"nonsense", items[0]]

    taken = publisher.take(items)
    waited = await publisher.wait_for(items)

    first = RING // 4
    assert (taken, waited) == ((0, True), 50)
    assert outcomes.offsets == list(range(first + 1, first + 51))
    assert outcomes.refusals == []


async def test_publisher_with_more_waits_for_others_and_not_for_the_next_round() -> None:
    """Two that take turns use up the room there is, instead of one message each and round."""
    crowd = Crowd()
    hub, topic = crowd.hub, crowd.topic
    request = decode_publish(b'{"topic":"t","data":[0]}')
    within_a_round: list[bool] = []

    async def publish_twice() -> None:
        for _ in range(2):
            await hub.turn(TENANT, topic)
            within_a_round.append(topic in hub.delivery.rounds.running)
            hub.publish(topic, request)

    crowd.arrive(RING // 4)
    await asyncio.sleep(0)
    crowd.arrive(RING // 4)

    await asyncio.gather(publish_twice(), publish_twice())

    # Both were woken by a round's end; who asked again behind the other went on before the next's.
    assert within_a_round[:3] == [False, False, True]


async def test_drain_ends_behind_publishes_that_wait() -> None:
    """A publish that is held back where nobody lags and nothing is pending is finished too."""
    crowd = Crowd()
    now_s = asyncio.get_running_loop().time()
    crowd.hub.throttler.evaluate(ThrottleSample(1, 1, cpu=1.0, memory=1.0), now_s)
    crowd.arrive()
    await asyncio.sleep(0)

    await crowd.hub.drain(now_s + 10.0)

    assert (len(crowd.tasks), crowd.topic.head) == (1, 1)
    await asyncio.gather(*crowd.tasks)
    assert crowd.seen() == [1]


async def test_topic_that_was_forgotten_meanwhile_is_made_within_its_tenants_limit() -> None:
    """The tenant's own limit holds, and not the one of tenants without limits."""
    config = Config(max_topics_per_tenant=1)
    hub = Hub(config, asyncio.get_running_loop(), stats=FakeStats())
    tenant = Tenant("acme", limits=Limits(max_topics=2))
    for name in ("a", "b"):
        hub.publish(hub.topic(tenant, name), PublishRequest(name, msgspec.Raw(b"1")))
    gone = hub.topic(tenant, "a")
    hub.topics.evict_idle(hub.now_s() + 2 * config.topic_idle_s)
    hub.publish(hub.topic(tenant, "b"), PublishRequest("b", msgspec.Raw(b"1")))

    topic = await hub.turn(tenant, gone)

    assert topic.name == "a"
    assert topic is not gone
