"""DELETE /topics/T/messages: nobody is given what was cleared, and no position is used again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from clients import subscribe
from daemons import Daemon, running, until
from keys import ADMIN, WEB, bearer, key, rules
from memory_log import MemoryEngine, MemoryLog
from streams import EVENTS, LINES, open_stream

from clevrd.journal import cleared_topics
from clevrd.tenants.keys import new_key
from clevrd.tenants.settings import read_access


async def clear(daemon: Daemon, topic: str, **headers: str) -> tuple[int, dict[str, Any]]:
    """Clear ``topic``; return the status and the answer."""
    url = f"{daemon.url}/topics/{topic}/messages"
    async with daemon.http.delete(url, headers=headers) as response:
        return response.status, await response.json()


def kinds_of(frames: list[dict[str, Any]]) -> list[Any]:
    """Return of each frame what it is: a notice's type, or a message's data."""
    return [frame.get("type") or frame["data"] for frame in frames]


async def test_cleared_topic_begins_a_new_epoch_that_readers_are_told() -> None:
    """Readers stay, are told a gap, and go on; those that come later find nothing of before."""
    async with running() as daemon:
        before = [await daemon.publish("t", data) for data in range(1, 4)][-1]
        async with (
            subscribe(daemon.ws_url, control="1") as told,
            subscribe(daemon.ws_url) as untold,
        ):
            frames = [json.loads(await told.recv()) for _ in range(4)]
            status, answer = await clear(daemon, "t")
            frames += [json.loads(await told.recv()) for _ in range(2)]
            empty = await daemon.get_json("/topics/t/messages")
            after = await daemon.publish("t", 4)
            frames.append(json.loads(await told.recv()))
            seen = [json.loads(await untold.recv())["data"] for _ in range(4)]
        old = f"offset=1&epoch={before['epoch']}"
        resumed = await daemon.get_json(f"/topics/t/messages?{old}")
        figures = await daemon.get_json("/metrics")

    assert (status, answer["success"], answer["topic"]) == (200, True, "t")
    assert answer["epoch"] == after["epoch"] != before["epoch"]
    assert kinds_of(frames) == ["subscribed", 1, 2, 3, "subscribed", "gap", 4]
    assert (frames[4]["epoch"], frames[5]["reason"]) == (answer["epoch"], "epoch")
    assert (empty["messages"], empty["epoch"]) == ([], answer["epoch"])
    assert seen == [1, 2, 3, 4]
    assert (resumed["gap"]["reason"], kinds_of(resumed["messages"])) == ("epoch", [4])
    sums = figures["messages"]
    lost = sum(sums["dropped"].values())
    assert sums["offered"] == sums["delivered"] + lost + sums["discarded"] + sums["queued"]


async def test_clearing_takes_a_permission_of_its_own() -> None:
    """A key that may publish and subscribe may not clear; one that may is logged by its id."""
    made, limited = new_key(), new_key()
    table = rules()
    may = {"publish": ["**"], "clear": ["orders.*"]}
    table["tenants"][0]["keys"].append(key("cleaner", made, **may))
    own = {"publish_rate_per_s": 1.0, "publish_burst": 2}
    table["tenants"][0]["keys"].append(key("limited", limited, **may, **own))
    async with running(access=read_access(table, "a test")) as daemon:
        await daemon.publish("orders.eu", 1, **bearer(made))
        await daemon.publish("news", 1, **bearer(made))
        refused = [
            await clear(daemon, "orders.eu", **bearer(WEB)),
            await clear(daemon, "orders.eu", **bearer(ADMIN)),
            await clear(daemon, "news", **bearer(made)),
            await clear(daemon, "orders.eu"),
        ]
        allowed = await clear(daemon, "orders.eu", **bearer(made))
        missing = await clear(daemon, "orders.none", **bearer(made))
        often = [(await clear(daemon, "orders.eu", **bearer(limited)))[0] for _ in range(3)]

    assert [status for status, _ in refused] == [403, 403, 403, 401]
    assert "lacks the permission to clear: 'news'" in refused[2][1]["error"]
    assert allowed[0] == 200
    assert (missing[0], missing[1]["code"]) == (404, "not_found")
    assert often == [200, 200, 429]


async def test_journal_clears_for_good(tmp_path: Path) -> None:
    """No message of before is read from the history, also after a restart; offsets go on."""
    pytest.importorskip("apsw")
    table = {"directory": str(tmp_path / "journal")}
    async with running(ring_messages=100, journal_table=table) as daemon:
        before = [await daemon.publish("t", data) for data in range(1, 6)][-1]
        async with subscribe(daemon.ws_url, control="1") as told:
            frames = [json.loads(await told.recv()) for _ in range(6)]
            status, answer = await clear(daemon, "t")
            after = await daemon.publish("t", 6)
            frames += [json.loads(await told.recv()) for _ in range(3)]
        await daemon.publish("u", 1)
        again = await clear(daemon, "u")
        twice = await clear(daemon, "u")
    async with running(ring_messages=100, journal_table=table) as daemon:
        shown = await daemon.get_json("/topics/t")
        pages = [
            await daemon.get_json(f"/topics/t/messages?{query}")
            for query in (
                "since=all",
                "last=10",
                "since=1h",
                f"offset=2&epoch={before['epoch']}",
                f"offset=5&epoch={answer['epoch']}",
            )
        ]
        async with subscribe(daemon.ws_url, since="all", control="1") as reader:
            told_later = [json.loads(await reader.recv()) for _ in range(2)]
        last = await daemon.publish("t", 7)
        # Cleared while it is in use by nobody here.
        unused = await clear(daemon, "u")
        await until(lambda: daemon.hub.subscribers == 0)

    assert (status, answer["offset"], after["offset"], last["offset"]) == (200, 5, 6, 7)
    assert before["epoch"] != answer["epoch"] == after["epoch"] == last["epoch"] == shown["epoch"]
    assert kinds_of(frames[5:]) == [5, "subscribed", "gap", 6]
    assert (frames[6]["epoch"], frames[6]["offset"]) == (answer["epoch"], 5)
    assert frames[7]["reason"] == "epoch"
    assert [kinds_of(page["messages"]) for page in pages] == [[6]] * 5
    assert [page["gap"] and page["gap"]["reason"] for page in pages] == [
        *(None, None, "epoch", "epoch", None)
    ]
    assert [page["epoch"] for page in pages] == [answer["epoch"]] * 5
    assert kinds_of(told_later) == ["subscribed", 6]
    assert again == twice == unused == (200, {**again[1]})


async def told_behind(
    daemon: Daemon, offset: int, epoch: str
) -> list[tuple[bool, str | None, list[Any]]]:
    """Resume topic t in each way; return what is recovered, the gap's reason, and the messages."""
    position = f"offset={offset}&epoch={epoch}"
    told = []
    for path in ("/topics/t/messages?", "/subscribe?topic=t&poll=1&timeout=0&"):
        page = await daemon.get_json(path + position)
        reason = page["gap"] and page["gap"]["reason"]
        told.append((page["recovered"], reason, kinds_of(page["messages"])))
    async with subscribe(daemon.ws_url, control="1", offset=offset, epoch=epoch) as reader:
        frames = [json.loads(await reader.recv())]
        while frames[-1].get("data") != 7:
            frames.append(json.loads(await reader.recv()))
    told.append(begun_with(frames))
    for accept in (EVENTS, LINES):
        stream = await open_stream(daemon.port, accept, f"topic=t&control=1&{position}")
        async with stream:
            frames = [(await stream.item()).json]
            while frames[-1].get("data") != 7:
                frames.append((await stream.item()).json)
        told.append(begun_with(frames))
    return told


