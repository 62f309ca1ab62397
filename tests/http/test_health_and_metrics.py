"""/health, /health/live, /health/ready and /metrics over real sockets: every field, and its truth.

What the control loops decide is tested with them; here is that it is shown.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest
from clients import offsets, raw_subscriber, subscribe
from daemons import Daemon, FakeStats, daemon_process, running, until
from http_wire import ask, get, post, responses, talk

from clevrd import __version__
from clevrd.handlers.operate.health import format_uptime

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")

# Field -> type, as clients of the published API rely on it.
HEALTH = {
    "status": str,
    "timestamp": str,
    "uptime": str,
    "topics": int,
    "subscribers": int,
    "goroutines": int,
    "memory": dict,
    "tasks": int,
    "version": str,
}
MEMORY = {
    "alloc_mb": (int, float),
    "total_alloc_mb": (int, float),
    "sys_mb": (int, float),
    "num_gc": int,
}
METRICS = {
    "total_topics": int,
    "total_subscribers": int,
    "slow_subscribers": int,
    "topics": list,
    "throttler_metrics": dict,
    "messages": dict,
    "process": dict,
}
TOPIC = {
    "name": str,
    "tenant_id": str,
    "messages_published": int,
    "active_subscribers": int,
    "total_subscribers": int,
    "created_at": str,
    "messages_delivered": int,
    "messages_dropped": int,
    "slow_subscribers": int,
    "offset": int,
    "epoch": str,
    "buffered_messages": int,
    "buffered_bytes": int,
}
THROTTLER = {
    "is_throttling": bool,
    "cpu_usage": (int, float),
    "memory_usage": (int, float),
    "slow_ratio": (int, float),
    "reason": str,
}
MESSAGES = {"published": int, "delivered": int, "dropped": dict, "queued": int}


@pytest.fixture
def stats() -> FakeStats:
    """Load figures that a test sets."""
    return FakeStats(cpu=0.25, memory=0.5)


@pytest.fixture
async def daemon(stats: FakeStats) -> AsyncIterator[Daemon]:
    """A daemon with a small ring, so that readers can lose something."""
    async with running(stats=stats, ring_messages=100) as running_daemon:
        yield running_daemon


def assert_fields(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that each expected field is there with its type; a bool is no number."""
    for name, kind in expected.items():
        assert name in found
        assert isinstance(found[name], kind), (name, found[name])
        assert kind is bool or not isinstance(found[name], bool), name


def assert_conserved(metrics: dict[str, Any]) -> None:
    """Check that each message offered to a reader is in one place, in sum and for each topic."""
    sums = metrics["messages"]
    dropped = sum(sums["dropped"].values())
    assert sums["offered"] == sums["delivered"] + dropped + sums["discarded"] + sums["queued"]
    for field, total in (
        ("messages_published", sums["published"]),
        ("messages_delivered", sums["delivered"]),
        ("messages_dropped", dropped),
        ("messages_discarded", sums["discarded"]),
        ("messages_queued", sums["queued"]),
    ):
        assert sum(topic[field] for topic in metrics["topics"]) == total, field


# --- health --------------------------------------------------------------------------------------


async def test_health_has_every_field_with_its_type(daemon: Daemon) -> None:
    """A client written for the published API finds what it documents."""
    health = await daemon.get_json("/health")

    assert_fields(health, HEALTH)
    assert_fields(health["memory"], MEMORY)


async def test_health_counts_topics_and_subscribers(daemon: Daemon) -> None:
    """As many as there are now."""
    await daemon.publish("a", 1)
    async with subscribe(daemon.ws_url, "b"), subscribe(daemon.ws_url, "b"):
        while_reading = await daemon.get_json("/health")
    await until(lambda: daemon.hub.subscribers == 0)
    afterwards = await daemon.get_json("/health")

    assert (while_reading["topics"], while_reading["subscribers"]) == (2, 2)
    assert (afterwards["topics"], afterwards["subscribers"]) == (2, 0)


