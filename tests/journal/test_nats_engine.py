"""The NATS engine against real servers: faults, refusals, credentials, TLS, checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from journal_engines import nats_settings
from journal_log import EPOCH, LogWriter
from nats_credentials import USER, make_key, with_operator
from nats_servers import NatsServer, nats_server
from ports import free_port
from tls import make_pair

from clevrd.errors import JournalFull, JournalUnavailable, MessageTooLarge
from clevrd.journal.base import Checkpoint, Fenced, TopicHead, Trimmed
from clevrd.journal.kept_checkpoints import KEPT
from clevrd.journal.nats import engine as engine_module
from clevrd.journal.nats.connection import Connection
from clevrd.journal.nats.engine import NatsEngine
from clevrd.journal.nats.library import LOST, PERMISSIONS, NatsFault
from clevrd.journal.nats.reading import ConsumerFeed
from clevrd.journal.nats.settings import NatsSettings
from clevrd.journal.nats.url import parse_nats_url
from clevrd.journal.records import digest_of


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """Give a running NATS for all tests."""
    with nats_server(tmp_path_factory.mktemp("nats")) as started:
        yield started


@pytest.fixture
async def server(one_server: NatsServer) -> NatsServer:
    """Give a running NATS without streams."""
    await one_server.delete_all()
    return one_server


@asynccontextmanager
async def opened(settings: NatsSettings) -> AsyncIterator[NatsEngine]:
    """Have an engine open for a while."""
    engine = NatsEngine(settings)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def append(engine: NatsEngine, writer: LogWriter, text: str, partition: int = 0) -> bytes:
    """Append a record with one message, and return the record."""
    record, placed = writer.one("t", text)
    await engine.append(partition, record, writer.stamp, placed)
    return record


async def read_on(engine: NatsEngine, after: int) -> list[tuple[int, bytes]]:
    """Read, as often as the log has just begun anew meanwhile."""
    while True:
        try:
            return await engine.read(0, after)
        except JournalUnavailable:
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def _short_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a start give up sooner where something may pass by itself."""
    monkeypatch.setattr(engine_module, "START_S", 0.5)


async def refused(settings: NatsSettings) -> str:
    """Return what an engine says that can't be opened."""
    with pytest.raises(JournalUnavailable) as caught:
        await NatsEngine(settings).open()
    return str(caught.value)


def at(url: str, **settings: Any) -> NatsSettings:
    """Return settings with credentials in the URL, which is shown without them."""
    settings = {"partitions": 1, **settings}
    return NatsSettings(address=parse_nats_url(url), shown="nats://shown", **settings)


# --- the stamp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sync_always", [False, True], ids=["os", "fsync"])
async def test_deleted_stream_has_another_stamp(server: NatsServer, sync_always: bool) -> None:
    """A record that was made for the log before is fenced by the server itself."""
    settings = nats_settings(server, partitions=1, sync_always=sync_always)
    async with opened(settings) as engine:
        old = LogWriter(await engine.stamp(0))
        await append(engine, old, "1")
        await server.delete_all()

        with pytest.raises(Fenced):
            await append(engine, old, "late")
        stamp = await engine.stamp(0)
        with pytest.raises(Fenced):
            await append(engine, old, "late")

        assert await engine.stamp(0) == stamp != old.stamp
        record = await append(engine, LogWriter(stamp), "2")
        assert await read_on(engine, 0) == [(1, record)]


async def test_stream_that_was_changed_takes_nothing_until_it_is_set_back(
    server: NatsServer,
) -> None:
    """It would lose records; publishers are refused, with what to do as the reason."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        config = (await server.api("STREAM.INFO.clevrd-p0"))["config"]
        await server.api("STREAM.UPDATE.clevrd-p0", {**config, "max_msgs": 5})
        await engine._look_at_all()

        with pytest.raises(JournalUnavailable, match=r"max_msgs 5.*; set them back"):
            await append(engine, writer, "2")
        await server.api("STREAM.UPDATE.clevrd-p0", config)
        record = await append(engine, writer, "3")

        assert (await read_on(engine, 1))[-1] == (2, record)


async def test_stream_of_others_in_the_place_of_a_log_is_left_as_it_is(server: NatsServer) -> None:
    """It takes the record that finds it out, and no other one; its settings stay."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        await server.delete("clevrd-p0")
        others = {"name": "clevrd-p0", "subjects": ["clevrd.p0.>"], "max_msgs": 2}
        made = await server.api("STREAM.CREATE.clevrd-p0", others)

        with pytest.raises(JournalUnavailable, match="not a journal's"):
            await append(engine, writer, "2")
        with pytest.raises(JournalUnavailable, match="not a journal's"):
            await engine.stamp(0)

        assert (await server.api("STREAM.INFO.clevrd-p0"))["config"] == made["config"]


