"""What the published system is known to get wrong, each as a promise of this one.

It closes every subscription after some 40 s, never opens its breaker (the last word on that is in
test_slow_readers.py), prints /metrics as something that is not JSON, guesses CPU use from the
number of threads, and panics when a publisher meets a subscriber that closes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from contextlib import AsyncExitStack, suppress
from typing import Any, NoReturn, cast

import pytest
from clients import (
    CLOSE,
    PING,
    PONG,
    RECORD,
    SMALL_BUFFERS,
    masked,
    offset_of,
    publishing,
    raw_subscriber,
    read_to_the_end,
    subscribe,
)
from conftest import FakeClock
from daemons import Daemon, FakeStats, running, until
from websockets.asyncio.client import ClientConnection

from clevrd.control.adaptive_throttler import ThrottleSample
from clevrd.control.system_stats import RealMachine, SystemStats

READERS_PER_LANE = 100
POLICIES = ("drop_oldest", "drop_newest", "circuit_breaker", "latest")


# --- subscriptions last --------------------------------------------------------------------------


async def test_subscriber_that_answers_pings_stays() -> None:
    """Twenty intervals and more, with a library's client and with one that only answers pings."""
    async with (
        running(ping_interval_s=0.1, pong_timeout_s=0.096) as daemon,
        subscribe(daemon.ws_url) as reader,
        await raw_subscriber(daemon.port) as raw,
        asyncio.timeout(15),
    ):
        for _ in range(20):
            assert (await raw.frame()).opcode == PING
            raw.send(masked(PONG))

        answer = await daemon.publish("t", "still there?")
        message = await reader.recv()
        figures = await daemon.get_json("/metrics")

    assert offset_of(message) == answer["offset"]
    assert answer["subscribers"] == 2
    assert figures["connections"]["pings_unanswered"] == 0
    assert figures["connections"]["closed"] == {}


# --- the breaker opens ---------------------------------------------------------------------------


async def test_breaker_opens() -> None:
    """A reader that asked for a circuit breaker and stalls is closed in time, with its own code."""
    async with (
        running(**SMALL_BUFFERS, circuit_breaker_open_s=0.2) as daemon,
        subscribe(daemon.ws_url, stalls=True, policy="circuit_breaker", buffer=10) as reader,
        publishing(daemon.port) as publisher,
    ):
        while daemon.hub.subscribers:
            await publisher.send("t", 20, RECORD)

        _, code, reason = await read_to_the_end(reader)

    assert (code, reason) == (4101, "circuit_open")


# --- /metrics is JSON ----------------------------------------------------------------------------


def no_json(name: str) -> NoReturn:
    """Refuse the constants that Python reads and JSON does not know (RFC 8259 §6)."""
    raise AssertionError(f"{name} is not JSON")


