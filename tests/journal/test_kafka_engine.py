"""The Kafka engine against a real broker: faults, refusals, TLS, SASL, lost tails, checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from confluent_kafka import KafkaError
from daemons import until
from journal_engines import kafka_settings, new_topic
from journal_log import EPOCH, LogWriter, read_all
from kafka_servers import UNKEPT, KafkaServer, shared_server
from ports import free_port

from clevrd.errors import ConfigError, JournalUnavailable, MessageTooLarge
from clevrd.journal.base import Checkpoint, Fenced, TailLost, TopicHead, Trimmed
from clevrd.journal.kafka import engine as engine_module
from clevrd.journal.kafka.engine import KafkaEngine
from clevrd.journal.kafka.library import KafkaFault
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.kafka.url import parse_kafka_url
from clevrd.journal.kept_checkpoints import KEPT

# A broker takes seconds to start on a busy machine.
# Checkpoints that are saved, so that some of their parts are removed.
SAVED = 30
pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def server() -> KafkaServer:
    """Give a running broker."""
    return shared_server()


@asynccontextmanager
async def opened(settings: KafkaSettings) -> AsyncIterator[KafkaEngine]:
    """Have an engine open for a while."""
    engine = KafkaEngine(settings)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def append(engine: KafkaEngine, writer: LogWriter, text: str) -> bytes:
    """Append a record with one message, and return the record."""
    record, placed = writer.one("t", text)
    await engine.append(0, record, writer.stamp, placed)
    return record


async def refusal(settings: KafkaSettings) -> str:
    """Return why an engine can't be opened."""
    engine = KafkaEngine(settings)
    with pytest.raises((JournalUnavailable, ConfigError)) as caught:
        await engine.open()
    return str(caught.value)


# --- records that do not count -------------------------------------------------------------------


