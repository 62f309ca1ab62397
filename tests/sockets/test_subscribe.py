"""Subscribing over a real socket: handshake, options, catch-up, and joins in the middle of a flood.

Every handshake is tried on both ways in, below aiohttp and through it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from clients import (
    CLOSE,
    KEY,
    PING,
    PONG,
    TEXT,
    RawSubscriber,
    client_of,
    masked,
    missing,
    offset_of,
    offsets,
    publish_request,
    publishing,
    raw_subscriber,
    subscribe,
    upgrade_request,
)
from daemons import Daemon, running, until
from websockets.exceptions import InvalidStatus

from clevrd.hub import rounds


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """Return a daemon that answers handshakes below aiohttp, and then one that does not."""
    async with running(raw_paths=request.param) as started:
        yield started


async def publish_many(daemon: Daemon, count: int, topic: str = "t") -> None:
    """Publish ``count`` messages, one after the other."""
    async with publishing(daemon.port) as publisher:
        await publisher.send(topic, count)


# --- catch-up ------------------------------------------------------------------------------------


async def test_catch_up_is_the_last_50_oldest_first_then_live(daemon: Daemon) -> None:
    """Who subscribes sees the recent past first, then everything that comes."""
    await publish_many(daemon, 80)

    async with subscribe(daemon.ws_url) as reader:
        past = [offset_of(await reader.recv()) for _ in range(50)]
        await publish_many(daemon, 3)
        live = [offset_of(await reader.recv()) for _ in range(3)]

    assert past == list(range(31, 81))
    assert live == [81, 82, 83]


@pytest.mark.parametrize(
    ("last", "first"),
    [(1, 80), (7, 74), (80, 1), (81, 1), (999_999_999, 1)],
)
async def test_last_chooses_how_much_of_the_past_comes_first(
    daemon: Daemon, last: int, first: int
) -> None:
    """`last=N` gives N messages, or as many as there are."""
    await publish_many(daemon, 80)

    async with subscribe(daemon.ws_url, last=last) as reader:
        seen = await offsets(reader, 80)

    assert seen == list(range(first, 81))


async def test_last_0_begins_with_what_comes(daemon: Daemon) -> None:
    """`last=0` wants no past."""
    await publish_many(daemon, 80)

    async with subscribe(daemon.ws_url, last=0) as reader:
        await publish_many(daemon, 1)
        message = await reader.recv()

    assert offset_of(message) == 81


async def test_last_reaches_no_further_than_the_ring() -> None:
    """What the ring has let go is gone; the rest comes whole and in order."""
    async with running(ring_messages=100) as daemon:
        await publish_many(daemon, 250)

        async with subscribe(daemon.ws_url, last=200) as reader:
            seen = await offsets(reader, 250)

    assert seen == list(range(151, 251))


async def test_message_is_exactly_the_documented_object(daemon: Daemon) -> None:
    """Subscribers get the fields of the wire contract, with the publisher's bytes as data."""
    async with subscribe(daemon.ws_url, "orders") as reader, publishing(daemon.port) as publisher:
        await publisher.send("orders", 1, b'{ "a" : 1.50e0,"\\u00e4":"\xc3\xa4" }')
        text = await reader.recv()

    message = json.loads(text)
    assert list(message) == ["id", "topic", "tenant_id", "data", "timestamp", "offset"]
    assert (message["topic"], message["tenant_id"]) == ("orders", "default-tenant")
    assert isinstance(text, str), "a text frame, not a binary one"
    assert '"data":{ "a" : 1.50e0,"\\u00e4":"ä" },"timestamp"' in text


