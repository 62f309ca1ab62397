"""A tenant with many stalled readers of large messages, and a quiet one that never notices.

Sockets, rings, readers and timers are real; load figures are the test's own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from clients import SMALL_BUFFERS, offsets, raw_subscriber, subscribe
from daemons import Daemon, FakeStats, running
from fakes import at_once

from clevrd.control.adaptive_buffer import WINDOW_MAX, WINDOW_MIN
from clevrd.control.adaptive_throttler import DELAY_S, DURATION_S
from clevrd.core.portions import Weights
from clevrd.core.topic import Topic
from clevrd.hub.waiting_publishes import WaitingPublishes
from clevrd.tenants import Tenant

STALLED = 40
LARGE = "x" * 65_536
# 64 MiB are 38 MiB of rings: 600 messages of 64 KiB fill them.
MEMORY_MB = 64
FILLING = 700
QUIET = 300


def topic_of(daemon: Daemon, tenant: str, name: str = "t") -> Topic:
    """Return a tenant's topic."""
    topic = daemon.hub.topics.find(tenant, name)
    assert topic is not None
    return topic


async def fill(daemon: Daemon, tenant: str, count: int, data: Any, topic: str = "t") -> None:
    """Publish so many messages as ``tenant``, by batches."""
    for start in range(0, count, 10):
        items = [{"topic": topic, "data": data} for _ in range(min(10, count - start))]
        async with daemon.http.post(
            f"{daemon.url}/publish/batch", json=items, headers={"X-Tenant-ID": tenant}
        ) as response:
            assert response.status == 200
            assert (await response.json())["published"] == len(items)


@asynccontextmanager
async def neighbours(stats: FakeStats, **settings: Any) -> AsyncIterator[Daemon]:
    """Run a daemon with stalled readers of tenant ``noisy``; tenant ``quiet`` has a portion."""
    async with (
        running(stats=stats, max_memory_mb=MEMORY_MB, **SMALL_BUFFERS, **settings) as daemon,
        AsyncExitStack() as stack,
    ):
        daemon.hub.share_out(Weights({"quiet": 1.0, "noisy": 1.0}, 0.0))
        for _ in range(STALLED):
            reader = await raw_subscriber(
                daemon.port, "topic=t&tenant=noisy&buffer=10", receive_bytes=4096
            )
            await stack.enter_async_context(reader)
        yield daemon


async def test_stalled_readers_of_another_tenant_change_nothing() -> None:
    """Ring, window and messages of the quiet tenant are as they would be without the noisy one."""
    stats = FakeStats(cpu=0.1)
    async with (
        neighbours(stats) as daemon,
        subscribe(daemon.ws_url, tenant="quiet") as reader,
        asyncio.timeout(60),
    ):
        await fill(daemon, "quiet", QUIET, "small")
        quiet = topic_of(daemon, "quiet")
        before = (quiet.first, quiet.held_messages, quiet.held_bytes)

        await fill(daemon, "noisy", FILLING, LARGE)
        stats.cpu = 0.95
        daemon.hub.evaluate_throttle()
        daemon.hub.evaluate_buffers()
        noisy = topic_of(daemon, "noisy")
        after = (quiet.first, quiet.held_messages, quiet.held_bytes)
        slow = noisy.slow
        must_wait = (daemon.hub.must_wait(noisy), daemon.hub.must_wait(quiet))
        await fill(daemon, "quiet", QUIET, "small")
        seen = await offsets(reader, 2 * QUIET)
        waits = daemon.hub.counters.wait_s.count
        metrics = await daemon.get_json("/metrics")

    # The noisy tenant has lost some of its own, and is throttled; the quiet one has all.
    assert noisy.first > 1
    assert slow == STALLED
    assert after == before == (1, QUIET, before[2])
    assert must_wait == (True, False)
    assert waits == 0
    assert seen == list(range(1, 2 * QUIET + 1))
    assert quiet.losses.total == 0
    assert quiet.window_cap == WINDOW_MAX
    assert noisy.window_cap == WINDOW_MIN
    told = metrics["throttler_metrics"]
    assert (told["is_throttling"], told["scope"]) == (True, "topic")
    assert (told["throttled_topics"], told["throttled"]) == (1, ["noisy:t"])
    assert told["reason"].startswith("100 % of subscribers slow in noisy:t and CPU at 95 %")
    shares = {share["tenant_id"]: share for share in metrics["memory_shares"]}
    assert shares["quiet"]["borrowed_bytes"] == 0
    assert shares["quiet"]["guaranteed_bytes"] == shares["noisy"]["guaranteed_bytes"]
    assert shares["noisy"]["ring_bytes"] == noisy.held_bytes
    assert shares["noisy"]["borrowed_bytes"] > 0