def begun_with(frames: list[dict[str, Any]]) -> tuple[bool, str | None, list[Any]]:
    """Return of a subscription's first frames what `told_behind` does."""
    gaps = [frame["reason"] for frame in frames if frame.get("type") == "gap"]
    messages = [frame["data"] for frame in frames if "data" in frame]
    return frames[0]["recovered"], gaps[0] if gaps else None, messages


@pytest.mark.parametrize("is_journaled", [False, True])
async def test_resume_after_a_clear_is_told_alike_in_each_way(
    tmp_path: Path, is_journaled: bool
) -> None:
    """The new epoch misses nothing, from wherever in it; of the old one a gap is told."""
    pytest.importorskip("apsw")
    table = {"directory": str(tmp_path / "journal")} if is_journaled else None
    async with running(journal_table=table) as daemon:
        before = [await daemon.publish("t", data) for data in range(1, 6)][-1]
        _, cleared = await clear(daemon, "t")
        after = [await daemon.publish("t", data) for data in (6, 7)][-1]
        offsets = {0, cleared["offset"], max(0, cleared["offset"] - 2)}
        new = [await told_behind(daemon, at, after["epoch"]) for at in offsets]
        old = await told_behind(daemon, 2, before["epoch"])

    assert new == [[(True, None, [6, 7])] * 5] * len(offsets)
    assert old == [(False, "epoch", [6, 7])] * 5