async def test_message_as_large_as_allowed_comes_through() -> None:
    """A message whose frame needs the longest header is delivered whole."""
    data = b'"' + b"x" * 200_000 + b'"'
    async with (
        running() as daemon,
        subscribe(daemon.ws_url) as reader,
        publishing(daemon.port) as publisher,
    ):
        await publisher.send("t", 1, data)
        text = await reader.recv()

    assert json.loads(text)["data"] == "x" * 200_000


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "topic is missing"),
        ("tenant=a", "topic is missing"),
        ("topic=", "topic is empty"),
        ("topic=" + "x" * 256, "256 bytes"),
        ("topic=a%0Ab", "control character"),
        ("topic=%FF", "not UTF-8"),
        ("topic=a&topic=a", "given twice"),
        ("topic=t&policy=foo", "drop_oldest, drop_newest, circuit_breaker, latest"),
        ("topic=t&policy=", "Unknown policy"),
        ("topic=t&buffer=-1", "option buffer"),
        ("topic=t&buffer=0", "option buffer"),
        ("topic=t&buffer=1.5", "option buffer"),
        ("topic=t&last=x", "option last"),
        ("topic=t&last=-1", "option last"),
        ("topic=t&last=%D9%A1", "option last"),  # a digit, but not an ASCII one
        ("topic=t&last=" + "9" * 5000, "option last"),
        ("topic=t&last=1&last=2", "given 2 times"),
        ("topic=t&tenant=a/b", "tenant's name"),
        ("topic=t&tenant=a&tenant=b", "tenant is given twice"),
    ],
)
async def test_bad_option_is_a_400_that_names_it(daemon: Daemon, query: str, words: str) -> None:
    """What can't be meant is refused before the handshake, in words, and nothing is made of it."""
    with pytest.raises(InvalidStatus) as refused:
        await client_of(f"{daemon.ws_url}/subscribe?{query}")

    response = refused.value.response
    answer = json.loads(response.body)
    assert response.status_code == 400
    assert words in answer["error"]
    assert (answer["success"], answer["code"]) == (False, "invalid_request")
    assert len(daemon.hub.topics) == 0


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"upgrade": None}, 426),
        ({"upgrade": "h2c"}, 426),
        ({"connection": "close"}, 426),
        ({"sec_websocket_version": None}, 426),
        ({"sec_websocket_version": "8"}, 426),
        ({"sec_websocket_version": "13, 8"}, 426),
        ({"sec_websocket_key": None}, 400),
        ({"sec_websocket_key": "short"}, 400),
        ({"sec_websocket_key": "x" * 24}, 400),
        ({"sec_websocket_key": "AAAAAAAAAAAAAAAAAAAAAA=="}, 101),
    ],
)
async def test_handshake_that_is_none_is_refused(
    daemon: Daemon, fields: dict[str, str | None], status: int
) -> None:
    """A request that is not RFC 6455's handshake is told what would be one."""
    head = await first_head(daemon, upgrade_request("topic=t", **fields))

    assert head.startswith(f"HTTP/1.1 {status} ")
    if status == 426:
        assert "\r\nUpgrade: websocket\r\n" in head
        assert "\r\nConnection: Upgrade\r\n" in head
        assert "\r\nSec-WebSocket-Version: 13\r\n" in head


