"""Clients with tokens that last a second, and real daemons: nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from daemons import Daemon, until
from keys import WEB, rules
from tokens import Issuer, token, trusting

from clevrd.client import Client, Closed, Message, Refused, Unauthorized, sync
from clevrd.tenants.settings import read_access

# Seconds that messages flow: each token is renewed several times.
FLOW_S = 4.0


@pytest_asyncio.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with trusting(tmp_path) as daemon:
        yield daemon


async def flow(daemon: Daemon, topics: list[str], publisher: Any) -> int:
    """Publish to each topic in turn for FLOW_S; return how many each got."""
    loop = asyncio.get_running_loop()
    end_s, count = loop.time() + FLOW_S, 0
    while loop.time() < end_s:
        for topic in topics:
            await publisher.publish(topic, count)
        count += 1
        await asyncio.sleep(0.01)
    return count


async def read(items: Any, topics: list[str]) -> dict[str, list[Any]]:
    """Return each topic's data up to the message "end"."""
    found: dict[str, list[Any]] = {topic: [] for topic in topics}
    ended: set[str] = set()
    async for item in items:
        assert isinstance(item, Message), item
        if item.data == "end":
            ended.add(item.topic)
        else:
            found[item.topic].append(item.data)
        if len(ended) == len(topics):
            break
    return found


@pytest.mark.parametrize("topics", [["orders.eu"], ["orders.eu", "orders.us"]])
@pytest.mark.parametrize("way", ["http", "socket"])
async def test_nothing_is_lost_while_tokens_end(
    daemon: Daemon, topics: list[str], way: str
) -> None:
    """Several topics keep their connection, which is renewed in place; others come back."""
    of_reader, of_writer = Issuer(1.0), Issuer(1.0)
    async with (
        Client(daemon.url, token=of_reader) as reader,
        Client(daemon.url, token=of_writer) as writer,
        reader.subscribe(*topics, last=0) as items,
    ):
        first = items._socket
        reading = asyncio.ensure_future(read(items, topics))
        if way == "http":
            count = await flow(daemon, topics, writer)
        else:
            async with writer.publisher() as publisher:
                count = await flow(daemon, topics, publisher)
        assert (items._socket is first) == (len(topics) > 1)
        for topic in topics:
            await writer.publish(topic, "end")
        async with asyncio.timeout(20):
            found = await reading

    assert found == {topic: list(range(count)) for topic in topics}
    assert 3 <= len(of_reader.tokens) < 20
    assert 3 <= len(of_writer.tokens) < 20


async def test_function_that_waits_renews_without_asyncio(daemon: Daemon) -> None:
    """It is called in a thread, and messages go on meanwhile."""

    def follow() -> list[Any]:
        with (
            sync.Client(daemon.url, token=Issuer(1.0)) as client,
            client.subscribe("orders.eu", "orders.us", last=0) as items,
        ):
            client.publish("orders.eu", "begin")
            return [item.data for item in islice(items, 101) if isinstance(item, Message)]

    following = asyncio.create_task(asyncio.to_thread(follow))
    await until(lambda: daemon.hub.subscribers == 2 and daemon.hub.topics.published == 1)
    async with Client(daemon.url, token=token(60)) as writer:
        for number in range(100):
            await writer.publish("orders.eu", number)
            await asyncio.sleep(0.02)
    async with asyncio.timeout(20):
        assert await following == ["begin", *range(100)]


async def test_text_ends_with_its_token(daemon: Daemon) -> None:
    """There is no other, so the daemon's words are the end."""
    async with Client(daemon.url, token=token(0.3)) as client:
        with pytest.raises(Unauthorized) as ended:
            await anext(client.subscribe("news"))

    assert ended.value.code == "unauthorized"


async def test_revoked_key_and_missing_permission_are_final(daemon: Daemon) -> None:
    """The client has nothing else to show."""
    async with Client(daemon.url, token=WEB.secret) as client:
        with pytest.raises(Refused, match="lacks the permission to subscribe"):
            await anext(client.subscribe("secrets"))
        async with client.subscribe("news") as items:
            without = {**rules(), "tenants": rules()["tenants"][1:]}
            await daemon.server.access.apply(read_access(without, "a test"), Path())
            with pytest.raises(Closed, match="4001"):
                await anext(items)


async def test_token_of_another_tenant_renews_nothing(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon refuses it and says so, and the connection ends with its first token."""
    tokens = [token(1.0), token(60, tenant="other")]
    async with (
        Client(daemon.url, token=lambda: tokens.pop(0)) as client,
        client.subscribe("news", "more") as items,
    ):
        reading = asyncio.ensure_future(anext(items))
        await until(lambda: "token not renewed" in caplog.text)

        assert daemon.hub.subscribers == 2
        reading.cancel()
