"""GET /topics and below it: lists, figures and messages of topics, for who does not subscribe."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clients import client_of, publishing, subscribe
from daemons import Daemon, running, until
from http_wire import ask, get
from keys import READER, WEB, WRITER, access, bearer

from clevrd.http_values import Response
from clevrd.scheduling.fair_turns import FairTurns


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a running daemon."""
    async with running(ring_messages=100) as started:
        yield started


async def fill(daemon: Daemon, topic: str, count: int) -> str:
    """Publish ``count`` messages to ``topic`` and return its epoch."""
    async with publishing(daemon.port) as publisher:
        await publisher.send(topic, count)
    found: str = (await daemon.get_json(f"/topics/{topic}"))["epoch"]
    return found


async def asked(daemon: Daemon, path: str, **headers: str) -> tuple[int, Any, Any]:
    """GET ``path``; return the status, the header fields and the JSON, None without a body."""
    async with daemon.http.get(f"{daemon.url}{path}", headers=headers) as response:
        body = await response.read()
        return response.status, response.headers, json.loads(body) if body else None


def offsets_of(answer: dict[str, Any]) -> list[int]:
    """Return the offsets of an answer's messages."""
    return [message["offset"] for message in answer["messages"]]


# --- the list ------------------------------------------------------------------------------------


async def test_topics_are_listed_by_name_page_by_page(daemon: Daemon) -> None:
    """Each topic with a message is on one page, and a name that is only read is on none."""
    for name in ("b", "a", "d/e", "c"):
        await daemon.publish(name, 1)
    await daemon.publish("other", 1, **{"X-Tenant-ID": "acme"})
    async with subscribe(daemon.ws_url, "only-read"), subscribe(daemon.ws_url, "b"):
        first = await daemon.get_json("/topics?limit=3")
        second = await daemon.get_json(f"/topics?limit=3&after={first['next']}")

    assert [each["topic"] for each in first["topics"]] == ["a", "b", "c"]
    assert [each["subscribers"] for each in first["topics"]] == [0, 1, 0]
    assert [each["offset"] for each in first["topics"]] == [1, 1, 1]
    assert ([each["topic"] for each in second["topics"]], second["next"]) == (["d/e"], None)


async def test_list_holds_only_what_the_credential_may_subscribe_to() -> None:
    """Other names are not told, and who may subscribe to nothing gets 403."""
    async with running(access=access()) as daemon:
        for name in ("orders.eu", "news", "secret"):
            await daemon.publish(name, 1, **bearer(WRITER))
        web = await asked(daemon, "/topics", **bearer(WEB))
        reader = await asked(daemon, "/topics", **bearer(READER))
        writer = await asked(daemon, "/topics", **bearer(WRITER))
        nobody = await asked(daemon, "/topics")
        one = await asked(daemon, "/topics/secret", **bearer(WEB))
        messages = await asked(daemon, "/topics/secret/messages", **bearer(WEB))

    assert [each["topic"] for each in web[2]["topics"]] == ["news", "orders.eu"]
    assert [each["topic"] for each in reader[2]["topics"]] == ["news", "orders.eu", "secret"]
    assert (writer[0], writer[2]["code"]) == (403, "forbidden")
    assert (nobody[0], nobody[2]["code"]) == (401, "unauthorized")
    assert one[0] == messages[0] == 403


async def test_wrong_options_are_refused_each_with_a_sentence(daemon: Daemon) -> None:
    """A limit is one number from 1 to 1,000, wherever it stands; an id is no longer than it may."""
    limits = ("0", "1001", "-1", "x", "", "1&limit=2", "99999999999999999999", "%D9%A3")
    ids = {"": "empty", "x" * 129: "129 bytes", "a%00b": "control character"}
    wrong = {
        f"{path}?limit={limit}": "limit"
        for path in ("/topics", "/topics/t", "/topics/t/messages")
        for limit in limits
    }
    wrong |= {f"/subscribe?topic=t&poll=1&subscriber_id={each}": ids[each] for each in ids}

    for path, says in wrong.items():
        status, _, answer = await asked(daemon, path)
        assert (status, answer["code"]) == (400, "invalid_request"), path
        assert says in answer["error"], path


# --- one topic -----------------------------------------------------------------------------------


