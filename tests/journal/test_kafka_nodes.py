"""Several daemons on one Kafka, seen from outside: one order, faults of the broker, lost topics."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest
import shared_journal
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from daemons import daemon_process, until
from journal_engines import new_topic
from kafka_servers import UNKEPT, KafkaServer, shared_server
from shared_journal import nodes, published, refused, resume
from websockets.asyncio.client import connect

# A broker takes seconds to start and to be found again.
pytestmark = pytest.mark.timeout(90)
received = partial(shared_journal.received, within_s=25.0)


@pytest.fixture
def server() -> Iterator[KafkaServer]:
    """Give a running broker, which may be killed and paused."""
    shared = shared_server()
    yield shared
    shared.revive()


async def test_messages_of_all_nodes_have_one_order_on_all_nodes(server: KafkaServer) -> None:
    """Two publishers on two nodes, and a reader on each: the same offsets, ids and data."""
    async with (
        nodes(server.url(new_topic()), partitions=2) as (one, two),
        connect(f"{one.ws_url}/subscribe?topic=t") as first,
        connect(f"{two.ws_url}/subscribe?topic=t") as second,
    ):
        answers = await asyncio.gather(
            *(daemon.publish("t", number) for number in range(20) for daemon in (one, two))
        )
        found = await received(first, 40)

        assert found == await received(second, 40)

    assert [each["offset"] for each in found] == list(range(1, 41))
    assert {each["message_id"] for each in answers} == {each["id"] for each in found}
    assert len({each["epoch"] for each in answers}) == 1
    assert all(each["durable"] for each in answers)


async def test_node_that_starts_fills_its_rings_from_the_log(server: KafkaServer) -> None:
    """Messages from before its start are there for readers that come back to it; so are keys."""
    url = server.url(new_topic())
    async with nodes(url, 1, partitions=2) as (one,):
        answers = [await one.publish(f"t.{number % 3}", number) for number in range(9)]
        keyed = await one.publish("t.0", 9, **{"Idempotency-Key": "k"})
    async with nodes(url, 1, partitions=2) as (two,):
        async with connect(resume(two, answers[0], "t.0")) as reader:
            greeting, *found = await received(reader, 4)
        after = await two.publish("t.0", "after")
        again = await two.publish("t.0", 9, **{"Idempotency-Key": "k"})

    assert greeting["recovered"] is True
    assert [each["data"] for each in found] == [3, 6, 9]
    assert (after["offset"], after["epoch"]) == (5, answers[0]["epoch"])
    assert (again["offset"], again["repeated"]) == (keyed["offset"], True)


@pytest.mark.holds_loop("a daemon process is started and waited for")
async def test_other_node_goes_on_when_one_is_killed_under_load(server: KafkaServer) -> None:
    """Kill after kill: what was answered is there, once, in its order; readers resume elsewhere."""
    url = server.url(new_topic())
    answered: list[dict[str, object]] = []
    async with nodes(url, 1) as (other,):
        first = await other.publish("t", -1)
        for kill in range(2):
            with daemon_process(CLEVRD_JOURNAL=url) as killed:

                async def publish(number: int, url: str = killed.url) -> None:
                    body = json.dumps({"topic": "t", "data": number})
                    async with other.http.post(f"{url}/publish", data=body) as response:
                        if response.status == 200:
                            answered.append({"data": number, **await response.json()})

                publishing = [
                    asyncio.ensure_future(publish(kill * 1000 + number)) for number in range(200)
                ]
                enough = len(answered) + 60
                await until(lambda enough=enough: len(answered) > enough)
                killed.process.kill()
                killed.process.wait(5)
                await asyncio.gather(*publishing, return_exceptions=True)
        last = await other.publish("t", "last")
        async with connect(resume(other, first)) as reader:
            greeting, *found = await received(reader, last["offset"])

    assert greeting["recovered"] is True
    assert [each["offset"] for each in found] == list(range(2, last["offset"] + 1))
    read = {each["id"]: (each["data"], each["offset"]) for each in found}
    assert len({each["data"] for each in found}) == len(found)
    for each in answered:
        assert read[str(each["message_id"])] == (each["data"], each["offset"])


async def test_foreign_producers_and_consumers_share_the_topic(server: KafkaServer) -> None:
    """A plain client publishes a plain object, and reads what was published without a node."""
    topic = new_topic()
    async with (
        nodes(server.url(topic), 2, partitions=1) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=orders.new") as reader,
    ):
        producer = Producer({"bootstrap.servers": server.address, "log_level": 0})
        producer.produce(topic, b'{"topic": "orders.new", "data": {"n": 1}, "key": "k"}')
        producer.produce(topic, b"no publish object")
        await asyncio.to_thread(producer.flush, 10)
        (foreign,) = await received(reader, 1)
        own = await one.publish("orders.new", {"n": 2})
        await received(reader, 1)
        figures = (await two.get_json("/metrics"))["journal"]

        lines = await asyncio.to_thread(read_plainly, server, topic)

    assert (foreign["data"], foreign["offset"], foreign["key"]) == ({"n": 1}, 1, "k")
    assert own["offset"] == 2
    assert (figures["engine"], figures["foreign"], figures["unreadable"]) == ("kafka", 1, 1)
    assert [line["data"] for line in lines] == [{"n": 1}, {"n": 2}]


def read_plainly(server: KafkaServer, topic: str) -> list[dict[str, object]]:
    """Return the publish objects in a topic, as a program without clevrd reads them."""
    consumer = Consumer({"bootstrap.servers": server.address, "group.id": "x", "log_level": 0})
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[dict[str, object]] = []
    try:
        while len(found) < 2:
            message = consumer.poll(5)
            assert message is not None
            assert message.error() is None
            lines = (message.value() or b"").splitlines()
            found += [json.loads(line) for line in lines if line.startswith(b"{")]
    finally:
        consumer.close()
    return found


@pytest.mark.long
async def test_topic_that_is_deleted_begins_anew_on_all_nodes(server: KafkaServer) -> None:
    """A node makes it again; readers are told of the epoch, and no position is used twice."""
    topic = new_topic()
    async with (
        nodes(server.url(topic), partitions=2) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = [await one.publish("t", number) for number in range(3)]
        await received(reader, 4)
        await asyncio.to_thread(server.delete_topics, topic, wait=False)
        after = [await published(daemon, "t", 10) for daemon in (one, two, one)]
        _, gap, *found = await received(reader, 5)
        async with connect(resume(one, before[-1])) as again:
            greeting = (await received(again, 1))[0]

    positions = [(each["epoch"], each["offset"]) for each in (*before, *after)]
    assert len(positions) == len(set(positions))
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")
    assert [each["offset"] for each in found] == [1, 2, 3]
    assert [each["offset"] for each in after] == [1, 2, 3]
    assert greeting["recovered"] is False


async def test_topic_that_is_made_again_at_once_is_another_log(server: KafkaServer) -> None:
    """No client notices that by itself; the topic's id and the stamps in records do."""
    topic = new_topic()
    async with (
        nodes(server.url(topic), partitions=1) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = [await one.publish("t", number) for number in range(3)]
        await received(reader, 4)
        await asyncio.to_thread(server.delete_topics, topic)
        # A node may have seen that it is gone, and have made it itself.
        with suppress(KafkaException):
            await asyncio.to_thread(server.make_topic, topic, 1, {})
        after = [await published(daemon, "t", 10) for daemon in (one, two)]
        _, gap, *found = await received(reader, 4)

    positions = [(each["epoch"], each["offset"]) for each in (*before, *after)]
    assert len(positions) == len(set(positions))
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")
    assert {each["offset"] for each in found} == {each["offset"] for each in after}


# --- the broker is away --------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "unkept"])
async def test_broker_that_is_killed_loses_nothing(server: KafkaServer, kept: bool) -> None:
    """Publishers wait or are refused, then it goes on; the epoch stays where nothing can be lost.

    A broker that answers before its disk has a message may have lost some, as far as a node knows.
    """
    topic = new_topic()
    await asyncio.to_thread(server.make_topic, topic, 1, {} if kept else UNKEPT)
    async with (
        nodes(server.url(topic), partitions=1) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = [await one.publish("t", number) for number in range(5)]
        await received(reader, 6)
        await asyncio.to_thread(server.kill)
        publishing = [asyncio.ensure_future(published(one, "t", n)) for n in range(5, 9)]
        await asyncio.to_thread(server.start)
        after = await asyncio.gather(*publishing)
        found = await received(reader, 4 if kept else 6)

    assert [each.get("durable", False) for each in before] == [kept] * 5
    if kept:
        assert {each["epoch"] for each in after} == {before[0]["epoch"]}
        assert [each["offset"] for each in found[:4]] == [6, 7, 8, 9]
    else:
        _, gap, *found = found
        assert (gap["type"], gap["reason"]) == ("gap", "epoch")
        assert [each["offset"] for each in found[:4]] == [1, 2, 3, 4]
    assert sorted(each["data"] for each in found[:4]) == [5, 6, 7, 8]


@pytest.mark.long
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "unkept"])
async def test_lost_tail_uses_no_position_twice(server: KafkaServer, kept: bool) -> None:
    """Answered messages are gone behind a crash: a new epoch, and the old one is over for good."""
    topic = new_topic()
    await asyncio.to_thread(server.make_topic, topic, 1, {} if kept else UNKEPT)
    async with (
        nodes(server.url(topic), partitions=1) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        left = [await one.publish("t", number) for number in range(3)]
        size_bytes = server.log_file(topic).stat().st_size
        lost = [await one.publish("t", number) for number in (3, 4)]
        await received(reader, 6)
        await asyncio.to_thread(server.kill)
        # As a power cut does to a file that was not flushed, or a disk to one that was.
        os.truncate(server.log_file(topic), size_bytes)
        await asyncio.to_thread(server.start)
        after = [await published(daemon, "t", 10) for daemon in (one, two)]
        frames = await received(reader, 1)
        while frames[-1].get("id") != after[-1]["message_id"]:
            frames += await received(reader, 1)
        async with connect(resume(two, lost[-1])) as again:
            greeting = (await received(again, 1))[0]

    positions = [(each["epoch"], each["offset"]) for each in (*left, *lost, *after)]
    assert len(positions) == len(set(positions))
    assert any((each.get("type"), each.get("reason")) == ("gap", "epoch") for each in frames)
    assert greeting["recovered"] is False


async def test_broker_that_hangs_is_told_and_passes(server: KafkaServer) -> None:
    """503 with Retry-After, health degraded, readers stay; then it goes on with the same epoch."""
    async with (
        nodes(server.url(new_topic()), partitions=1) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = await one.publish("t", 1)
        await received(reader, 2)
        server.pause()
        status, again, answer = await refused(one, "t", 2)
        health = await one.get_json("/health")
        server.go_on()
        after = await published(one, "t", 3)

    assert (status, answer["code"], answer["retryable"]) == (503, "journal_unavailable", True)
    assert float(again) >= 1
    assert health["status"] == "degraded"
    positions = {(each["epoch"], each["offset"]) for each in (before, after)}
    assert len(positions) == 2