async def test_health_tells_the_process_and_the_time(daemon: Daemon) -> None:
    """Memory in MiB of this process, the wall clock in UTC, asyncio's tasks, the version."""
    health = await daemon.get_json("/health")

    rss_mb = psutil.Process().memory_info().rss / 2**20
    memory = health["memory"]
    assert memory["alloc_mb"] == pytest.approx(rss_mb, rel=0.2)
    assert memory["sys_mb"] > memory["alloc_mb"]
    assert memory["total_alloc_mb"] >= memory["alloc_mb"] * 0.99
    assert RFC3339.fullmatch(health["timestamp"])
    age = datetime.now(UTC) - datetime.fromisoformat(health["timestamp"])
    assert -1 < age.total_seconds() < 60
    assert health["goroutines"] == health["tasks"] >= 1
    assert health["version"] == __version__
    assert re.fullmatch(r"\d+s", health["uptime"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m0s"), (330, "5m30s"), (3600, "1h0m0s"), (93_784, "26h3m4s")],
)
def test_uptime_is_written_as_people_say_it(seconds: float, text: str) -> None:
    """Hours, minutes, seconds, without leading zeros; days stay hours."""
    assert format_uptime(seconds) == text


async def test_health_says_when_it_is_draining_or_throttling(
    daemon: Daemon, stats: FakeStats
) -> None:
    """healthy; degraded while publishers are slowed; draining at the end. Always 200."""
    healthy = await ask(daemon.port, get("/health"))
    stats.cpu = 0.9
    async with await raw_subscriber(daemon.port, receive_bytes=4096):
        await fill(daemon)
        daemon.hub.evaluate_throttle()
        degraded = await ask(daemon.port, get("/health"))
    daemon.hub.is_draining = True
    draining = await ask(daemon.port, get("/health"))

    found = [(each.status, each.json["status"]) for each in (healthy, degraded, draining)]
    assert found == [(200, "healthy"), (200, "degraded"), (200, "draining")]


async def fill(daemon: Daemon, topic: str = "t") -> None:
    """Publish to ``topic`` until its one reader, which does not read, has lost messages."""
    data = "x" * 20_000
    while daemon.hub.settle(daemon.hub.topics) and sum_dropped(daemon, topic) == 0:
        await daemon.publish(topic, data)


def sum_dropped(daemon: Daemon, topic: str) -> int:
    """Return the drops of ``topic``."""
    found = daemon.hub.topics.find("default-tenant", topic)
    return 0 if found is None else found.losses.total


async def test_live_and_ready_part_ways_while_draining(daemon: Daemon) -> None:
    """An orchestrator takes the traffic away and does not restart it."""
    before = [await ask(daemon.port, get(f"/health/{probe}")) for probe in ("live", "ready")]

    daemon.hub.is_draining = True

    after = [await ask(daemon.port, get(f"/health/{probe}")) for probe in ("live", "ready")]
    assert [(each.status, each.json) for each in before] == [(200, {"status": "ok"})] * 2
    assert [each.status for each in after] == [200, 503]
    assert (after[1].code, after[1].json["retryable"]) == ("unavailable", True)
    assert int(after[1].headers["retry-after"]) >= 1


# --- metrics -------------------------------------------------------------------------------------


async def test_metrics_have_every_field_with_its_type(daemon: Daemon) -> None:
    """A client written for the published API finds what it documents."""
    await daemon.publish("t", 1)

    metrics = await daemon.get_json("/metrics")

    assert_fields(metrics, METRICS)
    assert_fields(metrics["topics"][0], TOPIC)
    assert_fields(metrics["throttler_metrics"], THROTTLER)
    assert_fields(metrics["messages"], MESSAGES)
    assert RFC3339.fullmatch(metrics["topics"][0]["created_at"])
    assert {"since", "until"} <= metrics["throttler_metrics"].keys()
    assert "buffer_metrics" in metrics


async def test_metrics_of_a_new_daemon_are_empty_and_whole(daemon: Daemon) -> None:
    """Nothing was published: zeros, not missing fields."""
    metrics = await daemon.get_json("/metrics")

    assert (metrics["total_topics"], metrics["total_subscribers"]) == (0, 0)
    assert metrics["topics"] == []
    assert_fields(metrics, METRICS)
    assert_conserved(metrics)


async def test_metrics_count_what_happened(daemon: Daemon) -> None:
    """Two readers of one topic, one of them gone, and a topic that nobody reads."""
    async with subscribe(daemon.ws_url, "t") as stays:
        async with subscribe(daemon.ws_url, "t") as leaves:
            for n in range(3):
                await daemon.publish("t", n)
            await offsets(leaves, upto=3)
        epoch = (await daemon.publish("t", 3))["epoch"]
        await daemon.publish("unread", 1)
        await offsets(stays, upto=4)
        await until(lambda: daemon.hub.subscribers == 1)
        metrics = await daemon.get_json("/metrics")

    topic = {each["name"]: each for each in metrics["topics"]}["default-tenant:t"]
    assert (metrics["total_topics"], metrics["total_subscribers"]) == (2, 1)
    assert (topic["messages_published"], topic["offset"], topic["buffered_messages"]) == (4, 4, 4)
    assert (topic["messages_delivered"], topic["messages_dropped"]) == (7, 0)
    assert (topic["active_subscribers"], topic["total_subscribers"]) == (1, 1)
    assert topic["epoch"] == epoch
    assert topic["buffered_bytes"] > 4 * 100
    assert (metrics["messages"]["published"], metrics["messages"]["delivered"]) == (5, 7)
    assert_conserved(metrics)


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "circuit_breaker", "latest"])
async def test_no_message_is_unaccounted_for(daemon: Daemon, policy: str) -> None:
    """A reader that stalls, one that reads, one that leaves: the sums hold at every moment."""
    stalled = await raw_subscriber(daemon.port, f"topic=t&policy={policy}", receive_bytes=4096)
    async with stalled, subscribe(daemon.ws_url, "t") as reads:
        while not sum_dropped(daemon, "t"):
            await daemon.publish("t", "x" * 20_000)
            assert_conserved(await daemon.get_json("/metrics"))
        last = await daemon.publish("t", 1)
        await offsets(reads, upto=last["offset"])
        while_stalled = await daemon.get_json("/metrics")
    await until(lambda: daemon.hub.subscribers == 0)
    afterwards = await daemon.get_json("/metrics")

    assert_conserved(while_stalled)
    assert sum(while_stalled["messages"]["dropped"].values()) > 0
    assert while_stalled["slow_subscribers"] == while_stalled["topics"][0]["slow_subscribers"] == 1
    assert_conserved(afterwards)
    assert afterwards["messages"]["queued"] == 0
    assert afterwards["messages"]["discarded"] > 0


