"""Messages with a time to live: skipped once it is over, told as a gap, on every transport."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clients import client_of, subscribe
from daemons import Daemon, running, until
from http_wire import ask, post

SHORT = 0.001


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a running daemon."""
    async with running() as started:
        yield started


async def send(daemon: Daemon, data: int, ttl_s: float | None = None, topic: str = "t") -> None:
    """Publish one message, perhaps with a time to live."""
    fields = {} if ttl_s is None else {"ttl_s": ttl_s}
    body = msgspec.json.encode({"topic": topic, "data": data, **fields})
    async with daemon.http.post(f"{daemon.url}/publish", data=body) as response:
        assert response.status == 200, await response.text()


async def is_over() -> None:
    """Wait until SHORT is over for all that was published before."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + 10 * SHORT
    await until(lambda: loop.time() > end_s)


async def fill(daemon: Daemon, topic: str = "t") -> None:
    """Publish five messages, of which the second, third and fifth expire at once."""
    for data, ttl_s in enumerate([None, SHORT, SHORT, 60, SHORT], 1):
        await send(daemon, data, ttl_s, topic)
    await is_over()


def offsets_of(answer: dict[str, Any]) -> list[int]:
    """Return the offsets of an answer's messages."""
    return [message["offset"] for message in answer["messages"]]


async def test_message_says_its_ttl_and_arrives_live(daemon: Daemon) -> None:
    """Who keeps up is given it as any other, with the field behind the offset."""
    async with subscribe(daemon.ws_url) as reader:
        await until(lambda: daemon.hub.subscribers == 1)
        await send(daemon, 1, 60)
        await send(daemon, 2, 0.5)
        await send(daemon, 3)
        received = [json.loads(await reader.recv()) for _ in range(3)]

    assert list(received[0])[-2:] == ["offset", "ttl_s"]
    assert [each.get("ttl_s") for each in received] == [60, 0.5, None]


async def test_expired_messages_are_skipped_in_catch_up_and_told(daemon: Daemon) -> None:
    """A subscriber that comes later has the others, and gaps where the expired ones were."""
    await fill(daemon)
    epoch = (await daemon.get_json("/topics/t"))["epoch"]
    async with (
        subscribe(daemon.ws_url, control="1") as told,
        subscribe(daemon.ws_url, offset=1, epoch=epoch, control="1") as resumed,
        subscribe(daemon.ws_url) as untold,
    ):
        first = [json.loads(await told.recv()) for _ in range(4)]
        second = [json.loads(await resumed.recv()) for _ in range(3)]
        third = [json.loads(await untold.recv())["offset"] for _ in range(2)]
        await send(daemon, 6)
        # What was lost last is told with the message behind it.
        last = [json.loads(await told.recv()) for _ in range(2)]
        third.append(json.loads(await untold.recv())["offset"])
    figures = await daemon.get_json("/metrics")

    gap = {"type": "gap", "topic": "t", "from": 2, "to": 3, "count": 2, "reason": "expired"}
    assert [each.get("offset") for each in first] == [0, 1, None, 4]
    assert first[2] == gap
    assert (second[0]["recovered"], second[1], second[2]["offset"]) == (True, gap, 4)
    assert last[0] == {**gap, "from": 5, "to": 5, "count": 1}
    assert (last[1]["offset"], third) == (6, [1, 4, 6])
    sums = figures["messages"]
    assert sums["dropped"]["expired"] == 9
    assert sums["offered"] == sums["delivered"] + 9 + sums["discarded"] + sums["queued"]


async def test_events_tell_the_gap_with_a_position(daemon: Daemon) -> None:
    """An EventSource that is cut behind the gap does not come back before it."""
    await fill(daemon)
    head = {"Accept": "text/event-stream"}
    async with daemon.http.get(f"{daemon.url}/subscribe?topic=t", headers=head) as stream:
        lines = b""
        while b'"offset":4' not in lines:
            lines += await stream.content.readline()

    events = [each for each in lines.split(b"\n\n") if b"event: gap" in each]
    assert len(events) == 1
    assert b":3\n" in events[0]
    assert b'"reason":"expired"' in events[0]


@pytest.mark.parametrize("path", ["/subscribe?topic=t&poll=1&timeout=0", "/topics/t/messages?"])
async def test_poll_ends_before_the_expired_and_tells_them_next(daemon: Daemon, path: str) -> None:
    """Each answer has the messages up to a gap, the next one the gap: positions stay honest."""
    await fill(daemon)

    answers = [await daemon.get_json(f"{path}&since=all")]
    for _ in range(3):
        place = f"offset={answers[-1]['offset']}&epoch={answers[-1]['epoch']}"
        answers.append(await daemon.get_json(f"{path}&{place}"))

    assert [offsets_of(each) for each in answers] == [[1], [4], [], []]
    assert [each["offset"] for each in answers] == [1, 4, 5, 5]
    assert [each["gap"] and each["gap"]["reason"] for each in answers] == [
        *(None, "expired", "expired", None)
    ]
    assert all(each["recovered"] for each in answers)


