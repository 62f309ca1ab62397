"""Streams of NATS JetStream as sources, seen from outside: order, repeats, takeovers, trouble.

nats-py writes, and a reader of the package websockets looks what comes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, running, until
from held_journals import hold_journal, under_way
from nats.js import JetStreamContext
from nats_servers import NatsServer
from websockets.asyncio.client import ClientConnection, connect

from clevrd.sources import jetstream

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """Give a running server to all tests of the module."""
    started = NatsServer(tmp_path_factory.mktemp("nats"))
    try:
        yield started.start()
    finally:
        started.kill()


@pytest.fixture
async def stream(server: NatsServer) -> AsyncIterator[JetStreamContext]:
    """Give a client of a server that has an empty stream ORDERS."""
    await server.delete_all()
    client = await server.client()
    try:
        context = client.jetstream()
        await context.add_stream(name="ORDERS", subjects=["orders.>"])
        yield context
    finally:
        await client.close()


def table(server: NatsServer, place: str = "ORDERS", **fields: Any) -> dict[str, Any]:
    """Return the table of a source that reads a stream from its beginning."""
    return {
        "name": "orders",
        "url": f"{server.url}/{place}",
        "topic": "t",
        "start": "earliest",
        **fields,
    }


def figures(daemon: Daemon) -> Any:
    """Return the figures of the source, as /metrics has them."""
    return daemon.server.parts.messaging.sources.figures()[0]


async def received(reader: ClientConnection, count: int) -> list[Any]:
    """Return the next messages."""
    async with asyncio.timeout(20):
        return [json.loads(await reader.recv()) for _ in range(count)]


@asynccontextmanager
async def reading(daemon: Daemon, topic: str = "t") -> AsyncIterator[Any]:
    """Subscribe to a topic, with all that it has."""
    async with connect(f"{daemon.ws_url}/subscribe?topic={topic}&last=10000") as reader:
        yield reader


async def add(
    stream: JetStreamContext, *values: Any, subject: str = "orders.eu", **headers: str
) -> None:
    """Publish values as JSON."""
    for value in values:
        await stream.publish(subject, json.dumps(value).encode(), headers=headers or None)


async def test_records_become_messages_in_their_order(
    server: NatsServer, stream: JetStreamContext
) -> None:
    """What was there and what comes later: topics of subjects, headers and pointers."""
    event = {"ce-specversion": "1.0", "ce-id": "50%25", "traceparent": PARENT}
    await add(stream, {"id": 1}, region="eu", **event)
    source = table(server, topic="{key}.{header:region}", key="{/id}")
    async with running(sources=[source]) as daemon, reading(daemon, "orders.eu.eu") as reader:
        (first,) = await received(reader, 1)
        for number in range(2, 401):
            await add(stream, {"id": number}, region="eu")
        rest = await received(reader, 399)
        await until(lambda: figures(daemon).lag == 0)
        path = "/topics/orders.eu.eu/messages?since=all&limit=2&headers=true"
        carried = await daemon.get_json(path)

    assert [each.get("headers") for each in carried["messages"]] == [
        {"traceparent": PARENT, "ce-specversion": "1.0", "ce-id": "50%"},
        None,
    ]
    assert [each["key"] for each in [first, *rest]] == [str(number) for number in range(1, 401)]
    assert (figures(daemon).taken, figures(daemon).position) == (400, "400")


async def test_records_are_read_while_the_journal_has_those_before_on_their_way(
    server: NatsServer,
    stream: JetStreamContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is one message, in order, and all are acknowledged at the end."""
    goes_on = hold_journal(monkeypatch)
    await asyncio.gather(*(add(stream, number) for number in range(1_200)))
    journal = {"directory": str(tmp_path / "journal")}
    async with running(sources=[table(server)], journal_table=journal) as daemon:
        await until(lambda: under_way(daemon) > 0)
        assert figures(daemon).taken == 0
        goes_on.set()
        await until(lambda: figures(daemon).lag == 0)
        async with reading(daemon) as reader:
            found = await received(reader, 1_200)

    assert [each["data"] for each in found] == list(range(1_200))
    assert (figures(daemon).taken, figures(daemon).repeated, figures(daemon).lost) == (1_200, 0, 0)
    info = await stream.consumer_info("ORDERS", "clevrd-orders")
    assert (info.num_ack_pending, info.num_pending) == (0, 0)