async def test_topic_tells_its_position_and_who_reads_it(daemon: Daemon) -> None:
    """Counts are of all readers; ids are of those that gave themselves one."""
    epoch = await fill(daemon, "t", 150)
    async with (
        subscribe(daemon.ws_url, "t", subscriber_id="ann") as first,
        subscribe(daemon.ws_url, "t", subscriber_id="ann"),
        subscribe(daemon.ws_url, "t"),
        client_of(f"{daemon.ws_url}/ws", subprotocols=["clevrd.v1"]) as many,
    ):
        await many.send('{"type":"subscribe","ref":1,"topic":"t","subscriber_id":"bob"}')
        await many.recv()
        there = await daemon.get_json("/topics/t")
        page = (await daemon.get_json("/topics/t?limit=1"))["presence"]
        following = (await daemon.get_json("/topics/t?limit=1&after=ann"))["presence"]
        await first.close()
        await until(lambda: daemon.hub.subscribers == 3)
        later = (await daemon.get_json("/topics/t"))["presence"]
        await many.send('{"type":"unsubscribe","topic":"t"}')
        await until(lambda: daemon.hub.subscribers == 2)
        last = (await daemon.get_json("/topics/t"))["presence"]
    await until(lambda: daemon.hub.subscribers == 0)

    assert (there["topic"], there["tenant_id"]) == ("t", "default-tenant")
    assert (there["epoch"], there["offset"], there["subscribers"]) == (epoch, 150, 4)
    assert (there["oldest_offset"], there["held_messages"]) == (51, 100)
    ann, bob = {"id": "ann", "connections": 2}, {"id": "bob", "connections": 1}
    assert there["presence"] == {"ids": [ann, bob], "count": 2, "next": None}
    assert page == {"ids": [ann], "count": 2, "next": "ann"}
    assert following == {"ids": [bob], "count": 2, "next": None}
    assert later["ids"] == [{"id": "ann", "connections": 1}, bob]
    assert last["ids"] == [{"id": "ann", "connections": 1}]
    ids = daemon.hub.subscriber_ids
    assert not ids.given
    assert not ids.of("default-tenant", "t")