async def strict_metrics(daemon: Daemon, accept: str) -> dict[str, Any]:
    """Return /metrics, read as strictly as any language reads it."""
    headers = {"Accept": accept}
    async with daemon.http.get(f"{daemon.url}/metrics", headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        body = await response.read()
    figures: dict[str, Any] = json.loads(body.decode(), parse_constant=no_json)
    return figures


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html"])
async def test_metrics_is_json_before_anything_happened(accept: str) -> None:
    """No topics, no subscribers, nothing evaluated: no NaN, no null where a number belongs."""
    async with running() as daemon:
        figures = await strict_metrics(daemon, accept)

    assert (figures["total_topics"], figures["total_subscribers"], figures["topics"]) == (0, 0, [])
    assert figures["throttler_metrics"]["is_throttling"] is False
    assert figures["throttler_metrics"]["cpu_usage"] == 0


async def test_metrics_is_json_whatever_topics_are_called() -> None:
    """Quotes, backslashes and all of Unicode in a topic's name come out as they went in."""
    names = ['say "hi"', "back\\slash", "</script>", "naïve", "😀", "line\u2028separator", "{}"]
    async with running(throttle_scope="global") as daemon:
        for name in names:
            await daemon.publish(name, 1)
        daemon.hub.evaluate_throttle()
        daemon.hub.evaluate_buffers()
        overload = ThrottleSample(subscribers=1, slow_subscribers=1, cpu=1.0, memory=1.0)
        daemon.hub.throttler.evaluate(overload, asyncio.get_running_loop().time())

        figures = await strict_metrics(daemon, "*/*")

    assert {topic["name"] for topic in figures["topics"]} == {f"default-tenant:{n}" for n in names}
    assert figures["throttler_metrics"]["is_throttling"] is True


# --- CPU is measured -----------------------------------------------------------------------------


async def test_cpu_figure_is_measured_and_not_guessed_from_threads() -> None:
    """A hundred idle threads are no load; one busy loop is."""
    machine = MachineWithClock()
    stats = SystemStats(1 << 30, machine=machine)
    enough = threading.Event()
    threads = [threading.Thread(target=enough.wait) for _ in range(100)]
    async with running(stats=cast(FakeStats, stats)) as daemon:
        daemon.hub.evaluate_throttle()
        for thread in threads:
            thread.start()
        await asyncio.sleep(0)
        machine.clock.advance(10.0)
        daemon.hub.evaluate_throttle()
        idle = daemon.hub.last_load

        for _ in range(10):
            burn(0.03)
            await asyncio.sleep(0)
        machine.clock.advance(1.0)
        daemon.hub.evaluate_throttle()
        busy = daemon.hub.last_load
        figures = await daemon.get_json("/metrics")
        enough.set()
    for thread in threads:
        thread.join()

    assert idle is not None
    assert busy is not None
    assert idle.cpu_loop < 0.1
    assert busy.cpu_loop >= 0.3
    assert figures["throttler_metrics"]["cpu_usage"] == round(busy.cpu, 4)


class MachineWithClock(RealMachine):
    """The machine we run on, whose time passes when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()

    def now_s(self) -> float:
        """Return the time that the test has set."""
        return self.clock()


def burn(cpu_s: float) -> None:
    """Use this thread's CPU for a while."""
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        pass


# --- publishers meet closing subscribers ---------------------------------------------------------


async def test_publishers_meet_closing_subscribers_and_nothing_happens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Readers that leave in every abrupt way, in the middle of a flood, disturb nobody."""
    caplog.set_level(logging.WARNING)
    async with (
        running(**SMALL_BUFFERS) as daemon,
        AsyncExitStack() as stack,
        asyncio.timeout(20),
    ):
        steady = await stack.enter_async_context(subscribe(daemon.ws_url))
        watching = asyncio.create_task(read_and_check(steady))
        flooding = [asyncio.create_task(flood(daemon)) for _ in range(2)]

        async with asyncio.TaskGroup() as tasks:
            for lane in range(8):
                tasks.create_task(churn(daemon, random.Random(lane)))  # noqa: S311  # test data

        for task in flooding:
            task.cancel()
        acknowledged = await asyncio.gather(*flooding)
        figures = await daemon.get_json("/metrics")
        await until(lambda: daemon.hub.subscribers == 1)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    sums = figures["messages"]
    accounted = sum(sums["dropped"].values()) + sums["delivered"] + sums["discarded"]
    assert sums["offered"] == accounted + sums["queued"]
    # How many is a matter of the machine; the readers above have read some of each lane's.
    assert sums["published"] >= sum(acknowledged)
    assert min(acknowledged) > 0
    assert figures["connections"]["accepted"] >= 8 * READERS_PER_LANE
    assert figures["connections"]["background_errors"] == 0
    assert caplog.messages == []


async def read_and_check(reader: ClientConnection) -> None:
    """Read until cancelled; fails when a message comes twice or out of order."""
    last = 0
    async for message in reader:
        offset = offset_of(message)
        assert offset > last
        last = offset


async def flood(daemon: Daemon) -> int:
    """Publish until cancelled; return how many publishes were acknowledged."""
    async with publishing(daemon.port) as publisher:
        try:
            while True:
                await publisher.send("t", 10, RECORD)
        except asyncio.CancelledError:
            return len(publisher.acknowledged)


async def churn(daemon: Daemon, chance: random.Random) -> None:
    """Connect, read a little or nothing, and go, again and again."""
    for _ in range(READERS_PER_LANE):
        query = f"topic=t&policy={chance.choice(POLICIES)}&buffer={chance.randint(1, 50)}"
        reader = await raw_subscriber(daemon.port, query, receive_bytes=4096)
        for _ in range(chance.choice((0, 0, 1, 20))):
            if (await reader.frame()).opcode == CLOSE:
                break
        match chance.randrange(5):
            case 0:
                reader.vanish()
            case 1:
                reader.send(masked(CLOSE, (1001).to_bytes(2, "big")))
            case 2:
                reader.send(b"\x81\x00")  # not masked
            case 3:
                reader.writer.write_eof()
        reader.writer.close()