async def test_poll_of_many_topics_skips_the_expired(daemon: Daemon) -> None:
    """Several topics in one answer: each up to its first gap."""
    await fill(daemon, "t")
    await send(daemon, 1, SHORT, "u")
    await send(daemon, 2, None, "u")
    await is_over()

    answer = await daemon.get_json("/subscribe?topic=t&topic=u&poll=1&timeout=0&since=all")

    assert [(each["topic"], each["offset"]) for each in answer["messages"]] == [("t", 1), ("u", 2)]
    assert [(gap["topic"], gap["to"], gap["reason"]) for gap in answer["gaps"]] == [
        ("u", 1, "expired")
    ]
    assert {name: at["offset"] for name, at in answer["positions"].items()} == {"t": 1, "u": 2}


async def test_every_way_to_publish_takes_a_ttl(daemon: Daemon) -> None:
    """Batches, publish sockets and commands; a page with such a message is not kept by caches."""
    item = {"topic": "t", "data": 1, "ttl_s": 60, "key": "k"}
    lines = b"\n".join(msgspec.json.encode({**item, "data": data}) for data in range(2))
    await daemon.http.post(f"{daemon.url}/publish/batch", data=lines)
    async with client_of(f"{daemon.ws_url}/publish") as socket:
        await socket.send(json.dumps({**item, "ref": 1}))
        await socket.recv()
    async with client_of(f"{daemon.ws_url}/ws", subprotocols=["clevrd.v1"]) as socket:
        await socket.send(json.dumps({"type": "publish", **item, "ref": 1}))
        await socket.recv()

    newest = await daemon.get_json("/topics/t/messages")
    path = f"{daemon.url}/topics/t/messages?limit=2&offset=0&epoch={newest['epoch']}"
    async with daemon.http.get(path) as response:
        caching = response.headers["Cache-Control"]

    assert [each["ttl_s"] for each in newest["messages"]] == [60] * 4
    assert [list(each)[-2:] for each in newest["messages"]] == [["ttl_s", "key"]] * 4
    assert caching == "no-store"


async def test_wrong_ttl_is_refused_with_a_sentence(daemon: Daemon) -> None:
    """A ttl is a number of seconds within bounds; a near name is told."""
    for wrong in ("0", "-1", '"60"', "true", "[]", "1e9", "0.0001", "{}", "100000001"):
        answer = await ask(daemon.port, post(f'{{"topic":"t","data":1,"ttl_s":{wrong}}}'))
        assert answer.status == 400, wrong
        assert "The ttl_s must be a number of seconds" in json.loads(answer.body)["error"], wrong
    null = await ask(daemon.port, post('{"topic":"t","data":1,"ttl_s":null}'))
    near = await ask(daemon.port, post('{"topic":"t","data":1,"ttl":60}'))

    assert null.status == 200
    assert "ttl_s is the name" in json.loads(near.body)["warnings"][0]


async def test_expiry_is_known_after_a_planned_restart(tmp_path: Path) -> None:
    """The saved messages say themselves when they expire."""
    async with running(state_dir=str(tmp_path)) as daemon:
        await fill(daemon)
    async with running(state_dir=str(tmp_path)) as daemon:
        first = await daemon.get_json("/topics/t/messages?since=all")
        second = await daemon.get_json(
            f"/topics/t/messages?offset=1&epoch={first['epoch']}&limit=5"
        )

    assert (offsets_of(first), offsets_of(second)) == ([1], [4])
    assert second["gap"]["reason"] == "expired"


async def test_history_skips_the_expired(tmp_path: Path) -> None:
    """What lies before the ring, or was published before the start, is skipped as well."""
    pytest.importorskip("apsw")
    table = {"directory": str(tmp_path / "journal")}
    async with running(ring_messages=100, journal_table=table) as daemon:
        await fill(daemon)
        await send(daemon, 6)
    async with running(ring_messages=100, journal_table=table) as daemon:
        epoch = (await daemon.get_json("/topics/t"))["epoch"]
        pages = [await daemon.get_json("/topics/t/messages?since=all")]
        for _ in range(2):
            place = f"offset={pages[-1]['offset']}&epoch={epoch}"
            pages.append(await daemon.get_json(f"/topics/t/messages?{place}"))
        async with (
            subscribe(daemon.ws_url, since="all", control="1") as told,
            subscribe(daemon.ws_url, since="all") as untold,
        ):
            frames = [json.loads(await told.recv()) for _ in range(6)]
            offsets = [json.loads(await untold.recv())["offset"] for _ in range(3)]
            await until(lambda: daemon.hub.reading_history == 0)
            figures = await daemon.get_json("/metrics")

    assert [offsets_of(page) for page in pages] == [[1], [4], [6]]
    assert [page["gap"] and page["gap"]["reason"] for page in pages] == [None, "expired", "expired"]
    assert [each.get("reason") or each["offset"] for each in frames] == [
        0,
        1,
        "expired",
        4,
        "expired",
        6,
    ]
    assert [(each["from"], each["to"]) for each in frames if "reason" in each] == [(2, 3), (5, 5)]
    assert offsets == [1, 4, 6]
    sums = figures["messages"]
    lost = sum(sums["dropped"].values())
    assert sums["dropped"]["expired"] > 0
    assert sums["offered"] == sums["delivered"] + lost + sums["discarded"] + sums["queued"]
