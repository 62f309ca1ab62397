"""The control loops in a running daemon: publishers slowed and released, windows cut and restored.

Load figures are the test's own; slow readers, publishers and timers are real.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from clients import (
    RECORD,
    SMALL_BUFFERS,
    RawPublisher,
    missing,
    offsets,
    publishing,
    raw_subscriber,
    subscribe,
)
from daemons import Daemon, FakeStats, running, until
from fakes import at_once
from websockets.asyncio.client import ClientConnection

from clevrd.control.adaptive_buffer import WINDOW_MAX, WINDOW_MIN
from clevrd.control.adaptive_throttler import DELAY_S, ThrottleSample
from clevrd.control.system_stats import LoadSample

# The loop's clock counts whole milliseconds.
LEAST_DELAY_S = DELAY_S - 0.001


class TightStats(FakeStats):
    """Load figures of a machine that has little memory left."""

    available_bytes = 8 << 30

    def sample(self) -> LoadSample:
        """Return the figures as they are set now."""
        return msgspec.structs.replace(super().sample(), available_bytes=self.available_bytes)


@asynccontextmanager
async def with_readers(
    daemon: Daemon, *, stalled: int, healthy: int
) -> AsyncIterator[list[ClientConnection]]:
    """Subscribe readers to topic t, make the stalled ones slow, and return the healthy ones."""
    async with AsyncExitStack() as stack:
        for _ in range(stalled):
            stalls = await raw_subscriber(daemon.port, "topic=t&buffer=10", receive_bytes=4096)
            await stack.enter_async_context(stalls)
        good = [await stack.enter_async_context(subscribe(daemon.ws_url)) for _ in range(healthy)]
        publisher = await stack.enter_async_context(publishing(daemon.port))
        while at_once(daemon.hub.sum_up())[1] < stalled:
            await publisher.send("t", 50, RECORD)
            for reader in good:
                await offsets(reader, publisher.acknowledged[-1])
        assert at_once(daemon.hub.sum_up())[1] == stalled
        yield good


async def send_in_portions(publisher: RawPublisher, count: int) -> None:
    """Send ``count`` messages; those at once are few, as a stalled reader is written all of them.

    A write has all messages of a turn, and a fast machine takes hundreds of them in one.
    """
    for _ in range(count // 50):
        await publisher.send("t", 50, RECORD)


async def throttler(daemon: Daemon) -> dict[str, Any]:
    """Return what /metrics says of the throttler."""
    figures: dict[str, Any] = (await daemon.get_json("/metrics"))["throttler_metrics"]
    return figures


async def timed_publish_s(daemon: Daemon) -> float:
    """Return how long one publish takes."""
    started_s = time.perf_counter()
    await daemon.publish("t", 1)
    return time.perf_counter() - started_s


@pytest.mark.parametrize(
    ("scope", "where"), [("topic", " in default-tenant:t"), ("global", "")], ids=["topic", "global"]
)
async def test_overload_slows_publishers_for_a_while_and_is_explained(
    scope: str, where: str
) -> None:
    """60 % slow readers at 85 % CPU: each publish waits 10 ms, /metrics says why, and it ends."""
    stats = FakeStats(cpu=0.3)
    async with (
        running(stats=stats, throttle_scope=scope, **SMALL_BUFFERS) as daemon,
        with_readers(daemon, stalled=3, healthy=2) as healthy,
        asyncio.timeout(20),
    ):
        stats.cpu = 0.85
        await until(daemon.hub.is_throttling)
        during = await throttler(daemon)
        health = await daemon.get_json("/health")
        slowed_s = [await timed_publish_s(daemon) for _ in range(5)]

        stats.cpu = 0.3
        await until(lambda: not daemon.hub.is_throttling(), timeout_s=8)
        after = await throttler(daemon)
        answer = await daemon.publish("t", "last")
        seen = [await offsets(reader, answer["offset"]) for reader in healthy]

    assert min(slowed_s) >= LEAST_DELAY_S
    assert during["is_throttling"]
    assert (during["cpu_usage"], during["slow_ratio"], during["delay_ms"]) == (0.85, 0.6, 10)
    assert during["reason"] == f"60 % of subscribers slow{where} and CPU at 85 %"
    assert during["until"] <= 5 <= during["since"] + during["until"] + 0.01
    assert health["status"] == "degraded"
    assert not after["is_throttling"]
    assert (after["delay_ms"], after["since"], after["until"]) == (0, None, None)
    assert after["times_started"] == 1
    assert after["seconds_throttled"] >= 5
    assert [missing(each) for each in seen] == [0, 0]


@pytest.mark.parametrize("scope", ["topic", "global"])
@pytest.mark.parametrize(
    ("stalled", "healthy", "cpu", "memory"),
    [(3, 2, 0.3, 0.3), (1, 2, 0.85, 0.85), (0, 2, 1.0, 1.0), (1, 1, 0.85, 0.3)],
)
async def test_slow_readers_alone_or_load_alone_slow_nobody(
    stalled: int, healthy: int, cpu: float, memory: float, scope: str
) -> None:
    """60 % slow at 30 % CPU: no. 33 % slow at 85 % CPU: no. Exactly half: no."""
    async with (
        running(stats=FakeStats(cpu, memory), throttle_scope=scope, **SMALL_BUFFERS) as daemon,
        with_readers(daemon, stalled=stalled, healthy=healthy),
    ):
        daemon.hub.evaluate_throttle()
        figures = await throttler(daemon)
        answer = await daemon.publish("t", 1)

    assert not figures["is_throttling"]
    assert figures["slow_ratio"] == round(stalled / (stalled + healthy), 4)
    assert "not more than" in figures["reason"]
    assert answer["success"]


async def test_memory_alone_is_load_enough() -> None:
    """60 % slow readers and memory over 80 %: throttled, and the reason names memory."""
    async with (
        running(
            stats=FakeStats(cpu=0.1, memory=0.9), throttle_scope="global", **SMALL_BUFFERS
        ) as daemon,
        with_readers(daemon, stalled=3, healthy=2),
    ):
        daemon.hub.evaluate_throttle()
        figures = await throttler(daemon)

    assert figures["is_throttling"]
    assert figures["reason"] == "60 % of subscribers slow and memory at 90 %"


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
async def test_publishes_under_the_throttle_keep_their_order(raw_paths: bool) -> None:
    """What one publisher sends ahead is slowed one by one, and not reordered."""
    async with (
        running(raw_paths=raw_paths, throttle_scope="global") as daemon,
        subscribe(daemon.ws_url, "orders") as reader,
        publishing(daemon.port) as publisher,
    ):
        overload = ThrottleSample(subscribers=2, slow_subscribers=2, cpu=0.9, memory=0.9)
        daemon.hub.throttler.evaluate(overload, asyncio.get_running_loop().time())
        started_s = time.perf_counter()
        await publisher.send("orders", 20)
        took_s = time.perf_counter() - started_s
        seen = await offsets(reader, 20)

    assert took_s >= 20 * LEAST_DELAY_S
    assert publisher.acknowledged == list(range(1, 21))
    assert seen == list(range(1, 21))


# --- windows -------------------------------------------------------------------------------------


async def test_shrinking_window_reaches_readers_that_are_connected() -> None:
    """When memory gets short, readers that lag already keep less, and it is counted."""
    stats = TightStats()
    async with (
        running(stats=stats, **SMALL_BUFFERS) as daemon,
        subscribe(daemon.ws_url, stalls=True) as reader,
        publishing(daemon.port) as publisher,
    ):
        await send_in_portions(publisher, 1000)
        wide = await daemon.get_json("/metrics")

        stats.available_bytes = 0
        daemon.hub.evaluate_throttle()
        daemon.hub.evaluate_buffers()
        tight = await daemon.get_json("/metrics")
        seen = await offsets(reader, 1000)

    assert wide["messages"]["dropped"]["slow_consumer"] == 0
    assert tight["buffer_metrics"]["window_messages"] == WINDOW_MIN
    assert tight["buffer_metrics"]["available_bytes"] == 0
    assert tight["messages"]["dropped"]["slow_consumer"] == missing(seen) > 500
    assert tight["messages"]["queued"] == WINDOW_MIN
    assert seen[-WINDOW_MIN:] == list(range(1001 - WINDOW_MIN, 1001))


async def test_growing_window_reaches_readers_that_are_connected() -> None:
    """When memory is free again, a reader that lags may lag more."""
    stats = TightStats()
    stats.available_bytes = 0
    async with (
        running(stats=stats, **SMALL_BUFFERS) as daemon,
        subscribe(daemon.ws_url, stalls=True) as reader,
        publishing(daemon.port) as publisher,
    ):
        daemon.hub.evaluate_buffers()
        await send_in_portions(publisher, 500)
        tight = await daemon.get_json("/metrics")

        stats.available_bytes = 8 << 30
        daemon.hub.evaluate_throttle()
        daemon.hub.evaluate_buffers()
        await send_in_portions(publisher, 500)
        wide = await daemon.get_json("/metrics")
        seen = await offsets(reader, 1000)

    assert wide["buffer_metrics"]["window_messages"] == WINDOW_MAX
    assert wide["messages"]["dropped"] == tight["messages"]["dropped"]
    assert missing(seen) == wide["messages"]["dropped"]["slow_consumer"] > 0
    assert seen[-600:] == list(range(401, 1001))
