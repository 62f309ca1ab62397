"""What is counted where it happens: rounds, bytes, waits, connections."""

from __future__ import annotations

import asyncio
from typing import cast

import msgspec
import pytest
from clients import masked, publish_request, raw_subscriber, subscribe, upgrade_request
from conftest import FakeClock
from daemons import Daemon, running, until
from fakes import FakeSink
from http_wire import ask, get, post, responses, talk
from world import ManualLoop

from clevrd.config import Config
from clevrd.core.beginning import Last
from clevrd.core.publish_request import PublishRequest
from clevrd.core.stream_forms import NDJSON_BARE
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub import Hub
from clevrd.hub.rounds import WRITES_PER_SLICE
from clevrd.metrics.histograms import HistogramView
from clevrd.tenants import Tenant

REQUEST = PublishRequest("t", msgspec.Raw(b"1"))


class Turns(ManualLoop):
    """A loop whose turns a test takes one by one."""

    def turn(self) -> None:
        """Run what is due now, and leave what that makes due for the next turn."""
        for _ in range(len(self._due)):
            call, arguments = self._due.popleft()
            call(*arguments)


class Bench:
    """A hub with one topic, on a clock that the test moves."""

    def __init__(self, *sinks: FakeSink) -> None:
        self.loop = Turns()
        self.clock = FakeClock()
        self.hub = Hub(Config(), cast(asyncio.AbstractEventLoop, self.loop))
        clock_ns = lambda: int(self.clock() * 1e9)  # noqa: E731  # a function of two lines
        self.hub.delivery._clock_ns = self.hub.delivery.rounds._clock_ns = clock_ns
        self.topic: Topic = self.hub.topic(Tenant("default-tenant"), "t")
        self.readers = [Subscriber(sink) for sink in sinks]
        for reader in self.readers:
            self.hub.subscribe(self.topic, reader, Last(0))
        self.loop.run()

    def publish(self, count: int = 1) -> None:
        """Publish so many messages one by one."""
        for _ in range(count):
            self.hub.publish(self.topic, REQUEST)


def values(histogram: HistogramView) -> tuple[int, float]:
    """Return how many values were recorded, and their sum."""
    return histogram.counts[-1], round(histogram.sum, 6)


def test_a_round_is_timed_from_its_oldest_message() -> None:
    """Three messages of one turn are one round, as old as the first of them."""
    bench = Bench(FakeSink())

    bench.publish()
    bench.clock.advance(0.25)
    bench.publish(2)
    bench.clock.advance(0.25)
    bench.loop.turn()

    rounds = bench.hub.counters.rounds
    assert values(rounds.messages()) == (1, 3)
    assert values(rounds.to_socket_s()) == (1, 0.5)
    assert values(rounds.durations_s()) == (1, 0)


def test_a_round_of_many_slices_lasts_until_the_last_is_written() -> None:
    """And a message that comes meanwhile is timed from when it came."""
    bench = Bench(*(FakeSink() for _ in range(WRITES_PER_SLICE + 1)))
    rounds = bench.hub.counters.rounds

    bench.publish()
    bench.clock.advance(1.0)
    bench.loop.turn()
    bench.clock.advance(2.0)
    bench.publish()
    before = values(rounds.durations_s())
    bench.clock.advance(4.0)
    bench.loop.turn()
    first = values(rounds.durations_s()), values(rounds.to_socket_s())
    bench.clock.advance(8.0)
    bench.loop.run()

    assert before == (0, 0)
    assert first == ((1, 6.0), (1, 7.0))
    assert values(rounds.to_socket_s()) == (2, 7.0 + 12.0)
    assert values(rounds.messages()) == (2, 2)


