"""Memory that runs out: rings shrink, then new subscribers are refused, then publishers.

What subscribers were promised stays. The ladder's decisions: tests/control/test_memory_ladder.py;
a real limit: tests/operation/test_memory_limit.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from clients import SMALL_BUFFERS, client_of, raw_subscriber, subscribe
from daemons import Daemon, FakeStats, running, until
from fakes import FakeSink, TopicDriver, frame_of, make_topic, sink_of
from websockets import InvalidStatus, Subprotocol

from clevrd.config import Config
from clevrd.control.memory_ladder import GROWTH_PART, MAX_SHRINK_BYTES, SHRINK_AT, Rung
from clevrd.control.system_stats import HeldMemory
from clevrd.core.budgets import Budget
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.kept_frames import KeptFrames
from clevrd.core.publish_request import PublishRequest
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import MemoryShort
from clevrd.hub import Hub
from clevrd.hub.memory_guard import LOOKS_TO_GIVE_BACK
from clevrd.tenants import Tenant

MIB = 1 << 20
TENANT = Tenant("default-tenant")


def hold(daemon: Daemon, stats: FakeStats, percent: int) -> None:
    """Let the daemon find so many percent of 100 MiB in use, now."""
    stats.held = HeldMemory(percent * MIB, 100 * MIB, "the test's limit")
    daemon.hub.memory_guard.look()


async def ask(
    daemon: Daemon, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, Any], str]:
    """Return the answer's status, its JSON and Retry-After."""
    async with daemon.http.request(method, daemon.url + path, data=body, headers=headers) as answer:
        return answer.status, await answer.json(), answer.headers.get("Retry-After", "")


def ring_of(daemon: Daemon, name: str = "t") -> Topic:
    """Return the topic of the default tenant called so."""
    topic = daemon.hub.topics.find("default-tenant", name)
    assert topic is not None
    return topic


# --- what a ring may give up -----------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(DropStrategy))
def test_spare_takes_nothing_that_a_reader_waits_for(strategy: DropStrategy) -> None:
    """Messages before all readers' places go; a reader that lags within its window loses none."""
    driver = TopicDriver(make_topic())
    reader = driver.join(Subscriber(FakeSink(), strategy))
    driver.send(6)
    driver.block(reader)
    driver.send(4)

    freed = driver.topic.spare(0, now_s=0.0)
    driver.unblock(reader)

    # Messages without a key replace one another for `latest`.
    waited_for = [10] if strategy is DropStrategy.LATEST else [7, 8, 9, 10]
    assert freed >= 6 * 120
    assert sink_of(reader).offsets == [1, 2, 3, 4, 5, 6, *waited_for]
    assert driver.topic.losses.retention == driver.topic.losses.memory == 0


def test_spare_takes_what_a_policy_has_given_up_already() -> None:
    """Beyond its window a reader is promised nothing."""
    driver = TopicDriver(make_topic(window=3))
    reader = driver.join(Subscriber(FakeSink(), DropStrategy.DROP_OLDEST))
    driver.block(reader)
    driver.send(10)

    freed = driver.topic.spare(0, now_s=0.0)
    driver.unblock(reader)

    assert freed == 7 * 120
    assert sink_of(reader).offsets == [8, 9, 10]


def test_spare_leaves_what_is_yet_to_be_offered() -> None:
    """As `trim` does."""
    driver = TopicDriver(make_topic())
    reader = driver.join(Subscriber(FakeSink()))
    driver.send(3)
    driver.publish(2)

    assert driver.topic.spare(0, now_s=0.0) == 3 * 120
    driver.flush()
    assert sink_of(reader).offsets == [1, 2, 3, 4, 5]


# --- floods between two looks ----------------------------------------------------------------


