"""Readers that stall, crawl or vanish: they hurt nobody but themselves, and every loss is counted.

Kernel and transport buffers are made small, so that a reader which does not read is soon noticed.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psutil
import pytest
from clients import (
    RECORD,
    SMALL_BUFFERS,
    RawPublisher,
    RawSubscriber,
    missing,
    offsets,
    publishing,
    raw_subscriber,
    read_to_the_end,
    subscribe,
    subscriber_process,
)
from daemons import Daemon, running, until

from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic

MIB = 1 << 20


def topic_of(daemon: Daemon) -> Topic:
    """Return the one topic there is."""
    (topic,) = daemon.hub.topics
    return topic


def only_reader(daemon: Daemon) -> Subscriber:
    """Return the one subscriber there is, as the hub knows it."""
    return daemon.only_reader()


async def publish_until_blocked(publisher: RawPublisher, reader: Subscriber) -> None:
    """Publish until ``reader``'s transport is full."""
    while not reader.is_blocked:
        await publisher.send("t", 10, RECORD)


def dropped(figures: dict[str, Any]) -> int:
    """Return how many messages /metrics says were dropped."""
    return sum(figures["messages"]["dropped"].values())


def assert_conserved(figures: dict[str, Any]) -> None:
    """Fail unless every message offered is delivered, dropped, discarded or queued."""
    sums = figures["messages"]
    accounted = sums["delivered"] + dropped(figures) + sums["discarded"] + sums["queued"]
    assert sums["offered"] == accounted, sums


async def watch_conservation(daemon: Daemon) -> None:
    """Poll /metrics until cancelled, and fail when its sums don't fit."""
    while True:
        assert_conserved(await daemon.get_json("/metrics"))


@asynccontextmanager
async def watched(daemon: Daemon) -> AsyncIterator[None]:
    """Poll /metrics for as long as the block runs; its sums have to fit every time."""
    watch = asyncio.create_task(watch_conservation(daemon))
    try:
        yield
        # Fails here if a poll did.
        assert not watch.done() or watch.result() is None
    finally:
        watch.cancel()


# --- one slow reader -----------------------------------------------------------------------------


async def test_drop_oldest_skips_to_the_newest_and_counts_the_hole() -> None:
    """It reads on where its window begins, and what it missed is what /metrics says."""
    async with (
        running(**SMALL_BUFFERS) as daemon,
        subscribe(daemon.ws_url, stalls=True, buffer=20) as reader,
        publishing(daemon.port) as publisher,
    ):
        await publish_until_blocked(publisher, only_reader(daemon))

        await publisher.send("t", 500, RECORD)
        figures = await daemon.get_json("/metrics")
        seen = await offsets(reader, topic_of(daemon).head)

    assert seen[:10] == list(range(1, 11))
    assert seen[-20:] == list(range(seen[-1] - 19, seen[-1] + 1))
    assert missing(seen) == dropped(figures) > 400
    assert figures["messages"]["dropped"]["slow_consumer"] == dropped(figures)
    assert figures["slow_subscribers"] == 1
    assert_conserved(figures)


async def test_drop_newest_keeps_the_first_and_counts_the_refused() -> None:
    """What it was promised first it gets, however long ago; what came too late is a hole."""
    async with (
        running(**SMALL_BUFFERS, ring_messages=100) as daemon,
        subscribe(daemon.ws_url, stalls=True, buffer=20, policy="drop_newest") as reader,
        publishing(daemon.port) as publisher,
    ):
        await publish_until_blocked(publisher, only_reader(daemon))
        decided = only_reader(daemon).cursor

        await publisher.send("t", 500, RECORD)
        figures = await daemon.get_json("/metrics")
        kept = await offsets(reader, decided + 20)
        await until(lambda: only_reader(daemon).is_live)
        await publisher.send("t", 3, RECORD)
        seen = kept + await offsets(reader, topic_of(daemon).head)

    assert kept == list(range(1, decided + 21))
    assert seen[len(kept) :] == [seen[-1] - 2, seen[-1] - 1, seen[-1]]
    assert missing(seen) == dropped(figures) > 400
    assert_conserved(figures)


async def test_circuit_breaker_opens_and_tells_who_reads_on() -> None:
    """Without openings it is closed with 4101 after so many drops, behind what was sent to it."""
    async with (
        running(
            **SMALL_BUFFERS, circuit_breaker_threshold=50, circuit_breaker_openings=0
        ) as daemon,
        subscribe(daemon.ws_url, stalls=True, buffer=20, policy="circuit_breaker") as reader,
        publishing(daemon.port) as publisher,
    ):
        await publish_until_blocked(publisher, only_reader(daemon))
        await publisher.send("t", 500, RECORD)
        figures = await daemon.get_json("/metrics")

        seen, code, reason = await read_to_the_end(reader)

        await until(lambda: len(daemon.server.connections) == 0)
    assert (code, reason) == (4101, "circuit_open")
    assert missing(seen) == 0
    assert figures["connections"]["closed"] == {"4101": 1}
    assert figures["total_subscribers"] == 0
    assert dropped(figures) >= 50
    assert_conserved(figures)


