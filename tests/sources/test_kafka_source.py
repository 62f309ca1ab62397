"""Topics of Kafka as sources, seen from outside: order, repeats, partitions, trouble.

confluent-kafka writes, and a reader of the package websockets looks what comes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from daemons import Daemon, running, until
from held_journals import hold_journal, under_way
from journal_engines import new_topic
from kafka_servers import KafkaServer, shared_server
from websockets.asyncio.client import ClientConnection, connect

from clevrd.sources import kafka_topic
from clevrd.sources.kafka_topic import KafkaReader
from clevrd.sources.kinds import reader_of
from clevrd.sources.progress import Progress
from clevrd.sources.reading import SourceTrouble
from clevrd.sources.settings import read_sources
from clevrd.tenants.settings import read_access

# A broker is a JVM, which a busy machine starts in half a minute.
pytestmark = pytest.mark.timeout(90)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def server() -> KafkaServer:
    """Give the broker that all tests of the process share."""
    return shared_server()


@pytest.fixture
def topic(server: KafkaServer) -> Iterator[str]:
    """Give an empty topic with one partition."""
    name = new_topic()
    server.make_topic(name, 1, {})
    yield name
    server.delete_topics(name, wait=False)


def table(server: KafkaServer, place: str, **fields: Any) -> dict[str, Any]:
    """Return the table of a source that reads a topic from its beginning."""
    return {
        "name": "orders",
        "url": server.url(place),
        "topic": "t",
        "start": "earliest",
        "group": f"group-{place}",
        **fields,
    }


def figures(daemon: Daemon) -> Any:
    """Return the figures of the source, as /metrics has them."""
    return daemon.server.parts.messaging.sources.figures()[0]


async def received(reader: ClientConnection, count: int) -> list[Any]:
    """Return the next messages."""
    async with asyncio.timeout(40):
        return [json.loads(await reader.recv()) for _ in range(count)]


@asynccontextmanager
async def reading(daemon: Daemon, topic: str = "t") -> AsyncIterator[Any]:
    """Subscribe to a topic, with all that it has."""
    async with connect(f"{daemon.ws_url}/subscribe?topic={topic}&last=10000") as reader:
        yield reader


async def add(server: KafkaServer, topic: str, *values: Any, **options: Any) -> None:
    """Produce values as JSON, of which bytes and None are the values themselves."""

    def produce() -> None:
        producer = Producer({"bootstrap.servers": server.address, "acks": "all", "log_level": 0})
        for value in values:
            is_raw = value is None or isinstance(value, bytes)
            producer.produce(topic, value if is_raw else json.dumps(value).encode(), **options)
        assert producer.flush(20) == 0

    await asyncio.to_thread(produce)


async def test_records_become_messages_in_their_order(server: KafkaServer, topic: str) -> None:
    """What was there and what comes later: topics and keys of key, headers and pointers."""
    event = {"ce_specversion": "1.0", "ce_id": "50%25", "traceparent": PARENT, "tracestate": "?"}
    await add(server, topic, {"id": 1}, key="k1", headers={"region": "eu", **event})
    source = table(server, topic, topic="{header:region}.{/id}", key="{key}")
    async with running(sources=[source]) as daemon, reading(daemon, "eu.1") as reader:
        (first,) = await received(reader, 1)
        numbers = [{"id": 1, "n": number} for number in range(1000)]
        await add(server, topic, *numbers, key="k2", headers={"region": "eu"})
        rest = await received(reader, 1000)
        await until(lambda: figures(daemon).lag == 0)
        carried = await daemon.get_json("/topics/eu.1/messages?since=all&limit=2&headers=true")

    assert [each.get("headers") for each in carried["messages"]] == [
        {"traceparent": PARENT, "ce-specversion": "1.0", "ce-id": "50%25"},
        None,
    ]
    assert first["key"] == "k1"
    assert [each["data"]["n"] for each in rest] == list(range(1000))
    assert (figures(daemon).taken, figures(daemon).position) == (1001, "0:1000")


async def test_records_are_read_while_the_journal_has_those_before_on_their_way(
    server: KafkaServer, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is one message, in order, and the group is behind all at the end."""
    goes_on = hold_journal(monkeypatch)
    await add(server, topic, *range(2_000))
    journal = {"directory": str(tmp_path / "journal")}
    async with running(sources=[table(server, topic)], journal_table=journal) as daemon:
        await until(lambda: under_way(daemon) > 0, timeout_s=40)
        assert figures(daemon).taken == 0
        goes_on.set()
        await until(lambda: figures(daemon).lag == 0)
        async with reading(daemon) as reader:
            found = await received(reader, 2_000)

    assert [each["data"] for each in found] == list(range(2_000))
    assert (figures(daemon).taken, figures(daemon).repeated, figures(daemon).lost) == (2_000, 0, 0)
    assert figures(daemon).position == "0:1999"


