"""Several daemons on one NATS, seen from outside: one order, rings, restarts, lost tails."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import shared_journal
from daemons import Daemon, daemon_process, until
from nats_servers import NatsServer, nats_server
from shared_journal import published, received, resume
from websockets.asyncio.client import connect

from clevrd.journal import node as node_module


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


# Each test makes its streams anew.
nodes = partial(shared_journal.nodes, partitions=2)


async def test_messages_of_all_nodes_have_one_order_on_all_nodes(server: NatsServer) -> None:
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


async def test_reader_that_is_cut_from_one_node_resumes_on_the_other(server: NatsServer) -> None:
    """The other node has kept what came, though nobody used the topic there."""
    async with nodes(server.url) as (one, two):
        answers = [await one.publish("t", number) for number in range(5)]
        await until(lambda: two.hub.topics.find("default-tenant", "t") is not None)

        async with connect(resume(two, answers[1])) as reader:
            greeting, *found = await received(reader, 4)

    assert (greeting["type"], greeting["recovered"]) == ("subscribed", True)
    assert [each["data"] for each in found] == [2, 3, 4]


async def test_node_that_starts_fills_its_rings_from_the_log(server: NatsServer) -> None:
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


async def test_idempotency_key_holds_over_nodes(server: NatsServer) -> None:
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
async def test_other_node_goes_on_when_one_is_killed(server: NatsServer) -> None:
    """A killed process takes nothing with it; its readers resume on the other."""
    async with nodes(server.url, 1, partitions=8) as (other,):
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


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync_always", [False, True], ids=["os", "fsync"])
async def test_killed_server_loses_nothing(tmp_path: Path, sync_always: bool) -> None:
    """Killed and started again: publishers wait; a new epoch, unless its files are synced."""
    jetstream = "sync_interval: always" if sync_always else ""
    with nats_server(tmp_path, jetstream=jetstream) as server:
        async with (
            nodes(server.url, sync_always=sync_always) as (one, two),
            connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
        ):
            before = await one.publish("t", 1)
            await received(reader, 2)
            server.kill()
            publishing = asyncio.ensure_future(published(one, "t", 2))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(server.start)
            after = await publishing
            found = await received(reader, 1 if sync_always else 3)

    assert before.get("durable", False) is sync_always
    assert (found[-1]["data"], found[-1]["offset"]) == (2, after["offset"])
    if sync_always:
        assert (after["epoch"], after["offset"]) == (before["epoch"], 2)
    else:
        assert after["epoch"] != before["epoch"]
        assert (found[1]["type"], found[1]["reason"]) == ("gap", "epoch")


async def test_nothing_is_lost_when_the_server_is_killed_under_load(tmp_path: Path) -> None:
    """Publishers on both nodes, and a server that is killed again and again."""
    jetstream = "sync_interval: always"
    with nats_server(tmp_path, jetstream=jetstream) as server:
        async with (
            nodes(server.url, sync_always=True) as (one, two),
            connect(f"{two.ws_url}/subscribe?topic=t&control=1", max_queue=None) as reader,
        ):
            answers: list[dict[str, Any]] = []
            enough = 400

            async def publish(daemon: Daemon, name: str) -> None:
                number = 0
                while len(answers) < enough:
                    number += 1
                    answers.append(await published(daemon, "t", f"{name}{number}"))

            publishing = [
                asyncio.ensure_future(publish(daemon, f"{number}."))
                for number, daemon in enumerate((one, two, one, two))
            ]
            for killed_at in (50, 150, 250):
                await until(lambda killed_at=killed_at: len(answers) >= killed_at)
                server.kill()
                await asyncio.to_thread(server.start)
            await asyncio.gather(*publishing)
            _, *found = await received(reader, len(answers) + 1)

    assert [each["offset"] for each in found] == list(range(1, len(answers) + 1))
    assert {each["message_id"] for each in answers} == {each["id"] for each in found}
    assert len({each["data"] for each in found}) == len(answers)


@pytest.mark.parametrize("how", ["deleted", "restart"])
async def test_log_that_is_gone_begins_anew_on_all_nodes(tmp_path: Path, how: str) -> None:
    """Streams that were deleted, or a restart without data: a new epoch, on both nodes."""
    with nats_server(tmp_path, jetstream="sync_interval: always") as server:
        async with (
            nodes(server.url, sync_always=True) as (one, two),
            connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
        ):
            before = [await one.publish("t", number) for number in range(3)]
            await received(reader, 4)
            if how == "restart":
                server.kill()
                server.forget()
                await asyncio.to_thread(server.start)
            else:
                await server.delete_all()
            after = [await published(one, "t", number) for number in (10, 11)]
            _, gap, *found = await received(reader, 4)
            other = await published(two, "t", 12)

    assert after[0]["epoch"] not in {each["epoch"] for each in before}
    assert [each["offset"] for each in after] == [1, 2]
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")
    assert [(each["data"], each["offset"]) for each in found] == [(10, 1), (11, 2)]
    assert (other["offset"], other["epoch"]) == (3, after[0]["epoch"])


async def test_server_that_hangs_is_503_and_passes(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped server (SIGSTOP): publishers are told to come again, and readers stay."""
    monkeypatch.setattr(node_module, "GIVE_UP_S", 1.0)
    async with (
        nodes(server.url, 1) as (daemon,),
        connect(f"{daemon.ws_url}/subscribe?topic=t&control=1") as reader,
    ):
        before = await daemon.publish("t", 1)
        server.pause()
        body = json.dumps({"topic": "t", "data": 2, "idempotency_key": "k"})
        async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
            status, refused = response.status, await response.json()
            headers = response.headers
        health = await daemon.get_json("/health")
        assert daemon.hub.journal is not None
        link = daemon.hub.journal.engine._link  # type: ignore[attr-defined]
        await until(lambda: link.present is None)
        server.go_on()
        after = await published(daemon, "t", 3)
        _, *found = await received(reader, 4)
        async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
            again = await response.json()

    assert (status, refused["code"]) == (503, "journal_unavailable")
    assert int(headers["Retry-After"]) >= 1
    assert health["status"] == "degraded"
    assert after["epoch"] == before["epoch"]
    assert [each["data"] for each in found] == [1, 2, 3]
    assert (again["offset"], again["repeated"]) == (2, True)