async def test_circuit_stays_closed_below_its_threshold() -> None:
    """A stall that drops less than the threshold is survived, and the count begins anew."""
    async with (
        running(**SMALL_BUFFERS, circuit_breaker_threshold=10_000) as daemon,
        subscribe(daemon.ws_url, stalls=True, buffer=20, policy="circuit_breaker") as reader,
        publishing(daemon.port) as publisher,
    ):
        await publish_until_blocked(publisher, only_reader(daemon))
        await publisher.send("t", 500, RECORD)
        first = only_reader(daemon).cursor

        kept = await offsets(reader, first)
        await until(lambda: only_reader(daemon).is_live)
        await publisher.send("t", 1, RECORD)
        seen = kept + await offsets(reader, topic_of(daemon).head)

        assert only_reader(daemon).dropped_in_stall == 0
        assert only_reader(daemon).dropped == missing(seen)


async def test_reader_that_stalls_again_and_again_is_counted_each_time() -> None:
    """All holes of all stalls together are the drops in /metrics."""
    async with (
        running(**SMALL_BUFFERS) as daemon,
        subscribe(daemon.ws_url, stalls=True, buffer=30) as reader,
        publishing(daemon.port) as publisher,
        watched(daemon),
    ):
        seen: list[int] = []
        for _ in range(5):
            await publish_until_blocked(publisher, only_reader(daemon))
            await publisher.send("t", 200, RECORD)
            seen += await offsets(reader, topic_of(daemon).head)
            await until(lambda: only_reader(daemon).is_live)
        figures = await daemon.get_json("/metrics")

    assert missing(seen) == dropped(figures) > 500


async def test_stalled_reader_that_leaves_is_accounted_for() -> None:
    """What still waited for it is discarded, and nothing is queued for nobody."""
    async with (
        running(**SMALL_BUFFERS) as daemon,
        await raw_subscriber(daemon.port, "topic=t&buffer=20", receive_bytes=4096) as reader,
        publishing(daemon.port) as publisher,
    ):
        await publish_until_blocked(publisher, only_reader(daemon))
        await publisher.send("t", 100, RECORD)

        reader.vanish()
        await until(lambda: daemon.hub.subscribers == 0)
        figures = await daemon.get_json("/metrics")

    assert figures["messages"]["queued"] == 0
    assert figures["messages"]["discarded"] == 20
    assert_conserved(figures)


# --- all kinds among healthy ones ----------------------------------------------------------------


async def test_the_healthy_lose_nothing_to_those_that_stall_crawl_or_vanish() -> None:
    """Five readers get every message while one stalls, one crawls and one hangs beside them."""
    total = 3000
    async with (
        running(**SMALL_BUFFERS, ping_interval_s=0.4, pong_timeout_s=0.38) as daemon,
        AsyncExitStack() as stack,
        asyncio.timeout(20),
    ):
        healthy = [await stack.enter_async_context(subscribe(daemon.ws_url)) for _ in range(5)]
        slow = [
            await stack.enter_async_context(
                await raw_subscriber(daemon.port, "topic=t&buffer=50", receive_bytes=4096)
            )
            for _ in range(2)
        ]
        hanging = await stack.enter_async_context(subscriber_process(daemon.ws_url))
        os.kill(hanging.pid, signal.SIGSTOP)
        await stack.enter_async_context(watched(daemon))
        crawling = asyncio.create_task(crawl(slow[1]))

        publisher = await stack.enter_async_context(publishing(daemon.port))
        reading = asyncio.gather(*(offsets(reader, total) for reader in healthy))
        for _ in range(total // 50):
            await publisher.send("t", 50, RECORD)
        seen = await reading

        await until(lambda: daemon.hub.subscribers == len(healthy))
        figures = await daemon.get_json("/metrics")
        crawling.cancel()

    assert seen == [list(range(1, total + 1))] * len(healthy)
    assert figures["connections"]["pings_unanswered"] == 3
    assert figures["connections"]["background_errors"] == 0
    assert dropped(figures) > 0
    assert_conserved(figures)


async def crawl(reader: RawSubscriber) -> None:
    """Read a kilobyte a second, and answer nothing."""
    while True:
        await reader.read(10)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "circuit_breaker", "latest"])
async def test_two_hundred_stalled_readers_of_large_messages_stay_in_bounds(policy: str) -> None:
    """What they hold is the ring and a budget, not a copy for each; who reads misses nothing."""
    readers, messages = 200, 2000
    data = b'"%b"' % (b"x" * 65_536)
    async with (
        running(max_memory_mb=64, circuit_breaker_threshold=1_000_000_000) as daemon,
        AsyncExitStack() as stack,
        asyncio.timeout(25),
    ):
        for _ in range(readers):
            query = f"topic=t&policy={policy}"
            stalled = await raw_subscriber(daemon.port, query, receive_bytes=4096)
            await stack.enter_async_context(stalled)
        healthy = await stack.enter_async_context(subscribe(daemon.ws_url))
        publisher = await stack.enter_async_context(publishing(daemon.port))
        before_bytes = psutil.Process().memory_info().rss

        seen: list[int] = []
        for _ in range(messages // 5):
            await publisher.send("t", 5, data)
            seen += await offsets(healthy, topic_of(daemon).head)
            assert daemon.hub.topics.ring_bytes <= daemon.hub.topics.max_ring_bytes
            assert daemon.hub.topics.kept.left_bytes >= 0
        grown_bytes = psutil.Process().memory_info().rss - before_bytes
        figures = await daemon.get_json("/metrics")

    assert seen == list(range(1, messages + 1))
    assert grown_bytes < 100 * MIB, "of 26 GB that were not read"
    assert figures["total_subscribers"] == readers + 1
    assert dropped(figures) > readers * messages / 5
    assert_conserved(figures)