@pytest.mark.parametrize(("scope", "waits"), [("topic", (True, False)), ("global", (True, True))])
async def test_scope_says_whose_publishes_wait(scope: str, waits: tuple[bool, bool]) -> None:
    """Only those to the slow topic, or all."""
    stats = FakeStats(cpu=0.1)
    async with (
        neighbours(stats, throttle_scope=scope) as daemon,
        subscribe(daemon.ws_url, tenant="quiet"),
        asyncio.timeout(60),
    ):
        await fill(daemon, "quiet", 1, "small")
        await fill(daemon, "noisy", 100, LARGE)
        stats.cpu = 0.95
        daemon.hub.evaluate_throttle()

        found = [daemon.hub.must_wait(topic_of(daemon, name)) for name in ("noisy", "quiet")]
        told = (await daemon.get_json("/metrics"))["throttler_metrics"]

    assert tuple(found) == waits
    assert told["is_throttling"]
    assert told["throttled"] == (["noisy:t"] if scope == "topic" else [])


async def publish_in_all_ways(daemon: Daemon, tenant: str, topic: str) -> None:
    """Publish once in each way there is, and wait for the answers."""
    item = {"topic": topic, "data": 1}
    for path, body in (("/publish", item), ("/publish/batch", [item])):
        async with daemon.http.post(
            f"{daemon.url}{path}", json=body, headers={"X-Tenant-ID": tenant}
        ) as answer:
            assert answer.status == 200
    for path, command in (("/publish", item), ("/ws", {"type": "publish", **item})):
        async with daemon.http.ws_connect(
            f"{daemon.url}{path}?tenant={tenant}", protocols=["clevrd.v1"]
        ) as socket:
            await socket.send_json({**command, "ref": 1})
            answer_text = (await socket.receive()).data
            assert '"offset"' in answer_text, answer_text


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
async def test_every_way_to_publish_is_slowed_for_the_slow_topic_alone(raw_paths: bool) -> None:
    """POST, batch, publish socket and command socket; the waits are counted, not timed."""
    async with running(raw_paths=raw_paths) as daemon:
        for tenant in ("noisy", "quiet"):
            await fill(daemon, tenant, 1, 1)
        topic_of(daemon, "noisy").throttled_until_s = daemon.hub.now_s() + 60
        counted = daemon.hub.counters.wait_s

        await publish_in_all_ways(daemon, "quiet", "t")
        await publish_in_all_ways(daemon, "noisy", "other")
        unslowed = counted.count
        await publish_in_all_ways(daemon, "noisy", "t")
        assert topic_of(daemon, "noisy").head == 5
        slowed = counted.view(zeros=0)

    assert unslowed == 0
    assert counted.count == 4
    assert slowed.sum >= 4 * (DELAY_S - 0.001)


async def test_throttle_of_a_topic_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 s after its readers were last slow under load, also if nobody looks any more."""
    stats = FakeStats(cpu=0.1)
    async with neighbours(stats) as daemon, asyncio.timeout(60):
        await fill(daemon, "noisy", 100, LARGE)
        daemon.hub.stop()
        stats.cpu = 0.95
        daemon.hub.evaluate_throttle()
        topic = topic_of(daemon, "noisy")
        now_s = daemon.hub.now_s()
        monkeypatch.setattr(daemon.hub.publishing, "_loop", FixedTime(now_s + DURATION_S + 0.1))

        assert topic.throttled_until_s > now_s
        assert not daemon.hub.must_wait(topic)


class FixedTime:
    """A loop's clock that stands still."""

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s

    def time(self) -> float:
        """Return the time."""
        return self._now_s