async def test_subject_names_a_part_of_a_stream(
    server: NatsServer, stream: JetStreamContext
) -> None:
    """Only messages of the subject are read; what is no JSON is a dead letter with its subject."""
    await add(stream, 1, subject="orders.us")
    await stream.publish("orders.eu.1", b"no JSON")
    await add(stream, 2, subject="orders.eu.2")
    async with (
        running(sources=[table(server, "orders.eu.*")]) as daemon,
        reading(daemon) as reader,
        reading(daemon, "sources.dead") as graveyard,
    ):
        (message,) = await received(reader, 1)
        (dead,) = await received(graveyard, 1)

    assert message["data"] == 2
    assert (dead["data"]["key"], dead["data"]["position"]) == ("orders.eu.1", "2")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("earliest", [1, 2, 3, 4]),
        ("latest", [4]),
        ("3", [3, 4]),
        ("2020-01-01T00:00:00Z", [1, 2, 3, 4]),
    ],
)
async def test_source_begins_where_it_is_told(
    server: NatsServer, stream: JetStreamContext, start: str, expected: list[int]
) -> None:
    """At an end, with the message of a number, or with the first one from a moment on."""
    await add(stream, 1, 2, 3)
    async with running(sources=[table(server, start=start)]) as daemon, reading(daemon) as reader:
        await until(lambda: figures(daemon).state == "reading")
        await add(stream, 4)
        found = await received(reader, len(expected))

    assert [each["data"] for each in found] == expected


async def test_source_goes_on_where_it_was_after_a_restart(
    server: NatsServer, stream: JetStreamContext
) -> None:
    """A stop keeps the position in the consumer."""
    await add(stream, *range(100))
    async with running(sources=[table(server)]) as daemon, reading(daemon) as reader:
        await received(reader, 100)
    info = await stream.consumer_info("ORDERS", "clevrd-orders")
    assert info.ack_floor is not None
    assert info.ack_floor.stream_seq == 100
    await add(stream, *range(100, 103))
    async with running(sources=[table(server)]) as daemon, reading(daemon) as reader:
        found = await received(reader, 3)

    assert [each["data"] for each in found] == [100, 101, 102]
    assert (figures(daemon).taken, figures(daemon).lost) == (3, 0)


async def test_trimmed_messages_are_counted_as_lost(
    server: NatsServer, stream: JetStreamContext
) -> None:
    """Those that the stream gave up by its bound while publishes were refused."""
    await stream.update_stream(name="ORDERS", subjects=["orders.>"], max_msgs=20)
    await add(stream, {"t": "a", "n": 0}, {"t": "b", "n": 1})
    source = table(server, topic="{/t}")
    async with (
        running(sources=[source], max_topics_per_tenant=1, topic_idle_s=3.0) as daemon,
    ):
        await until(lambda: figures(daemon).state == "waiting")
        await add(stream, *({"t": "b", "n": number} for number in range(2, 202)))
        await until(lambda: figures(daemon).position == "202")
        async with reading(daemon, "b") as reader:
            found = [
                each["data"]["n"] for each in await received(reader, figures(daemon).taken - 1)
            ]

    assert figures(daemon).lost > 0
    assert figures(daemon).lost + figures(daemon).taken == 202
    assert found == sorted(found)
    assert found[-1] == 201


async def test_holes_in_a_stream_are_no_loss_and_cost_few_questions(
    server: NatsServer, stream: JetStreamContext
) -> None:
    """The stream keeps the newest message of each subject, so half of the numbers are missing."""
    await stream.update_stream(name="ORDERS", subjects=["orders.>"], max_msgs_per_subject=1)
    for number in range(150):
        await add(stream, number, subject=f"orders.once.{number}")
        await add(stream, number, subject="orders.again")
    asked: list[str] = []

    async def note(message: Any) -> None:
        asked.append(message.subject)

    client = await server.client()
    try:
        await client.subscribe("$JS.API.STREAM.INFO.ORDERS", cb=note)
        await client.flush()
        async with running(sources=[table(server)]) as daemon, reading(daemon) as reader:
            found = [each["data"] for each in await received(reader, 151)]
    finally:
        await client.close()

    assert found == [*range(150), 149]
    assert figures(daemon).lost == 0
    # One as it begins, and one for all that has come at a time.
    assert 0 < len(asked) < 50