async def test_deletions_are_passed_over_and_others_are_dead_letters(
    server: KafkaServer, topic: str
) -> None:
    """A record without a value says that its key is gone; what is no JSON is told."""
    await add(server, topic, None, b"no JSON", 1, key="k")
    async with (
        running(sources=[table(server, topic)]) as daemon,
        reading(daemon) as reader,
        reading(daemon, "sources.dead") as graveyard,
    ):
        (message,) = await received(reader, 1)
        (dead,) = await received(graveyard, 1)

    assert message["data"] == 1
    assert (dead["data"]["position"], dead["data"]["key"]) == ("0:1", "k")
    assert (figures(daemon).filtered, figures(daemon).dead) == (1, 1)


async def test_headers_that_cant_be_read_hold_nothing_up(
    server: KafkaServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is not UTF-8 is a fault only where a header is asked for.

    No client for Python sends such a name. So this raises what its library does that reads one.
    """
    record_of = kafka_topic._record_of

    class _Unreadable:
        def __init__(self, message: Any) -> None:
            self._message = message

        def __getattr__(self, name: str) -> Any:
            return getattr(self._message, name)

        def headers(self) -> None:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    def first_is_unreadable(message: Any) -> Any:
        return record_of(_Unreadable(message) if message.offset() == 0 else message)

    monkeypatch.setattr(kafka_topic, "_record_of", first_is_unreadable)
    await add(server, topic, 1, 2, headers={"region": "eu"})
    plain = table(server, topic, name="plain", group=f"plain-{topic}")
    async with (
        running(sources=[plain, table(server, topic, topic="{header:region}")]) as daemon,
        reading(daemon) as reader,
        reading(daemon, "eu") as of_region,
        reading(daemon, "sources.dead") as graveyard,
    ):
        messages = await received(reader, 2)
        (message,) = await received(of_region, 1)
        (dead,) = await received(graveyard, 1)

    assert [each["data"] for each in messages] == [1, 2]
    assert message["data"] == 2
    assert dead["data"]["reason"] == (
        "The header region can't be read: a header's name is not UTF-8."
    )


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("earliest", [1, 2, 3, 4]),
        ("latest", [4]),
        ("1", [2, 3, 4]),
        ("2020-01-01T00:00:00Z", [1, 2, 3, 4]),
    ],
)
async def test_source_begins_where_it_is_told(
    server: KafkaServer, topic: str, start: str, expected: list[int]
) -> None:
    """At an end, with the record of an offset, or with the first one from a moment on."""
    await add(server, topic, 1, 2, 3)
    source = table(server, topic, start=start)
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        await until(lambda: figures(daemon).lag == 0)
        await add(server, topic, 4)
        found = await received(reader, len(expected))

    assert [each["data"] for each in found] == expected


async def test_source_goes_on_where_it_was_and_counts_what_is_gone(
    server: KafkaServer, topic: str
) -> None:
    """A stop commits the offset; what the topic gave up since then is lost."""
    await add(server, topic, *range(100))
    source = table(server, topic)
    async with running(sources=[source]) as daemon:
        await until(lambda: figures(daemon).taken == 100)
    asked = ConsumerGroupTopicPartitions(source["group"], [TopicPartition(topic, 0)])
    # Its futures need the client as long as they run.
    admin = server.admin
    (group,) = admin.list_consumer_group_offsets([asked]).values()
    assert group.result(10).topic_partitions[0].offset == 100
    await add(server, topic, *range(100, 150))
    (trimmed,) = admin.delete_records([TopicPartition(topic, 0, 130)]).values()
    trimmed.result(10)
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        found = await received(reader, 20)

    assert [each["data"] for each in found] == list(range(130, 150))
    assert (figures(daemon).taken, figures(daemon).lost) == (20, 30)


async def test_missing_topic_is_read_from_its_beginning(server: KafkaServer) -> None:
    """Also with "latest": whatever comes was not there when the source began."""
    name = new_topic()
    source = table(server, name, start="latest")
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        await until(lambda: figures(daemon).state == "missing")
        server.make_topic(name, 1, {})
        await add(server, name, 1, 2)
        found = await received(reader, 2)

    assert [each["data"] for each in found] == [1, 2]


async def test_topic_made_anew_is_read_from_its_beginning(server: KafkaServer, topic: str) -> None:
    """Its offsets begin anew, below those that were read of the old one."""
    await add(server, topic, *range(20))
    async with running(sources=[table(server, topic)]) as daemon, reading(daemon) as reader:
        await received(reader, 20)
        await asyncio.to_thread(server.delete_topics, topic)
        await until(lambda: figures(daemon).state == "missing")
        await asyncio.to_thread(server.make_topic, topic, 1, {})
        await add(server, topic, 20, 21)
        found = await received(reader, 2)

    assert [each["data"] for each in found] == [20, 21]


async def test_topic_made_anew_at_once_is_read_from_its_beginning(
    server: KafkaServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody sees it missing, and it has the offset at which reading would go on."""
    monkeypatch.setattr(kafka_topic, "_LOOK_S", 0.0)
    source = table(server, topic, start="latest")
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        await until(lambda: figures(daemon).state == "reading", timeout_s=40)
        await add(server, topic, 1, 2)
        await received(reader, 2)
        # The next looks are over before the topic goes, and behind those that come when it is back.
        monkeypatch.setattr(kafka_topic, "_LOOK_S", 60.0)
        await asyncio.to_thread(server.delete_topics, topic)
        await asyncio.to_thread(server.make_topic, topic, 1, {})
        await add(server, topic, 3, 4)
        monkeypatch.setattr(kafka_topic, "_LOOK_S", 0.0)
        found = await received(reader, 2)

    assert [each["data"] for each in found] == [3, 4]


async def test_broker_that_hangs_is_shown_and_told_once(
    server: KafkaServer, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon serves meanwhile; the source goes on by itself, behind what it took."""
    await add(server, topic, 1)
    async with running(sources=[table(server, topic)]) as daemon, reading(daemon) as reader:
        await received(reader, 1)
        server.pause()
        try:
            await until(lambda: figures(daemon).state == "away", timeout_s=40)
            assert "can't be reached" in figures(daemon).last_error
            assert (await daemon.get_json("/health"))["status"] == "healthy"
        finally:
            server.go_on()
        await add(server, topic, 2)
        found = await received(reader, 1)
        await until(lambda: figures(daemon).state == "reading", timeout_s=40)

    assert found[0]["data"] == 2
    assert len([each for each in caplog.records if "source away" in each.getMessage()]) == 1


async def test_nodes_share_partitions_and_take_over(server: KafkaServer, topic: str) -> None:
    """Of two nodes with one partition one stands by, and goes on when the other is stopped."""
    await add(server, topic, *range(50))
    source = table(server, topic)
    async with running(sources=[source]) as two, reading(two) as reader:
        async with running(sources=[source]) as one:
            both = (one, two)
            await until(lambda: {figures(each).state for each in both} == {"reading", "standby"})
            await until(lambda: sum(figures(each).taken for each in both) == 50)
        taken = figures(two).taken
        await add(server, topic, *range(50, 100))
        found = await received(reader, taken + 50)

    assert [each["data"] for each in found[-50:]] == list(range(50, 100))


async def test_wrong_password_is_refused_and_shown(
    server: KafkaServer, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The source says so, without the password, and the daemon serves."""
    url = f"kafka+ssl://me:hush@localhost:{server.secured_port}/{topic}"
    source = table(server, topic, url=url, ca_file=server.ca_file)
    async with running(sources=[source]) as daemon:
        await until(lambda: figures(daemon).state == "refused")
        assert "refuses the user or the password" in figures(daemon).last_error

    assert "hush" not in caplog.text


@pytest.mark.parametrize("state", ["missing", "refused"])
async def test_source_that_cannot_be_read_does_not_seem_to_read_meanwhile(
    state: str,
    server: KafkaServer,
    topic: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is tried again and again, and says once why it does not read."""
    opened = 0
    open_of = kafka_topic.KafkaReader.open

    async def counted(reader: kafka_topic.KafkaReader) -> None:
        nonlocal opened
        opened += 1
        await open_of(reader)

    monkeypatch.setattr(kafka_topic.KafkaReader, "open", counted)
    caplog.set_level("INFO")
    url = server.url(f"{topic}-missing")
    if state == "refused":
        url = f"kafka+ssl://other:secret@localhost:{server.secured_port}/{topic}"
    source = table(server, topic, url=url, ca_file=server.ca_file if state == "refused" else "")
    async with running(sources=[source]) as daemon:
        await until(lambda: opened > 3, timeout_s=40)
        assert figures(daemon).state == state
        assert figures(daemon).last_error

    told = [each.getMessage().split(" name=")[0] for each in caplog.records]
    assert [each for each in told if each.startswith("source ")] == [
        f"source {state}",
        "source stopped",
    ]


async def test_user_and_tls_are_used(server: KafkaServer, topic: str) -> None:
    """With the right password records are taken."""
    url = f"kafka+ssl://me:secret@localhost:{server.secured_port}/{topic}"
    source = table(server, topic, url=url, ca_file=server.ca_file)
    await add(server, topic, 1)
    async with running(sources=[source]) as daemon, reading(daemon) as reader:
        assert (await received(reader, 1))[0]["data"] == 1


# --- partitions without a leader -----------------------------------------------------------------


class LeaderlessConsumer:
    """A consumer whose partition has no leader until somebody has asked so often who leads."""

    # Set by each test: for all consumers together.
    looks_needed = 0

    def __init__(self, _properties: object) -> None:
        self._place: TopicPartition | None = None
        self._on_assign: Any = None
        self._is_in_callback = False
        # The messages that come next, and where the reader goes on.
        self.coming: list[Any] = []
        self.assigned: list[int] = []

    def subscribe(self, topics: list[str], on_assign: Any, on_revoke: Any) -> None:
        """Join the group."""
        self._place = TopicPartition(topics[0], 0)
        self._on_assign = on_assign

    def consume(self, _count: int, _timeout_s: float) -> list[Any]:
        """Give the partition, or what comes."""
        if not self.assigned:
            self._is_in_callback = True
            try:
                self._on_assign(self, [self._place])
            except KafkaException as error:
                raise AssertionError("what the library raises then, no except catches") from error
            finally:
                self._is_in_callback = False
        coming, self.coming = self.coming, []
        return coming

    def committed(self, places: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        """Say that the group has read nothing."""
        return [TopicPartition(each.topic, each.partition, -1001) for each in places]

    def get_watermark_offsets(
        self, _place: object, timeout: float = 0, *, cached: bool = False
    ) -> tuple[int, int]:
        """Return the extent, once the leader is known."""
        if not cached:
            self._need_leader()
        return 3, 9

    def offsets_for_times(
        self, places: list[TopicPartition], timeout: float
    ) -> list[TopicPartition]:
        """Return the sixth record's place, once the leader is known."""
        self._need_leader()
        return [TopicPartition(each.topic, each.partition, 6) for each in places]

    def _need_leader(self) -> None:
        if LeaderlessConsumer.looks_needed > 0:
            raise KafkaException(KafkaError(KafkaError._UNKNOWN_PARTITION))

    def list_topics(self, topic: str, timeout: float) -> Any:
        """Ask who leads; the topic is there."""
        assert not self._is_in_callback, "the library aborts the process then"
        LeaderlessConsumer.looks_needed -= 1
        return SimpleNamespace(topics={topic: SimpleNamespace(error=None)})

    def assign(self, places: list[TopicPartition]) -> None:
        """Note where the reader goes on."""
        self.assigned = [each.offset for each in places]

    def seek(self, place: TopicPartition) -> None:
        """Note where the reader goes on."""
        self.assigned = [place.offset]

    def commit(self, **_: object) -> None:
        """Keep what is read."""

    def close(self) -> None:
        """Leave the group."""


def leaderless_reader(monkeypatch: pytest.MonkeyPatch, start: str, looks: int) -> KafkaReader:
    """Return a reader of a partition whose leader is known behind so many looks."""
    monkeypatch.setattr(kafka_topic, "Consumer", LeaderlessConsumer)
    monkeypatch.setattr(LeaderlessConsumer, "looks_needed", looks)
    source = {"name": "a", "url": "kafka://127.0.0.1:1/x", "topic": "t", "start": start}
    (entry,) = read_sources({"sources": [source]}, read_access({}, "file f"), "f")
    reader = reader_of(entry, Progress(entry))
    assert isinstance(reader, KafkaReader)
    return reader


@pytest.mark.parametrize(
    ("start", "offset"), [("earliest", 3), ("latest", 9), ("2026-01-31T08:00:00Z", 6)]
)
async def test_partition_without_a_leader_is_no_missing_topic(
    monkeypatch: pytest.MonkeyPatch, start: str, offset: int
) -> None:
    """Else a source that begins with the latest record would read all of a topic afterwards."""
    reader = leaderless_reader(monkeypatch, start, looks=1)
    await reader.open()

    with pytest.raises(SourceTrouble) as raised:
        await reader.read()
    await reader.close()
    await reader.open()
    await reader.read()

    assert raised.value.state == "away"
    assert str(raised.value).startswith("Kafka at kafka://127.0.0.1:1/x has a partition without")
    assert reader._consumer.assigned == [offset]


async def test_leader_that_came_later_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps for 15 minutes that there is none, and asks again only if it is told to."""
    reader = leaderless_reader(monkeypatch, "latest", looks=0)
    await reader.open()
    await reader.read()
    # The topic has no record any more at the position that is asked for.
    gone = KafkaError(KafkaError._AUTO_OFFSET_RESET)
    reader._consumer.coming = [SimpleNamespace(error=lambda: gone, partition=lambda: 0)]
    reader._next[0] = 1
    monkeypatch.setattr(LeaderlessConsumer, "looks_needed", 1)

    assert await reader.read() == []
    assert reader._consumer.assigned == [3]


async def test_group_is_left_before_questions_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """These may wait for a broker that is away, and a stop waits only for so long."""
    reader = leaderless_reader(monkeypatch, "earliest", looks=0)
    ended: list[str] = []

    async def close() -> None:
        ended.append("questions")

    reader._consumer = SimpleNamespace(close=lambda: ended.append("group"))
    reader._questions = SimpleNamespace(close=close)  # type: ignore[assignment]

    await reader.close()

    assert ended == ["group", "questions"]
