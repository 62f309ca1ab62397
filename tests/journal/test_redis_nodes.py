"""Several daemons on one Redis, seen from outside: one order, rings, failovers, lost tails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, daemon_process, running, until
from redis.exceptions import RedisError
from redis_servers import RedisServer, Sentinel, all_stopped, redis_server
from shared_journal import nodes, published, received, resume
from websockets.asyncio.client import connect

from clevrd import __version__
from clevrd.journal import node as node_module
from clevrd.journal.records import Header, encode_record
from clevrd.metrics.journal import JournalFigures


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """Give a running Redis."""
    with redis_server(tmp_path / "redis") as started:
        yield started


async def test_messages_of_all_nodes_have_one_order_on_all_nodes(server: RedisServer) -> None:
    """Two publishers on two nodes, and a reader on each: the same offsets, ids and data."""
    async with (
        nodes(server.url) as (one, two),
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
    assert not any("durable" in each for each in answers)


async def test_reader_that_is_cut_from_one_node_resumes_on_the_other(server: RedisServer) -> None:
    """The other node has kept what came, though nobody used the topic there."""
    async with nodes(server.url) as (one, two):
        answers = [await one.publish("t", number) for number in range(5)]
        await until(lambda: two.hub.topics.find("default-tenant", "t") is not None)

        async with connect(resume(two, answers[1])) as reader:
            greeting, *found = await received(reader, 4)

    assert (greeting["type"], greeting["recovered"]) == ("subscribed", True)
    assert [each["data"] for each in found] == [2, 3, 4]


async def test_topic_beside_the_patterns_is_each_nodes_own(server: RedisServer) -> None:
    """What is published on one node is heard there alone, also while Redis is away."""
    async with (
        nodes(server.url, topics=["orders.*"]) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=orders.eu&topic=news") as reader,
    ):
        first = await one.publish("news", "of one")
        shared = await one.publish("orders.eu", "of both")
        (heard,) = await received(reader, 1)
        server.pause()
        try:
            second = await two.publish("news", "of two")
            (own,) = await received(reader, 1)
        finally:
            server.go_on()
        async with connect(resume(two, first, "news")) as other:
            told = await received(other, 2)

    assert (heard["topic"], heard["data"]) == ("orders.eu", "of both")
    assert (own["topic"], own["data"]) == ("news", "of two")
    assert [first["offset"], second["offset"]] == [1, 1]
    assert first["epoch"] != second["epoch"]
    assert "subscribers_of" not in first
    assert shared["subscribers_of"] == "node"
    assert [each["type"] for each in told] == ["subscribed", "gap"]
    assert told[1]["reason"] == "epoch"


async def test_topic_is_cleared_on_all_nodes(server: RedisServer) -> None:
    """Readers of each node are told, later nodes have nothing of before, and offsets go on."""
    async with nodes(server.url) as (one, two):
        before = [await one.publish("t", number) for number in range(3)]
        await until(lambda: two.hub.topics.find("default-tenant", "t") is not None)
        async with connect(resume(two, before[-1])) as reader:
            await received(reader, 1)
            async with one.http.delete(f"{one.url}/topics/t/messages") as response:
                cleared = await response.json()
            told = await received(reader, 2)
            # An operator does the same.
            await one.publish("t", "between")
            told += await received(reader, 1)
            url = f"{two.url}/admin/messages?topic=t"
            async with two.http.delete(url) as response:
                again = await response.json()
            told += await received(reader, 2)
            after = await two.publish("t", "after")
            told += await received(reader, 1)
        async with nodes(server.url, 1) as (late,):
            pages = [
                await each.get_json("/topics/t/messages?since=all") for each in (one, two, late)
            ]

    assert (cleared["success"], cleared["offset"]) == (True, 3)
    places = [each.get("reason") or each["offset"] for each in told]
    assert places == [3, "epoch", 4, 4, "epoch", 5]
    assert cleared["epoch"] == again["old_epoch"] != before[0]["epoch"]
    assert (again["old_offset"], again["offset"]) == (4, 4)
    assert after["epoch"] == again["epoch"] != cleared["epoch"]
    assert [[each["data"] for each in page["messages"]] for page in pages] == [["after"]] * 3
    assert {page["epoch"] for page in pages} == {after["epoch"]}


async def test_node_that_starts_fills_its_rings_from_the_log(server: RedisServer) -> None:
    """Messages from before its start are there for readers that come back to it."""
    async with nodes(server.url, 1) as (one,):
        answers = [await one.publish(f"t.{number % 3}", number) for number in range(9)]
    async with nodes(server.url, 1) as (two,):
        async with connect(resume(two, answers[0], "t.0")) as reader:
            greeting, *found = await received(reader, 3)
        after = await two.publish("t.0", "after")

    assert greeting["recovered"] is True
    assert [each["data"] for each in found] == [3, 6]
    assert (after["offset"], after["epoch"]) == (4, answers[0]["epoch"])


async def test_pattern_finds_topics_that_only_another_node_has_used(server: RedisServer) -> None:
    """A reader of a pattern gets the first message of a topic that was published elsewhere."""
    async with (
        nodes(server.url) as (one, two),
        connect(f"{two.ws_url}/subscribe?pattern=orders.*") as reader,
    ):
        await one.publish("orders.new", 1)

        (message,) = await received(reader, 1)

    assert (message["topic"], message["data"]) == ("orders.new", 1)


async def test_idempotency_key_holds_over_nodes(server: RedisServer) -> None:
    """A repeat on the other node gets the first one's position."""
    async with nodes(server.url) as (one, two):
        first = await one.publish("t", 1, **{"Idempotency-Key": "k"})

        again = await two.publish("t", 1, **{"Idempotency-Key": "k"})

    assert (again["offset"], again["message_id"], again["repeated"]) == (
        first["offset"],
        first["message_id"],
        True,
    )


