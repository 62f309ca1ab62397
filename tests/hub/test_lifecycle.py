"""Lifecycle: a tenant is told in $events who reads its topics, once for each change that holds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from clients import client_of, subscribe
from daemons import Daemon, running, until
from keys import READER, WEB, WRITER, bearer, rules

from clevrd.errors import ConfigError
from clevrd.hub import lifecycle
from clevrd.hub.lifecycle import Told
from clevrd.tenants.settings import Access, read_access
from clevrd.tenants.topic_permissions import ALL_TOPICS, TopicPermissions

SETTLE_S = 0.02


def told(*topics: str, presence: tuple[str, ...] = (), **tenant: Any) -> Access:
    """Return rules of an open daemon whose default tenant is told of these topics."""
    entry = {"name": "default-tenant", "lifecycle": [*topics], "presence": [*presence]}
    return read_access({"tenants": [{**entry, **tenant}]}, "a test")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let changes settle soon."""
    monkeypatch.setattr(lifecycle, "SETTLE_S", SETTLE_S)


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a daemon that tells of rooms."""
    async with running(access=told("room.*", "hall", presence=("room.*",))) as started:
        yield started


async def events_of(daemon: Daemon, **headers: str) -> list[dict[str, Any]]:
    """Return all messages in the topic of events."""
    url = f"{daemon.url}/topics/%24events/messages?since=all&limit=1000"
    async with daemon.http.get(url, headers=headers) as response:
        answer = await response.json()
        return answer["messages"] if response.status == 200 else []


def short(events: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return type, topic and id of each event."""
    return [tuple(v for k, v in e["data"].items() if k not in ("time", "node")) for e in events]


async def settled(daemon: Daemon) -> None:
    """Wait until nothing is left to be told."""
    await until(lambda: not daemon.hub.lifecycle._pending)


async def test_topic_is_told_occupied_and_vacated(daemon: Daemon) -> None:
    """Once for the first subscriber and once after the last, with positions like any message."""
    async with subscribe(daemon.ws_url, "room.1"), subscribe(daemon.ws_url, "other"):
        await settled(daemon)
        async with subscribe(daemon.ws_url, "room.1"), subscribe(daemon.ws_url, "hall"):
            await settled(daemon)
    await until(lambda: daemon.hub.subscribers == 0)
    await settled(daemon)
    events = await events_of(daemon)

    assert short(events) == [
        ("occupied", "room.1"),
        ("occupied", "hall"),
        ("vacated", "hall"),
        ("vacated", "room.1"),
    ]
    assert [each["offset"] for each in events] == [1, 2, 3, 4]
    assert [each["key"] for each in events] == ["room.1", "hall", "hall", "room.1"]
    assert len({each["data"]["node"] for each in events}) == 1
    figures = await daemon.get_json("/metrics")
    assert figures["connections"]["lifecycle"] == {"published": 4, "dropped": 0}


async def test_ids_are_told_joined_and_left(daemon: Daemon) -> None:
    """An id joins with its first connection and leaves with its last, in its topics alone."""
    async with (
        subscribe(daemon.ws_url, "room.1", subscriber_id="ann"),
        subscribe(daemon.ws_url, "room.1", subscriber_id="ann"),
        subscribe(daemon.ws_url, "hall", subscriber_id="ann"),
        subscribe(daemon.ws_url, "room.1"),
    ):
        await until(lambda: daemon.hub.subscribers == 4)
        await settled(daemon)
    await until(lambda: daemon.hub.subscribers == 0)
    await settled(daemon)
    events = short(await events_of(daemon))

    assert sorted(each for each in events if each[0] in ("joined", "occupied")) == [
        *(("joined", "room.1", "ann"), ("occupied", "hall"), ("occupied", "room.1"))
    ]
    assert sorted(each for each in events if each[0] in ("left", "vacated")) == [
        *(("left", "room.1", "ann"), ("vacated", "hall"), ("vacated", "room.1"))
    ]
    assert len(events) == 6