async def first_head(daemon: Daemon, request: bytes) -> str:
    """Return the head of the first answer to ``request``."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    try:
        writer.write(request)
        async with asyncio.timeout(5):
            return (await reader.readuntil(b"\r\n\r\n")).decode()
    finally:
        writer.close()


@pytest.mark.parametrize("method", ["HEAD", "POST", "DELETE"])
async def test_only_get_subscribes(daemon: Daemon, method: str) -> None:
    """RFC 6455 §4.1: the method of the handshake is GET."""
    head = await first_head(daemon, upgrade_request().replace(b"GET", method.encode(), 1))

    assert not head.startswith("HTTP/1.1 101 ")
    assert head.startswith("HTTP/1.1 4")
    assert daemon.hub.subscribers == 0


@pytest.mark.parametrize(
    "framing",
    ["content-length: 2\r\n\r\n{}", "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"],
)
async def test_upgrade_with_a_body_is_refused(daemon: Daemon, framing: str) -> None:
    """What would be the body here is the first frames elsewhere, so nobody gets to disagree."""
    request = upgrade_request().removesuffix(b"\r\n") + framing.encode()

    head = await first_head(daemon, request)

    assert head.startswith("HTTP/1.1 400 ")
    assert daemon.hub.subscribers == 0


@pytest.mark.parametrize("connection", ["Upgrade", "upgrade", "keep-alive, Upgrade"])
async def test_browsers_spellings_of_the_handshake_are_taken(
    daemon: Daemon, connection: str
) -> None:
    """Header values that differ in case or carry keep-alive are the same handshake."""
    head = await first_head(daemon, upgrade_request(connection=connection, upgrade="WebSocket"))

    assert head.startswith("HTTP/1.1 101 ")
    assert "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
    assert KEY not in head


async def test_draining_daemon_takes_no_subscriber(daemon: Daemon) -> None:
    """Who connects while the daemon shuts down is told to come back."""
    daemon.hub.is_draining = True

    head = await first_head(daemon, upgrade_request())

    assert head.startswith("HTTP/1.1 503 ")
    assert "\r\nRetry-After: 1\r\n" in head


# --- what comes behind the handshake -------------------------------------------------------------


async def test_frames_sent_behind_the_handshake_are_read(daemon: Daemon) -> None:
    """A client need not wait for the 101 before it speaks."""
    early = masked(PING, b"early")

    async with await raw_subscriber(daemon.port, early=early) as reader:
        frame = await reader.frame()

    assert frame == (PONG, b"early")


async def test_half_a_frame_behind_the_handshake_is_kept(daemon: Daemon) -> None:
    """What arrives in pieces around the hand-over is one frame all the same."""
    ping = masked(PING, b"in two pieces")

    async with await raw_subscriber(daemon.port, early=ping[:3]) as reader:
        reader.send(ping[3:])
        frame = await reader.frame()

    assert frame == (PONG, b"in two pieces")


async def test_close_sent_behind_the_handshake_is_answered(daemon: Daemon) -> None:
    """A client may leave before it has arrived."""
    early = masked(CLOSE, (1000).to_bytes(2, "big"))

    async with await raw_subscriber(daemon.port, early=early) as reader:
        goodbye = await reader.goodbye()

    assert goodbye.code == 1000
    await until(lambda: len(daemon.server.connections) == 0)


async def test_handshake_a_byte_at_a_time_is_a_handshake(daemon: Daemon) -> None:
    """How the bytes are cut into segments means nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    for byte in upgrade_request() + masked(PING, b"x"):
        writer.write(bytes((byte,)))
        await asyncio.sleep(0)

    head = await reader.readuntil(b"\r\n\r\n")
    frame = await RawSubscriber(reader, writer).frame()

    writer.close()
    assert head.startswith(b"HTTP/1.1 101 ")
    assert frame == (PONG, b"x")