def test_what_a_round_leaves_is_as_old_as_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that brings more than a round carries is timed from its first message throughout."""
    bench = Bench(FakeSink())
    half = PublishRequest("t", msgspec.Raw(b'"%b"' % (b"x" * 200_000)))

    bench.hub.publish(bench.topic, half)
    bench.hub.publish(bench.topic, half)
    bench.clock.advance(1.0)
    bench.loop.turn()
    bench.clock.advance(1.0)
    bench.loop.turn()

    assert values(bench.hub.counters.rounds.to_socket_s()) == (2, 1.0 + 2.0)


def test_what_nobody_is_left_for_does_not_age_what_comes_later() -> None:
    """Readers that leave while a round is written take with them what was to be offered next."""
    bench = Bench(*(FakeSink() for _ in range(WRITES_PER_SLICE + 1)))
    rounds = bench.hub.counters.rounds

    bench.publish()
    bench.loop.turn()
    bench.publish()
    for reader in bench.readers:
        bench.hub.unsubscribe(bench.topic, reader)
    bench.loop.run()
    before = values(rounds.to_socket_s())
    bench.clock.advance(100.0)
    bench.hub.subscribe(bench.topic, Subscriber(FakeSink()), Last(0))
    bench.publish()
    bench.clock.advance(1.0)
    bench.loop.run()

    assert before == (1, 0)
    assert values(rounds.to_socket_s()) == (2, 1.0)
    assert values(rounds.messages()) == (2, 2)


def test_without_readers_there_is_no_round_to_time() -> None:
    """A publish that nobody reads is offered to nobody."""
    bench = Bench()

    bench.publish(3)
    bench.loop.run()

    assert values(bench.hub.counters.rounds.messages()) == (0, 0)


def test_delivered_bytes_are_what_the_sinks_got() -> None:
    """By rounds, in every form, and by catching up."""
    bench = Bench(FakeSink(), FakeSink())
    sinks = [reader.sink for reader in bench.readers]

    bench.publish(2)
    bench.loop.run()
    for form in (None, NDJSON_BARE):
        sinks.append(FakeSink())
        bench.hub.subscribe(bench.topic, Subscriber(sinks[-1], form=form), Last(2))
    bench.publish(3)
    bench.loop.run()

    got = sum(len(write) for sink in sinks for write in cast(FakeSink, sink).writes)
    assert bench.hub.counters.delivered_bytes == got > 0


# --- over sockets --------------------------------------------------------------------------------


async def received(daemon: Daemon, *sent: bytes, until_answered: int = 0) -> int:
    """Return how many more bytes the daemon has counted once ``sent`` were sent and answered."""
    before = daemon.hub.input_budget.received_bytes
    await talk(daemon.port, list(sent), shut=True)
    return daemon.hub.input_budget.received_bytes - before


@pytest.mark.parametrize("raw_paths", [True, False])
async def test_each_byte_that_is_read_is_counted_once(raw_paths: bool) -> None:
    """Whoever reads it, and also where one hands it on to another."""
    async with running(raw_paths=raw_paths) as daemon:
        plain = post('{"topic":"t","data":1}')
        strange = post('{"topic":"t","data":1}', "X-Strange: ä")
        for request in (plain, strange, get("/health"), plain + strange + plain, b"\0\r\n\r\n"):
            assert await received(daemon, request) == len(request)
            assert await received(daemon, request[:9], request[9:]) == len(request)
        before = daemon.hub.input_budget.received_bytes
        early = masked(9, b"hello")
        async with await raw_subscriber(daemon.port, early=early):
            sent = len(upgrade_request() + early)
            await until(lambda: daemon.hub.subscribers == 1)
            await until(lambda: daemon.hub.input_budget.received_bytes - before >= sent)
            counted = daemon.hub.input_budget.received_bytes - before

    assert counted == sent


async def test_connections_are_counted_by_kind_and_timed_when_they_end() -> None:
    """A socket, a stream and a client of HTTP are one each; what has ended is none."""
    async with running() as daemon:
        headers = {"Accept": "text/event-stream"}
        stream = f"{daemon.url}/subscribe?topic=t"
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        async with subscribe(daemon.ws_url), daemon.http.get(stream, headers=headers):
            writer.write(publish_request("t", b"1"))
            await reader.readuntil(b"}")
            during = daemon.server.parts.count_connections()
        writer.close()
        await until(lambda: not any(daemon.server.parts.count_connections().values()))
        ended = daemon.hub.counters.connection_s.count

    assert during == {"http": 1, "websocket": 1, "stream": 1}
    assert ended == 2


async def test_waits_are_of_those_that_waited_and_the_others_are_zero() -> None:
    """As many values as messages were published."""
    async with running(ring_messages=100, max_message_bytes=1 << 20) as daemon:
        readers = [await raw_subscriber(daemon.port) for _ in range(WRITES_PER_SLICE + 1)]
        await until(lambda: daemon.hub.subscribers == len(readers))
        items = b"".join(b'{"topic":"t","data":%d}\n' % number for number in range(300))
        async with daemon.http.post(f"{daemon.url}/publish/batch", data=items) as answer:
            assert (await answer.json())["published"] == 300
        waited = daemon.hub.counters.wait_s.count
        waits = daemon.hub.publish_waits()
        for each in readers:
            await each.__aexit__(None, None, None)

    assert 0 < waited < 300
    assert waits.counts[-1] == 300
    assert waits.counts[0] >= 300 - waited


async def test_the_loop_is_looked_at() -> None:
    """The timer runs in a daemon that serves."""
    async with running() as daemon:
        await until(lambda: daemon.hub.counters.loop_lag_s.count >= 2)


# --- bad input -----------------------------------------------------------------------------------

ACCEPTS = {
    "8 KB": "a/b;c=d," * 1000 + "text/plain",
    "8 KB in one range": "text/plain;x=" + "y" * 8000,
    "quotes": 'text/plain;x="' + "\\" * 2000,
    "semicolons": "text/plain" + ";" * 4000,
    "malformed": "text/plain;q=;;=,//,*/json",
}


@pytest.mark.parametrize("accept", ACCEPTS.values(), ids=ACCEPTS)
async def test_any_accept_is_answered(accept: str) -> None:
    """With one of the forms, or refused because the line is too long; and the daemon goes on."""
    async with running() as daemon:
        answer = await ask(daemon.port, get("/metrics", f"Accept: {accept}"))
        after = await ask(daemon.port, get("/metrics", "Accept: text/plain"))

    assert answer.status == 200
    assert answer.headers["content-type"].partition(";")[0] in ("application/json", "text/plain")
    assert after.headers["content-type"].startswith("text/plain")


async def test_accept_on_several_lines_is_one_list() -> None:
    """RFC 9110 §5.3."""
    async with running() as daemon:
        answer = await ask(
            daemon.port,
            get("/metrics", "Accept: text/plain;q=0.5", "Accept: application/openmetrics-text"),
        )

    assert answer.headers["content-type"].startswith("application/openmetrics-text")


async def test_head_has_the_type_that_get_would_have() -> None:
    """The answer without its body."""
    async with running() as daemon:
        sent = get("/metrics", "Accept: text/plain", "Connection: close", method="HEAD")
        [answer] = responses(await talk(daemon.port, [sent]), to_head=True)

    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert int(answer.headers["content-length"]) > 1000


async def test_scrapes_that_are_cut_leave_nothing_behind() -> None:
    """In the head, before the answer, and in the middle of it."""
    request = get("/metrics", "Accept: application/openmetrics-text")
    async with running() as daemon:
        for number in range(5_000):
            daemon.hub.publish(
                daemon.hub.topic(Tenant("default-tenant"), f"t{number % 500}"), REQUEST
            )
        for cut in (10, len(request) - 2, len(request)):
            _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            writer.write(request[:cut])
            await writer.drain()
            writer.transport.abort()
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(request * 3)
        await reader.readexactly(2_000)
        writer.transport.abort()
        await until(lambda: daemon.server.parts.count_connections()["http"] == 0)
        answer = await ask(daemon.port, request)

    assert answer.status == 200
    assert daemon.hub.counters.background_errors == 0