async def test_many_ids_are_looked_at_in_turns(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right page is found in steps, as 100,000 ids in one would hold the loop up."""
    await daemon.publish("t", 1)
    names = [f"id{number:04}" for number in range(5_000)]
    slot = ("default-tenant", "t")
    daemon.hub.subscriber_ids._by_topic[slot] = dict.fromkeys(reversed(names), 1)
    steps = 0
    carry_out = FairTurns.carry_out

    def counted(turns: FairTurns, work: Generator[None, None, Response]) -> Awaitable[Response]:
        def steps_of() -> Generator[None, None, Response]:
            nonlocal steps
            while True:
                try:
                    next(work)
                except StopIteration as end:
                    answer: Response = end.value
                    return answer
                steps += 1
                yield

        return carry_out(turns, steps_of())

    monkeypatch.setattr(FairTurns, "carry_out", counted)

    page = (await daemon.get_json("/topics/t?limit=3&after=id2999"))["presence"]

    assert [each["id"] for each in page["ids"]] == names[3_000:3_003]
    assert (page["count"], page["next"]) == (5_000, "id3002")
    assert steps >= 5


async def test_pattern_brings_its_subscriber_into_each_topic(daemon: Daemon) -> None:
    """A subscriber of a pattern is present in every topic that matches, also in later ones."""
    await daemon.publish("news.a", 1)
    url = f"{daemon.ws_url}/subscribe?pattern=news.*&subscriber_id=ann&control=1"
    async with client_of(url) as reader:
        while json.loads(await reader.recv()).get("type") != "watching":
            pass
        await daemon.publish("news.b", 1)
        await reader.recv()
        present = [await daemon.get_json(f"/topics/news.{name}") for name in "ab"]

    assert [each["presence"]["ids"][0]["id"] for each in present] == ["ann", "ann"]


async def test_topic_that_is_only_read_is_there_while_it_is_read(daemon: Daemon) -> None:
    """Asking for a topic makes none."""
    async with subscribe(daemon.ws_url, "quiet"):
        read = await asked(daemon, "/topics/quiet")
    missing = [await asked(daemon, f"/topics/none{end}") for end in ("", "/messages?last=3")]

    assert (read[0], read[2]["offset"], read[2]["oldest_offset"]) == (200, 0, None)
    assert [(status, answer["code"]) for status, _, answer in missing] == [(404, "not_found")] * 2
    assert daemon.hub.topics.find("default-tenant", "none") is None


# --- names in paths ------------------------------------------------------------------------------


async def test_topic_is_found_by_its_percent_encoded_name(daemon: Daemon) -> None:
    """Every name that a topic can have can stand in a path."""
    for name in ("a/b", "ü", "a b", "50%", "*", "..", "x?y#z", "+", "messages"):
        await daemon.publish(name, name)
        path = "".join(f"%{byte:02X}" for byte in name.encode())

        answer = (await ask(daemon.port, get(f"/topics/{path}/messages"))).body

        assert [each["data"] for each in json.loads(answer)["messages"]] == [name]


async def test_path_that_names_no_topic_is_refused(daemon: Daemon) -> None:
    """Each has its status and a sentence, and nothing is guessed."""
    wrong = {
        400: ("", "%zz", "%", "%ff", "%00", "x" * 256, "%C2%80"),
        404: ("t/", "t/other", "t/messages/1", "a/b/messages", "t/messages/"),
    }
    for status, paths in wrong.items():
        for path in paths:
            answer = await ask(daemon.port, get(f"/topics/{path}"))

            assert answer.status == status, path
            assert json.loads(answer.body)["success"] is False


async def test_methods_of_a_topic_are_told(daemon: Daemon) -> None:
    """OPTIONS and 405 say what there is."""
    for method, status in (("OPTIONS", 204), ("PUT", 405)):
        answer = await ask(daemon.port, get("/topics/t/messages", method=method))

        assert answer.status == status
        assert answer.headers["allow"].startswith("GET, HEAD")


# --- messages ------------------------------------------------------------------------------------


async def test_messages_are_those_that_a_poll_has(daemon: Daemon) -> None:
    """Every way to say where to begin gives a poll's answer, byte for byte."""
    epoch = await fill(daemon, "t", 60)

    for query in ("last=5", f"offset=55&epoch={epoch}", "since=1h", "since=all"):
        read = await daemon.http.get(f"{daemon.url}/topics/t/messages?{query}&limit=1000")
        poll = await daemon.http.get(f"{daemon.url}/subscribe?topic=t&poll=1&timeout=0&{query}")
        assert await read.read() == await poll.read()
    newest = await daemon.get_json("/topics/t/messages?limit=3")
    oldest = await daemon.get_json("/topics/t/messages?last=5&limit=3")
    figures = await daemon.get_json("/metrics")

    assert offsets_of(newest) == [58, 59, 60]
    assert (offsets_of(oldest), oldest["offset"]) == ([56, 57, 58], 58)
    assert figures["messages"]["offered"] == figures["messages"]["delivered"]


async def test_missing_messages_are_told_and_a_position_ahead_is_refused(daemon: Daemon) -> None:
    """What the ring gave up is a gap; what is not there yet is a mistake."""
    epoch = await fill(daemon, "t", 150)

    lost = await daemon.get_json(f"/topics/t/messages?offset=20&epoch={epoch}&limit=2")
    ahead = await asked(daemon, f"/topics/t/messages?offset=151&epoch={epoch}")
    half = await asked(daemon, "/topics/t/messages?offset=1")
    both = await asked(daemon, f"/topics/t/messages?offset=1&epoch={epoch}&last=2")

    assert (lost["gap"]["from"], lost["gap"]["to"], offsets_of(lost)) == (21, 50, [51, 52])
    assert [each[0] for each in (ahead, half, both)] == [400, 400, 400]


async def test_full_page_behind_a_position_may_be_kept(daemon: Daemon) -> None:
    """A page that can't change has a tag; one that may grow, or begins elsewhere, has none."""
    epoch = await fill(daemon, "t", 60)
    path = f"/topics/t/messages?offset=10&epoch={epoch}&limit=20"

    status, fields, answer = await asked(daemon, path)
    again = await asked(daemon, path, **{"If-None-Match": f'"x", W/{fields["ETag"]}'})
    other = await asked(daemon, path, **{"If-None-Match": '"x"'})
    growing = [
        await asked(daemon, f"/topics/t/messages?{query}")
        for query in (f"offset=50&epoch={epoch}&limit=20", "since=all&limit=20", "last=20&limit=20")
    ]
    foreign = await asked(daemon, "/topics/t/messages?offset=10&epoch=before&limit=20")

    assert (status, offsets_of(answer)) == (200, list(range(11, 31)))
    assert fields["Cache-Control"] == "private, max-age=3600, immutable"
    assert "X-Tenant-ID" in fields["Vary"]
    assert (again[0], again[2], again[1]["ETag"]) == (304, None, fields["ETag"])
    assert other[0] == 200
    for each in (*growing, foreign):
        assert each[0] == 200
        assert (each[1]["Cache-Control"], "ETag" in each[1]) == ("no-store", False)


async def test_tag_is_of_one_tenant_and_one_topic(daemon: Daemon) -> None:
    """The same offsets elsewhere are another page."""
    tags = set()
    for tenant, topic in (("one", "t"), ("two", "t"), ("one", "u")):
        for data in range(3):
            await daemon.publish(topic, data, **{"X-Tenant-ID": tenant})
        head = {"X-Tenant-ID": tenant}
        _, _, whole = await asked(daemon, f"/topics/{topic}/messages", **head)
        path = f"/topics/{topic}/messages?offset=0&epoch={whole['epoch']}&limit=2"
        _, fields, answer = await asked(daemon, path, **head)
        assert [each["tenant_id"] for each in answer["messages"]] == [tenant] * 2
        tags.add(fields["ETag"])

    assert len(tags) == 3


async def test_head_reads_nothing(daemon: Daemon) -> None:
    """HEAD is answered as GET is, and no message counts as delivered."""
    await fill(daemon, "t", 5)

    async with daemon.http.head(f"{daemon.url}/topics/t/messages") as response:
        status = response.status
    figures = await daemon.get_json("/metrics")

    assert status == 200
    assert figures["messages"]["delivered"] == 0


# --- with a journal ------------------------------------------------------------------------------


async def test_journal_is_read_beyond_the_ring_and_after_a_restart(tmp_path: Path) -> None:
    """Pages reach from the history into the ring, and no topic is brought into use by asking."""
    pytest.importorskip("apsw")
    table = {"directory": str(tmp_path / "journal")}
    async with running(ring_messages=100, journal_table=table) as daemon:
        epoch = await fill(daemon, "t", 250)
        across = await daemon.get_json(f"/topics/t/messages?offset=140&epoch={epoch}&limit=50")
        first = await asked(daemon, f"/topics/t/messages?offset=0&epoch={epoch}&limit=10")
    async with running(ring_messages=100, journal_table=table) as daemon:
        listed = await daemon.get_json("/topics")
        shown = await daemon.get_json("/topics/t")
        again = await asked(daemon, f"/topics/t/messages?offset=0&epoch={epoch}&limit=10")
        newest = await daemon.get_json("/topics/t/messages?last=2")
        in_use = len(daemon.hub.topics)
        counted = daemon.hub.connection_counts

        await daemon.publish("t", "more")
        both = await daemon.get_json(f"/topics/t/messages?offset=248&epoch={epoch}")
        relisted = await daemon.get_json("/topics")

    assert offsets_of(across) == list(range(141, 191))
    assert (first[0], offsets_of(first[2])) == (200, list(range(1, 11)))
    assert (again[2], again[1]["ETag"]) == (first[2], first[1]["ETag"])
    assert (listed["topics"][0]["topic"], listed["topics"][0]["offset"]) == ("t", 250)
    assert (shown["offset"], shown["epoch"], shown["held_messages"]) == (250, epoch, 0)
    assert offsets_of(newest) == [249, 250]
    assert in_use == 0
    assert not counted._of_tenants.of("default-tenant")
    assert offsets_of(both) == [249, 250, 251]
    assert [each["offset"] for each in relisted["topics"]] == [251]


async def test_list_of_many_topics_is_made_in_steps(daemon: Daemon) -> None:
    """Thousands of topics are listed in pages, without holding the loop."""
    lines = b"\n".join(
        msgspec.json.encode({"topic": f"t{number:05d}", "data": 1}) for number in range(2_500)
    )
    async with daemon.http.post(f"{daemon.url}/publish/batch", data=lines) as response:
        assert response.status == 200
    names: list[str] = []
    after: str | None = ""
    while after is not None:
        page = await daemon.get_json(f"/topics?limit=1000&after={after}")
        names += [each["topic"] for each in page["topics"]]
        after = page["next"]
        await asyncio.sleep(0)

    assert names == [f"t{number:05d}" for number in range(2_500)]
