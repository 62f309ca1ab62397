"""A real Prometheus scrapes a daemon, as docs/operations.md tells to configure it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from clients import publishing, subscribe
from daemons import Daemon, running, until
from keys import ADMIN, READER, access
from prometheus import KEY_FILE, Prometheus, example, need, scraping

SUBSCRIBERS = 5
DROPPED = "clevrd_messages_dropped_total"

# PromQL -> where the JSON of /metrics has the same figure.
FIGURES = {
    "clevrd_topics": ("total_topics",),
    "clevrd_subscribers": ("total_subscribers",),
    "clevrd_slow_subscribers": ("slow_subscribers",),
    "clevrd_messages_published_total": ("messages", "published"),
    "clevrd_messages_offered_total": ("messages", "offered"),
    "clevrd_messages_delivered_total": ("messages", "delivered"),
    "clevrd_messages_discarded_total": ("messages", "discarded"),
    "clevrd_messages_queued": ("messages", "queued"),
    "clevrd_circuits_opened_total": ("connections", "circuits_opened"),
    "clevrd_background_errors_total": ("connections", "background_errors"),
    "clevrd_log_lines_dropped_total": ("log", "dropped"),
    "clevrd_idempotency_keys": ("idempotency", "keys"),
    "clevrd_publish_wait_seconds_count": ("messages", "published"),
}


@asynccontextmanager
async def load(daemon: Daemon) -> AsyncIterator[None]:
    """Publish without a pause to some subscribers that read it all."""

    async def read(reader: Any) -> None:
        async for _ in reader:
            pass

    async def publish() -> None:
        async with publishing(daemon.port) as publisher:
            while True:
                await publisher.send("t", 10)

    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        running_tasks = [tasks.create_task(publish())]
        for _ in range(SUBSCRIBERS):
            reader = await stack.enter_async_context(subscribe(daemon.ws_url, "t"))
            running_tasks.append(tasks.create_task(read(reader)))
        yield
        for task in running_tasks:
            task.cancel()


async def at_least(prometheus: Prometheus, query: str, value: float) -> float:
    """Wait until ``query`` finds at least ``value``; return what it finds."""
    async with asyncio.timeout(20):
        while True:
            found = await prometheus.value(query)
            if found is not None and found >= value:
                return found
            await asyncio.sleep(0.05)


@pytest.mark.timeout(60)
async def test_prometheus_scrapes_a_daemon_under_load(tmp_path: Path) -> None:
    """It is up, its counters rise, and at rest it has what the JSON says."""
    async with running() as daemon, scraping(daemon.port, tmp_path) as prometheus:
        async with load(daemon):
            await at_least(prometheus, "up", 1)
            first = await at_least(prometheus, "clevrd_messages_delivered_total", 1)
            more = await at_least(prometheus, "clevrd_messages_delivered_total", first + 1)
            await at_least(prometheus, 'clevrd_connections{kind="websocket"}', SUBSCRIBERS)
            rate = await at_least(prometheus, "rate(clevrd_received_bytes_total[2s])", 1)
            target = await prometheus.target()
        await until(lambda: daemon.hub.subscribers == 0)
        told = await daemon.get_json("/metrics")
        published = told["messages"]["published"]
        await at_least(prometheus, "clevrd_messages_published_total", published)
        await at_least(prometheus, "clevrd_messages_discarded_total", told["messages"]["discarded"])
        await at_least(prometheus, "1 - (clevrd_subscribers > bool 0)", 1)
        found = {query: await at_least(prometheus, query, 0) for query in FIGURES}
        dropped = {
            reason: await at_least(prometheus, f'{DROPPED}{{reason="{reason}"}}', 0)
            for reason in told["messages"]["dropped"]
        }
        p99_s = await at_least(
            prometheus, "histogram_quantile(0.99, clevrd_publish_to_socket_seconds_bucket)", 0
        )
        units = await prometheus.get("targets/metadata", metric="clevrd_received_bytes")

    assert more > first
    assert rate > 0
    assert (target["health"], target["lastError"]) == ("up", "")
    for query, path in FIGURES.items():
        expected: Any = told
        for name in path:
            expected = expected[name]
        assert found[query] == expected, query
    assert dropped == told["messages"]["dropped"]
    assert p99_s > 0
    # Units are told in OpenMetrics alone.
    assert [each["unit"] for each in units] == ["bytes"]


@pytest.mark.timeout(60)
async def test_prometheus_scrapes_with_a_key(tmp_path: Path) -> None:
    """With the permission admin in the required mode; without the permission it is told why not."""
    async with running(access=access()) as daemon:
        (tmp_path / "admin").mkdir()
        async with scraping(daemon.port, tmp_path / "admin", key=ADMIN.secret) as prometheus:
            await at_least(prometheus, "up", 1)
            topics = await at_least(prometheus, "clevrd_topics", 0)
        async with scraping(daemon.port, tmp_path, key=READER.secret) as prometheus:
            await at_least(prometheus, "1 - up", 1)
            target = await prometheus.target()

    assert topics == 0
    assert "403" in target["lastError"]


@pytest.mark.timeout(60)
async def test_prometheus_scrapes_the_admin_address(tmp_path: Path) -> None:
    """It needs no key there, in the required mode too."""
    async with running(access=access(), admin_address="127.0.0.1:0") as daemon:
        port = int(daemon.server.admin_addresses[0].rsplit(":", 1)[1])
        async with scraping(port, tmp_path) as prometheus:
            await at_least(prometheus, "up", 1)
            topics = await at_least(prometheus, "clevrd_topics", 0)

    assert topics == 0


@pytest.mark.parametrize("has_key", [False, True])
async def test_documented_configuration_is_right(has_key: bool, tmp_path: Path) -> None:
    """promtool takes it."""
    file = tmp_path / "prometheus.yml"
    (tmp_path / "key").write_text("secret")
    file.write_text(example(has_key=has_key).replace(KEY_FILE, f"{tmp_path}/key"))

    checked = await asyncio.to_thread(
        subprocess.run,
        [need("promtool"), "check", "config", str(file)],
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