async def test_sums_outlive_an_evicted_topic() -> None:
    """Totals never fall, although the topic is gone from the list."""
    async with running(topic_idle_s=0.0) as daemon:
        async with subscribe(daemon.ws_url, "t") as reader:
            await daemon.publish("t", 1)
            await offsets(reader, upto=1)
        await until(lambda: daemon.hub.subscribers == 0)

        daemon.hub.evict_idle_topics()

        metrics = await daemon.get_json("/metrics")
        assert metrics["topics"] == []
        assert (metrics["messages"]["published"], metrics["messages"]["delivered"]) == (1, 1)


async def test_throttler_metrics_show_the_decision_and_its_inputs(
    daemon: Daemon, stats: FakeStats
) -> None:
    """Ratios are 0..1; times are null until it throttles, then ago and to come."""
    daemon.hub.evaluate_throttle()
    calm = (await daemon.get_json("/metrics"))["throttler_metrics"]
    stats.cpu = 0.9
    async with await raw_subscriber(daemon.port, receive_bytes=4096):
        await fill(daemon)
        daemon.hub.evaluate_throttle()
        busy = (await daemon.get_json("/metrics"))["throttler_metrics"]

    assert (calm["is_throttling"], calm["cpu_usage"], calm["memory_usage"]) == (False, 0.25, 0.5)
    assert (calm["since"], calm["until"], calm["slow_ratio"]) == (None, None, 0)
    assert (busy["is_throttling"], busy["cpu_usage"], busy["slow_ratio"]) == (True, 0.9, 1)
    assert busy["since"] >= 0
    assert 0 < busy["until"] <= 5
    assert busy["reason"] != calm["reason"]


