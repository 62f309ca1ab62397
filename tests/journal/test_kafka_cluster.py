"""A Kafka of three brokers whose leaders are killed: what is lost, and what readers are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from daemons import Daemon, running, until
from journal_engines import new_topic
from kafka_servers import KafkaCluster
from shared_journal import nodes, published, received, refused, resume
from websockets.asyncio.client import ClientConnection, connect

# A cluster takes half a minute to start, and some seconds to choose each leader.
pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

# Three copies, of which two are there before a message is answered.
KEPT: dict[str, Any] = {"replication_factor": 3, "min_replicas": 2, "partitions": 1}


@pytest.fixture(scope="module")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    """Give a running cluster for all tests."""
    cluster = KafkaCluster(tmp_path_factory.mktemp("kafka"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


@pytest.fixture
def cluster(one_cluster: KafkaCluster) -> Iterator[KafkaCluster]:
    """Give a running cluster, of which brokers may be killed."""
    yield one_cluster
    one_cluster.revive()


class Publishers:
    """Publishers on all nodes, which send each message until it is answered."""

    def __init__(self, daemons: list[Daemon]) -> None:
        self.answers: list[dict[str, Any]] = []
        # What each of them was answered, in order.
        self.texts: list[list[str]] = [[] for _ in range(2 * len(daemons))]
        self._daemons = daemons
        self._is_ending = False
        self._tasks = [
            asyncio.ensure_future(self._publish(number, own))
            for number, own in enumerate(self.texts)
        ]

    async def _publish(self, number: int, own: list[str]) -> None:
        while not self._is_ending:
            text = f"{number}.{len(own)}"
            daemon = self._daemons[number % len(self._daemons)]
            self.answers.append(await published(daemon, "t", text))
            own.append(text)

    async def have(self, count: int) -> None:
        """Wait until so many messages are answered."""
        await until(lambda: len(self.answers) >= count, timeout_s=60)

    async def end(self) -> None:
        """Let each of them have its last answer."""
        self._is_ending = True
        await asyncio.gather(*self._tasks)


async def read_up_to(reader: ClientConnection, message_id: str) -> list[Any]:
    """Return all frames up to a message."""
    frames = await received(reader, 1)
    while frames[-1].get("id") != message_id:
        frames += await received(reader, 1)
    return frames


async def test_leader_that_is_killed_under_load_loses_nothing(cluster: KafkaCluster) -> None:
    """Again and again: all that was answered is there, once, in order, in the same epoch."""
    topic = new_topic()
    async with nodes(cluster.url(topic), **KEPT) as daemons:
        first = await daemons[0].publish("t", "first")
        async with (
            connect(resume(daemons[0], first), max_queue=None) as one,
            connect(resume(daemons[1], first), max_queue=None) as two,
        ):
            publishers = Publishers(daemons)
            for _ in range(2):
                await asyncio.to_thread(cluster.wait_in_sync, topic, 3)
                await publishers.have(len(publishers.answers) + 40)
                leader = await asyncio.to_thread(cluster.leader_of, topic)
                leader.kill()
                # Enough to be sure that another one leads.
                await publishers.have(len(publishers.answers) + 40)
                await asyncio.to_thread(leader.start)
            await publishers.end()
            last = await daemons[1].publish("t", "last")
            greeting, *frames = await read_up_to(one, last["message_id"])
            _, *others = await read_up_to(two, last["message_id"])
            figures = (await daemons[0].get_json("/metrics"))["journal"]

    assert greeting["recovered"] is True
    assert figures["durability"] == "replicas"
    assert frames == others
    assert [each.get("offset") for each in frames] == list(range(2, last["offset"] + 1))
    assert {each["epoch"] for each in publishers.answers} == {first["epoch"]}
    places = {each["id"]: each["offset"] for each in frames}
    assert all(places[each["message_id"]] == each["offset"] for each in publishers.answers)
    read = [each["data"] for each in frames]
    assert len(set(read)) == len(read)
    for number, texts in enumerate(publishers.texts):
        assert [text for text in read if text.startswith(f"{number}.")] == texts


async def test_two_brokers_that_are_killed_are_503_until_one_returns(
    cluster: KafkaCluster,
) -> None:
    """One copy alone takes nothing; readers stay and are told nothing; then it goes on."""
    topic = new_topic()
    async with nodes(cluster.url(topic), **KEPT) as (one, two):
        before = [await one.publish("t", number) for number in range(5)]
        async with connect(resume(two, before[0]), max_queue=None) as reader:
            greeting, *found = await received(reader, 5)
            await asyncio.to_thread(cluster.wait_in_sync, topic, 3)
            leader = await asyncio.to_thread(cluster.leader_of, topic)
            killed = [leader, next(each for each in cluster.brokers if each is not leader)]
            for each in killed:
                each.kill()
            status, again, answer = await refused(one, "t", "refused")
            health = await one.get_json("/health")
            await asyncio.to_thread(killed[1].start)
            after = [await published(daemon, "t", "after") for daemon in (one, two)]
            async with asyncio.timeout(30):
                while (await one.get_json("/health"))["status"] != "healthy":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            found += await read_up_to(reader, after[-1]["message_id"])

    assert greeting["recovered"] is True
    assert (status, answer["code"], answer["retryable"]) == (503, "journal_unavailable", True)
    assert int(again) >= 1
    assert (health["status"], health["journal"]["state"]) == ("degraded", "unavailable")
    assert [each.get("offset") for each in found] == list(range(2, after[-1]["offset"] + 1))
    assert {each["epoch"] for each in after} == {before[0]["epoch"]}
    # The one that was refused may have been accepted, and then it was so once.
    assert [each["data"] for each in found].count("refused") <= 1


async def test_leader_that_was_not_in_sync_loses_a_tail_and_that_is_told(
    cluster: KafkaCluster,
) -> None:
    """An unclean election: readers get a gap, reason `epoch`, and no position is given twice."""
    topic = new_topic()
    config = {"min.insync.replicas": "1", "unclean.leader.election.enable": "true"}
    await asyncio.to_thread(cluster.brokers[0].make_topic, topic, 1, config, 3)
    async with (
        nodes(cluster.url(topic), partitions=1) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1", max_queue=None) as reader,
    ):
        kept = [await one.publish("t", number) for number in range(3)]
        await asyncio.to_thread(cluster.wait_in_sync, topic, 3)
        leader = await asyncio.to_thread(cluster.leader_of, topic)
        followers = [each for each in cluster.brokers if each is not leader]
        for each in followers:
            each.kill()
        await asyncio.to_thread(cluster.wait_in_sync, topic, 1)
        lost = [await published(one, "t", number) for number in (3, 4)]
        frames = await read_up_to(reader, lost[-1]["message_id"])
        leader.kill()
        await asyncio.to_thread(followers[0].start)
        after = [await published(daemon, "t", "after") for daemon in (one, two)]
        frames += await read_up_to(reader, after[-1]["message_id"])
        figures = (await one.get_json("/metrics"))["journal"]
        async with connect(resume(two, lost[-1])) as again:
            greeting = (await received(again, 1))[0]
            gap = (await received(again, 1))[0]

    assert figures["durability"] == "memory"
    positions = [(each["epoch"], each["offset"]) for each in (*kept, *lost, *after)]
    assert len(positions) == len(set(positions))
    told = [each for each in frames if each.get("type") == "gap"]
    assert {each["reason"] for each in told} == {"epoch"}
    assert {each["epoch"] for each in after}.isdisjoint(each["epoch"] for each in lost)
    assert [each["data"] for each in frames if each.get("id") and each["data"] == "after"] == [
        "after",
        "after",
    ]
    assert greeting["recovered"] is False
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")


async def test_source_goes_on_behind_a_time_without_a_leader(cluster: KafkaCluster) -> None:
    """A topic with one copy, whose broker dies: it is away and not missing, and comes back alone.

    The source begins with the latest record, so nothing of before comes, and all that comes later.
    """
    topic = new_topic()
    await asyncio.to_thread(cluster.brokers[0].make_topic, topic, 1, {}, 1)
    leader = await asyncio.to_thread(cluster.leader_of, topic)
    await asyncio.to_thread(produce, cluster, topic, "before")
    await asyncio.to_thread(make_groups, cluster, topic)
    leader.kill()
    source = {"name": "s", "url": cluster.url(topic), "topic": "t", "start": "latest"}
    async with running(sources=[source]) as daemon:

        def figures() -> Any:
            return daemon.server.parts.messaging.sources.figures()[0]

        await until(lambda: "without a leader" in figures().last_error, timeout_s=60)
        assert figures().state == "away"
        await asyncio.to_thread(leader.start)
        await until(lambda: figures().state == "reading", timeout_s=60)
        async with connect(f"{daemon.ws_url}/subscribe?topic=t&last=9") as reader:
            number = 0
            # Until the group has given the partition what comes is before the latest record.
            while not figures().taken:
                await asyncio.to_thread(produce, cluster, topic, number)
                number += 1
            (first,) = await received(reader, 1)

    assert first["data"] in range(number)


def make_groups(cluster: KafkaCluster, topic: str) -> None:
    """Have the brokers make the topic in which they keep groups, which takes all three of them."""
    brokers = ",".join(each.address for each in cluster.brokers)
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "another", "log_level": 0})
    are_there = False
    while not are_there:
        # For a moment its own brokers don't know yet which of them it is.
        with suppress(KafkaException):
            consumer.committed([TopicPartition(topic, 0)], timeout=30)
            are_there = True
    consumer.close()


def produce(cluster: KafkaCluster, topic: str, data: Any) -> None:
    """Produce a record by a client that this project did not write."""
    brokers = ",".join(each.address for each in cluster.brokers)
    producer = Producer({"bootstrap.servers": brokers, "acks": "all", "log_level": 0})
    producer.produce(topic, json.dumps(data).encode())
    assert producer.flush(30) == 0
