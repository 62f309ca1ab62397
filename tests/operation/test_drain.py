"""Draining: readers leave at a pace, with their positions, and come back; publishers go on.

The stop itself is in test_shutdown.py, and over a state directory in test_restart.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from clients import (
    CLOSE,
    SMALL_BUFFERS,
    TEXT,
    PublishRefused,
    RawPublisher,
    RawSubscriber,
    client_of,
    masked,
    offset_of,
    publishing,
    raw_subscriber,
    read_to_the_end,
    subscribe,
)
from daemons import Daemon, running, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from clevrd.connections.departures import Returns, closed_by, pace_s

# As clients that are told what happens.
NOTICES: dict[str, Any] = {"subprotocols": ["clevrd.v1"]}
AS_TOLD: dict[str, Any] = {"sec_websocket_protocol": "clevrd.v1"}


# --- the pace ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "at_most_s", "over_s"),
    [(0, 10, 0), (1, 10, 0.001), (1_000, 10, 1), (10_000, 10, 10), (50_000, 10, 10), (5, -3, 0)],
)
def test_pace_is_a_thousand_a_second_or_what_the_time_asks(
    count: int, at_most_s: float, over_s: float
) -> None:
    """Few are gone in no time, and the limit holds for many."""
    assert pace_s(count, at_most_s) == over_s


def test_closes_are_spread_evenly_and_end_with_the_time() -> None:
    """The first one is closed at once, and nobody is left at the end."""
    closed = [closed_by(elapsed_s / 10, 1_000, 1.0) for elapsed_s in range(12)]

    assert closed == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901, 1_000, 1_000]
    assert closed_by(0.0, 7, 0.0) == 7


def test_clients_come_back_when_there_is_something_to_come_back_to() -> None:
    """Where no other daemon has their topics they wait for its end, and then at 2,000 a second."""
    alone = Returns(10_000, 10.0, is_alone=True)
    among_others = Returns(10_000, 10.0, is_alone=False)

    assert [alone.delay_ms(at_s, 0.0) for at_s in (0.0, 4.0, 10.0)] == [12_200, 8_200, 2_200]
    assert alone.delay_ms(10.0, 0.999999) == 7_199
    # Few come back as soon as a process can have been replaced.
    assert Returns(10, 0.0, is_alone=True).delay_ms(0.0, 0.0) == 202
    assert [among_others.delay_ms(at_s, 0.0) for at_s in (0.0, 10.0)] == [200, 200]
    assert among_others.delay_ms(0.0, 0.999999) == 1_199


# --- real sockets --------------------------------------------------------------------------------


class Reader:
    """A client that reads to the end of its connection, and comes back with its position."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.going: dict[str, Any] = {}
        self.code: int | None = None

    async def read(self, connection: RawSubscriber, upto: int = 1 << 62) -> None:
        """Read until the connection is closed, or up to offset ``upto``."""
        while not self.offsets or self.offsets[-1] < upto:
            opcode, payload = await connection.frame()
            if opcode == CLOSE:
                self.code = int.from_bytes(payload[:2], "big")
                connection.send(masked(CLOSE, payload))
                return
            if opcode != TEXT:
                continue
            told = json.loads(payload)
            if told.get("type") == "going_away":
                self.going = told
            elif "type" not in told:
                self.offsets.append(told["offset"])

    @property
    def position(self) -> dict[str, Any]:
        """Where it resumes, as it was told."""
        position: dict[str, Any] = self.going["positions"]["t"]
        return position


def chunks(readers: list[Reader]) -> list[list[Reader]]:
    """Return ``readers`` by the hundred, which connect at once."""
    return [readers[at : at + 100] for at in range(0, len(readers), 100)]


async def push(publisher: RawPublisher, readers: list[Reader]) -> None:
    """Publish one more message each time that a hundred more have left, until one is refused."""
    with suppress(PublishRefused, asyncio.IncompleteReadError, ConnectionError):
        for gone in range(0, len(readers), 100):
            await until(lambda least=gone: sum(bool(each.going) for each in readers) >= least)
            await publisher.send("t", 1)


