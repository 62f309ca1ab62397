"""The Redis engine against real servers: faults, refusals, TLS, ACL, a cluster, checkpoints."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from daemons import until
from journal_engines import redis_settings
from journal_log import EPOCH, LogWriter
from ports import free_port
from redis_servers import RedisServer, need_waitaof, redis_server
from tls import make_pair

from clevrd.errors import JournalFull, JournalUnavailable
from clevrd.journal.base import Checkpoint, Fenced, TopicHead, Trimmed
from clevrd.journal.kept_checkpoints import KEPT, to_forget
from clevrd.journal.records import digest_of
from clevrd.journal.redis import engine as engine_module
from clevrd.journal.redis.connections import Connections
from clevrd.journal.redis.engine import RedisEngine
from clevrd.journal.redis.library import ACL_RULES, LOST, RedisFault
from clevrd.journal.redis.pipeline import Pipeline
from clevrd.journal.redis.reading import LogReader
from clevrd.journal.redis.retention import LEAST, UNBOUNDED, kept_entries
from clevrd.journal.redis.scripts import PartitionKeys, entry_of, position_of
from clevrd.journal.redis.settings import RedisSettings
from clevrd.journal.redis.url import parse_redis_url


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """Give a running Redis."""
    with redis_server(tmp_path / "redis") as started:
        yield started


@asynccontextmanager
async def opened(settings: RedisSettings) -> AsyncIterator[RedisEngine]:
    """Have an engine open for a while."""
    engine = RedisEngine(settings)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


async def append(engine: RedisEngine, writer: LogWriter, text: str, partition: int = 0) -> bytes:
    """Append a record with one message, and return the record."""
    record, placed = writer.one("t", text)
    await engine.append(partition, record, writer.stamp, placed)
    return record


@pytest.fixture(autouse=True)
def _short_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a start give up sooner where something may pass by itself."""
    monkeypatch.setattr(engine_module, "START_S", 1.0)


async def refused(settings: RedisSettings) -> str:
    """Return what an engine says that can't be opened."""
    with pytest.raises(JournalUnavailable) as caught:
        await RedisEngine(settings).open()
    return str(caught.value)


def test_positions_are_entries_in_their_order() -> None:
    """IDs become numbers and back, also the largest."""
    entries = [b"0-1", b"1-0", b"1-18446744073709551615", b"1700000000000-3"]

    positions = [position_of(entry) for entry in entries]

    assert positions == sorted(positions)
    assert positions[0] == 1
    assert [entry_of(position).encode() for position in positions] == entries


# --- the stamp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flushall", "stream", "hash", "restart"])
async def test_log_that_is_not_what_it_was_has_another_stamp(server: RedisServer, how: str) -> None:
    """A record that was made for the log before is fenced, over any connection."""
    async with opened(redis_settings(server, partitions=1)) as engine:
        old = LogWriter(await engine.stamp(0))
        await append(engine, old, "1")
        with server.client as client:
            if how == "flushall":
                client.flushall()
            elif how == "stream":
                client.delete("{clevrd:p0}:log")
            elif how == "hash":
                client.delete("{clevrd:p0}:meta")
        if how == "restart":
            server.kill()
            await asyncio.to_thread(server.start)

        with pytest.raises((Fenced, JournalUnavailable)):
            await append(engine, old, "late")
        stamp = await engine.stamp(0)
        with pytest.raises(Fenced):
            await append(engine, old, "late")

        assert await engine.stamp(0) == stamp != old.stamp
        record = await append(engine, LogWriter(stamp), "2")
        found = await engine.read(0, 0)
        assert found[-1][1] == record
        assert not any(b"late" in each for _, each in found)