async def test_lost_tail_uses_no_position_twice(tmp_path: Path) -> None:
    """A stream that was put back as it was: delivered messages are in an epoch that is over."""
    with nats_server(tmp_path, jetstream="sync_interval: always") as server:
        table = {"sync_always": True, "partitions": 1}
        async with (
            nodes(server.url, **table) as (one, two),
            connect(f"{two.ws_url}/subscribe?topic=t&control=1") as reader,
        ):
            kept = [await one.publish("t", number) for number in range(3)]
            stream = tmp_path / "data" / "jetstream" / "$G" / "streams" / "clevrd-p0"
            copy = tmp_path / "copy"
            server.kill()
            await asyncio.to_thread(shutil.copytree, stream, copy)
            await asyncio.to_thread(server.start)
            lost = [await published(one, "t", number) for number in (3, 4)]
            await received(reader, 6)
            server.kill()
            await asyncio.to_thread(shutil.rmtree, stream)
            copy.rename(stream)
            await asyncio.to_thread(server.start)
            after = [await published(daemon, "t", 10) for daemon in (one, two)]
            _, gap, *new = await received(reader, 4)
            async with connect(resume(two, lost[-1])) as again:
                greeting = (await received(again, 1))[0]

    positions = [(each["epoch"], each["offset"]) for each in (*kept, *lost, *after)]
    assert len(positions) == len(set(positions))
    assert (gap["type"], gap["reason"]) == ("gap", "epoch")
    assert [each["offset"] for each in new] == [each["offset"] for each in after]
    assert greeting["recovered"] is False