async def come_back(daemon: Daemon, reader: Reader, upto: int) -> None:
    """Resume where the reader was told it is, and read up to ``upto``."""
    at = reader.position
    query = f"topic=t&epoch={at['epoch']}&offset={at['offset']}"
    async with await raw_subscriber(daemon.port, query, **AS_TOLD) as connection:
        await reader.read(connection, upto)


@pytest.mark.timeout(90)
async def test_thousand_readers_leave_one_after_the_other_and_miss_nothing(tmp_path: Path) -> None:
    """A publisher goes on while they leave; each comes back from its position to the next one."""
    settings: dict[str, Any] = {"state_dir": str(tmp_path), "shutdown_timeout_s": 30.0}
    readers = [Reader() for _ in range(1_000)]
    async with running(**settings) as daemon, AsyncExitStack() as stack:
        reading = []
        for some in chunks(readers):
            opened = await asyncio.gather(*(raw_subscriber(daemon.port, **AS_TOLD) for _ in some))
            for reader, connection in zip(some, opened, strict=True):
                await stack.enter_async_context(connection)
                reading.append(asyncio.create_task(reader.read(connection)))
        publisher = await stack.enter_async_context(publishing(daemon.port))
        await publisher.send("t", 5)
        pushing = asyncio.create_task(push(publisher, readers))

        await daemon.server.stop()
        await asyncio.gather(*reading)
        await pushing
    async with running(**settings) as daemon, AsyncExitStack() as stack:
        for some in chunks(readers):
            await asyncio.gather(
                *(come_back(daemon, reader, publisher.acknowledged[-1]) for reader in some)
            )

    acknowledged = publisher.acknowledged
    assert {reader.code for reader in readers} == {1012}
    # Messages were accepted while readers left: they have left at different places.
    places = [reader.position["offset"] for reader in readers]
    # A round that is on its way has reached some of them, and not those that leave next, so these
    # may be one round apart in either order.
    assert len(set(places)) > 2
    assert max(places[:250]) <= min(places[-250:])
    assert places[0] < places[-1] <= acknowledged[-1]
    delays_ms = [reader.going["reconnect_after_ms"] for reader in readers]
    assert len(set(delays_ms)) > 300
    assert all(reader.offsets == acknowledged for reader in readers)