class GrowingStats(FakeStats):
    """The memory of a process: what its rings hold, and what all else does."""

    def __init__(self, limit_bytes: int, other_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.other_bytes = other_bytes
        self.ring_bytes: Callable[[], int] = lambda: 0

    def held_memory(self) -> HeldMemory:
        """Return what is used now."""
        used_bytes = self.other_bytes + self.ring_bytes()
        return HeldMemory(used_bytes, self.limit_bytes, "the test's limit")


async def growing_hub(
    limit_bytes: int = 100 * MIB, other_bytes: int = 60 * MIB
) -> tuple[Hub, GrowingStats, Callable[[], None]]:
    """Return a hub whose guard has looked once, its memory, and a publish of a MiB in this turn."""
    stats = GrowingStats(limit_bytes, other_bytes)
    hub = Hub(Config(max_memory_mb=limit_bytes // MIB), asyncio.get_running_loop(), stats=stats)
    stats.ring_bytes = lambda: hub.topics.ring_bytes
    hub.memory_guard.look()
    large = PublishRequest("t", msgspec.Raw(b'"%b"' % (b"x" * MIB)))

    def publish() -> None:
        hub.check_rate(TENANT)
        topic = hub.topic(TENANT, "t")
        hub.publish(topic, large)
        # Nobody reads it: the round that the next turn would have.
        hub.delivery.rounds.begin(topic)

    return hub, stats, publish


async def test_flood_within_one_turn_shrinks_rings() -> None:
    """Of 50 MiB that come at once rings keep what lies below the rung, and one look's growth."""
    hub, stats, publish = await growing_hub()

    for _ in range(50):
        publish()

    assert hub.memory_guard.decision.rung is Rung.RINGS_SHRINK
    assert stats.held_memory().share < SHRINK_AT + 3 / GROWTH_PART
    assert hub.memory_guard.shrunk_bytes > 20 * MIB


async def test_large_limit_is_looked_at_as_often_as_rings_can_shrink() -> None:
    """A part of it alone would be more than rings give up in one look."""
    hub, _, publish = await growing_hub(limit_bytes=8_000 * MIB, other_bytes=7_000 * MIB)

    for _ in range(60):
        publish()

    assert hub.topics.ring_bytes < MAX_SHRINK_BYTES + 2 * MIB


async def test_flood_within_one_turn_is_refused_where_rings_do_not_help() -> None:
    """Something else takes the memory meanwhile; the next looks at growth leave no rung."""
    hub, stats, publish = await growing_hub()
    rungs = []
    publish()
    stats.other_bytes = 96 * MIB

    publish()
    rungs.append(hub.memory_guard.decision.rung)
    with pytest.raises(MemoryShort):
        publish()
    stats.other_bytes = 50 * MIB
    for look in (hub.memory_guard.look_at_growth, hub.memory_guard.look):
        look()
        rungs.append(hub.memory_guard.decision.rung)

    assert rungs == [Rung.NO_PUBLISHES, Rung.NO_PUBLISHES, Rung.WELL]


async def test_look_that_fails_is_counted_and_not_repeated_with_each_message() -> None:
    """The message is taken; the next look comes when rings have grown as much again."""
    hub, stats, publish = await growing_hub()
    looks: list[int] = []

    def fail() -> HeldMemory:
        looks.append(hub.topics.ring_bytes)
        raise OSError

    stats.held_memory = fail  # type: ignore[method-assign]
    for _ in range(20):
        publish()

    assert hub.topics.published == 20
    assert len(looks) == hub.counters.background_errors == 10


# --- the rungs, over sockets -----------------------------------------------------------------


async def test_memory_is_given_back_where_rings_have_nothing_to_give() -> None:
    """The allocator may hold what requests have left, which would keep a rung for ever."""
    stats, trims = FakeStats(), []
    async with running(stats=stats) as daemon:
        daemon.hub.memory._trim = lambda: trims.append(daemon.hub.topics.ring_bytes)
        for _ in range(LOOKS_TO_GIVE_BACK):
            hold(daemon, stats, 97)

        assert trims[:1] == [0]


async def test_largest_rings_shrink_first_and_readers_lose_nothing() -> None:
    """At 85 % idle rings give way; the ring that a slow subscriber reads keeps what it lacks."""
    stats = FakeStats()
    async with (
        running(stats=stats, **SMALL_BUFFERS) as daemon,
        await raw_subscriber(daemon.port, "topic=slow", receive_bytes=4096) as slow,
    ):
        for number in range(60):
            await daemon.publish("slow", [number, "x" * 2_000])
            await daemon.publish("big", "x" * 20_000)
        await daemon.publish("small", 1)
        before = ring_of(daemon, "slow").held_bytes

        # All that lies above 83 % is to go, 3 MiB: more than there is to spare.
        hold(daemon, stats, 86)

        held = {name: len(ring_of(daemon, name).ring) for name in ("big", "small")}
        numbers = [(await slow.message())["data"][0] for _ in range(60)]
        view = await daemon.get_json("/metrics")
        publishes = await ask(daemon, "POST", "/publish", b'{"topic":"t","data":1}')
        async with subscribe(daemon.ws_url):
            pass

    assert held == {"big": 0, "small": 0}
    assert before > 0
    assert numbers == list(range(60))
    assert sum(view["messages"]["dropped"].values()) == 0
    assert view["memory_ladder"]["state"] == "rings_shrink"
    assert view["memory_ladder"]["rings_shrunk_bytes"] > 60 * 20_000
    assert publishes[0] == 200


async def test_new_subscribers_are_refused_before_publishers() -> None:
    """At 92 %: WebSockets, streams, EventSources and commands; what is open goes on."""
    stats = FakeStats()
    async with (
        running(stats=stats) as daemon,
        subscribe(daemon.ws_url) as reader,
        client_of(f"{daemon.ws_url}/ws", subprotocols=[Subprotocol("clevrd.v1")]) as commands,
    ):
        hold(daemon, stats, 92)

        published = await daemon.publish("t", 1)
        received = json.loads(await reader.recv())
        stream = await ask(daemon, "GET", "/subscribe?topic=t", Accept="application/x-ndjson")
        async with daemon.http.get(
            f"{daemon.url}/subscribe?topic=t", headers={"Accept": "text/event-stream"}
        ) as answer:
            events = answer.status, await answer.text()
        with pytest.raises(InvalidStatus) as websocket:
            await subscribe(daemon.ws_url)
        await commands.send('{"type":"subscribe","topic":"u","ref":7}')
        command = json.loads(await commands.recv())
        poll = await ask(daemon, "GET", "/subscribe?topic=t&poll=1&last=1")
        health = await daemon.get_json("/health")

        hold(daemon, stats, 89)
        async with subscribe(daemon.ws_url, "u"):
            pass
        refused = daemon.hub.counters.refused["memory_limit"]

    assert received["offset"] == published["offset"]
    assert (stream[0], stream[1]["code"], stream[2]) == (503, "memory_limit", "10")
    assert stream[1]["error"] == (
        "The daemon uses 92 of 100 MiB (the test's limit) of memory, 92 %, and takes subscribers"
        " again below 90 %; come back in 10 s."
    )
    assert events[0] == 200
    assert '"code":"memory_limit"' in events[1]
    assert websocket.value.response.status_code == 503
    assert (command["type"], command["code"], command["ref"]) == ("error", "memory_limit", 7)
    assert poll[0] == 200
    assert (health["status"], health["memory"]["state"]) == ("degraded", "no_new_subscribers")
    assert refused == 4


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
async def test_publishers_are_refused_and_taken_again(raw_paths: bool) -> None:
    """At 95 %: single publishes, keyed ones, batches and sockets; below 93 % all are taken."""
    body = b'{"topic":"t","data":1}'
    stats = FakeStats()
    async with (
        running(stats=stats, raw_paths=raw_paths) as daemon,
        client_of(f"{daemon.ws_url}/publish") as socket,
    ):
        hold(daemon, stats, 95)
        single = await ask(daemon, "POST", "/publish", body)
        keyed = await ask(daemon, "POST", "/publish", body, **{"Idempotency-Key": '"1"'})
        batch = await ask(daemon, "POST", "/publish/batch", body + b"\n" + body)
        await socket.send(body.decode())
        on_socket = json.loads(await socket.recv())
        hold(daemon, stats, 93)
        still = await ask(daemon, "POST", "/publish", body)
        hold(daemon, stats, 92)
        again = await ask(daemon, "POST", "/publish", body)
        refused = daemon.hub.counters.refused["memory_limit"]

    assert (single[0], single[1]["code"], single[2]) == (429, "memory_limit", "2")
    assert single[1]["error"] == (
        "The daemon uses 95 of 100 MiB (the test's limit) of memory, 95 %, and takes messages"
        " again below 93 %; retry in 2 s."
    )
    assert single[1]["retryable"] is True
    assert keyed[1]["code"] == on_socket["code"] == still[1]["code"] == "memory_limit"
    assert [each["code"] for each in batch[1]["results"]] == ["memory_limit"] * 2
    assert (again[0], again[1]["offset"]) == (200, 1)
    assert refused == 6


async def test_rate_of_a_tenant_holds_again_afterwards() -> None:
    """The rate is not forgotten while publishes are shed, and a shed publish costs nothing."""
    body = b'{"topic":"t","data":1}'
    stats = FakeStats()
    async with running(stats=stats, publish_rate=0.001, publish_burst=1) as daemon:
        hold(daemon, stats, 99)
        shed = await ask(daemon, "POST", "/publish", body)
        hold(daemon, stats, 10)
        codes = [await ask(daemon, "POST", "/publish", body) for _ in range(2)]

    assert shed[1]["code"] == "memory_limit"
    assert [codes[0][0], codes[1][1]["code"]] == [200, "rate_limited"]


async def explained(daemon: Daemon, kind: str) -> dict[str, dict[str, Any]]:
    """Return the decisions of a kind that operators are told of, by their codes."""
    view = await daemon.get_json("/admin/explain")
    found = [each for each in view["decisions"] if each["kind"] == kind]
    by_code = {each["code"]: each for each in found}
    assert len(by_code) == len(found)
    return by_code


async def test_each_rung_is_explained_as_long_as_it_holds() -> None:
    """With its rule, the figures and the limits; what lies below is a decision of its own."""
    stats = FakeStats()
    async with running(stats=stats) as daemon:
        hold(daemon, stats, 86)
        first = await explained(daemon, "memory")
        hold(daemon, stats, 96)
        all_three = await explained(daemon, "memory")
        hold(daemon, stats, 91)
        publishing = await explained(daemon, "memory")
        hold(daemon, stats, 10)
        well = await explained(daemon, "memory")
        hold(daemon, stats, 85)
        again = await explained(daemon, "memory")

    assert first.keys() == {"rings_shrink"}
    assert first["rings_shrink"]["rule"] == (
        "Rings give up messages that no subscriber waits for, from 85% of the memory on until less"
        " than 83% is used: it was 86 of 100 MiB (the test's limit)."
    )
    assert first["rings_shrink"]["scope"]["kind"] == "daemon"
    assert {code: each["is_on"] for code, each in all_three.items()} == {
        "rings_shrink": True,
        "no_new_subscribers": True,
        "no_publishes": True,
    }
    shed = all_three["no_publishes"]
    assert (shed["ends_at"], shed["count"]) == (None, 1)
    assert shed["inputs"] == {
        "used_share": 0.96,
        "used_bytes": 96 * MIB,
        "limit_bytes": 100 * MIB,
    }
    assert shed["thresholds"] == {"begins_at": 0.95, "ends_below": 0.93}
    assert [code for code, each in publishing.items() if not each["is_on"]] == ["no_publishes"]
    ended = publishing["no_publishes"]
    # The clock of decisions counts milliseconds, and all of this may take none.
    assert ended["ends_at"] == ended["last_at"] >= ended["began_at"]
    assert not any(each["is_on"] for each in well.values())
    # It goes on with what was told of before.
    shrinks = again["rings_shrink"]
    assert (shrinks["is_on"], shrinks["ends_at"], shrinks["count"]) == (True, None, 2)
    assert shrinks["inputs"]["used_share"] == 0.85


async def test_what_rings_give_up_is_explained_by_tenant() -> None:
    """Each that has a share of its own is told how much went, and at which use."""
    stats = FakeStats()
    async with running(stats=stats) as daemon:
        for tenant in ("default-tenant", "made-up"):
            await daemon.publish("t", "x" * 50_000, **{"X-Tenant-ID": tenant})
        hold(daemon, stats, 86)
        view = await daemon.get_json("/admin/explain?tenant=default-tenant")

    found = [each for each in view["decisions"] if each["code"] == "rings_shrunk"]
    assert sorted(each["scope"]["tenant_id"] for each in found) == ["", "default-tenant"]
    assert {each["kind"] for each in found} == {"eviction"}
    assert all(50_000 < each["inputs"]["freed_bytes"] < 51_000 for each in found)
    assert all(each["thresholds"]["begins_at"] == 0.85 for each in found)


async def test_kept_messages_that_are_given_up_are_explained() -> None:
    """Those of a tenant over its share, and those of whoever finds all memory for them taken."""
    async with running(stats=FakeStats()) as daemon:
        topics = daemon.hub.topics
        greedy, other = (topics.portions.of(tenant) for tenant in ("default-tenant", "made-up"))
        Giver(greedy.kept).takes(topics.kept.max_bytes - 1)
        given_back = KeptFrames(other.kept).hold(full_ring(), 0, 1)
        topics.kept.left_bytes = 0
        kept = KeptFrames(greedy.kept).hold(full_ring(), 0, 1)
        found = await explained(daemon, "eviction")

    assert (given_back, kept) == (1, 0)
    assert found.keys() == {"kept_frames_given_back", "kept_frames_full"}
    assert {each["scope"]["tenant_id"] for each in found.values()} == {"default-tenant"}
    back, full = found["kept_frames_given_back"], found["kept_frames_full"]
    limits = {"share_bytes": greedy.kept.guaranteed_bytes, "max_kept_bytes": topics.kept.max_bytes}
    assert back["thresholds"] == full["thresholds"] == limits
    assert back["inputs"]["freed_bytes"] > topics.kept.max_bytes / 20
    assert full["inputs"]["left_bytes"] == 0


class Giver:
    """A holder of bytes of a budget, which gives back what is wanted."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        budget.holders[self] = None

    def takes(self, size_bytes: int) -> None:
        """Take bytes, which there are."""
        assert self.budget.take(size_bytes)

    def give_back(self, wanted_bytes: int, /) -> int:
        """Let go of what is wanted."""
        self.budget.give(wanted_bytes)
        return wanted_bytes


def full_ring() -> RecentMessageCache:
    """Return a ring with one message."""
    ring = RecentMessageCache(1, 1 << 20)
    ring.extend([frame_of(1, 64)])
    return ring


async def test_each_change_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A rung that is reached is a warning with the figures; one that is left is not."""
    caplog.set_level(logging.INFO, "clevrd")
    stats = FakeStats()
    async with running(stats=stats) as daemon:
        for percent in (95, 96, 95, 50, 50):
            hold(daemon, stats, percent)
        await until(lambda: daemon.hub.memory_guard.decision.rung == 0)

    lines = [
        (record.levelname, record.message)
        for record in caplog.records
        if "memory ladder" in record.message
    ]
    assert lines == [
        (
            "WARNING",
            "memory ladder changed from=well to=no_publishes used=95.0%"
            ' memory="95 of 100 MiB (the test\'s limit)"',
        ),
        (
            "INFO",
            "memory ladder changed from=no_publishes to=well used=50.0%"
            ' memory="50 of 100 MiB (the test\'s limit)"',
        ),
    ]