@pytest.mark.parametrize("ahead", [1, 300])
async def test_handshake_behind_publishes_on_one_connection(daemon: Daemon, ahead: int) -> None:
    """A connection that published may subscribe, and is read from as any other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(publish_request("t", b"1") * ahead + upgrade_request("topic=t&last=1"))
    while b" 101 " not in await reader.readuntil(b"\r\n\r\n"):
        await reader.readuntil(b"}")

    async with RawSubscriber(reader, writer) as subscriber:
        newest = await subscriber.frame()
        subscriber.send(masked(PING, b"heard?"))
        answer = await subscriber.frame()

    assert b'"offset":%d}' % ahead in newest.payload
    assert answer == (PONG, b"heard?")


# --- a flood -------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
async def test_joining_in_the_middle_of_a_flood_is_seamless(
    raw_paths: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catch-up goes over into live delivery: nothing twice, nothing missing, nothing reordered."""
    # Rounds that take several turns of the loop, so that readers join in the middle of them too.
    monkeypatch.setattr(rounds, "WRITES_PER_SLICE", 3)
    chance = random.Random(2)  # noqa: S311  # picks test data
    async with running(raw_paths=raw_paths) as daemon, asyncio.timeout(20):
        flood = Flood(daemon, publishers=4, batches=30, batch=25)
        wanted = [0, 1, 50, 400, 10_000, *(chance.randrange(500) for _ in range(35))]

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(flood.run())
            readings = [
                tasks.create_task(flood.read(last, joins_after=index * flood.total // 45))
                for index, last in enumerate(wanted)
            ]

        for last, reading in zip(wanted, readings, strict=True):
            seen = reading.result()
            assert seen == list(range(seen[0], flood.total + 1)), f"last={last}"
        figures = await daemon.get_json("/metrics")
    assert sum(figures["messages"]["dropped"].values()) == 0
    assert figures["connections"]["background_errors"] == 0


class Flood:
    """Several publishers that push as hard as they can, and readers that join meanwhile."""

    def __init__(self, daemon: Daemon, *, publishers: int, batches: int, batch: int) -> None:
        self._daemon = daemon
        self._publishers = publishers
        self._batches = batches
        self._batch = batch
        self.total = publishers * batches * batch

    async def run(self) -> None:
        """Publish everything."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._publishers):
                tasks.create_task(self._publish())

    async def _publish(self) -> None:
        async with publishing(self._daemon.port) as publisher:
            for _ in range(self._batches):
                await publisher.send("t", self._batch)

    async def read(self, last: int, joins_after: int) -> list[int]:
        """Join once ``joins_after`` messages are published; return all offsets to the last one.

        Fails when what came first is not what ``last`` asked for.
        """
        topics = self._daemon.hub.topics
        await until(lambda: any(topic.head >= joins_after for topic in topics), timeout_s=15)
        (topic,) = topics
        # What is appended but not offered yet is still to come, so it is no part of the past.
        earliest = min(topic.edge, topic.head - last)
        async with subscribe(self._daemon.ws_url, last=last) as reader:
            latest = topic.head - last
            seen = await offsets(reader, self.total)
        assert max(0, earliest) <= seen[0] - 1 <= max(0, latest)
        return seen


async def test_readers_come_and_go_while_others_miss_nothing() -> None:
    """A reader that stays sees every message, however many others join and leave around it."""
    async with running() as daemon, AsyncExitStack() as stack, asyncio.timeout(20):
        steady = await stack.enter_async_context(subscribe(daemon.ws_url, last=0))
        publisher = await stack.enter_async_context(publishing(daemon.port))

        for turn in range(40):
            passing = await raw_subscriber(daemon.port, "topic=t&last=10")
            await publisher.send("t", 20)
            if turn % 2:
                passing.vanish()
            else:
                passing.writer.close()
        seen = await offsets(steady, 800)

    assert missing(seen) == 0
    assert seen[0] == 1


async def test_topics_of_two_tenants_stay_apart(daemon: Daemon) -> None:
    """One name under two tenants is two topics, for who subscribes by query and by header."""
    async with (
        subscribe(daemon.ws_url, "same", tenant="a") as of_a,
        subscribe(daemon.ws_url, "same", tenant="b") as of_b,
    ):
        await daemon.publish("same", "for a", **{"X-Tenant-ID": "a"})
        await daemon.publish("same", "for b", **{"X-Tenant-ID": "b"})
        texts = [json.loads(await reader.recv())["data"] for reader in (of_a, of_b)]

    assert texts == ["for a", "for b"]


# --- leaving nothing behind ----------------------------------------------------------------------


async def test_two_thousand_visitors_leave_nothing_behind() -> None:
    """Tasks, descriptors, readers, the wheel and the closing list are as before they came."""
    async with running() as daemon, asyncio.timeout(25):
        await daemon.publish("t", "catch-up for everyone")
        baseline = belongings(daemon)

        async with asyncio.TaskGroup() as tasks:
            for lane in range(10):
                tasks.create_task(visit_often(daemon, range(lane, 2000, 10)))

        await until(lambda: belongings(daemon) == baseline)
        figures = await daemon.get_json("/metrics")
    assert figures["total_subscribers"] == 0
    assert figures["messages"]["queued"] == 0
    assert figures["connections"]["background_errors"] == 0


async def visit_often(daemon: Daemon, numbers: range) -> None:
    """Connect and leave once for each number."""
    for number in numbers:
        await visit(daemon, number)


async def visit(daemon: Daemon, number: int) -> None:
    """Subscribe, read the catch-up, and leave in one of the ways there are."""
    reader = await raw_subscriber(daemon.port)
    assert (await reader.frame()).opcode == TEXT
    match number % 4:
        case 0:
            reader.send(masked(CLOSE, (1000).to_bytes(2, "big")))
            assert (await reader.goodbye()).code == 1000
        case 1:
            reader.send(b"\x81\x00")  # not masked
            assert (await reader.goodbye()).code == 1002
        case 2:
            reader.vanish()
    reader.writer.close()


def belongings(daemon: Daemon) -> dict[str, int]:
    """Return what a connection that was forgotten to clean up would still hold."""
    connections = daemon.server.connections
    return {
        "tasks": len(asyncio.all_tasks()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "connections": len(connections),
        "on the wheel": len(connections._presence),
        "closing": len(connections._farewells),
        "raw": len(daemon.listener.raw.open),
        "readers": sum(topic.subscribers for topic in daemon.hub.topics),
        "subscribers": daemon.hub.subscribers,
    }