async def test_scripts_that_were_flushed_are_sent_again(server: RedisServer) -> None:
    """SCRIPT FLUSH costs a round trip, and keeps the order."""
    async with opened(redis_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        with server.client as client:
            client.script_flush()
        made = [writer.one("t", str(number)) for number in range(20)]

        await asyncio.gather(
            *(engine.append(0, record, writer.stamp, placed) for record, placed in made)
        )

        found: list[tuple[int, bytes]] = []
        while len(found) < 20:
            found += await engine.read(0, found[-1][0] if found else 0)
        assert [record for _, record in found] == [record for record, _ in made]


# --- what is gone --------------------------------------------------------------------------------


async def test_reader_that_was_away_learns_that_records_are_gone(server: RedisServer) -> None:
    """Trimmed is raised where the place that it reads from is there no more."""
    async with opened(redis_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        for number in range(10):
            await append(engine, writer, str(number))
        found = await engine.read(0, 0)
        with server.client as client:
            client.xtrim("{clevrd:p0}:log", 3, approximate=False)

        with pytest.raises(Trimmed):
            await engine.read(0, found[2][0])

        first = await engine.first(0)
        assert first == found[7][0]
        assert [position for position, _ in await engine.read(0, first - 1)] == [
            position for position, _ in found[7:]
        ]


async def test_log_is_cut_by_bytes_but_not_behind_the_last_checkpoint(server: RedisServer) -> None:
    """Records that a start needs to count on stay, however many they are."""
    async with opened(redis_settings(server, partitions=1, retention_bytes=1 << 20)) as engine:
        writer = LogWriter(await engine.stamp(0))
        for _ in range(3_000):
            await append(engine, writer, "x" * 1_000)
        found = await engine.read(0, 0)
        position, record = found[0]
        await engine._cut(engine._partitions[0])
        with server.client as client:
            before = client.xlen("{clevrd:p0}:log")
            await engine.save_checkpoint(
                0, Checkpoint(position, digest_of(record), EPOCH, b"s", [], True)
            )
            await engine._cut(engine._partitions[0])
            after = client.xlen("{clevrd:p0}:log")

    assert before == 3_000
    assert 800 < after < 1_500


def test_bounds_of_a_log() -> None:
    """Bytes become entries by the mean of those that are there; few are always kept."""
    assert kept_entries(0, 100, 10_000) == UNBOUNDED
    assert kept_entries(1 << 20, 0, 0) == UNBOUNDED
    assert kept_entries(1_000_000, 10_000, 10_000_000) == LEAST
    assert kept_entries(1 << 30, 10_000, 10_000_000) == 1_073_741


# --- checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_are_spread_over_what_fills_the_rings() -> None:
    """The oldest one reaches far enough back, the others lie between it and the newest."""
    kept: list[int] = []
    for added in range(0, 100_000, 100):
        kept.insert(0, added)
        for index in sorted(to_forget(kept, added, reach=10_000), reverse=True):
            del kept[index]
        assert len(kept) <= KEPT
    newest, oldest = kept[0], kept[-1]

    assert newest == 99_900
    assert 10_000 <= newest - oldest <= 25_000


async def test_large_checkpoint_is_saved_in_parts_and_comes_back(server: RedisServer) -> None:
    """200,000 topics: the loop goes on meanwhile, and a part that is damaged is noticed."""
    topics = [TopicHead("default-tenant", f"topic.{number}", number) for number in range(200_000)]
    checkpoint = Checkpoint(1, "00000001", EPOCH, b"state" * 200_000, topics, True)
    async with opened(redis_settings(server, partitions=1)) as engine:
        await engine.save_checkpoint(0, checkpoint)
        (loaded,) = await engine.load_checkpoints(0)

        with server.client as client:
            (key,) = client.keys("*:checkpoint:*")
            client.lset(key, 0, b"other")

        assert loaded == checkpoint
        assert await engine.load_checkpoints(0) == []


async def test_five_checkpoints_are_kept_and_one_of_two_nodes_is_enough(
    server: RedisServer,
) -> None:
    """The parts of those that are forgotten are gone, and nodes don't save the same twice."""
    settings = redis_settings(server, partitions=1)
    async with opened(settings) as one, opened(settings) as two:
        for number in range(8):
            await one.save_checkpoint(
                0, Checkpoint(number, "00000001", EPOCH, b"s", [TopicHead("d", "t", 1)], True)
            )
        await two.save_checkpoint(0, Checkpoint(99, "00000001", EPOCH, b"s", [], True))

        loaded = await two.load_checkpoints(0)

        assert len(loaded) == KEPT
        assert loaded[0].position == 7
        with server.client as client:
            assert len(client.keys("*:checkpoint:*")) == KEPT


# --- faults --------------------------------------------------------------------------------------


async def test_server_without_memory_is_full(server: RedisServer) -> None:
    """Nothing is taken, and the sentence says what to do."""
    async with opened(redis_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        with server.client as client:
            client.config_set("maxmemory", 1)

        with pytest.raises(JournalFull, match="maxmemory"):
            await append(engine, writer, "1")


async def test_hung_server_is_found_and_left(server: RedisServer) -> None:
    """A stopped server (SIGSTOP): appends and reads fail within seconds, and go on afterwards."""
    async with opened(redis_settings(server, partitions=1)) as engine:
        writer = LogWriter(await engine.stamp(0))
        await append(engine, writer, "1")
        ((position, _),) = await engine.read(0, 0)
        reading = asyncio.ensure_future(engine.read(0, position))
        server.pause()

        async with asyncio.timeout(20):
            with pytest.raises(JournalUnavailable, match="does not answer"):
                await append(engine, writer, "2")
            with pytest.raises(JournalUnavailable, match="does not answer"):
                await reading
        server.go_on()

        writer.stamp = await engine.stamp(0)
        record = await append(engine, writer, "3")
        assert (await engine.read(0, position))[-1][1] == record


async def test_too_few_replicas_are_no_answer(tmp_path: Path, server: RedisServer) -> None:
    """With min_replicas an append is answered when so many have it, and not before."""
    replica = RedisServer(
        tmp_path / "b",
        *("--replicaof", "127.0.0.1", str(server.port), "--repl-diskless-sync-delay", "0"),
    )
    settings = redis_settings(server, partitions=1, min_replicas=1)
    async with opened(settings) as engine:
        assert engine.durability == "replicas"
        writer = LogWriter(await engine.stamp(0))
        with pytest.raises(JournalUnavailable, match=r"0 replicas .* have the message"):
            await append(engine, writer, "1")
        try:
            await asyncio.to_thread(replica.start)
            with replica.client as client:
                await until(lambda: client.info("replication")["master_link_status"] == "up")
            # A server has another replication id from its first replica on.
            with pytest.raises(Fenced):
                await append(engine, writer, "2")
            writer.stamp = await engine.stamp(0)
            record = await append(engine, writer, "2")
            with replica.client as client:
                assert client.xrevrange("{clevrd:p0}:log", count=1)[0][1][b"d"] == record
        finally:
            replica.kill()


async def test_replicas_are_asked_over_the_connection_of_the_append(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that ends behind the append says nothing, and the next one would say: all have.

    A server knows of each connection what was written over it, and of a new one that is nothing.
    """
    replica = RedisServer(
        tmp_path / "b",
        *("--replicaof", "127.0.0.1", str(server.port), "--repl-diskless-sync-delay", "0"),
    )
    try:
        await asyncio.to_thread(replica.start)
        with replica.client as client:
            await until(lambda: client.info("replication")["master_link_status"] == "up")
        async with opened(redis_settings(server, partitions=1, min_replicas=1)) as engine:
            writer = LogWriter(await engine.stamp(0))
            run = engine._run

            async def cut_behind(pipeline: Pipeline, *asked: Any) -> Any:
                answer = await run(pipeline, *asked)
                pipeline.end(RedisFault(LOST, "it was cut"))
                return answer

            monkeypatch.setattr(engine, "_run", cut_behind)

            with pytest.raises(JournalUnavailable, match="it was cut"):
                await append(engine, writer, "1")
    finally:
        replica.kill()


@pytest.mark.parametrize("must_sync", [True, False], ids=["promised", "seen"])
async def test_server_with_other_settings_behind_a_restart_promises_no_more(
    tmp_path: Path, must_sync: bool
) -> None:
    """What was promised is refused then; what was only seen is said no more."""
    with redis_server(tmp_path / "redis", "--appendfsync", "always") as server:
        settings = redis_settings(server, partitions=2, must_sync=must_sync)
        async with opened(settings) as engine, asyncio.timeout(20):
            writer = LogWriter(await engine.stamp(0))
            await append(engine, writer, "1")
            before = engine.durability
            server.options = ("--appendfsync", "everysec")
            server.kill()
            await asyncio.to_thread(server.start)
            await until(lambda: not engine._partitions[0].stamp)
            if must_sync:
                with pytest.raises(JournalUnavailable, match="set appendonly yes, appendfsync"):
                    await engine.stamp(0)
            else:
                assert await engine.stamp(0) != writer.stamp

        assert (before, engine.durability) == ("fsync", "memory")


async def test_append_waits_for_the_disks_of_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that has a record in its memory alone is none of those that are waited for."""
    need_waitaof()
    monkeypatch.setattr(engine_module, "_SYNC_MS", 300)
    with redis_server(tmp_path / "redis", "--appendfsync", "always") as server:
        replica = RedisServer(
            tmp_path / "b",
            *("--replicaof", "127.0.0.1", str(server.port), "--repl-diskless-sync-delay", "0"),
            *("--appendfsync", "always"),
        )
        try:
            await asyncio.to_thread(replica.start)
            with replica.client as client:
                await until(lambda: client.info("replication")["master_link_status"] == "up")
                client.config_set("appendonly", "no")
            settings = redis_settings(server, partitions=1, must_sync=True, min_replicas=1)
            async with opened(settings) as engine, asyncio.timeout(20):
                writer = LogWriter(await engine.stamp(0))
                with pytest.raises(JournalUnavailable, match=r"0 replicas .* on their disks"):
                    await append(engine, writer, "1")
                with replica.client as client:
                    client.config_set("appendonly", "yes")
                    await until(lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0)
                monkeypatch.setattr(engine_module, "_SYNC_MS", 3_000)
                await append(engine, writer, "2")
            assert engine.durability == "fsync"
        finally:
            replica.kill()


async def test_server_that_answers_before_its_disk_has_a_message_is_refused(
    server: RedisServer,
) -> None:
    """Where the journal is to promise more: the daemon does not start, and says what to set."""
    said = await refused(redis_settings(server, must_sync=True))

    assert "may answer before its disk has a message" in said
    assert "appendfsync always" in said


@pytest.mark.parametrize(
    ("options", "durability"),
    [
        (("--appendfsync", "always"), "fsync"),
        (("--appendfsync", "everysec"), "memory"),
        (("--appendfsync", "always", "--no-appendfsync-on-rewrite", "yes"), "memory"),
    ],
    ids=["always", "everysec", "not-on-rewrite"],
)
async def test_durability_is_what_the_server_does(
    tmp_path: Path, options: tuple[str, ...], durability: str
) -> None:
    """Only a server that syncs before it answers outlives a power cut."""
    with redis_server(tmp_path / "redis", *options) as server:
        async with opened(redis_settings(server)) as engine:
            assert engine.durability == durability


class FakeConnections:
    """Notes which connections are dropped; nothing is ever answered."""

    def __init__(self) -> None:
        self.dropped: list[str | None] = []
        self.asked = asyncio.Event()

    async def call(self, *_: object, **__: object) -> None:
        """Never answer."""
        self.asked.set()
        await asyncio.Event().wait()

    def drop(self, fault: RedisFault, role: str | None = None) -> None:
        """Note it."""
        self.dropped.append(role)


async def test_connection_that_does_not_bring_what_was_appended_is_dropped() -> None:
    """It may lead to a server that was the primary, and that says that there is nothing new."""
    connections = FakeConnections()
    reader = LogReader(0, PartitionKeys("p", 0), cast(Connections, connections), lambda: 0.0)
    reading = asyncio.ensure_future(reader.read(0))
    await connections.asked.wait()
    for _ in range(10):
        reader.tick()
    before = list(connections.dropped)
    reader.note_append(1)

    for _ in range(4):
        reader.tick()

    assert (before, connections.dropped) == ([], ["reads 0"])
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


# --- refusals ------------------------------------------------------------------------------------


async def test_wrong_servers_and_logs_are_told(tmp_path: Path, server: RedisServer) -> None:
    """Another number of partitions, a key in the way, a replica: a sentence each."""
    async with opened(redis_settings(server, partitions=2)):
        pass
    with server.client as client:
        client.set("{taken:p0}:log", "x")
        client.set("{meta:p0}:meta", "x")

    number = await refused(redis_settings(server, partitions=3))
    taken = await refused(redis_settings(server, prefix="taken"))
    meta = await refused(redis_settings(server, prefix="meta"))
    with redis_server(tmp_path / "b", "--replicaof", "127.0.0.1", str(server.port)) as replica:
        replica_said = await refused(redis_settings(replica))

    assert "made with 2 partitions" in number
    assert "partitions = 2" in number
    assert "another prefix" in taken
    assert "another prefix" in meta
    assert "read-only replica" in replica_said


async def test_what_is_not_redis_is_told() -> None:
    """A web server in its place."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    web = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with web:
        url = f"redis://127.0.0.1:{web.sockets[0].getsockname()[1]}"

        said = await refused(RedisSettings(address=parse_redis_url(url), shown=url))

    assert "is not Redis" in said


async def test_acl_is_enough_and_less_is_told(server: RedisServer) -> None:
    """The rules that the sentence names suffice; without them it names what is missing."""
    with server.client as client:
        client.execute_command("ACL", "SETUSER", "node", "on", ">secret", *ACL_RULES.split())
        client.execute_command("ACL", "SETUSER", "weak", "on", ">secret", "~*", "+ping", "+info")
    settings = redis_settings(server, partitions=1)

    def as_user(user: str, password: str) -> RedisSettings:
        address = msgspec.structs.replace(settings.address, user=user, password=password)
        return msgspec.structs.replace(settings, address=address)

    async with opened(as_user("node", "secret")) as engine:
        writer = LogWriter(await engine.stamp(0))
        record = await append(engine, writer, "1")
        found = await engine.read(0, 0)
        await engine.save_checkpoint(0, Checkpoint(1, digest_of(record), EPOCH, b"s", [], True))
        await engine._cut(engine._partitions[0])
        assert await engine.digest(0, 1) == digest_of(record)
        assert len(await engine.load_checkpoints(0)) == 1
        assert [each for _, each in found] == [record]
    weak = await refused(as_user("weak", "secret"))
    wrong = await refused(as_user("node", "guess"))

    assert ACL_RULES in weak
    assert "refuses the user or the password" in wrong
    assert "secret" not in weak + wrong
    assert "guess" not in wrong


async def test_tls_is_spoken_and_what_does_not_verify_is_told(tmp_path: Path) -> None:
    """A server that asks for certificates; without its CA, or ours, the sentence says so."""
    authority = make_pair(tmp_path, "authority", is_authority=True)
    pair = make_pair(tmp_path, "server", signer=authority)
    own = make_pair(tmp_path, "node", signer=authority)
    tls_port_options = (
        *("--port", "0", "--tls-cert-file", str(pair.cert), "--tls-key-file", str(pair.key)),
        *("--tls-ca-cert-file", str(authority.cert)),
    )
    server = RedisServer(tmp_path / "redis", *tls_port_options)
    server.options = (*server.options, "--tls-port", str(server.port))
    server.client_options = {
        "ssl": True,
        "ssl_ca_certs": str(authority.cert),
        "ssl_certfile": str(own.cert),
        "ssl_keyfile": str(own.key),
    }
    url = f"rediss://127.0.0.1:{server.port}"
    settings = RedisSettings(
        address=parse_redis_url(url),
        shown=url,
        partitions=1,
        ca_file=str(authority.cert),
        client_cert_file=str(own.cert),
        client_key_file=str(own.key),
    )
    try:
        await asyncio.to_thread(server.start)
        async with opened(settings) as engine:
            record = await append(engine, LogWriter(await engine.stamp(0)), "1")
            assert [each for _, each in await engine.read(0, 0)] == [record]

        no_ca = await refused(msgspec.structs.replace(settings, ca_file=""))
        no_own = await refused(
            msgspec.structs.replace(settings, client_cert_file="", client_key_file="")
        )
        plain = url.replace("rediss", "redis")
        no_tls = await refused(RedisSettings(address=parse_redis_url(plain), shown=plain))
    finally:
        server.kill()

    assert "certificate is not trusted" in no_ca
    assert "ca_file" in no_ca
    assert "client_cert_file" in no_own
    assert "write rediss" in no_tls


# --- a cluster -----------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Give a cluster of three nodes."""
    servers = [
        RedisServer(
            tmp_path / str(number),
            *("--cluster-enabled", "yes", "--cluster-node-timeout", "2000"),
            port=free_port(),
        )
        for number in range(3)
    ]
    try:
        for each in servers:
            each.start()
        subprocess.run(
            [
                *("redis-cli", "--cluster", "create", "--cluster-yes"),
                *(f"127.0.0.1:{each.port}" for each in servers),
            ],
            check=True,
            capture_output=True,
            timeout=30,
        )
        yield servers
    finally:
        for each in servers:
            each.kill()


@pytest.mark.holds_loop("the cluster is made by the fixture")
async def test_partitions_are_spread_over_a_cluster(cluster: list[RedisServer]) -> None:
    """Each partition is on the node that has its slot; one node is enough to find them all."""
    url = f"redis+cluster://127.0.0.1:{cluster[1].port}"
    settings = RedisSettings(address=parse_redis_url(url), shown=url, partitions=8)
    async with opened(settings) as engine:
        for partition in range(8):
            writer = LogWriter(await engine.stamp(partition))
            record = await append(engine, writer, str(partition), partition)
            assert [each for _, each in await engine.read(partition, 0)] == [record]
            await engine.save_checkpoint(
                partition, Checkpoint(1, digest_of(record), EPOCH, b"s", [], True)
            )
            assert len(await engine.load_checkpoints(partition)) == 1
    logs = []
    for each in cluster:
        with each.client as client:
            logs.append(len(client.keys("*:log")))
    single = await refused(redis_settings(cluster[0]))

    assert sum(logs) == 8
    assert sum(1 for count in logs if count) >= 2
    assert "redis+cluster://" in single