async def test_new_epoch_of_the_log_is_no_want_of_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the log loses its end meanwhile, the topic has nothing of before, and that is said."""
    log = MemoryLog()
    monkeypatch.setattr("clevrd.server.messaging.engine_of", lambda *_: MemoryEngine(log))
    async with running(journal_table={"directory": str(tmp_path / "journal")}) as daemon:
        for data in range(3):
            await daemon.publish("t", data)
        log.goes_on.clear()
        clearing = asyncio.create_task(clear(daemon, "t"))
        assert daemon.hub.journal is not None
        node = daemon.hub.journal.node
        await until(lambda: node.is_busy)
        log.lose(0, 1, "01")
        log.goes_on.set()
        status, answer = await clearing
        shown = await daemon.get_json("/topics/t")
        after = await daemon.publish("t", 3)

    assert (status, answer["success"]) == (200, True)
    assert (answer["epoch"], answer["offset"]) == (shown["epoch"], 0)
    assert (after["epoch"], after["offset"]) == (answer["epoch"], 1)


async def test_topic_beyond_the_bound_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log has a number of cleared topics at most; one that is cleared may be so again."""
    pytest.importorskip("apsw")
    monkeypatch.setattr(cleared_topics, "MAX_CLEARED", 1)
    async with running(journal_table={"directory": str(tmp_path / "journal")}) as daemon:
        for topic in ("t", "u"):
            await daemon.publish(topic, 1)
        first = await clear(daemon, "t")
        refused = await clear(daemon, "u")
        await daemon.publish("t", 2)
        again = await clear(daemon, "t")
        page = await daemon.get_json("/topics/u/messages?since=all")
        counted = daemon.hub.counters.refused["unavailable"]

    assert (first[0], again[0], again[1]["offset"]) == (200, 200, 2)
    assert (refused[0], refused[1]["code"], refused[1]["retryable"]) == (503, "unavailable", True)
    assert "as many cleared topics as it may have" in refused[1]["error"]
    assert kinds_of(page["messages"]) == [1]
    assert counted == 1


async def test_cleared_topic_stays_cleared_without_a_checkpoint(tmp_path: Path) -> None:
    """The record alone says it: a journal whose checkpoint is gone is read again."""
    pytest.importorskip("apsw")
    folder = tmp_path / "journal"
    table = {"directory": str(folder)}
    async with running(journal_table=table) as daemon:
        await daemon.publish("t", 1)
        _, answer = await clear(daemon, "t")
        await daemon.publish("t", 2)
    for path in folder.glob("checkpoint.db*"):
        path.unlink()
    async with running(journal_table=table) as daemon:
        page = await daemon.get_json("/topics/t/messages?since=all")

    assert (page["epoch"], kinds_of(page["messages"])) == (answer["epoch"], [2])