async def test_waiting_publishes_of_one_tenant_leave_room_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the bound a tenant that has fewer than its part waiting may still have one wait."""
    monkeypatch.setattr("clevrd.hub.waiting_publishes.MAX_WAITING_PUBLISHES", 4)
    async with running() as daemon, asyncio.timeout(20):
        daemon.hub.share_out(Weights({"quiet": 1.0, "noisy": 1.0}, 0.0))
        for tenant in ("noisy", "quiet"):
            await fill(daemon, tenant, 1, 1)
            topic_of(daemon, tenant).throttled_until_s = daemon.hub.now_s() + 60
        turns = [
            asyncio.ensure_future(daemon.hub.turn(tenant, daemon.hub.topic(tenant, "t")))
            for tenant in map(Tenant, ["noisy"] * 5 + ["quiet"] * 3)
        ]

        done = await asyncio.gather(*turns, return_exceptions=True)

    refused = [isinstance(each, Exception) for each in done]
    assert refused == [False] * 4 + [True] + [False] * 2 + [True]
    assert daemon.hub.waiting_publishes == 0
    assert len(daemon.hub.publishing.waiting._by_portion) == 0


async def test_bytes_that_wait_of_one_tenant_leave_room_for_another() -> None:
    """The messages of publishes that wait have their bound in bytes, shared out alike."""
    async with running() as daemon, asyncio.timeout(20):
        daemon.hub.share_out(Weights({"quiet": 1.0, "noisy": 1.0}, 0.0))
        waiting = daemon.hub.publishing.waiting
        waiting._max_bytes = 400
        for tenant in ("noisy", "quiet"):
            await fill(daemon, tenant, 1, 1)
            topic_of(daemon, tenant).throttled_until_s = daemon.hub.now_s() + 60
        # What they are called, and their bytes.
        wanted = [("noisy", 400), ("noisy", 1), ("quiet", 200), ("quiet", 1), ("noisy", 0)]
        turns = [
            asyncio.ensure_future(
                daemon.hub.turn(tenant, daemon.hub.topic(tenant, "t"), size_bytes=size_bytes)
            )
            for tenant, size_bytes in ((Tenant(name), size) for name, size in wanted)
        ]

        done = await asyncio.gather(*turns, return_exceptions=True)
        again = await daemon.hub.turn(
            Tenant("noisy"), daemon.hub.topic(Tenant("noisy"), "t"), size_bytes=400
        )

    refused = [str(each) if isinstance(each, Exception) else "" for each in done]
    assert [bool(each) for each in refused] == [False, True, False, True, True]
    assert "have too many bytes; retry later." in refused[1]
    assert again.tenant == "noisy"
    assert (waiting._size_bytes, waiting._bytes_by_portion) == (0, {})


@pytest.mark.parametrize("way", ["publish", "key", "socket", "batch"])
async def test_each_way_to_publish_says_how_many_bytes_wait(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By HTTP, with an idempotency key, over a publish socket, and in a batch."""
    begun: list[int] = []
    begin = WaitingPublishes.begin

    def note(waiting: WaitingPublishes, tenant: str, size_bytes: int) -> str:
        begun.append(size_bytes)
        return begin(waiting, tenant, size_bytes)

    monkeypatch.setattr(WaitingPublishes, "begin", note)
    text = "x" * 5_000
    async with running() as daemon, asyncio.timeout(20):
        await daemon.publish("t", 1)
        (topic,) = daemon.hub.topics
        topic.throttled_until_s = daemon.hub.now_s() + 60
        body = json.dumps({"topic": "t", "data": text})
        if way == "batch":
            async with daemon.http.post(f"{daemon.url}/publish/batch", data=body) as answer:
                assert answer.status == 200
        elif way == "socket":
            async with daemon.http.ws_connect(f"{daemon.url}/publish") as socket:
                await socket.send_str(body.replace("}", ',"ref":1}'))
                assert '"success":true' in await socket.receive_str()
        else:
            headers = {"Idempotency-Key": "k"} if way == "key" else {}
            async with daemon.http.post(
                f"{daemon.url}/publish", data=body, headers=headers
            ) as answer:
                assert answer.status == 200
        waiting = daemon.hub.publishing.waiting
        assert (waiting._size_bytes, waiting.count) == (0, 0)

    assert len(begun) == 1
    assert 5_000 <= begun[0] <= 5_100


async def test_reader_that_catches_up_does_not_wait_for_those_of_another_tenant() -> None:
    """Portions take turns, so one reader is handed its messages among the first of thousands."""
    order: list[str] = []
    async with running() as daemon:
        daemon.hub.share_out(Weights({"quiet": 1.0, "noisy": 1.0}, 0.0))
        readers = daemon.hub.delivery.readers
        for tenant in ["noisy"] * 50 + ["quiet"]:
            topic = daemon.hub.topic(Tenant(tenant), "t")
            readers._take_turns(topic, Waiting(tenant, order))  # type: ignore[arg-type]
        while readers._read_next() is not None:
            pass

    assert order.index("quiet") == 1
    assert len(order) == 51
    assert all(earlier == "noisy" for earlier, _ in pairwise(order[2:]))
    assert at_once(daemon.hub.sum_up())[1] == 0


class Waiting:
    """A reader that notes when it is its turn, and has left."""

    def __init__(self, tenant: str, order: list[str]) -> None:
        self._tenant = tenant
        self._order = order

    @property
    def is_joined(self) -> bool:
        """Note the turn."""
        self._order.append(self._tenant)
        return False