@pytest.mark.holds_loop("a daemon process is started and waited for")
async def test_other_node_goes_on_when_one_is_killed(server: RedisServer) -> None:
    """A killed process takes nothing with it; its readers resume on the other."""
    async with nodes(server.url, 1) as (other,):
        with daemon_process(CLEVRD_JOURNAL=server.url) as killed:
            body = json.dumps({"topic": "t", "data": 1})
            async with other.http.post(f"{killed.url}/publish", data=body) as response:
                first = await response.json()
            await other.publish("t", 2)
            killed.process.kill()
            killed.process.wait(5)

        third = await other.publish("t", 3)
        async with connect(resume(other, first)) as reader:
            greeting, *found = await received(reader, 3)

    assert greeting["recovered"] is True
    assert [each["data"] for each in found] == [2, 3]
    assert (third["offset"], third["epoch"]) == (3, first["epoch"])


async def test_messages_that_are_old_make_no_topic_at_a_start(server: RedisServer) -> None:
    """A topic that a running daemon would have forgotten by now is not made from the log."""
    async with nodes(server.url, 1) as (one,):
        await one.publish("t", 1)
    async with running(topic_idle_s=60.0, journal_table={"url": server.url}) as two:
        assert two.hub.topics.find("default-tenant", "t") is not None
        journaling = two.hub.journal
        assert journaling is not None
        now_us = journaling._wall_us()

        made = journaling.make("default-tenant", "old", 3, now_us - 61_000_000)
        young = journaling.make("default-tenant", "young", 3, now_us - 59_000_000)

        assert made is None
        assert young is not None
        assert young.first == 4


async def test_nodes_tell_of_each_other(server: RedisServer) -> None:
    """Health and both forms of /metrics: the engine, positions, lag, and which nodes there are."""
    async with nodes(server.url, partitions=2) as (one, two):
        await until(lambda: all(view_of(each).nodes == 2 for each in (one, two)))
        async with connect(f"{two.ws_url}/subscribe?topic=t") as reader:
            answer = await one.publish("t", 1)
            await received(reader, 1)
            here = await two.publish("t", 2)
        for each in (one, two):
            assert each.hub.journal is not None
            await each.hub.journal.node._save_checkpoint(each.hub.journal.node._partitions[1])
        await until(lambda: len({positions_of(each) for each in (one, two)}) == 1)
        health = [(await each.get_json("/health"))["journal"] for each in (one, two)]
        figures = (await one.get_json("/metrics"))["journal"]
        text = await scraped(one)

    assert (answer["subscribers"], answer["subscribers_of"]) == (0, "node")
    assert (here["subscribers"], here["subscribers_of"]) == (1, "node")
    for found in health:
        assert (found["engine"], found["durability"], found["state"]) == ("redis", "memory", "ok")
        assert (found["nodes"], found["node_versions"]) == (2, {__version__: 2})
        assert found["partitions"] == len(found["positions"]) == 2
        assert found["lag_s"] >= 0.0
        assert found["checkpoint_age_s"] >= 0.0
    assert health[0]["positions"] == health[1]["positions"]
    assert [each["position"] for each in figures["places"]] == health[0]["positions"]
    assert all(each["time_s"] > 1.7e9 for each in figures["places"])
    assert f'clevrd_journal_node_versions{{version="{__version__}"}} 2.0' in text
    for metric in ("lag", "position_time"):
        assert f'clevrd_journal_{metric}_seconds{{partition="1"}} ' in text