async def test_record_of_another_leaders_epoch_is_fenced_and_never_read(
    server: KafkaServer,
) -> None:
    """Its writer had not heard of the change of leaders; all readers leave it out."""
    topic = new_topic()
    await asyncio.to_thread(server.make_topic, topic, 1, UNKEPT)
    async with opened(kafka_settings(server, topic, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        first = await append(engine, writer, "first")
        # As if the leader had changed twice since it was asked about.
        each = engine._partitions[0]
        each.leader_epoch += 2
        late = LogWriter(await engine.stamp(0))

        with pytest.raises(Fenced):
            await append(engine, late, "not looked up by a reader")
        reading = asyncio.ensure_future(engine.read(0, 0))
        ((position, found),) = await reading
        with pytest.raises(Fenced):
            await append(engine, late, "seen by the reader")
        each.leader_epoch -= 2
        last = await append(engine, writer, "last")

        ((after, behind),) = await engine.read(0, position)

    assert (found, behind) == (first, last)
    assert after == position + 3


async def test_appends_in_the_topic_that_took_the_place_of_another_do_not_count(
    server: KafkaServer,
) -> None:
    """Deleted and made again between two appends, so that no client notices: the id tells."""
    topic = new_topic()
    async with opened(kafka_settings(server, topic, partitions=1)) as engine:
        old = LogWriter(await engine.stamp(0))
        await append(engine, old, "old")
        ((position, _),) = await read_all(engine, 1)
        await asyncio.to_thread(server.delete_topics, topic)
        await asyncio.to_thread(server.make_topic, topic, 1, {})

        # Either a round of the reader has seen the other topic already, or the append finds it.
        with pytest.raises((Fenced, JournalUnavailable), match=r"^$|shorter than it was"):
            await append(engine, old, "late")
        with pytest.raises(Fenced):
            await append(engine, old, "later")
        with pytest.raises(Trimmed):
            await engine.read(0, position + 1)
        stamp = await engine.stamp(0)
        new = LogWriter(stamp)
        record = await append(engine, new, "new")
        found = [record for _, record in await engine.read(0, 0)]

    assert stamp[:32] != old.stamp[:32]
    assert found == [record]


async def test_lost_tail_is_told_apart_from_a_trimmed_head(server: KafkaServer) -> None:
    """A place behind the log's end was read once; one before its beginning is too old."""
    async with opened(kafka_settings(server, new_topic(), partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        for number in range(4):
            await append(engine, writer, str(number))

        with pytest.raises(TailLost):
            await engine.read(0, 9)
        questions, _, _ = engine._opened()
        await questions.cut(engine._topic, {0: 2})
        with pytest.raises(Trimmed) as caught:
            await engine.read(0, 1)
        assert not isinstance(caught.value, TailLost)
        assert await engine.first(0) == 3
        assert len(await read_all(engine, 2, 2)) == 2


async def test_message_that_the_topic_does_not_take_is_its_publishers_fault(
    server: KafkaServer,
) -> None:
    """It is refused as too large, at once; what comes behind it is taken."""
    topic = new_topic()
    await asyncio.to_thread(server.make_topic, topic, 1, {"max.message.bytes": "700000"})
    async with opened(kafka_settings(server, topic, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))

        with pytest.raises(MessageTooLarge, match=r"max\.message\.bytes"):
            await append(engine, writer, "x" * 700_000)
        await append(engine, writer, "x" * 690_000)


async def test_producer_is_made_again_behind_a_fatal_error(server: KafkaServer) -> None:
    """An idempotent producer that has given itself up takes nothing any more."""
    async with opened(kafka_settings(server, new_topic(), partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        _, appender, _ = engine._opened()
        old = appender._serving
        fatal = KafkaError(KafkaError._FATAL, "broken", fatal=True)

        error = engine._append_error(KafkaFault(fatal.name(), fatal.str()), 1)
        record = await append(engine, writer, "2")

        assert isinstance(error, JournalUnavailable)
        assert appender._serving is not old
        assert (await read_all(engine, 2))[-1][1] == record


async def test_reader_that_hears_nothing_is_made_again(server: KafkaServer) -> None:
    """A record was taken seconds ago, and no consumer has brought it."""
    async with opened(kafka_settings(server, new_topic(), partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        record = await append(engine, writer, "1")
        ((position, _),) = await engine.read(0, 0)
        _, _, reader = engine._opened()
        consuming = reader._consuming
        engine._partitions[0].unseen.position = position + 5
        reading = asyncio.ensure_future(engine.read(0, position))
        await asyncio.sleep(0)

        for _ in range(engine_module._DEAF_LOOKS):
            engine._look_for_deaf()

        assert reader._consuming is not consuming
        second = await append(engine, writer, "2")
        assert [found for _, found in await reading] == [second]
        assert record != second


async def test_partition_whose_records_nobody_takes_holds_up_no_other(
    server: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paused, and read on without a loss when somebody takes them."""
    monkeypatch.setattr("clevrd.journal.kafka.reading._HIGH_BYTES", 20_000)
    monkeypatch.setattr("clevrd.journal.kafka.reading._LOW_BYTES", 5_000)
    monkeypatch.setattr("clevrd.journal.kafka.reading._ANSWER_BYTES", 4_000)
    monkeypatch.setattr("clevrd.journal.kafka.reading._MESSAGES", 10)
    async with opened(kafka_settings(server, new_topic(), partitions=2)) as engine:
        writer = LogWriter(await engine.stamp(0))
        records = [await append(engine, writer, f"{number}".ljust(1_000)) for number in range(400)]
        found = await engine.read(0, 0)
        _, _, reader = engine._opened()
        await until(lambda: reader._slots[0].is_paused)
        other = LogWriter(await engine.stamp(1))
        record, placed = other.one("t", "other")
        await engine.append(1, record, other.stamp, placed)

        assert [each for _, each in await engine.read(1, 0)] == [record]
        while len(found) < 400:
            found += await engine.read(0, found[-1][0])

    assert [each for _, each in found] == records


# --- checkpoints ---------------------------------------------------------------------------------


async def test_large_checkpoint_is_saved_in_parts_and_five_are_kept(server: KafkaServer) -> None:
    """Each is whole, the newest comes first, and what is forgotten is removed from the topic.

    The first one is kept for long, and moves to the others.
    """
    heads = [TopicHead("default", f"topic.{number}", number) for number in range(9_000)]
    settings = kafka_settings(server, new_topic(), partitions=1)
    async with opened(settings) as engine:
        for number in range(1, SAVED + 1):
            await engine.save_checkpoint(
                0, Checkpoint(number, "00000000", EPOCH, b"s" * 600_000, heads, True)
            )

        loaded = await engine.load_checkpoints(0)
        questions, _, _ = engine._opened()
        first, end = await questions.extent(settings.address.checkpoints, 1)

    assert (loaded[0].position, loaded[-1].position) == (SAVED, 1)
    assert len(loaded) == KEPT
    assert all(each.topics == heads and len(each.state) == 600_000 for each in loaded)
    assert end >= SAVED * 6
    assert first > 0
    assert end - first <= 4 * KEPT * 6 + 32


async def test_checkpoint_of_another_node_is_enough(server: KafkaServer) -> None:
    """Two nodes save in turns, not both; a damaged list is none."""
    settings = kafka_settings(server, new_topic(), partitions=1)

    def checkpoint(position: int) -> Checkpoint:
        return Checkpoint(position, "00000000", EPOCH, b"s", [], True)

    async with opened(settings) as one, opened(settings) as two:
        await one.save_checkpoint(0, checkpoint(1))
        await two.save_checkpoint(0, checkpoint(2))
        await one.save_checkpoint(0, checkpoint(3))
        in_turns = [each.position for each in await one.load_checkpoints(0)]
        _, appender, _ = one._opened()
        await appender.append(settings.address.checkpoints, 0, b"damaged")

        assert await two.load_checkpoints(0) == []
        await two.save_checkpoint(0, checkpoint(4))
        assert [each.position for each in await one.load_checkpoints(0)] == [4]

    assert in_turns == [2, 1]


# --- what is refused -----------------------------------------------------------------------------


async def test_wrong_topics_are_told(server: KafkaServer) -> None:
    """Another number of partitions, a compacted one, one with other records, no such copies."""
    compacted, foreign = new_topic(), new_topic()
    await asyncio.to_thread(server.make_topic, compacted, 2, {"cleanup.policy": "compact"})
    await asyncio.to_thread(server.make_topic, foreign, 1, {})
    async with opened(kafka_settings(server, new_topic(), partitions=1)) as engine:
        _, appender, _ = engine._opened()
        await appender.append(foreign, 0, b"a log line of something else")

    assert "partitions = 2" in await refusal(kafka_settings(server, compacted, partitions=4))
    assert "is compacted" in await refusal(kafka_settings(server, compacted, partitions=2))
    assert "no publish objects" in await refusal(kafka_settings(server, foreign, partitions=1))
    assert "replication_factor" in await refusal(
        kafka_settings(server, new_topic(), partitions=1, replicas=3)
    )


async def test_topic_of_publishes_with_headers_of_another_program_is_taken(
    server: KafkaServer,
) -> None:
    """Its newest record counts for the fold, so it does not tell of a topic that is no journal."""
    settings = kafka_settings(server, new_topic(), partitions=1)
    await asyncio.to_thread(server.make_topic, settings.address.topic, 1, {})
    async with opened(kafka_settings(server, new_topic(), partitions=1)) as engine:
        _, appender, _ = engine._opened()
        record = b'{"topic":"a","data":1,"headers":{"x-region":"eu"}}'
        await appender.append(settings.address.topic, 0, record)

    async with opened(settings) as engine:
        assert [each for _, each in await engine.read(0, 0)] == [record]


async def test_what_is_not_kafka_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody there, a web server, and a name that no resolver knows."""
    monkeypatch.setattr(engine_module, "START_S", 0.0)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    web = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = web.sockets[0].getsockname()[1]

    def at(place: str) -> KafkaSettings:
        url = f"kafka://{place}/t"
        return KafkaSettings(address=parse_kafka_url(url), shown=url)

    async with web:
        nobody, other = await asyncio.gather(
            refusal(at(f"127.0.0.1:{free_port()}")), refusal(at(f"127.0.0.1:{port}"))
        )

    assert "can't be reached" in nobody
    assert "refused" in nobody
    assert "can't be reached" in other


async def test_tls_passwords_and_rights_are_told(
    server: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What verifies and is allowed works; each thing that does not has its sentence."""
    monkeypatch.setattr(engine_module, "START_S", 0.0)
    host, topic = f"localhost:{server.secured_port}", new_topic()

    def with_user(user: str, **fields: Any) -> KafkaSettings:
        url = f"kafka+ssl://{user}@{host}/{topic}"
        return KafkaSettings(
            **{
                "address": parse_kafka_url(url),
                "shown": f"kafka+ssl://{host}/{topic}",
                "partitions": 1,
                "ca_file": server.ca_file,
                **fields,
            }
        )

    async with opened(with_user("me:secret")) as engine:
        record = await append(engine, LogWriter(await engine.stamp(0)), "1")
        assert (await read_all(engine, 1))[0][1] == record

    wrong = await refusal(with_user("me:wrong"))
    assert "refuses the user or the password" in wrong
    assert "wrong" not in wrong
    assert "does not allow" in await refusal(with_user("other:secret"))
    assert "ca_file" in await refusal(with_user("me:secret", ca_file=""))
    plain = f"kafka://{host}/t"
    told = await refusal(KafkaSettings(address=parse_kafka_url(plain), shown=plain))
    assert "can't be reached" in told
