"""SIGKILL in the middle of a load, for each kind of source: nothing is lost, and nothing twice."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from confluent_kafka import Producer
from daemons import daemon_process, until
from journal_engines import new_topic
from kafka_servers import shared_server
from nats_servers import NatsServer
from redis_servers import redis_server
from source_daemons import exported, has_messages, source_of

RECORDS: Final = 3_000
# A daemon is killed when the journal has so many messages. Kafka and NATS wait for ten seconds
# before they let the next one read.
KILLS: Final = {"redis": (500, 1_500), "nats": (800,), "kafka": (800,)}
TOPICS: Final = 3
# Further settings. The broker misses a killed daemon sooner.
MORE: Final = {
    "redis": 'field = "data"',
    "kafka": 'kafka = { "session.timeout.ms" = 6000 }',
}

CONFIG: Final = """
[[sources]]
name = "orders"
url = "{url}"
topic = "t.{{/topic}}"
start = "earliest"
{more}
"""


def value_of(number: int) -> bytes:
    """Return the value of a record."""
    return json.dumps({"topic": number % TOPICS, "n": number}).encode()


@asynccontextmanager
async def redis_place(folder: Path) -> AsyncIterator[str]:
    """Give the URL of a stream with RECORDS records."""
    with redis_server(folder / "redis") as server, server.client as client:
        pipe = client.pipeline(transaction=False)
        for number in range(RECORDS):
            pipe.xadd("orders", {"data": value_of(number)})
        pipe.execute()
        yield f"{server.url}/orders"


@asynccontextmanager
async def nats_place(folder: Path) -> AsyncIterator[str]:
    """Give the URL of a stream with RECORDS messages."""
    server = NatsServer(folder / "nats").start()
    try:
        client = await server.client()
        stream = client.jetstream()
        await stream.add_stream(name="ORDERS", subjects=["orders"])
        for number in range(RECORDS):
            await client.publish("orders", value_of(number))
        await client.flush()
        await client.close()
        yield f"{server.url}/ORDERS"
    finally:
        server.kill()


@asynccontextmanager
async def kafka_place(folder: Path) -> AsyncIterator[str]:
    """Give the URL of a topic with one partition and RECORDS records."""
    server, topic = shared_server(), new_topic()
    server.make_topic(topic, 1, {})
    producer = Producer({"bootstrap.servers": server.address, "acks": "all", "log_level": 0})
    for number in range(RECORDS):
        producer.produce(topic, value_of(number))
    assert await asyncio.to_thread(producer.flush, 20) == 0
    yield server.url(topic)


PLACES: Final[dict[str, Callable[[Path], object]]] = {
    "redis": redis_place,
    "nats": nats_place,
    "kafka": kafka_place,
}


@pytest.mark.timeout(120)
@pytest.mark.holds_loop("daemon processes are started and waited for")
@pytest.mark.parametrize(
    "kind",
    [kind if kind == "redis" else pytest.param(kind, marks=pytest.mark.long) for kind in PLACES],
)
async def test_killed_daemon_loses_nothing_and_repeats_nothing(kind: str, tmp_path: Path) -> None:
    """Each record is one message of the journal, in the order of its topic, after kills."""
    journal = tmp_path / "journal"
    config = tmp_path / "clevrd.toml"
    async with PLACES[kind](tmp_path) as url:  # type: ignore[attr-defined]
        more = MORE.get(kind, "")
        config.write_text(CONFIG.format(url=url, more=more))
        variables = {"CLEVRD_CONFIG": str(config), "CLEVRD_JOURNAL": str(journal)}
        for messages in KILLS[kind]:
            with daemon_process(**variables) as daemon:
                await until(partial(has_messages, daemon, messages), timeout_s=40)
                daemon.process.send_signal(signal.SIGKILL)
                daemon.process.wait(5)
        with daemon_process(**variables) as daemon:
            await until(lambda: source_of(daemon)["lag"] == 0, timeout_s=40)
            assert source_of(daemon)["dead"] == 0
            assert daemon.stop() == 0

    found = exported(journal)
    for topic in range(TOPICS):
        numbers = [each["data"]["n"] for each in found if each["topic"] == f"t.{topic}"]
        assert numbers == list(range(topic, RECORDS, TOPICS))
