"""Arrivals: all may connect to a daemon that is in time; fewer and fewer while its loop is late."""

from __future__ import annotations

import asyncio
import math

import aiohttp
import pytest
from clients import client_of, subscribe
from daemons import running
from websockets.exceptions import InvalidStatus

from clevrd.control.arrivals import (
    FIRST_RATE_PER_S,
    IN_TIME_S,
    LATE_S,
    LEAST_RATE_PER_S,
    SPREAD_S,
    Arrivals,
    TooManyArrive,
)
from clevrd.tenants.settings import read_access


def late(arrivals: Arrivals, times: int, late_s: float = LATE_S, now_s: float = 0.0) -> None:
    """Look so many times at a loop that is so late."""
    for _ in range(times):
        arrivals.look(late_s, now_s)


def taken(arrivals: Arrivals, count: int, now_s: float) -> int:
    """Return how many of ``count`` clients may connect at ``now_s``."""
    refused = 0
    for _ in range(count):
        try:
            arrivals.check(now_s, 0.5)
        except TooManyArrive:
            refused += 1
    return count - refused


def test_loop_that_is_late_once_bounds_nothing() -> None:
    """One pause, as of a garbage collection or a disk, is no reason to refuse anybody."""
    arrivals = Arrivals()

    late(arrivals, 1, 5.0)
    late(arrivals, 1, 0.0)
    late(arrivals, 1, 5.0)

    assert not arrivals.is_limited
    assert arrivals.rate_per_s == math.inf


def test_rate_falls_while_the_loop_is_late_and_ends_when_it_is_in_time() -> None:
    """Halved at each look; then it grows until it ends, slower while the loop is a little late."""
    arrivals = Arrivals()

    late(arrivals, 2)
    first = arrivals.rate_per_s
    late(arrivals, 2)
    quarter = arrivals.rate_per_s
    late(arrivals, 5, (LATE_S + IN_TIME_S) / 2)
    between = arrivals.rate_per_s
    late(arrivals, 20)
    least = arrivals.rate_per_s
    looks = 0
    while arrivals.is_limited:
        late(arrivals, 1, 0.0)
        looks += 1

    assert (first, quarter) == (FIRST_RATE_PER_S, FIRST_RATE_PER_S / 4)
    assert quarter < between < 1.5 * quarter
    assert least == LEAST_RATE_PER_S
    assert looks <= 18
    assert arrivals.rate_per_s == math.inf


def test_daemon_that_is_steadily_a_little_late_takes_all_in_the_end() -> None:
    """Lateness that is below the bound's does not keep the bound for ever."""
    arrivals = Arrivals()
    late(arrivals, 20)

    late(arrivals, 100, (LATE_S + IN_TIME_S) / 2)

    assert not arrivals.is_limited


def test_change_is_told_once() -> None:
    """Each beginning and each end is one line of the log, not each look."""
    arrivals = Arrivals()

    told = [arrivals.look(late_s, 0.0) for late_s in (1.0, 1.0, 1.0, *[0.0] * 10)]

    assert told.count(True) == 2
    assert told[1] is True


def test_no_more_connect_in_a_second_than_the_rate() -> None:
    """A quarter of a second's at once, and the rest as time goes on."""
    arrivals = Arrivals()
    late(arrivals, 2)

    at_once = taken(arrivals, 5_000, 0.0)
    later = sum(taken(arrivals, 100, 0.01 * step) for step in range(1, 101))

    assert at_once == FIRST_RATE_PER_S / 4
    assert later == pytest.approx(FIRST_RATE_PER_S, abs=2)
    assert arrivals.refused == 5_000 + 10_000 - at_once - later


def test_refused_client_is_told_a_time_of_its_own() -> None:
    """They come back spread over some seconds."""
    arrivals = Arrivals()
    late(arrivals, 2)
    taken(arrivals, 1_000, 0.0)

    waits_s = []
    for share in (0.0, 0.5, 0.99):
        with pytest.raises(TooManyArrive) as refusal:
            arrivals.check(0.0, share)
        waits_s.append(refusal.value.whole_seconds)

    assert waits_s[0] == 1
    assert waits_s == sorted(waits_s)
    assert waits_s[-1] == math.ceil(1 + SPREAD_S * 0.99)


async def test_daemon_that_is_late_refuses_handshakes_and_serves_the_rest() -> None:
    """503 with Retry-After to WebSockets and streams; publishes and who is connected go on."""
    async with running() as daemon, subscribe(daemon.ws_url) as reader:
        arrivals = daemon.hub.arrivals
        late(arrivals, 2, now_s=asyncio.get_running_loop().time())
        arrivals._level = -1_000.0
        refusals = []
        for path in ("/subscribe?topic=t", "/ws", "/publish"):
            with pytest.raises(InvalidStatus) as refused:
                await client_of(f"{daemon.ws_url}{path}", subprotocols=["clevrd.v1"])
            refusals.append(refused.value.response)
        stream = await daemon.http.get(
            f"{daemon.url}/subscribe?topic=t", headers={"Accept": "application/x-ndjson"}
        )
        answer = await daemon.publish("t", 1)
        message = await reader.recv()
        late(arrivals, 100, 0.0)
        async with subscribe(daemon.ws_url, last=1) as later:
            await later.recv()

    for refusal in refusals:
        assert refusal.status_code == 503
        assert 1 <= int(refusal.headers["Retry-After"]) <= 6
    assert (stream.status, answer["offset"]) == (503, 1)
    assert isinstance(stream, aiohttp.ClientResponse)
    assert '"offset":1' in str(message)


async def test_client_over_its_own_limit_keeps_nobody_else_out() -> None:
    """Its attempts count for nothing, however many it makes while the loop is late."""
    access = read_access({"tenants": [{"name": "default-tenant", "max_connections": 1}]}, "a test")
    async with running(access=access) as daemon, subscribe(daemon.ws_url):
        arrivals = daemon.hub.arrivals
        late(arrivals, 2, now_s=asyncio.get_running_loop().time())
        level = arrivals._level
        with pytest.raises(InvalidStatus):
            await client_of(f"{daemon.ws_url}/subscribe?topic=t")

        assert (arrivals._level, arrivals.refused) == (level, 0)