async def test_node_that_does_not_say_its_version_is_counted(server: RedisServer) -> None:
    """A record of an older clevrd: a node more, whose version is unknown."""
    async with nodes(server.url, 1, partitions=1) as (daemon,):
        journaling = daemon.hub.journal
        assert journaling is not None
        stamp = await journaling.engine.stamp(0)
        record = encode_record(Header(stamp, "0abc", 1, 0), ())
        await journaling.engine.append(0, record, stamp, ())
        await until(lambda: view_of(daemon).nodes == 2)

        health = await daemon.get_json("/health")

    assert health["journal"]["node_versions"] == {__version__: 1, "unknown": 1}


def view_of(daemon: Daemon) -> JournalFigures:
    """Return a daemon's figures of its journal."""
    assert daemon.hub.journal is not None
    return daemon.hub.journal.node.view()


def positions_of(daemon: Daemon) -> tuple[str, ...]:
    """Return how far a daemon has read."""
    return tuple(each.position for each in view_of(daemon).places)


async def scraped(daemon: Daemon) -> str:
    """Return the figures as Prometheus reads them."""
    accept = {"Accept": "text/plain"}
    async with daemon.http.get(f"{daemon.url}/metrics", headers=accept) as response:
        return await response.text()


# --- faults --------------------------------------------------------------------------------------