async def make_again(
    server: NatsServer, engine: NatsEngine, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Delete the first partition's stream, and make it with the same settings; return these."""

    async def make(stream: str, config: dict[str, Any]) -> bytes:
        raise NatsFault(LOST, "the test makes it")

    monkeypatch.setattr(engine, "_make", make)
    config: dict[str, Any] = (await server.api("STREAM.INFO.clevrd-p0"))["config"]
    await server.delete("clevrd-p0")
    await server.api("STREAM.CREATE.clevrd-p0", config)
    return config


async def test_stream_that_was_made_again_by_hand_has_another_stamp(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same subjects too, by when it was made; its reader does not wait beyond its end."""
    async with opened(nats_settings(server, partitions=1, sync_always=True)) as engine:
        old = LogWriter(await engine.stamp(0))
        for number in range(5):
            await append(engine, old, str(number))
        found = await engine.read(0, 0)
        while found[-1][0] < 5:
            found += await engine.read(0, found[-1][0])
        reading = asyncio.ensure_future(read_on(engine, 5))
        await make_again(server, engine, monkeypatch)

        with pytest.raises(Trimmed):
            await reading
        assert await engine.stamp(0) != old.stamp
        with pytest.raises(Fenced):
            await append(engine, old, "late")
        assert await engine.first(0) == 1


async def test_records_that_took_the_places_of_others_are_noticed(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming at a number that another record has by now would leave records out."""
    async with opened(nats_settings(server, partitions=1, sync_always=True)) as engine:
        writer = LogWriter(await engine.stamp(0))
        for number in range(3):
            await append(engine, writer, str(number))
        found = await engine.read(0, 0)
        while found[-1][0] < 3:
            found += await engine.read(0, found[-1][0])
        config = await make_again(server, engine, monkeypatch)
        client = await server.client()
        for number in range(5):
            await client.request(config["subjects"][0], b"%d" % number, timeout=5)
        await client.close()

        with pytest.raises(Trimmed):
            await read_on(engine, 3)


async def test_restarted_server_has_another_stamp_unless_it_syncs(tmp_path: Path) -> None:
    """What it had answered may be lost without `sync_interval: always`, and not with it."""
    with nats_server(tmp_path) as server:
        settings = nats_settings(server, partitions=1)
        synced = msgspec.structs.replace(settings, sync_always=True, durability="fsync")
        async with opened(settings) as engine, opened(synced) as other:
            assert (engine.durability, other.durability) == ("os", "fsync")
            before = [await each.stamp(0) for each in (engine, other)]
            old = LogWriter(before[0])
            await append(engine, old, "1")
            server.kill()
            await asyncio.to_thread(server.start)

            with pytest.raises((Fenced, JournalUnavailable)):
                await append(engine, old, "late")
            with pytest.raises(Fenced):
                await append(engine, old, "late")
            after = [await each.stamp(0) for each in (engine, other)]

    assert after[0] != before[0]
    assert after[1] == before[1]


async def test_lost_tail_is_found_at_a_start_by_a_checkpoint(server: NatsServer) -> None:
    """A checkpoint that counts more records than the log has had: they are lost."""
    settings = nats_settings(server, partitions=1, sync_always=True)
    async with opened(settings) as engine:
        before = await engine.stamp(0)
        await append(engine, LogWriter(before), "1")
        await engine.save_checkpoint(0, Checkpoint(7, "00000001", EPOCH, b"s", [], True))
    async with opened(settings) as engine:
        assert await engine.stamp(0) != before
        assert await engine.first(0) == 1


async def test_consumer_whose_place_was_not_looked_at_is_not_read(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at the stream failed once: the next read looks again, before it takes a record."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        looked: list[int] = []
        reader = engine._readers[0]
        check = reader._check

        async def fail_once(after: int, record: bytes | None) -> None:
            looked.append(after)
            if len(looked) == 1:
                raise JournalUnavailable("The server was away.")
            await check(after, record)

        monkeypatch.setattr(reader, "_check", fail_once)
        with pytest.raises(JournalUnavailable):
            await engine.read(0, 0)
        await engine.read(0, 0)

    assert looked == [0, 0]


# --- what is gone --------------------------------------------------------------------------------


async def test_reader_learns_that_records_are_gone(server: NatsServer) -> None:
    """Trimmed is raised where records behind a place are there no more."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        for number in range(10):
            await append(engine, writer, str(number))
        await server.api("STREAM.PURGE.clevrd-p0", {"keep": 3})

        with pytest.raises(Trimmed):
            await engine.read(0, 2)

        assert await engine.first(0) == 8
        assert (await engine.read(0, 7))[0][0] == 8
        await server.api("STREAM.PURGE.clevrd-p0")
        # There is nothing that could be read, and show it.
        with pytest.raises(Trimmed):
            await engine.read(0, 8)


async def test_records_that_go_behind_the_look_at_the_stream_are_noticed(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first record that comes, which is not the next one."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        for number in range(10):
            await append(engine, writer, str(number))

        async def purge(after: int, record: bytes | None) -> None:
            await server.api("STREAM.PURGE.clevrd-p0", {"keep": 3})

        monkeypatch.setattr(engine._readers[0], "_check", purge)

        with pytest.raises(Trimmed):
            await engine.read(0, 2)


async def test_place_that_is_given_again_begins_the_log_anew(server: NatsServer) -> None:
    """A record was taken at a place where another one was seen: records are lost."""
    async with opened(nats_settings(server, partitions=1, sync_always=True)) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        engine._partitions[0].newest = 7

        with pytest.raises(JournalUnavailable):
            await append(engine, writer, "2")

        assert await engine.stamp(0) != writer.stamp


async def test_records_of_a_log_that_is_over_are_not_handed_out(server: NatsServer) -> None:
    """They had come, and nobody had read them: their positions are those of another log."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        first = await append(engine, writer, "1")
        assert await engine.read(0, 0) == [(1, first)]
        feed = engine._readers[0]._feed
        assert feed is not None
        feed._records = [(2, b"old")]

        engine._readers[0].restart()

        second = await append(engine, writer, "2")
        assert await read_on(engine, 1) == [(2, second)]


async def test_silence_ends_a_consumer_and_then_its_connection() -> None:
    """A server shows itself each second to who asks; who asks nothing expects nothing."""
    loop = asyncio.get_running_loop()
    ended: list[Connection] = []
    connection = Connection(loop, ended.append)
    feed = ConsumerFeed(connection, "s", 0, loop)
    connection.feeds.add(feed)
    for _ in range(20):
        connection.tick()
    assert (feed.fault, connection.fault) == (None, None)
    feed._asked = 1

    for _ in range(6):
        connection.tick()
    assert feed.fault is None
    connection.tick()
    assert feed.fault is not None
    other = ConsumerFeed(connection, "s", 0, loop)
    other._asked = 1
    connection.feeds.add(other)
    for _ in range(4):
        connection.tick()

    assert ended == [connection]
    assert other.fault is not None
    await asyncio.sleep(0)


async def test_single_deleted_record_is_passed_over(server: NatsServer) -> None:
    """What is left of the log is read on."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        for number in range(5):
            await append(engine, writer, str(number))
        await server.api("STREAM.MSG.DELETE.clevrd-p0", {"seq": 3})

        found: list[int] = []
        while len(found) < 4:
            found += [each for each, _ in await engine.read(0, found[-1] if found else 0)]

        assert found == [1, 2, 4, 5]


async def test_bounds_of_the_settings_are_the_streams(server: NatsServer) -> None:
    """A start with other ones changes them."""
    settings = nats_settings(server, partitions=2, retention_bytes=8 << 20)
    found = []
    for each in (
        settings,
        msgspec.structs.replace(settings, retention_s=900.0),
        msgspec.structs.replace(settings, retention_bytes=0),
    ):
        async with opened(each) as engine:
            await append(engine, LogWriter(await engine.stamp(0)), "x")
        config = (await server.api("STREAM.INFO.clevrd-p0"))["config"]
        found.append((config["max_age"], config["max_bytes"]))

    week = 7 * 86_400 * 10**9
    assert found == [(week, 4 << 20), (900 * 10**9, 4 << 20), (week, -1)]


async def test_catching_up_is_in_order_and_bounded(server: NatsServer) -> None:
    """More than is asked for at once, and more bytes: all of it comes, in order, once."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        made = [writer.one("t", str(number).ljust(number % 7 * 6_000)) for number in range(700)]
        await asyncio.gather(
            *(engine.append(0, record, writer.stamp, placed) for record, placed in made)
        )

        found: list[tuple[int, bytes]] = []
        most = 0
        while len(found) < len(made):
            records = await engine.read(0, found[-1][0] if found else 0)
            most = max(most, sum(len(record) for _, record in records))
            found += records

        assert found == [(place + 1, record) for place, (record, _) in enumerate(made)]
        assert most < 3 << 20


async def test_one_consumer_brings_all(server: NatsServer) -> None:
    """It is asked again and again, and not made again, where there is more than one answer has."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        made = [writer.one("t", str(number)) for number in range(1_200)]
        await asyncio.gather(
            *(engine.append(0, record, writer.stamp, placed) for record, placed in made)
        )
        found = await engine.read(0, 0)
        feed = engine._readers[0]._feed

        while len(found) < len(made):
            found += await engine.read(0, found[-1][0])

        assert [record for _, record in found] == [record for record, _ in made]
        assert engine._readers[0]._feed is feed


# --- checkpoints ---------------------------------------------------------------------------------


async def test_large_checkpoint_is_saved_in_parts_and_comes_back(server: NatsServer) -> None:
    """200,000 topics, more than a message may have; a part that is missing or wrong is noticed."""
    topics = [TopicHead("default-tenant", f"topic.{number}", number) for number in range(200_000)]
    checkpoint = Checkpoint(1, "00000001", EPOCH, b"state" * 200_000, topics, True)
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        for number in range(2):
            await append(engine, writer, str(number))
        await engine.save_checkpoint(0, checkpoint)
        (loaded,) = await engine.load_checkpoints(0)

        assert loaded == checkpoint
        small = msgspec.structs.replace(checkpoint, topics=topics[:1], state=b"", position=2)
        await engine.save_checkpoint(0, small)
        assert await engine.load_checkpoints(0) == [small, checkpoint]
        await server.api("STREAM.MSG.DELETE.clevrd-checkpoints", {"seq": 3})
        assert await engine.load_checkpoints(0) == [small]
        subjects = (
            await server.api("STREAM.INFO.clevrd-checkpoints", {"subjects_filter": "*.*.*.part.>"})
        )["state"]["subjects"]
        newest = max(subjects, key=lambda subject: subject.split(".")[4])
        client = await server.client()
        await client.request(newest, b'[["default-tenant","topic.0",9]]', timeout=5)
        await client.close()
        assert await engine.load_checkpoints(0) == []


async def test_five_checkpoints_are_kept_and_one_of_two_nodes_is_enough(server: NatsServer) -> None:
    """The parts of those that are forgotten are gone, and nodes don't save the same twice."""
    settings = nats_settings(server, partitions=1)
    async with opened(settings) as one, opened(settings) as two:
        writer = LogWriter(await one.stamp(0))
        for number in range(8):
            await append(one, writer, str(number))
            await one.save_checkpoint(
                0, Checkpoint(number + 1, "00000001", EPOCH, b"s", [TopicHead("d", "t", 1)], True)
            )
        await two.save_checkpoint(0, Checkpoint(99, "00000001", EPOCH, b"s", [], True))

        loaded = await two.load_checkpoints(0)
        state = (await server.api("STREAM.INFO.clevrd-checkpoints"))["state"]

        assert len(loaded) == KEPT
        assert loaded[0].position == 8
        # An entry, and a message for each part.
        assert state["messages"] == 3 * KEPT


async def test_stream_of_checkpoints_that_was_deleted_is_made_again(server: NatsServer) -> None:
    """The next checkpoint but one is kept."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        checkpoint = Checkpoint(1, "00000001", EPOCH, b"s", [], True)
        await server.delete("clevrd-checkpoints")

        with pytest.raises(JournalUnavailable):
            await engine.save_checkpoint(0, checkpoint)
        await engine.save_checkpoint(0, checkpoint)

        assert await engine.load_checkpoints(0) == [checkpoint]


async def test_unfinished_checkpoint_of_a_dead_node_is_removed(server: NatsServer) -> None:
    """Parts without an entry stay for minutes, in which it may still come, and not for ever."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        client = await server.client()
        young = (await server.api("STREAM.INFO.clevrd-checkpoints"))["ts"]
        now_ms = int(datetime.fromisoformat(young).timestamp() * 1000)
        for name in (f"{now_ms - 700_000:012x}old", f"{now_ms - 5_000:012x}young"):
            await client.request(f"clevrd.checkpoint.p0.part.{name}.0", b"x", timeout=5)
        await client.close()
        await engine.save_checkpoint(0, Checkpoint(1, "00000001", EPOCH, b"s", [], True))

        state = (await server.api("STREAM.INFO.clevrd-checkpoints", {"subjects_filter": ">"}))[
            "state"
        ]

        names = {subject.split(".")[4] for subject in state["subjects"] if ".part." in subject}
        assert {name[12:] for name in names} - {"young"} != {"old"}
        assert not any(name.endswith("old") for name in names)
        assert any(name.endswith("young") for name in names)


# --- faults --------------------------------------------------------------------------------------


async def test_hung_server_is_found_and_left(server: NatsServer) -> None:
    """A stopped server (SIGSTOP): appends and reads fail within seconds, and go on afterwards."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        ((position, _),) = await engine.read(0, 0)
        reading = asyncio.ensure_future(engine.read(0, position))
        await asyncio.sleep(0)
        server.pause()
        try:
            async with asyncio.timeout(20):
                with pytest.raises(JournalUnavailable, match="does not answer"):
                    await append(engine, writer, "2")
                with pytest.raises(JournalUnavailable):
                    await reading
        finally:
            server.go_on()

        writer.stamp = await engine.stamp(0)
        record = await append(engine, writer, "3")
        found = await read_on(engine, position)
        while found[-1][1] != record:
            found += await read_on(engine, found[-1][0])


async def test_lost_consumer_is_made_again(server: NatsServer) -> None:
    """It was deleted, or its server has left: nothing is missing, and nothing comes twice."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        first = await append(engine, writer, "1")
        assert await engine.read(0, 0) == [(1, first)]
        reading = asyncio.ensure_future(read_on(engine, 1))
        names: list[str] = []
        while not names:
            names = (await server.api("CONSUMER.NAMES.clevrd-p0"))["consumers"] or []
        for name in names:
            await server.api(f"CONSUMER.DELETE.clevrd-p0.{name}")

        second = await append(engine, writer, "2")

        assert await reading == [(2, second)]


async def test_record_beyond_max_payload_is_too_large(server: NatsServer) -> None:
    """It is the publisher's fault, and keeps nothing else from being sent."""
    async with opened(nats_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))

        with pytest.raises(MessageTooLarge, match="max_payload of the NATS servers"):
            await append(engine, writer, "x" * 1_100_000)

        record = await append(engine, writer, "small")
        assert await engine.read(0, 0) == [(1, record)]


async def test_server_without_room_is_full(tmp_path: Path) -> None:
    """Nothing is taken, and the sentence says what to do."""
    with nats_server(tmp_path, jetstream="max_file_store: 2MB") as server:
        async with opened(nats_settings(server, partitions=1, retention_bytes=0)) as engine:
            writer = LogWriter(await engine.stamp(0))

            with pytest.raises(JournalFull, match="max_file_store"):
                await asyncio.gather(*(append(engine, writer, "x" * 500_000) for _ in range(9)))

        settings = nats_settings(server, partitions=1, retention_bytes=1 << 30, prefix="other")
        said = await refused(settings)

    assert "retention_bytes" in said


# --- refusals ------------------------------------------------------------------------------------


async def test_wrong_streams_are_told(server: NatsServer) -> None:
    """Another number of partitions, of replicas, a stream of others, other settings."""
    async with opened(nats_settings(server, partitions=2)):
        pass
    await server.api("STREAM.CREATE.taken-p0", {"name": "taken-p0", "subjects": ["x"]})
    await server.api("STREAM.CREATE.theirs", {"name": "theirs", "subjects": ["over.>"]})
    said = {
        "number": await refused(nats_settings(server, partitions=3)),
        "replicas": await refused(nats_settings(server, partitions=2, replicas=3)),
        "taken": await refused(nats_settings(server, prefix="taken")),
        "overlap": await refused(nats_settings(server, prefix="over")),
    }
    config = (await server.api("STREAM.INFO.clevrd-p1"))["config"]
    await server.api("STREAM.UPDATE.clevrd-p1", {**config, "max_msgs": 5})
    said["settings"] = await refused(nats_settings(server, partitions=2))
    await server.delete_all()
    said["alone"] = await refused(nats_settings(server, replicas=3))

    assert "made with 2 partitions" in said["number"]
    assert "partitions = 2" in said["number"]
    assert "replicas = 1" in said["replicas"]
    assert "not a journal's" in said["taken"]
    assert "another prefix" in said["overlap"]
    assert "max_msgs 5" in said["settings"]
    assert "not enough servers" in said["alone"]


async def test_jetstream_that_is_off_is_told(tmp_path: Path) -> None:
    """The sentence says where it is switched on."""
    with nats_server(tmp_path, has_jetstream=False) as server:
        said = await refused(nats_settings(server))

    assert "JetStream does not answer" in said
    assert "store_dir" in said


async def test_small_max_payload_is_told(tmp_path: Path) -> None:
    """Records would not fit."""
    with nats_server(tmp_path, "max_payload: 100KB") as server:
        said = await refused(nats_settings(server))

    assert "raise max_payload" in said


async def a_server_that_says(line: bytes) -> tuple[asyncio.Server, str]:
    """Return a server that says ``line`` to each connection, and its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line)
        while b := await reader.read(1000):
            if b"PING" in b:
                writer.write(b"PONG\r\n")
        writer.close()

    made = await asyncio.start_server(answer, "127.0.0.1", 0)
    return made, f"nats://127.0.0.1:{made.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "is not NATS"),
        (
            b'INFO {"version":"2.9.10","headers":true,"max_payload":1048576}\r\n',
            "is 2.9.10, and the journal needs 2.10.23",
        ),
        (b'INFO {"version":"2.10.24","max_payload":1048576}\r\n', "headers switched off"),
    ],
    ids=["web", "old", "headers"],
)
async def test_wrong_server_is_told(line: bytes, sentence: str) -> None:
    """By its first words."""
    fake, url = await a_server_that_says(line)
    async with fake:
        said = await refused(NatsSettings(address=parse_nats_url(url), shown=url))

    assert sentence in said


async def test_credentials_go_nowhere_in_the_clear_where_tls_was_asked_for() -> None:
    """A server without TLS at a tls:// URL is told, and never sees the password."""
    heard = b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        writer.write(b'INFO {"version":"2.15.1","headers":true,"max_payload":1048576}\r\n')
        heard += await reader.read(1000)
        writer.close()

    made = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with made:
        port = made.sockets[0].getsockname()[1]
        said = await refused(at(f"tls://me:secret@127.0.0.1:{port}"))

    assert "does not speak TLS" in said
    assert heard == b""


async def test_server_that_is_not_there_is_told() -> None:
    """Of several servers one is enough."""
    url = f"nats://127.0.0.1:{free_port()}"

    said = await refused(NatsSettings(address=parse_nats_url(url), shown=url))

    assert "can't be reached" in said


async def test_one_of_several_servers_is_enough(server: NatsServer) -> None:
    """The URL names servers of which some may be away."""
    url = f"nats://127.0.0.1:{free_port()},127.0.0.1:{server.port}"
    async with opened(NatsSettings(address=parse_nats_url(url), shown=url, partitions=1)) as engine:
        record = await append(engine, LogWriter(await engine.stamp(0)), "1")

        assert await engine.read(0, 0) == [(1, record)]


async def used(settings: NatsSettings) -> None:
    """Append, read and save with an engine."""
    async with opened(settings) as engine:
        writer = LogWriter(await engine.stamp(0))
        record = await append(engine, writer, "1")
        found = await engine.read(0, 0)
        while found[-1][1] != record:
            found += await engine.read(0, found[-1][0])
        position = found[-1][0]
        for number in range(KEPT + 1):
            await append(engine, writer, str(number))
            await engine.save_checkpoint(
                0, Checkpoint(position + number, digest_of(record), EPOCH, b"s", [], True)
            )
        assert len(await engine.load_checkpoints(0)) == KEPT
        assert await engine.digest(0, position) == digest_of(record)


async def test_users_and_permissions(tmp_path: Path) -> None:
    """User and password, an nkey; the permissions that the sentence names are enough."""
    key = make_key(USER)
    enough = PERMISSIONS.replace("PREFIX", "clevrd")
    config = (
        "authorization { users: [\n"
        f"{{ user: me, password: secret, {enough.replace('permissions {', 'permissions: {')} }}\n"
        f"{{ nkey: {key.public} }}\n"
        '{ user: weak, password: secret, permissions: { publish: ["clevrd.>"],'
        ' subscribe: ["_INBOX.>"] } }\n'
        '{ user: deaf, password: secret, permissions: { subscribe: ["other.>"] } }\n'
        "] }"
    )
    seed_file = tmp_path / "seed"
    seed_file.write_text(f"{key.seed}\n")
    bad_seed = tmp_path / "bad"
    bad_seed.write_text("SUsecret\n")
    with nats_server(tmp_path / "nats", config) as server:
        place = f"127.0.0.1:{server.port}"
        await used(at(f"nats://me:secret@{place}"))
        await used(at(f"nats://{place}", nkey_seed_file=str(seed_file)))
        said = [
            await refused(at(f"nats://{who}@{place}"))
            for who in ("me:guess", "nobody:guess", "guess")
        ]
        said.append(await refused(at(f"nats://{place}")))
        denied = [await refused(at(f"nats://{who}:secret@{place}")) for who in ("weak", "deaf")]
        no_seed = await refused(at(f"nats://{place}", nkey_seed_file=str(bad_seed)))

    assert all("refuses the credentials" in each for each in said)
    assert all("permissions {" in each for each in denied)
    assert "no seed of a user" in no_seed
    assert not any("guess" in each or "secret" in each for each in (*said, *denied, no_seed))


async def test_token(tmp_path: Path) -> None:
    """It stands alone before the @."""
    with nats_server(tmp_path, "authorization { token: s3cr3t }") as server:
        await used(at(f"nats://s3cr3t@127.0.0.1:{server.port}"))
        said = await refused(at(f"nats://wrong@127.0.0.1:{server.port}"))

    assert "refuses the credentials" in said
    assert "wrong" not in said


async def test_credentials_file(tmp_path: Path) -> None:
    """A user of an account that an operator has signed; a file without a seed is told."""
    config, credentials = with_operator()
    good, bad = tmp_path / "good.creds", tmp_path / "bad.creds"
    good.write_text(credentials)
    bad.write_text("nothing\n")
    with nats_server(tmp_path / "nats", config) as server:
        url = f"nats://127.0.0.1:{server.port}"
        await used(at(url, creds_file=str(good)))
        said = await refused(at(url, creds_file=str(bad)))
        none = await refused(at(url, creds_file=str(tmp_path / "none")))

    assert "has no user JWT" in said
    assert "can't be read" in none


async def test_tls_is_spoken_and_a_certificate_that_does_not_verify_is_told(tmp_path: Path) -> None:
    """A server that asks for certificates; without its CA, or ours, the sentence says so."""
    authority = make_pair(tmp_path, "authority", is_authority=True)
    pair = make_pair(tmp_path, "server", signer=authority)
    own = make_pair(tmp_path, "node", signer=authority)
    config = (
        f'tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}",'
        f' ca_file: "{authority.cert}", verify: true }}'
    )
    with nats_server(tmp_path / "nats", config) as server:
        settings = at(
            f"tls://127.0.0.1:{server.port}",
            ca_file=str(authority.cert),
            client_cert_file=str(own.cert),
            client_key_file=str(own.key),
        )
        await used(settings)
        no_ca = await refused(msgspec.structs.replace(settings, ca_file=""))
        no_own = await refused(
            msgspec.structs.replace(settings, client_cert_file="", client_key_file="")
        )
        no_tls = await refused(at(f"nats://127.0.0.1:{server.port}"))

    assert "certificate is not trusted" in no_ca
    assert "ca_file" in no_ca
    assert "client_cert_file" in no_own
    assert "write tls://" in no_tls
