"""A cluster of three NATS servers with three copies of each stream, one of which is killed.

It takes half a minute, so it is one of the long tests.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from daemons import until
from nats_servers import NatsServer, cluster_of
from shared_journal import published, received
from test_nats_nodes import nodes
from websockets.asyncio.client import connect

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[NatsServer]]:
    """Give three servers that sync their files."""
    servers = cluster_of(tmp_path, jetstream="sync_interval: always")
    try:
        for each in servers:
            each.start()
        yield servers
    finally:
        for each in servers:
            each.kill()


def url_of(servers: list[NatsServer]) -> str:
    """Return the URL for a journal in all servers."""
    return "nats://" + ",".join(f"127.0.0.1:{each.port}" for each in servers)


async def leader_of(servers: list[NatsServer]) -> NatsServer:
    """Return the leader of the first partition; wait for one, and for a server that knows it."""
    async with asyncio.timeout(40):
        for asked in itertools.cycle(servers):
            with suppress(nats.errors.TimeoutError, KeyError):
                name = (await asked.api("STREAM.INFO.clevrd-p0"))["cluster"]["leader"]
                return servers[int(name[1:])]
            # A server that was just started may not know it yet.
            await asyncio.sleep(0.1)
    raise AssertionError("there is no leader")


@pytest.mark.parametrize("sync_always", [True, False], ids=["fsync", "os"])
async def test_leader_is_killed_under_load(cluster: list[NatsServer], sync_always: bool) -> None:
    """Again and again: nothing that was answered is missing, and no position is given twice.

    The epoch stays where the servers sync; or else readers are told that it is another one, over
    which idempotency keys do not hold.
    """
    table: dict[str, Any] = {"replicas": 3, "partitions": 1}
    table |= {"sync_always": True} if sync_always else {"durability": "os"}
    async with (
        nodes(url_of(cluster), **table) as (one, two),
        connect(f"{two.ws_url}/subscribe?topic=t&control=1", max_queue=None) as reader,
    ):
        answers: list[dict[str, Any]] = []
        enough = 300

        async def publish(number: int) -> None:
            count = 0
            while len(answers) < enough:
                count += 1
                daemon = (one, two)[number % 2]
                answers.append(await published(daemon, "t", f"{number}.{count}"))

        publishing = [asyncio.ensure_future(publish(number)) for number in range(4)]
        for killed_at in (60, 160):
            await until(lambda killed_at=killed_at: len(answers) >= killed_at, timeout_s=40)
            leader = await leader_of(cluster)
            leader.kill()
            # Enough to be sure that the others have elected one.
            await until(lambda killed_at=killed_at: len(answers) >= killed_at + 40, timeout_s=40)
            await asyncio.to_thread(leader.start)
        await asyncio.gather(*publishing)
        epochs = {each["epoch"] for each in answers}
        frames: list[Any] = []
        missing = {each["message_id"] for each in answers}
        while missing:
            frames += await received(reader, 1)
            missing.discard(frames[-1].get("id"))

    found = [each for each in frames if "id" in each]
    gaps = [each for each in frames if each.get("type") == "gap"]
    assert len({each["id"] for each in found}) == len(found)
    assert all(each["reason"] == "epoch" for each in gaps)
    if sync_always:
        assert len(epochs) == 1
        assert gaps == []
        assert len({each["data"] for each in found}) == len(found)
        assert [each["offset"] for each in found] == list(range(1, len(found) + 1))
        assert all(each["durable"] for each in answers)
    else:
        assert len(gaps) == len(epochs) - 1 > 0
    positions = [(each["epoch"], each["offset"]) for each in answers]
    assert len(set(positions)) == len(positions)
