"""A journal's server that hangs for half a minute: what publishers, readers and health are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
from daemons import Daemon, until
from journal_engines import new_topic
from kafka_servers import shared_server
from nats_servers import nats_server
from redis_servers import redis_server
from shared_journal import nodes, received, resume
from websockets.asyncio.client import ClientConnection, connect

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

# Longer than any of the engines' own limits, and than a broker's session.
PAUSE_S = 30.0
PUBLISHERS = 2


class Hanging(Protocol):
    """A server that can be stopped, so that its connections stay and nothing is answered."""

    def pause(self) -> None:
        """Stop it."""

    def go_on(self) -> None:
        """Let it go on."""


class Journal(NamedTuple):
    """A journal, and the server that it is in."""

    server: Hanging
    table: dict[str, Any]


@pytest.fixture(params=["kafka", "nats", "redis"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    """Give a journal in each engine that several nodes share."""
    if request.param == "redis":
        with redis_server(tmp_path / "redis") as redis:
            yield Journal(redis, {"url": redis.url})
    elif request.param == "nats":
        with nats_server(tmp_path / "nats", jetstream="sync_interval: always") as nats:
            yield Journal(nats, {"url": nats.url, "sync_always": True})
    else:
        kafka = shared_server()
        yield Journal(kafka, {"url": kafka.url(new_topic())})
        kafka.revive()


class Load:
    """Publishers that send text after text, and what each of them was told."""

    def __init__(self) -> None:
        # Texts by publisher, in the order in which they were answered.
        self.answered: dict[str, list[str]] = {}
        self.answers: list[dict[str, Any]] = []
        # Status, code, whether to come again, and when, of all that was refused.
        self.refused: list[tuple[int, str, bool, str]] = []
        self.is_ending = False

    async def publish(self, daemon: Daemon, name: str) -> None:
        """Publish until the load ends; what was refused is sent again, with its key."""
        answered = self.answered[name] = []
        while not self.is_ending:
            text = f"{name} {len(answered)}"
            body = json.dumps({"topic": "t", "data": text, "idempotency_key": text})
            while True:
                async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
                    answer = await response.json()
                    if response.status == 200:
                        break
                    again = response.headers.get("Retry-After", "")
                self.refused.append((response.status, answer["code"], answer["retryable"], again))
                await asyncio.sleep(0.2)
            answered.append(text)
            self.answers.append(answer)
            await asyncio.sleep(0.002)


@asynccontextmanager
async def loaded(daemons: list[Daemon]) -> AsyncIterator[Load]:
    """Have publishers on all nodes; they end, and are answered, in the end."""
    load = Load()
    publishing = [
        asyncio.ensure_future(load.publish(daemon, f"{index}.{number}"))
        for index, daemon in enumerate(daemons)
        for number in range(PUBLISHERS)
    ]
    try:
        yield load
        load.is_ending = True
        await asyncio.gather(*publishing)
    finally:
        for each in publishing:
            each.cancel()
        await asyncio.gather(*publishing, return_exceptions=True)


async def status_of(daemon: Daemon) -> tuple[str, str]:
    """Return what /health says of a daemon, and of its journal."""
    health = await daemon.get_json("/health")
    return health["status"], health["journal"]["state"]


async def until_status(daemons: list[Daemon], status: str, state: str) -> None:
    """Wait until all nodes say it."""
    async with asyncio.timeout(40):
        for daemon in daemons:
            while await status_of(daemon) != (status, state):  # noqa: ASYNC110  # it tells by itself
                await asyncio.sleep(0.05)


async def read_up_to(reader: ClientConnection, message_id: str) -> list[Any]:
    """Return all frames up to a message."""
    frames = await received(reader, 1)
    while frames[-1].get("id") != message_id:
        frames += await received(reader, 1)
    return frames


async def test_server_that_hangs_for_long_loses_nothing_and_tells_nothing_false(
    journal: Journal,
) -> None:
    """Publishers are told to come again, readers stay, and then all is there once and in order."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        daemons = await enter(nodes(partitions=2, **journal.table))
        first = await daemons[0].publish("t", "first")
        readers = [await enter(connect(resume(each, first), max_queue=None)) for each in daemons]
        async with loaded(daemons) as load:
            await until(lambda: len(load.answers) >= 50)
            journal.server.pause()
            try:
                until_s = loop.time() + PAUSE_S
                await until_status(daemons, "degraded", "unavailable")
                answered = len(load.answers)
                late = await enter(connect(resume(daemons[1], first), max_queue=None))
                greeting = (await received(late, 1))[0]
                await until(lambda: loop.time() >= until_s, timeout_s=PAUSE_S + 10)
                statuses = [await status_of(each) for each in daemons]
                meanwhile = len(load.answers) - answered
            finally:
                journal.server.go_on()
            await until_status(daemons, "healthy", "ok")
            enough = len(load.answers) + 50
            await until(lambda: len(load.answers) >= enough)
        last = await daemons[1].publish("t", "last")
        seen = [await read_up_to(each, last["message_id"]) for each in (*readers, late)]

    greetings = [*(frames.pop(0) for frames in seen[:2]), greeting]
    assert statuses == [("degraded", "unavailable")] * 2
    assert meanwhile == 0
    assert {(status, code, again) for status, code, again, _ in load.refused} == {
        (503, "journal_unavailable", True)
    }
    assert all(int(seconds) >= 1 for _, _, _, seconds in load.refused)
    assert all(each["recovered"] for each in greetings)
    assert seen[0] == seen[1] == seen[2]
    assert [each.get("offset") for each in seen[0]] == list(range(2, last["offset"] + 1))
    read = {each["data"]: each["id"] for each in seen[0]}
    assert len(read) == len(seen[0])
    assert {each["message_id"] for each in load.answers} <= set(read.values())
    assert {each["epoch"] for each in load.answers} == {first["epoch"]}
    for name, answered_texts in load.answered.items():
        texts = [text for text in read if text.startswith(f"{name} ")]
        assert texts == answered_texts