@pytest.fixture
def slow_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a drain of a few readers take the whole of drain_s, or until all have left."""
    monkeypatch.setattr("clevrd.connections.departures.CLOSES_PER_S", 0.01)


@asynccontextmanager
async def draining(daemon: Daemon) -> AsyncIterator[None]:
    """Stop the daemon; the block runs while it drains, and its readers leave at the end of it."""
    stopping = asyncio.create_task(daemon.server.stop())
    await until(lambda: daemon.hub.is_draining)
    yield
    await stopping


@pytest.mark.usefixtures("slow_pace")
async def test_daemon_that_drains_serves_publishers_and_takes_no_readers(tmp_path: Path) -> None:
    """Not ready at once, 503 with Retry-After to new readers; a publish reaches who is there."""
    async with (
        running(state_dir=str(tmp_path), shutdown_timeout_s=60.0, drain_s=40.0) as daemon,
        AsyncExitStack() as readers,
    ):
        # The first one is sent away at once, the others after many seconds.
        first = await readers.enter_async_context(subscribe(daemon.ws_url))
        others = [await readers.enter_async_context(subscribe(daemon.ws_url)) for _ in range(2)]
        commands = await readers.enter_async_context(client_of(f"{daemon.ws_url}/ws", **NOTICES))
        async with draining(daemon):
            ending = await read_to_the_end(first)
            answer = await daemon.publish("t", 1)
            seen = [offset_of(await other.recv()) for other in others]
            statuses = {}
            for path in ("/health/ready", "/health/live", "/subscribe?topic=t&poll=1"):
                async with daemon.http.get(f"{daemon.url}{path}") as response:
                    statuses[path] = response.status, response.headers.get("Retry-After")
            fields = {"Accept": "text/event-stream"}
            async with daemon.http.get(f"{daemon.url}/subscribe?topic=t", headers=fields) as told:
                events = await told.text()
            with pytest.raises(InvalidStatus) as handshake:
                await readers.enter_async_context(subscribe(daemon.ws_url))
            await commands.send('{"type":"subscribe","topic":"t"}')
            refusal = json.loads(await commands.recv())
            await commands.send('{"type":"publish","topic":"t","data":2,"ref":2}')
            published = json.loads(await commands.recv())
            await readers.aclose()

    assert (ending.code, ending.offsets) == (1012, [])
    assert answer["offset"] == 1
    assert seen == [1, 1]
    assert statuses["/health/ready"][0] == 503
    assert statuses["/health/live"] == (200, None)
    assert statuses["/subscribe?topic=t&poll=1"][0] == 503
    # Readers are told to come when the drain will be over.
    assert 30 <= int(statuses["/subscribe?topic=t&poll=1"][1] or 0) <= 41
    assert handshake.value.response.status_code == 503
    assert 30 <= int(handshake.value.response.headers["Retry-After"]) <= 41
    assert "event: error" in events
    assert (refusal["type"], refusal["code"], refusal["retryable"]) == (
        "error",
        "unavailable",
        True,
    )
    assert published["offset"] == 2


@pytest.mark.usefixtures("slow_pace")
async def test_daemon_without_a_memory_of_its_own_takes_nothing_while_it_drains() -> None:
    """What it accepted would be lost to readers that have left, so publishers wait for the next."""
    async with (
        running(shutdown_timeout_s=60.0, drain_s=40.0) as daemon,
        publishing(daemon.port) as publisher,
        AsyncExitStack() as readers,
    ):
        await publisher.send("t", 3)
        opened = [
            await readers.enter_async_context(subscribe(daemon.ws_url, last=3)) for _ in range(3)
        ]
        async with draining(daemon):
            first = await read_to_the_end(opened[0])
            with pytest.raises((PublishRefused, asyncio.IncompleteReadError, ConnectionError)):
                await publisher.send("t", 1)
            seen = [[offset_of(await other.recv()) for _ in range(3)] for other in opened[1:]]
            await readers.aclose()

    assert (first.code, first.offsets) == (1012, [1, 2, 3])
    assert seen == [[1, 2, 3], [1, 2, 3]]


async def test_reader_that_lags_leaves_last_and_has_everything(tmp_path: Path) -> None:
    """Its backlog is not cut off, as it would be at its place in the order."""
    async with (
        running(
            state_dir=str(tmp_path), shutdown_timeout_s=30.0, drain_s=0.2, **SMALL_BUFFERS
        ) as daemon,
        subscribe(daemon.ws_url, stalls=True) as slow,
        subscribe(daemon.ws_url) as quick,
        publishing(daemon.port) as publisher,
    ):
        await publisher.send("t", 300, b'"%b"' % (b"x" * 2_000))
        assert daemon.hub.delivery.is_lagging()

        stopping = asyncio.create_task(daemon.server.stop())
        quick_end, slow_end = await asyncio.gather(read_to_the_end(quick), read_to_the_end(slow))
        await stopping

    assert (quick_end.code, slow_end.code) == (1012, 1012)
    assert quick_end.offsets == slow_end.offsets == list(range(1, 301))


@pytest.mark.usefixtures("slow_pace")
async def test_publish_socket_stays_until_readers_have_left(tmp_path: Path) -> None:
    """Publishers are served to the end, so their sockets are closed last."""
    async with (
        running(state_dir=str(tmp_path), shutdown_timeout_s=60.0, drain_s=40.0) as daemon,
        client_of(f"{daemon.ws_url}/publish") as publisher,
        AsyncExitStack() as readers,
    ):
        first = await readers.enter_async_context(subscribe(daemon.ws_url))
        second = await readers.enter_async_context(subscribe(daemon.ws_url))
        async with draining(daemon):
            await publisher.send('{"topic":"t","data":1,"ref":1}')
            answer = json.loads(await publisher.recv())
            first_end = await read_to_the_end(first)
            seen = offset_of(await second.recv())
            await readers.aclose()
            with pytest.raises(ConnectionClosed):
                await publisher.recv()

    assert answer["success"] is True
    assert first_end.code == publisher.close_code == 1012
    assert seen == 1
