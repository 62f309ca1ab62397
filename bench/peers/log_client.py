"""The same as a journal, without clevrd: an engine's own client appends messages and reads them.

One thread appends all that is due in one go, waits until the engine has it, reads it back and
compares it with what it wrote. Prints one JSON object: what was lost or out of order, how late, and
the CPU of a message.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, Protocol

PAYLOAD = b"x" * 242


class Log(Protocol):
    """An engine's client; another engine adds a class, and its name to `LOGS`."""

    def append(self, messages: list[bytes]) -> None:
        """Return when all of them are taken."""

    def read(self) -> list[bytes]:
        """Return what was appended since the last call."""


class SqliteLog:
    """A table in WAL mode, flushed to the disk with each transaction."""

    def __init__(self, place: str) -> None:
        import apsw

        self._connection = apsw.Connection(place + ".db")
        self._connection.execute("PRAGMA journal_mode = wal")
        self._connection.execute("PRAGMA synchronous = full")
        self._connection.execute("CREATE TABLE log (position INTEGER PRIMARY KEY, message BLOB)")
        self._position = 0

    def append(self, messages: list[bytes]) -> None:
        """Insert them in one transaction."""
        with self._connection:
            self._connection.executemany(
                "INSERT INTO log (message) VALUES (?)", [(message,) for message in messages]
            )

    def read(self) -> list[bytes]:
        """Select what is behind the last one."""
        query = "SELECT position, message FROM log WHERE position > ? ORDER BY position"
        rows = list(self._connection.execute(query, (self._position,)))
        if rows:
            self._position = rows[-1][0]
        return [message for _, message in rows]


class RedisLog:
    """A stream; the commands of one go are one write."""

    def __init__(self, place: str) -> None:
        from redis import Redis

        self._redis: Any = Redis.from_url(place)
        self._position = b"0"

    def append(self, messages: list[bytes]) -> None:
        """Add them in a pipeline."""
        pipeline = self._redis.pipeline(transaction=False)
        for message in messages:
            pipeline.xadd("log", {"m": message})
        pipeline.execute()

    def read(self) -> list[bytes]:
        """Read what is behind the last one."""
        found = self._redis.xread({"log": self._position})
        if not found:
            return []
        ((_, entries),) = found
        self._position = entries[-1][0]
        return [fields[b"m"] for _, fields in entries]


class NatsLog:
    """A stream of JetStream; the messages of one go are sent before the first is acknowledged."""

    def __init__(self, place: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._unread = 0
        self._loop.run_until_complete(self._open(place))

    async def _open(self, place: str) -> None:
        import nats
        from nats.js.api import AckPolicy, ConsumerConfig

        self._client: Any = await nats.connect(place)
        self._stream: Any = self._client.jetstream(publish_async_max_pending=100_000)
        await self._stream.add_stream(name="log", subjects=["log"])
        config = ConsumerConfig(ack_policy=AckPolicy.NONE)
        self._reader: Any = await self._stream.pull_subscribe("log", config=config)

    def append(self, messages: list[bytes]) -> None:
        """Publish them, and wait for all acknowledgements."""
        self._loop.run_until_complete(self._append(messages))
        self._unread += len(messages)

    async def _append(self, messages: list[bytes]) -> None:
        answers = [await self._stream.publish_async("log", message) for message in messages]
        await asyncio.gather(*answers)

    def read(self) -> list[bytes]:
        """Fetch what was appended since the last call."""
        return self._loop.run_until_complete(self._read())

    async def _read(self) -> list[bytes]:
        found: list[bytes] = []
        while len(found) < self._unread:
            wanted = min(self._unread - len(found), 1_000)
            found += [each.data for each in await self._reader.fetch(wanted, timeout=5)]
        self._unread = 0
        return found


class KafkaLog:
    """A topic with one partition, by an idempotent producer that does not linger."""

    def __init__(self, place: str) -> None:
        from confluent_kafka import Consumer, Producer, TopicPartition
        from confluent_kafka.admin import AdminClient
        from confluent_kafka.cimpl import NewTopic

        address = place.removeprefix("kafka://").partition("/")[0]
        admin: Any = AdminClient({"bootstrap.servers": address})
        for made in admin.create_topics([NewTopic("log", 1, 1)]).values():
            made.result(30)
        self._producer: Any = Producer(
            {
                "bootstrap.servers": address,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "queue.buffering.max.messages": 1_000_000,
            }
        )
        self._consumer: Any = Consumer(
            {
                "bootstrap.servers": address,
                "group.id": "log",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 5,
            }
        )
        self._consumer.assign([TopicPartition("log", 0, 0)])
        self._unread = 0

    def append(self, messages: list[bytes]) -> None:
        """Produce them, and wait until all are on the broker."""
        for message in messages:
            self._producer.produce("log", message)
        self._producer.flush()
        self._unread += len(messages)

    def read(self) -> list[bytes]:
        """Consume what was appended since the last call."""
        found: list[bytes] = []
        while len(found) < self._unread:
            found += [each.value() for each in self._consumer.consume(self._unread - len(found), 5)]
        self._unread = 0
        return found


LOGS: dict[str, Callable[[str], Log]] = {
    "sqlite": SqliteLog,
    "redis": RedisLog,
    "nats": NatsLog,
    "kafka": KafkaLog,
}


def measure(log: Log, rate: float, seconds: float) -> dict[str, float]:
    """Append by a schedule for so long."""
    # The first one finds out who leads, and makes what is made once.
    log.append([PAYLOAD])
    log.read()
    latencies_ms: list[float] = []
    sent = wrong = 0
    begun_cpu, begun = time.process_time(), time.monotonic()
    while sent < rate * seconds:
        due = min(int((time.monotonic() - begun) * rate), int(rate * seconds))
        if due <= sent:
            time.sleep(0.0002)
            continue
        messages = [b"%08d" % number + PAYLOAD for number in range(sent, due)]
        log.append(messages)
        found = log.read()
        now = time.monotonic() - begun
        wrong += sum(one != other for one, other in zip(found, messages, strict=False))
        wrong += abs(len(found) - len(messages))
        latencies_ms += [(now - number / rate) * 1e3 for number in range(sent, due)]
        sent = due
    cpu_us = (time.process_time() - begun_cpu) * 1e6 / sent
    latencies_ms.sort()
    p50, p99 = (latencies_ms[int(len(latencies_ms) * share)] for share in (0.5, 0.99))
    return {"wrong": wrong, "p50": p50, "p99": p99, "cpu_us": cpu_us}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=LOGS)
    parser.add_argument("place")
    parser.add_argument("--rate", type=float, default=1_000)
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    log = LOGS[options.engine](options.place)
    print(json.dumps(measure(log, options.rate, options.seconds)))


if __name__ == "__main__":
    main()