async def test_redis_that_hangs_is_told_and_readers_stay(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 that says when to come back, `degraded`, a lag that grows, and readers told nothing."""
    monkeypatch.setattr(node_module, "GIVE_UP_S", 0.5)
    monkeypatch.setattr(node_module, "LOOK_S", 0.1)
    async with (
        nodes(server.url, partitions=1) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        await one.publish("t", 1)
        await received(reader, 2)
        server.pause()
        try:
            body = json.dumps({"topic": "t", "data": 2, "idempotency_key": "k"})
            async with one.http.post(f"{one.url}/publish", data=body) as response:
                status, refused = response.status, await response.json()
                retry_after_s = response.headers["Retry-After"]
            health = await one.get_json("/health")
        finally:
            server.go_on()
        await published(one, "t", 3)
        found = await received(reader, 1)
        while found[-1]["data"] != 3:
            found += await received(reader, 1)
        await until(lambda: view_of(one).state == "ok")
        healthy = await one.get_json("/health")

    assert (status, refused["code"]) == (503, "journal_unavailable")
    assert int(retry_after_s) >= 1
    assert (health["status"], health["journal"]["state"]) == ("degraded", "unavailable")
    assert health["journal"]["lag_s"] >= 0.5
    assert {each.get("type", "message") for each in found} == {"message"}
    assert (healthy["status"], healthy["journal"]["state"]) == ("healthy", "ok")


async def test_restart_with_data_loses_nothing_and_begins_an_epoch(server: RedisServer) -> None:
    """Killed and started again with its file: publishers wait, readers are told of the epoch."""
    async with (
        nodes(server.url) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = await one.publish("t", 1)
        await received(reader, 2)
        server.kill()
        publishing = asyncio.ensure_future(published(one, "t", 2))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.start)
        after = await publishing
        _, gap, message = await received(reader, 3)

    assert after["epoch"] != before["epoch"]
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")
    assert (message["data"], message["offset"]) == (2, after["offset"])


@pytest.mark.parametrize("how", ["flushall", "restart", "deleted"])
async def test_log_that_is_gone_begins_anew_on_all_nodes(server: RedisServer, how: str) -> None:
    """FLUSHALL, a restart without data, a stream that was deleted: a new epoch, on both nodes."""
    async with (
        nodes(server.url) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = [await one.publish("t", number) for number in range(3)]
        await received(reader, 4)
        if how == "restart":
            server.kill()
            server.forget()
            await asyncio.to_thread(server.start)
        else:
            with server.client as client:
                if how == "flushall":
                    client.flushall()
                else:
                    client.delete(*client.keys("*:log"))
        after = [await published(one, "t", number) for number in (10, 11)]
        _, gap, *found = await received(reader, 4)
        other = await published(two, "t", 12)

    assert after[0]["epoch"] not in {each["epoch"] for each in before}
    assert [each["offset"] for each in after] == [1, 2]
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")
    assert [(each["data"], each["offset"]) for each in found] == [(10, 1), (11, 2)]
    assert (other["offset"], other["epoch"]) == (3, after[0]["epoch"])


async def test_connections_that_are_killed_are_made_again(server: RedisServer) -> None:
    """CLIENT KILL of all: publishes go on, readers lose nothing, the epoch stays."""
    async with (
        nodes(server.url) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = await one.publish("t", 1)
        with server.client as client:
            client.client_kill_filter(_type="normal", skipme=True)
        after = await published(one, "t", 2)
        _, *found = await received(reader, 3)

    assert (after["offset"], after["epoch"]) == (2, before["epoch"])
    assert [each["data"] for each in found] == [1, 2]


async def test_full_memory_is_507_and_passes(server: RedisServer) -> None:
    """Redis without memory: an answer of its own, health says so, and it goes on by itself."""
    async with nodes(server.url, 1) as (daemon,):
        await daemon.publish("t", 1)
        with server.client as client:
            client.config_set("maxmemory", 1)
            body = json.dumps({"topic": "t", "data": 2})
            async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
                status, refused = response.status, await response.json()
            health = await daemon.get_json("/health")
            client.config_set("maxmemory", 0)
        after = await published(daemon, "t", 3)

    assert (status, refused["code"]) == (507, "journal_full")
    assert "maxmemory" in refused["error"]
    assert health["status"] == "degraded"
    assert after["offset"] == 2


async def test_answer_waits_for_the_replicas_that_are_promised(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers have the message, but its publisher is answered when a replica has it, or told."""
    monkeypatch.setattr(node_module, "GIVE_UP_S", 1.0)
    replica = RedisServer(
        tmp_path / "b",
        *("--replicaof", "127.0.0.1", str(server.port), "--repl-diskless-sync-delay", "0"),
    )
    try:
        await asyncio.to_thread(replica.start)
        with replica.client as client:
            await until(lambda: client.info("replication")["master_link_status"] == "up")
        async with nodes(server.url, 1, min_replicas=1, partitions=1) as (daemon,):
            first = await daemon.publish("t", 1)
            replica.pause()
            body = json.dumps({"topic": "t", "data": 2, "idempotency_key": "k"})
            async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
                status, refused = response.status, await response.json()
            replica.go_on()
            async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
                again = await response.json()
    finally:
        replica.kill()

    assert "durable" not in first
    assert (status, refused["code"]) == (503, "journal_unavailable")
    assert (again["offset"], again["repeated"]) == (2, True)


@pytest.mark.parametrize("table", [{}, {"durability": "fsync"}], ids=["seen", "promised"])
async def test_answer_of_a_server_that_syncs_says_so(tmp_path: Path, table: dict[str, str]) -> None:
    """With appendfsync always, whether the journal promises it or finds it."""
    with redis_server(tmp_path / "redis", "--appendfsync", "always") as server:
        async with nodes(server.url, 1, partitions=2, **table) as (daemon,):
            answer = await daemon.publish("t", 1)
            figures = (await daemon.get_json("/metrics"))["journal"]

    assert answer["durable"] is True
    assert figures["durability"] == "fsync"


async def test_trimmed_records_are_told_as_a_gap(server: RedisServer) -> None:
    """A node that finds that records went unread goes on behind them, and its readers know."""
    async with (
        nodes(server.url, 2, partitions=1) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        await one.publish("t", 0)
        await received(reader, 2)
        journaling = two.hub.journal
        assert journaling is not None
        await journaling.node._readers[0].stop()
        for number in range(1, 5):
            await one.publish("t", number)
        assert one.hub.journal is not None
        await one.hub.journal.node._save_checkpoint(one.hub.journal.node._partitions[0])
        await one.publish("t", 5)
        with server.client as client:
            client.xtrim("{clevrd:p0}:log", 2, approximate=False)
        journaling.engine._readers[0]._answered_s = -10.0  # type: ignore[attr-defined]
        journaling.node._readers[0].start()
        _, gap, message = await received(reader, 3)
        after = await two.publish("t", 6)

    assert (gap["type"], gap["reason"], gap["count"]) == ("gap", "retention", 4)
    assert (message["offset"], message["data"]) == (6, 5)
    assert after["offset"] == 7


# --- Sentinel ------------------------------------------------------------------------------------


class Service:
    """A primary with a replica, and three Sentinels."""

    def __init__(self, folder: Path) -> None:
        self.primary = RedisServer(folder / "a", "--repl-diskless-sync-delay", "0")
        self.replica = RedisServer(
            folder / "b",
            *("--replicaof", "127.0.0.1", str(self.primary.port)),
            *("--repl-diskless-sync-delay", "0"),
        )
        self.sentinels: list[Sentinel] = []
        self._folder = folder

    def start(self) -> None:
        """Start all, and wait until the replica has the primary's data."""
        self.primary.start()
        self.replica.start()
        with self.replica.client as client:
            wait_for(lambda: client.info("replication")["master_link_status"] == "up")
        for number in range(3):
            self.sentinels.append(Sentinel(self._folder / f"s{number}", self.primary))
            self.sentinels[-1].start()
        for sentinel in self.sentinels:
            with sentinel.client as client:
                wait_for(
                    lambda client=client: (
                        client.sentinel_master("mymaster")["num-other-sentinels"] == 2
                        and client.sentinel_master("mymaster")["num-slaves"] == 1
                    )
                )

    @property
    def url(self) -> str:
        """The URL for a journal."""
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels)
        return f"redis+sentinel://{hosts}/mymaster"

    def all(self) -> list[RedisServer]:
        """Return all processes."""
        return [*self.sentinels, self.primary, self.replica]


def wait_for(claim: Any) -> None:
    """Wait until ``claim()`` is true."""
    import time

    until_s = time.monotonic() + 20
    while True:
        try:
            if claim():
                return
        except RedisError:
            pass
        assert time.monotonic() < until_s
        time.sleep(0.05)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Give a service with Sentinels."""
    made = Service(tmp_path)
    with all_stopped():
        try:
            made.start()
            yield made
        finally:
            for each in made.all():
                each.kill()


async def test_failover_that_loses_nothing(service: Service) -> None:
    """The primary is killed: publishers wait, and everything acknowledged is still there."""
    async with (
        nodes(service.url, partitions=2) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = [await one.publish("t", number) for number in range(5)]
        await received(reader, 6)
        service.primary.kill()
        after = await published(one, "t", 5)
        _, gap, message = await received(reader, 3)
        with service.replica.client as client:
            role = client.info("replication")["role"]

    assert role == "master"
    assert after["epoch"] != before[0]["epoch"]
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")
    assert (message["data"], message["offset"]) == (5, after["offset"])


async def test_failover_that_loses_a_tail_uses_no_position_twice(service: Service) -> None:
    """Messages that were delivered and are lost: their positions are of an epoch that is over."""
    async with (
        nodes(service.url, partitions=2) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        kept = [await one.publish("t", number) for number in range(3)]
        with service.primary.client as client:
            client.wait(1, 2_000)
        service.replica.pause()
        lost = [await one.publish("t", number) for number in (3, 4)]
        _, *found = await received(reader, 6)
        service.primary.kill()
        service.replica.go_on()
        after = [await published(daemon, "t", 10) for daemon in (one, two)]
        _, gap, *new = await received(reader, 4)
        async with connect(resume(two, lost[-1])) as reader:
            greeting = (await received(reader, 1))[0]

    positions = [(each["epoch"], each["offset"]) for each in (*kept, *lost, *after)]
    assert len(positions) == len(set(positions))
    assert [each["offset"] for each in found] == [1, 2, 3, 4, 5]
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")
    assert [each["offset"] for each in new] == [each["offset"] for each in after]
    assert greeting["recovered"] is False