async def test_flapping_subscriber_does_not_flood(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes and changes back before it has settled is not told."""
    monkeypatch.setattr(lifecycle, "SETTLE_S", 0.5)
    for _ in range(20):
        async with subscribe(daemon.ws_url, "room.1", subscriber_id="ann"):
            pass
    await until(lambda: daemon.hub.subscribers == 0)
    known = dict(daemon.hub.lifecycle._pending)
    await settled(daemon)

    # On a slow machine the second half may come after the first has settled.
    assert len(known) <= 2
    events = short(await events_of(daemon))
    assert len(events) <= 8
    # Nothing is told to have gone that was not told to be there.
    for there, gone in (("occupied", "vacated"), ("joined", "left")):
        kinds = [each[0] for each in events if each[0] in (there, gone)]
        assert kinds == [there, gone] * (len(kinds) // 2)
    assert not daemon.hub.lifecycle._told


async def test_events_are_followed_live_and_by_position(daemon: Daemon) -> None:
    """A backend subscribes as to any topic, and its own subscription is no event."""
    async with subscribe(daemon.ws_url, "$events", control="1", last=0) as backend:
        first = json.loads(await backend.recv())
        async with subscribe(daemon.ws_url, "room.1"):
            event = json.loads(await backend.recv())
    page = await daemon.get_json(
        f"/subscribe?topic=%24events&poll=1&offset=0&epoch={first['epoch']}"
    )

    assert (event["offset"], event["data"]["type"]) == (1, "occupied")
    assert page["recovered"]
    assert page["messages"][0] == event


async def test_publishers_may_not_publish_events(daemon: Daemon) -> None:
    """Every way to publish is refused, where the tenant has events; others are as before."""
    body = {"topic": "$events", "data": 1}
    async with daemon.http.post(f"{daemon.url}/publish", json=body) as response:
        plain = response.status, (await response.json())["code"]
    keyed_body = {**body, "idempotency_key": "k"}
    async with daemon.http.post(f"{daemon.url}/publish", json=keyed_body) as response:
        keyed = response.status
    async with daemon.http.post(f"{daemon.url}/publish/batch", json=[body]) as response:
        batch = (await response.json())["results"][0]["code"]
    async with client_of(f"{daemon.ws_url}/ws", subprotocols=["clevrd.v1"]) as socket:
        await socket.send(json.dumps({"type": "publish", **body, "ref": 1}))
        command = json.loads(await socket.recv())
    other = await daemon.publish("$events", 1, **{"X-Tenant-ID": "acme"})

    assert plain == (403, "forbidden")
    assert keyed == 403
    assert (batch, command["code"]) == ("forbidden", "forbidden")
    assert other["success"]
    assert await events_of(daemon) == []


async def test_who_may_read_events_is_a_permission() -> None:
    """A key that may not subscribe to $events does not learn of anybody."""
    table = rules()
    table["tenants"][0]["lifecycle"] = ["**"]
    async with running(access=read_access(table, "a test")) as daemon:
        await daemon.publish("news", 1, **bearer(WRITER))
        head = bearer(READER)
        url = f"{daemon.url}/subscribe?topic=news"
        async with daemon.http.get(url, headers={**head, "Accept": "text/event-stream"}):
            await until(lambda: daemon.hub.lifecycle.counts["published"] == 1)
            seen = short(await events_of(daemon, **head))
        async with daemon.http.get(
            f"{daemon.url}/topics/%24events/messages", headers=bearer(WEB)
        ) as refused:
            status = refused.status

    assert seen == [("occupied", "news")]
    assert status == 403


async def test_stop_tells_nobody_that_all_have_left(tmp_path: Path) -> None:
    """A restart is no reason for events: subscribers come back by themselves."""
    access = told("**")
    async with (
        running(access=access, state_dir=str(tmp_path)) as daemon,
        subscribe(daemon.ws_url, "room.1") as reader,
    ):
        await until(lambda: daemon.hub.lifecycle.counts["published"] == 1)
        stopping = asyncio.create_task(daemon.server.stop())
        await reader.wait_closed()
        await stopping
    async with running(access=access, state_dir=str(tmp_path)) as daemon:
        events = short(await events_of(daemon))

    assert events == [("occupied", "room.1")]


async def test_too_many_topics_are_counted_and_not_told(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory for what was told is bounded; the log says it once."""
    monkeypatch.setattr(lifecycle, "MAX_KNOWN", 2)
    async with client_of(f"{daemon.ws_url}/ws", subprotocols=["clevrd.v1"]) as socket:
        for number in range(4):
            await socket.send(json.dumps({"type": "subscribe", "topic": f"room.{number}"}))
            await socket.recv()
        await settled(daemon)
    await until(lambda: daemon.hub.subscribers == 0)
    await settled(daemon)

    counts = daemon.hub.lifecycle.counts
    assert counts["dropped"] >= 2
    assert counts["published"] == 4
    assert sum("is not told" in each.message for each in caplog.records) == 1


async def test_tenant_with_many_topics_keeps_no_other_from_being_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each tenant is guaranteed a part of what is kept in mind."""
    monkeypatch.setattr(lifecycle, "MAX_KNOWN", 8)
    entries = [{"name": name, "lifecycle": ["**"]} for name in ("loud", "calm")]
    async with running(access=read_access({"tenants": entries}, "a test")) as daemon:
        headers = {"X-Tenant-ID": "loud"}
        async with client_of(
            f"{daemon.ws_url}/ws", subprotocols=["clevrd.v1"], additional_headers=headers
        ) as socket:
            for number in range(20):
                await socket.send(json.dumps({"type": "subscribe", "topic": f"room.{number}"}))
                await socket.recv()
            await settled(daemon)
            async with subscribe(daemon.ws_url, "room.1", tenant="calm"):
                await settled(daemon)
                events = short(await events_of(daemon, **{"X-Tenant-ID": "calm"}))

    assert events == [("occupied", "room.1")]


async def test_changes_that_did_not_hold_are_looked_at_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those cost time, so that a client that comes and goes everywhere holds nobody up."""
    monkeypatch.setattr(lifecycle, "SETTLE_S", 0.0)
    async with running(access=told("**")) as daemon:
        kept = daemon.hub.lifecycle
        for number in range(3 * lifecycle.EVENTS_PER_TURN):
            kept._look_later(("default-tenant", f"gone.{number}", None), ALL_TOPICS)
        left = [len(kept._pending)]
        while kept._pending:
            await asyncio.sleep(0)
            left.append(len(kept._pending))

    steps = [before - after for before, after in pairwise(left)]
    assert max(steps) == lifecycle.EVENTS_PER_TURN


async def test_reload_leaves_nothing_of_what_is_told_no_more(daemon: Daemon) -> None:
    """Neither of a tenant that wants nothing now, nor of a topic, which is forgotten in silence."""
    kept = daemon.hub.lifecycle
    every, rooms = TopicPermissions(["room.*", "hall"]), TopicPermissions(["room.*"])
    async with subscribe(daemon.ws_url, "room.1"), subscribe(daemon.ws_url, "hall"):
        await settled(daemon)
        daemon.hub.tell_lifecycle({"default-tenant": Told(rooms)})
    await until(lambda: daemon.hub.subscribers == 0)
    await settled(daemon)
    assert not kept._told

    async with subscribe(daemon.ws_url, "room.1"):
        await settled(daemon)
        daemon.hub.tell_lifecycle({})
    await until(lambda: daemon.hub.subscribers == 0)
    daemon.hub.tell_lifecycle({"default-tenant": Told(every)})
    assert not kept._told
    async with subscribe(daemon.ws_url, "room.1"):
        await settled(daemon)
        events = short(await events_of(daemon))

    assert not [each for each in events if each == ("vacated", "hall")]
    assert events.count(("occupied", "room.1")) == 3
    await until(lambda: not kept._known)


async def test_journaled_topics_have_events_too(tmp_path: Path) -> None:
    """Events go into the journal where its patterns say so, and are there after a restart."""
    pytest.importorskip("apsw")
    table = {"directory": str(tmp_path / "journal")}
    async with running(access=told("room.*"), journal_table=table) as daemon:
        async with subscribe(daemon.ws_url, "room.1"):
            await until(lambda: daemon.hub.lifecycle.counts["published"] == 1)
        await until(lambda: daemon.hub.lifecycle.counts["published"] == 2)
    async with running(journal_table=table) as daemon:
        events = short(await events_of(daemon))

    assert events == [("occupied", "room.1"), ("vacated", "room.1")]


def test_wrong_patterns_are_named_at_the_start() -> None:
    """A mistake in a list of topics has a line of its own."""
    with pytest.raises(ConfigError, match=r"tenants\[0\]\.lifecycle .*ro\*m"):
        told("ro*m")
    with pytest.raises(ConfigError, match=r"tenants\[0\]\.presence"):
        told(presence=("",))
