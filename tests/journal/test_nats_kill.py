"""Daemons that are killed while they publish into NATS: what was answered is read back, once.

KILLS says how many are killed; each takes some seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from daemons import DaemonProcess, daemon_process, running
from nats_servers import nats_server
from websockets.asyncio.client import connect

KILLS = int(os.environ.get("KILLS", "2"))
PUBLISHERS = 8


async def publish_until_killed(
    http: aiohttp.ClientSession, url: str, who: int, todo: list[str], answers: list[Any]
) -> None:
    """Publish text after text; leave the one in ``todo`` that was not answered."""
    while True:
        if not todo:
            todo.append(f"{who}-{len(answers)}-{random.getrandbits(32):x}")
        body = json.dumps({"topic": "t", "data": todo[0], "idempotency_key": todo[0]})
        try:
            async with http.post(f"{url}/publish", data=body) as response:
                answer = await response.json()
        except (aiohttp.ClientError, ConnectionError):
            return
        if response.status == 200:
            answers.append((todo.pop(), answer["epoch"], answer["offset"], answer["message_id"]))


async def killed_under_load(
    http: aiohttp.ClientSession,
    daemon: DaemonProcess,
    todo: list[list[str]],
    answers: list[list[Any]],
    enough: int,
) -> None:
    """Kill ``daemon`` when it has answered so many publishes of this round."""
    before = sum(map(len, answers))
    publishing = [
        asyncio.ensure_future(publish_until_killed(http, daemon.url, who, todo[who], answers[who]))
        for who in range(PUBLISHERS)
    ]
    async with asyncio.timeout(20):
        while sum(map(len, answers)) < before + enough:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        daemon.process.kill()
        await asyncio.gather(*publishing)


async def all_frames(url: str, count: int) -> list[Any]:
    """Return the first messages of the topic, as a daemon has them."""
    async with connect(f"{url}/subscribe?topic=t&since=all", max_queue=None) as reader:
        async with asyncio.timeout(20):
            return [json.loads(await reader.recv()) for _ in range(count)]


@pytest.mark.timeout(60 + 15 * KILLS)
@pytest.mark.holds_loop("daemon processes are started and waited for")
async def test_what_was_answered_before_a_kill_is_read_back(tmp_path: Path) -> None:
    """Kill after kill: each answered message is at its place, in order, once, on any node."""
    chance = random.Random(7)  # noqa: S311  # moments to kill at, the same in each run
    todo: list[list[str]] = [[] for _ in range(PUBLISHERS)]
    answers: list[list[Any]] = [[] for _ in range(PUBLISHERS)]
    with nats_server(tmp_path, jetstream="sync_interval: always") as server:
        table = {"url": server.url, "sync_always": True}
        config = tmp_path / "clevrd.toml"
        config.write_text(
            f'ring_messages = 100000\n[journal]\nurl = "{server.url}"\nsync_always = true\n'
        )
        async with (
            running(ring_messages=100_000, journal_table=table) as witness,
            connect(f"{witness.ws_url}/subscribe?topic=t", max_queue=None) as reader,
        ):
            for _ in range(KILLS):
                with daemon_process(CLEVRD_CONFIG=str(config)) as daemon:
                    await killed_under_load(
                        witness.http, daemon, todo, answers, chance.randrange(1, 400)
                    )
            last = await witness.publish("t", "last")
            async with asyncio.timeout(20):
                seen = [json.loads(await reader.recv()) for _ in range(last["offset"])]
            async with running(ring_messages=100_000, journal_table=table) as other:
                kept = await all_frames(other.ws_url, last["offset"])

    places = {(each["data"], each["offset"], each["id"]) for each in seen}
    assert [each["offset"] for each in seen] == list(range(1, len(seen) + 1))
    assert len({each["data"] for each in seen}) == len(seen)
    assert kept == seen
    answered = [each for own in answers for each in own]
    assert {epoch for _, epoch, _, _ in answered} == {last["epoch"]}
    assert {(text, offset, name) for text, _, offset, name in answered} <= places