async def test_missing_stream_and_one_made_anew_are_read_from_their_beginning(
    server: NatsServer, stream: JetStreamContext
) -> None:
    """Also with "latest": whatever comes was not there when the source began."""
    await server.delete("ORDERS")
    source = table(server, start="latest")
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        for numbers in ([1, 2], [3, 4]):
            await until(lambda: figures(daemon).state == "missing")
            await stream.add_stream(name="ORDERS", subjects=["orders.>"])
            await add(stream, *numbers)
            found = await received(reader, 2)
            assert [each["data"] for each in found] == numbers
            await server.delete("ORDERS")


async def test_one_node_reads_and_another_takes_over(
    server: NatsServer, stream: JetStreamContext
) -> None:
    """Two nodes on one journal: each record is one message, in order, over a node's end."""
    journal = {"url": server.url, "partitions": 1}
    source = table(server)
    await add(stream, *range(50))
    async with running(sources=[source], journal_table=journal) as one:
        await until(lambda: figures(one).taken == 50)
        async with running(sources=[source], journal_table=journal) as two, reading(two) as reader:
            await until(lambda: figures(two).state == "standby")
            await add(stream, *range(50, 250))
            await one.server.crash()
            await add(stream, *range(250, 300))

            found = await received(reader, 300)
            await until(lambda: figures(two).lag == 0)

    assert [each["data"] for each in found] == list(range(300))


async def test_what_a_killed_node_was_sent_is_read_as_soon_as_it_is_let_go(
    server: NatsServer, stream: JetStreamContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing newer comes, by which another node would be noticed."""
    monkeypatch.setattr(jetstream, "_PIN_S", 1)
    monkeypatch.setattr(jetstream, "_LOOK_S", 0.2)
    hold_journal(monkeypatch)
    journal = {"directory": str(tmp_path / "journal")}
    await add(stream, *range(10))
    async with running(sources=[table(server)], journal_table=journal) as killed:
        await until(lambda: under_way(killed) == 10)
        await killed.server.crash()

    async with running(sources=[table(server)]) as daemon, reading(daemon) as reader:
        found = await received(reader, 10)
        await until(lambda: figures(daemon).lag == 0)

    assert [each["data"] for each in found] == list(range(10))


async def test_server_that_is_away_is_shown_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon serves meanwhile; the source goes on by itself, behind what it took."""
    own = NatsServer(tmp_path / "nats")
    try:
        async with running(sources=[table(own)]) as daemon, reading(daemon) as reader:
            await until(lambda: figures(daemon).errors >= 2)
            assert figures(daemon).state == "away"
            own.start()
            client = await own.client()
            await client.jetstream().add_stream(name="ORDERS", subjects=["orders.>"])
            await add(client.jetstream(), 1)
            assert (await received(reader, 1))[0]["data"] == 1
            await client.close()
            own.kill()
            await until(lambda: figures(daemon).state == "away")
            own.start()
            client = await own.client()
            await add(client.jetstream(), 2)
            await client.close()
            assert (await received(reader, 1))[0]["data"] == 2
    finally:
        own.kill()
    told = [each.getMessage() for each in caplog.records if "source away" in each.getMessage()]
    assert len(told) == 2


async def test_consumer_of_others_is_refused(server: NatsServer, stream: JetStreamContext) -> None:
    """A consumer that was made for something else is left alone."""
    await stream.pull_subscribe("orders.>", durable="clevrd-orders")
    async with running(sources=[table(server)]) as daemon:
        await until(lambda: figures(daemon).state == "refused")
        assert "was made for something else" in figures(daemon).last_error


async def test_work_queue_is_refused(server: NatsServer, stream: JetStreamContext) -> None:
    """It gives each message to one consumer alone, and a source says what to do."""
    await stream.add_stream(name="QUEUE", subjects=["queue.>"], retention="workqueue")
    async with running(sources=[table(server, "QUEUE")]) as daemon:
        await until(lambda: figures(daemon).state == "refused")
        assert "is a work queue" in figures(daemon).last_error
        assert "copies it" in figures(daemon).last_error


async def test_server_that_is_too_old_is_refused(
    server: NatsServer, stream: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make a consumer that is not what was asked for; none is made."""
    monkeypatch.setattr(jetstream, "MIN_VERSION", (99, 1))
    async with running(sources=[table(server)]) as daemon:
        await until(lambda: figures(daemon).state == "refused")
        assert "a source needs 99.1 or newer; update it." in figures(daemon).last_error

    assert await stream.consumers_info("ORDERS") == []