async def test_buffer_metrics_show_the_window(daemon: Daemon) -> None:
    """What readers may lag now, once it has been decided."""
    daemon.hub.evaluate_buffers()

    metrics = await daemon.get_json("/metrics")

    assert metrics["buffer_metrics"]["window_messages"] == daemon.hub.buffers.window


@pytest.mark.parametrize(("option", "listed"), [("", 100), ("?topics=3", 3), ("?topics=0", 0)])
async def test_topics_are_bounded_and_the_busiest_come_first(
    daemon: Daemon, option: str, listed: int
) -> None:
    """100 unless asked otherwise; the counts are of all topics either way."""
    for number in range(101):
        await daemon.publish(f"t{number}", 1)
    for _ in range(2):
        await daemon.publish("t77", 1)

    metrics = await daemon.get_json(f"/metrics{option}")

    assert metrics["total_topics"] == 101
    assert metrics["messages"]["published"] == 103
    assert len(metrics["topics"]) == listed
    assert [topic["name"] for topic in metrics["topics"][:1]] == (
        ["default-tenant:t77"] if listed else []
    )


@pytest.mark.parametrize("option", ["-1", "x", "", "1.5", "%D9%A3", "1&topics=2"])
async def test_malformed_topics_option_is_a_400(daemon: Daemon, option: str) -> None:
    """It says what the option has to be."""
    answer = await ask(daemon.port, get(f"/metrics?topics={option}"))

    assert (answer.status, answer.code) == (400, "invalid_request")
    assert "whole number" in answer.json["error"]


async def test_refusals_are_counted_by_code(daemon: Daemon) -> None:
    """Each refused request, whichever way it came."""
    for sent in (post("{"), post("{", "X: ä"), get("/nope"), get("/publish/batch"), b"\0\r\n\r\n"):
        await ask(daemon.port, sent)

    metrics = await daemon.get_json("/metrics")

    assert metrics["connections"]["refused"] == {
        "invalid_request": 3,
        "not_found": 1,
        "method_not_allowed": 1,
    }


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html, */*;q=0.1", None])
async def test_metrics_are_json(daemon: Daemon, accept: str | None) -> None:
    """Real JSON: no bare NaN, no text around it."""
    fields = [] if accept is None else [f"Accept: {accept}"]

    answer = await ask(daemon.port, get("/metrics", *fields))

    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    json.loads(answer.body, parse_constant=pytest.fail)


@pytest.mark.parametrize("path", ["/health", "/health/live", "/metrics"])
async def test_head_is_answered_like_get_without_a_body(daemon: Daemon, path: str) -> None:
    """The length is the one the body would have."""
    sent = get(path, "Connection: close", method="HEAD")

    [answer] = responses(await talk(daemon.port, [sent]), to_head=True)

    assert answer.status == 200
    assert int(answer.headers["content-length"]) > 10
    assert answer.headers["content-type"].startswith("application/json")


async def test_metrics_are_answered_while_a_flood_comes_in(daemon: Daemon) -> None:
    """Somebody who looks gets an answer, and one that adds up."""
    flood = asyncio.ensure_future(
        talk(daemon.port, [post('{"topic":"t","data":1}') * 2000], shut=True)
    )
    async with subscribe(daemon.ws_url, "t"):
        while not flood.done():
            assert_conserved(await daemon.get_json("/metrics"))

    assert len(responses(await flood)) == 2000


@pytest.mark.holds_loop(reason="starts a daemon process and waits for it")
async def test_real_process_measures_itself() -> None:
    """Without injected figures: load within 0..1, and counters of the process."""
    with daemon_process() as process:
        health = await ask(process.port, get("/health"))
        metrics = await ask(process.port, get("/metrics"))

    throttler = metrics.json["throttler_metrics"]
    assert 0 <= throttler["cpu_usage"] <= 1
    assert 0 <= throttler["memory_usage"] <= 1
    assert health.json["status"] == "healthy"
    assert 10 < health.json["memory"]["alloc_mb"] < 500
    assert metrics.json["process"].keys() >= {"rss_bytes"}
