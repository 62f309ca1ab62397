"""Several topics and patterns over SSE, NDJSON and long-polls, over real sockets.

Every schedule of cuts is test_many_streams_model.py's; one topic is test_streams.py's and
test_poll.py's.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, quote

import httpx
import msgspec
import pytest
from clients import SMALL_BUFFERS, reset_by_peer
from daemons import Daemon, running, until
from fakes import FakeSink, totals_of
from http_wire import get, responses, talk
from httpx_sse import ServerSentEvent, aconnect_sse
from streams import EVENTS, LINES, Item, Stream, open_stream

from clevrd.connections.poll import POLLS_PER_TURN, Poll
from clevrd.connections.stream import EventIdSink
from clevrd.core.beginning import After
from clevrd.core.event_ids import EventIds
from clevrd.core.publish_request import PublishRequest
from clevrd.core.stream_forms import SLOTTED_MESSAGES, SSE, SSE_BARE, SlottedWrites
from clevrd.core.subscriber import Sink
from clevrd.errors import Unavailable
from clevrd.handlers.subscribe.endpoint import read_request
from clevrd.http_values import Request
from clevrd.hub import rounds
from clevrd.tenants import Tenant

FORMS = pytest.mark.parametrize("accept", [EVENTS, LINES])
VERSIONS = pytest.mark.parametrize("version", ["1.0", "1.1"])
TENANT = Tenant("default-tenant")
HANDSHAKE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a running daemon."""
    async with running() as started:
        yield started


def seen(items: list[Item]) -> list[tuple[str, int]]:
    """Return topic and offset of the messages among ``items``."""
    return [(item.json["topic"], item.json["offset"]) for item in items if not item.kind]


def kinds(items: list[Item]) -> list[str]:
    """Return what each item is, "" for a message."""
    return [item.kind for item in items]


async def until_seen(stream: Stream, topic: str, offset: int) -> list[Item]:
    """Return what comes up to the message of ``topic`` with ``offset``."""
    items = [await stream.item()]
    while (topic, offset) not in seen(items[-1:]):
        items.append(await stream.item())
    return items


async def poll(daemon: Daemon, query: str) -> dict[str, Any]:
    """Return the answer to a poll."""
    return await daemon.get_json(f"/subscribe?poll=1&{query}")


def assert_conserved(figures: dict[str, Any]) -> None:
    """Fail unless every message offered is accounted for."""
    sums = figures["messages"]
    lost = sum(sums["dropped"].values())
    assert sums["offered"] == sums["delivered"] + lost + sums["discarded"] + sums["queued"]


# --- streams -------------------------------------------------------------------------------------


@FORMS
@VERSIONS
async def test_one_stream_has_several_topics(daemon: Daemon, accept: str, version: str) -> None:
    """As over WebSocket: each with its greeting and its past, then what comes to any of them."""
    await daemon.publish("a", 1)
    query = "topic=a&topic=b&control=1"

    async with await open_stream(daemon.port, accept, query, version=version) as stream:
        begin = await stream.items(3)
        await daemon.publish("b", 1)
        await daemon.publish("a", 2)
        live = await stream.items(2)

    assert kinds(begin) == ["subscribed", "", "subscribed"]
    assert seen(begin) == [("a", 1)]
    assert seen(live) == [("b", 1), ("a", 2)]


@FORMS
async def test_stream_has_what_a_pattern_matches(daemon: Daemon, accept: str) -> None:
    """Topics that are, word that these are all, and topics that come."""
    await daemon.publish("orders.eu", 1)

    async with await open_stream(daemon.port, accept, "pattern=orders.*&control=1") as stream:
        found = await stream.items(3)
        await daemon.publish("orders.us", 1)
        await daemon.publish("other", 1)
        await daemon.publish("orders.eu", 2)
        later = await stream.items(3)

    assert kinds(found) == ["subscribed", "", "watching"]
    assert [item.json["pattern"] for item in found if item.kind] == ["orders.*", "orders.*"]
    assert kinds(later) == ["subscribed", "", ""]
    assert seen(found + later) == [("orders.eu", 1), ("orders.us", 1), ("orders.eu", 2)]


async def test_lines_without_control_frames_are_messages_only(daemon: Daemon) -> None:
    """A pipe into jq tells the topics apart by `topic`."""
    await daemon.publish("p.1", 1)

    async with await open_stream(daemon.port, LINES, "topic=a&pattern=p.*") as stream:
        first = await stream.item()
        await daemon.publish("a", 1)
        second = await stream.item()

    assert seen([first, second]) == [("p.1", 1), ("a", 1)]


async def test_each_id_is_a_place_to_come_back_to(daemon: Daemon) -> None:
    """Whichever event was read last, an EventSource gets what followed it, of every topic."""
    for number in range(3):
        for topic in ("a", "p.1", "b", "p.2"):
            await daemon.publish(topic, number)
    query = "topic=a&topic=b&pattern=p.*"
    async with await open_stream(daemon.port, EVENTS, query) as stream:
        events = await stream.items(4 + 12 + 1)
    everything = set(seen(events))

    for cut in range(1, len(events) + 1):
        had, last_id = set(seen(events[:cut])), events[cut - 1].id
        header = f"Last-Event-ID: {last_id}"
        async with await open_stream(daemon.port, EVENTS, query, header) as again:
            rest = seen(await again.items(4 + 12 - len(had) + 1))

        assert had | set(rest) == everything
        assert not had & set(rest)
    assert len(everything) == 12


async def test_httpx_sse_reads_several_topics_across_a_cut(daemon: Daemon) -> None:
    """A client that this project did not write, which knows nothing of what an id holds."""
    last_id = ""
    heard: list[ServerSentEvent] = []
    for count in (3, 4, 5):
        for topic in ("a", "b"):
            await daemon.publish(topic, count)
        headers = {"Last-Event-ID": last_id} if last_id else {}
        url = f"{daemon.url}/subscribe?topic=a&topic=b"
        async with (
            httpx.AsyncClient(trust_env=False) as client,
            aconnect_sse(client, "GET", url, headers=headers) as source,
        ):
            async for event in source.aiter_sse():
                heard.append(event)
                last_id = event.id
                if event.event == "message" and len(messages(heard)) == count - 2:
                    break
    for topic in ("a", "b"):
        await daemon.publish(topic, 0)
    url = f"/subscribe?poll=1&topic=a&topic=b&last_event_id={last_id}"
    rest = (await daemon.get_json(url))["messages"]

    had = [(each["topic"], each["offset"]) for each in (*messages(heard), *rest)]
    assert sorted(had) == sorted((topic, offset) for topic in "ab" for offset in (1, 2, 3, 4))


def messages(events: list[ServerSentEvent]) -> list[dict[str, Any]]:
    """Return the messages among events."""
    return [json.loads(event.data) for event in events if event.event == "message"]


async def test_topic_that_began_anew_is_told_and_one_that_began_is_read_from_its_start() -> None:
    """What an EventSource knew is told as lost when it comes back in a new life."""
    async with running() as before:
        await before.publish("p.1", 1)
        async with await open_stream(before.port, EVENTS, "pattern=p.*&last=0") as stream:
            *_, watching = await stream.items(2)
    assert watching.kind == "watching"

    async with running() as daemon:
        for topic, count in (("p.1", 2), ("p.2", 3)):
            for number in range(count):
                await daemon.publish(topic, number)
        header = f"Last-Event-ID: {watching.id}"
        query = "pattern=p.*&last=0"
        async with await open_stream(daemon.port, EVENTS, query, header) as stream:
            items = await stream.items(9)

    gaps = [item.json for item in items if item.kind == "gap"]
    assert [(gap["topic"], gap["reason"]) for gap in gaps] == [("p.1", "epoch")]
    assert sorted(seen(items)) == [("p.1", 1), ("p.1", 2), ("p.2", 1), ("p.2", 2), ("p.2", 3)]


async def test_topic_that_is_gone_stays_in_the_ids_until_it_is_back() -> None:
    """Two daemons later it is still known that something of it was missed."""
    ids = ["f00d:7@p.1,*"]
    for _ in range(2):
        header = f"Last-Event-ID: {ids[0]}"
        async with (
            running() as daemon,
            await open_stream(daemon.port, EVENTS, "pattern=p.*", header) as stream,
        ):
            watching = await stream.item()
            await daemon.publish("p.2", 1)
            ids = [str(item.id) for item in (watching, *await stream.items(2))]

    assert ids[0] == "f00d:7@p.1,*"
    assert all("f00d:7@p.1" in text for text in ids)


async def test_topics_that_give_way_in_the_ids_are_told_as_lost(daemon: Daemon) -> None:
    """There is no room to remember them, but that is no reason to lose them in silence."""
    gone = [f"p.{number:040}" for number in range(50)]
    last_id = ",".join([*(f"0123abcd:7@{name}" for name in gone), "*"])
    header = f"Last-Event-ID: {last_id}"
    for number in range(20):
        await daemon.publish(f"p.new{number:036}", 1)

    async with await open_stream(daemon.port, EVENTS, "pattern=p.*", header) as stream:
        items = [await stream.item()]
        while items[-1].kind != "watching":
            items.append(await stream.item())
    answer = await poll(daemon, f"pattern=p.*&last_event_id={quote(last_id)}")

    told = [item.json["topic"] for item in items if item.kind == "gap"]
    assert {item.json["reason"] for item in items if item.kind == "gap"} == {"epoch"}
    assert 0 < len(told) < 30
    assert told == gone[: len(told)]
    assert all(name in str(items[-1].id) for name in gone[len(told) :])
    assert not any(name in str(items[-1].id) for name in told)
    assert len(seen(items)) == len(answer["messages"]) == 20
    assert [gap["topic"] for gap in answer["gaps"]] == told


async def test_topic_that_was_forgotten_is_in_no_id() -> None:
    """All of it was given, so who comes back is told of no gap."""
    async with (
        running(topic_idle_s=0.1) as daemon,
        await open_stream(daemon.port, EVENTS, "topic=a&pattern=p.*") as stream,
    ):
        await stream.items(2)
        await daemon.publish("p.1", 1)
        _, known = await stream.items(2)
        gone = await stream.item()
        await daemon.publish("a", 1)
        after = await stream.item()

    assert (gone.kind, gone.json["topic"], gone.json["offset"]) == ("forgotten", "p.1", 1)
    assert "@p.1" in str(known.id)
    assert "@p.1" not in str(gone.id)
    assert "@p.1" not in str(after.id)


async def test_reader_of_events_takes_many_messages_in_parts(daemon: Daemon) -> None:
    """A burst, live or behind, comes whole and in order, each write of a bounded number of ids."""
    count = 5 * SLOTTED_MESSAGES + 7
    body = b'{"topic":"a","data":1}\n' * count
    query = "topic=a&topic=b&last=1000"
    async with await open_stream(daemon.port, EVENTS, query) as live:
        await live.items(2)
        for _ in range(2):
            async with daemon.http.post(f"{daemon.url}/publish/batch", data=body) as response:
                assert response.status == 200
        burst = await live.items(2 * count)
        async with await open_stream(daemon.port, EVENTS, query) as late:
            past = await late.items(2 * count + 2)

    assert seen(burst) == [("a", offset) for offset in range(1, 2 * count + 1)]
    assert seen(past) == seen(burst)
    assert set(str(burst[-1].id).split(",")) == set(str(past[-1].id).split(","))


async def test_readers_at_the_same_places_are_written_the_same_object(daemon: Daemon) -> None:
    """Who is elsewhere, in another topic or form of response, gets its own; nothing is mixed up."""
    queries = ["topic=a&topic=b"] * 3 + ["topic=b&topic=a"]
    writes = SlottedWrites()
    written: list[list[bytes]] = []
    sinks: list[Sink] = []
    for number, query in enumerate(queries):
        names = [field.removeprefix("topic=") for field in query.split("&")]
        ids = EventIds(dict.fromkeys(names, After(0, "e")), {}, has_found_all=False)
        sink = FakeSink()
        form = SSE if number == 2 else SSE_BARE
        topic = daemon.hub.topic(TENANT, "a")
        sinks.append(EventIdSink(sink, form, ids.add(topic.name, topic.epoch), writes))
        sinks[-1].write(b"id: e:2\0\ndata: 1\n\n")
        written.append(sink.writes)
    for each in sinks:
        each.write(b"id: e:3\0\ndata: 1\n\n")

    same, also, chunked, other = (writes[-1] for writes in written)
    assert same is also
    assert same == b"id: e:3/0,e:0/1\ndata: 1\n\n"
    assert chunked == SSE.framed(same)
    assert other == b"id: e:3/1,e:0/0\ndata: 1\n\n"


async def test_parts_of_a_round_take_turns_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts times readers are no more writes in one turn of the loop than a slice has."""
    monkeypatch.setattr(rounds, "WRITES_PER_SLICE", 5)
    async with running() as daemon, AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(
                await open_stream(daemon.port, EVENTS, f"topic=a&topic=b{number}")
            )
            for number in range(4)
        ]
        for stream in streams:
            await stream.items(2)
        topic = daemon.hub.topic(TENANT, "a")
        for number in range(3 * SLOTTED_MESSAGES):
            daemon.hub.publish(topic, PublishRequest("a", msgspec.Raw(b"%d" % number)))
        delivered = []
        while topic.pending or topic in daemon.hub.delivery.rounds.running:
            await asyncio.sleep(0)
            delivered.append(topic.delivered)
        items = [await stream.items(3 * SLOTTED_MESSAGES) for stream in streams]

    steps = [after - before for before, after in pairwise([0, *delivered])]
    assert max(steps) == 5 * SLOTTED_MESSAGES
    assert sum(steps) == 4 * 3 * SLOTTED_MESSAGES
    for each in items:
        assert seen(each) == [("a", offset) for offset in range(1, 3 * SLOTTED_MESSAGES + 1)]


@FORMS
@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "latest"])
async def test_stalled_stream_lags_in_all_its_topics_and_is_told_in_each(
    accept: str, policy: str
) -> None:
    """What one transport holds up, it holds up for all; each topic counts and tells its own."""
    query = f"topic=a&topic=b&policy={policy}&buffer=20&control=1"
    async with (
        running(**SMALL_BUFFERS) as daemon,
        await open_stream(daemon.port, accept, query, receive_bytes=4096) as stream,
    ):
        for number in range(400):
            for topic in ("a", "b"):
                await daemon.publish(topic, "x" * 200 + str(number))
        (connection,) = daemon.server.connections._open
        unsent_bytes = connection.transport.get_write_buffer_size()
        # Who has enough to take needs no sign of life.
        connection.ping()
        assert connection.transport.get_write_buffer_size() == unsent_bytes > 0
        reading = asyncio.gather(read_until_whole(stream, 401))
        await until(lambda: all(topic.live for topic in daemon.hub.topics))
        for topic in ("a", "b"):
            await daemon.publish(topic, 1)
        ((have, lost),) = await reading
        figures = await daemon.get_json("/metrics")

    for topic in ("a", "b"):
        assert sorted(have[topic] + lost[topic]) == list(range(1, 402))
        assert have[topic] == sorted(have[topic])
        assert len(lost[topic]) > 100
    assert sum(figures["messages"]["dropped"].values()) == sum(map(len, lost.values()))
    assert_conserved(figures)


async def read_until_whole(
    stream: Stream, upto: int
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Read both topics up to ``upto``; return by topic which offsets came and were told lost."""
    have: dict[str, list[int]] = {"a": [], "b": []}
    lost: dict[str, list[int]] = {"a": [], "b": []}
    while any(upto not in offsets for offsets in have.values()):
        item = await stream.item()
        if item.kind == "gap":
            lost[item.json["topic"]] += range(item.json["from"], item.json["to"] + 1)
        elif not item.kind:
            have[item.json["topic"]].append(item.json["offset"])
    return have, lost


async def test_more_topics_than_may_be_are_told(daemon: Daemon) -> None:
    """Nothing that matches is left out in silence: an error, or for plain lines an end."""
    async with (
        running(max_topics_per_connection=3) as small,
        await open_stream(small.port, EVENTS, "pattern=p.*") as events,
        await open_stream(small.port, LINES, "pattern=p.*") as lines,
    ):
        await events.item()
        for number in range(4):
            await small.publish(f"p.{number}", 1)
        heard = await events.items(5)
        plain = await lines.to_the_end()
        await small.publish("p.0", 2)
        goes_on = await events.item()

    assert (heard[-1].kind, heard[-1].json["code"]) == ("error", "invalid_request")
    assert (plain[-1].kind, plain[-1].json["code"]) == ("error", "too_many_topics")
    assert goes_on.json["offset"] == 2


async def test_ids_that_would_become_too_long_are_told(daemon: Daemon) -> None:
    """A pattern that matches more than an id has room for says so; the others go on."""
    async with await open_stream(daemon.port, EVENTS, "pattern=p.*") as stream:
        await stream.item()
        for number in range(30):
            await daemon.publish(f"p.{number:0200}", 1)
        items = [await stream.item()]
        while items[-1].kind != "error":
            items.append(await stream.item())
        await daemon.publish(f"p.{0:0200}", 2)
        goes_on = await stream.item()
        header = f"Last-Event-ID: {goes_on.id}"
        async with await open_stream(daemon.port, EVENTS, "pattern=p.*", header) as again:
            greeting = await again.item()

    assert "over /ws" in items[-1].json["error"]
    assert 10 < len(seen(items)) < 30
    assert goes_on.json["offset"] == 2
    assert greeting.json["recovered"] is True


async def test_going_away_has_the_position_of_every_topic() -> None:
    """Of lines that asked for control frames, and of all events."""
    async with (
        running() as daemon,
        await open_stream(daemon.port, EVENTS, "topic=a&topic=b") as events,
        await open_stream(daemon.port, LINES, "topic=a&topic=b&control=1") as lines,
    ):
        await events.items(2)
        await lines.items(2)
        await daemon.publish("a", 1)
        stopping = asyncio.create_task(daemon.server.stop())
        ends = [(await each.to_the_end())[-1] for each in (events, lines)]
        await stopping

    for end in ends:
        assert end.kind == "going_away"
        offsets = {topic: at["offset"] for topic, at in end.json["positions"].items()}
        assert offsets == {"a": 1, "b": 0}


@FORMS
async def test_everything_is_let_go_when_a_stream_ends(daemon: Daemon, accept: str) -> None:
    """Readers and patterns of a connection that is gone are gone with it."""
    async with await open_stream(daemon.port, accept, "topic=a&pattern=p.*") as _:
        await daemon.publish("p.1", 1)
        await until(lambda: daemon.hub.subscribers == 2)
        assert len(daemon.hub.patterns) == 1

    await until(lambda: daemon.hub.subscribers == 0)
    assert len(daemon.hub.patterns) == 0


# An id that is not of the URL's, and what is wrong with it.
FOREIGN = pytest.mark.parametrize(
    ("query", "last_id", "words"),
    [
        ("topic=a&topic=b", "e:1/2", "is of 3 topics or more"),
        ("topic=a&topic=b", "e:1@c", "which is not asked for"),
        ("pattern=p.*", "e:1@q.1,*", "which is not asked for"),
        ("pattern=p.*", "e:1", "can't resume by a position here"),
        ("topic=a&topic=b", "e:1", "has 1 values for 2 topics"),
        ("topic=a&topic=b", "e:1/0,e:2", "does not say whose"),
        ("topic=a", "e:1/0,e:2/1", "is of 2 topics or more"),
        ("topic=a", "e:1/0,e:2@a", "two positions of 'a'"),
        ("topic=a&topic=b", "e:1@" + "x" * 6_000, "longer than any"),
        ("topic=a&pattern=p.*", "e:1@p.\xff", "not ASCII"),
        ("topic=a&pattern=p.*", "e:1@p.\udcff", "not ASCII"),
        ("topic=a", "42", "must be epoch:offset"),
        ("topic=a", "e:" + "9" * 19, "must be epoch:offset"),
        ("topic=a&topic=b", "\udcff\udcfe", "has 1 values"),
        ("topic=a", "x" * 8_000, "must be epoch:offset"),
    ],
)


@FOREIGN
@pytest.mark.parametrize("transport", ["lines", "poll", "poll of events", "socket"])
async def test_id_of_another_url_is_a_400(
    daemon: Daemon, transport: str, query: str, last_id: str, words: str
) -> None:
    """It is not guessed what was meant, and no topic is made of it."""
    header = f"Last-Event-ID: {last_id}"
    asked = f"/subscribe?{query}"
    request = {
        "lines": get(asked, f"Accept: {LINES}", header),
        "poll": get(f"{asked}&poll=1", header),
        "poll of events": get(f"{asked}&poll=1", f"Accept: {EVENTS}", header),
        "socket": get(asked, header, *HANDSHAKE),
    }[transport]

    (answer,) = responses(await talk(daemon.port, [request], shut=True))

    assert (answer.status, answer.code) == (400, "invalid_request")
    assert words in answer.json["error"]
    assert len(daemon.hub.topics) == 0


@FOREIGN
async def test_event_source_with_a_foreign_id_is_told_a_gap(
    daemon: Daemon, query: str, last_id: str, words: str
) -> None:
    """It sends the id again whatever it is answered, and after a 400 it would never come back."""
    named = parse_qs(query)
    names = [*named.get("topic", []), *(["p.1"] if "pattern" in named else [])]
    for name in names:
        await daemon.publish(name, 1)
        await daemon.publish(name, 2)
    header = f"Last-Event-ID: {last_id}"

    async with await open_stream(daemon.port, EVENTS, query, header) as stream:
        items = await stream.items(4 * len(names))

    assert sorted(seen(items)) == [(name, offset) for name in names for offset in (1, 2)]
    gaps = [item.json for item in items if item.kind == "gap"]
    assert sorted(gap["topic"] for gap in gaps) == names
    assert {gap["reason"] for gap in gaps} == {"epoch"}
    assert not any(item.json["recovered"] for item in items if item.kind == "subscribed")


async def test_what_follows_a_foreign_id_resumes_whole(daemon: Daemon) -> None:
    """The ids of the stream that it gets are its own again; also that of the first event."""
    for name in ("a", "b", "p.1"):
        await daemon.publish(name, 1)
    query = "topic=a&topic=b&pattern=p.*"
    async with await open_stream(daemon.port, EVENTS, query, "Last-Event-ID: zzz") as stream:
        items = await stream.items(10)
    last_id = items[-1].id
    await daemon.publish("b", 2)
    await daemon.publish("p.2", 1)

    async with await open_stream(daemon.port, EVENTS, query, f"Last-Event-ID: {last_id}") as stream:
        items = await stream.items(6)

    assert sorted(seen(items)) == [("b", 2), ("p.2", 1)]
    assert [item.kind for item in items].count("gap") == 0


async def test_cut_while_a_foreign_id_is_told_it_is_told_again(daemon: Daemon) -> None:
    """A topic that has not begun yet is in the ids with the position that nobody knows."""
    await daemon.publish("a", 1)
    await daemon.publish("b", 1)
    query = "topic=a&topic=b"
    async with await open_stream(daemon.port, EVENTS, query, "Last-Event-ID: zzz") as stream:
        first_id = next(item.id for item in await stream.items(6) if item.id)

    async with await open_stream(
        daemon.port, EVENTS, query, f"Last-Event-ID: {first_id}"
    ) as stream:
        items = await stream.items(5)

    assert [item.json["topic"] for item in items if item.kind == "gap"] == ["b"]
    assert sorted(seen(items)) == [("a", 1), ("b", 1)]


@pytest.mark.parametrize("accept", [EVENTS, LINES])
async def test_offset_ahead_in_one_of_several_topics(daemon: Daemon, accept: str) -> None:
    """What was never published can't have been received: a 400, but to an EventSource a gap."""
    epoch = (await daemon.publish("a", 1))["epoch"]
    header = f"Last-Event-ID: {epoch}:2/1"

    if accept == LINES:
        request = get("/subscribe?topic=b&topic=a", f"Accept: {accept}", header)
        (answer,) = responses(await talk(daemon.port, [request], shut=True))
        assert answer.status == 400
        assert "ahead of the topic" in answer.json["error"]
        return
    async with await open_stream(daemon.port, EVENTS, "topic=b&topic=a", header) as stream:
        items = await stream.items(4)

    assert [item.json["topic"] for item in items if item.kind == "gap"] == ["a"]
    assert seen(items) == [("a", 1)]


async def test_url_of_an_id_may_say_where_other_topics_begin(daemon: Daemon) -> None:
    """So that it stays the same; also for a client that puts its id into the URL."""
    for number in range(3):
        for topic in ("a", "b", "p.1"):
            await daemon.publish(topic, number)
    epoch = daemon.hub.topic(TENANT, "a").epoch
    query = f"topic=a&topic=b&pattern=p.*&last=1&lastEventId={quote(f'{epoch}:1/0')}"

    answer = await poll(daemon, query)
    async with await open_stream(daemon.port, EVENTS, query) as stream:
        items = await stream.items(8)

    found = [(each["topic"], each["offset"]) for each in answer["messages"]]
    assert sorted(found) == [("a", 2), ("a", 3), ("b", 3), ("p.1", 3)]
    assert sorted(seen(items)) == sorted(found)


async def test_single_position_in_the_url_wins_for_who_reads_events(daemon: Daemon) -> None:
    """As the header does: some clients put it there when they come back."""
    epoch = (await daemon.publish("a", 1))["epoch"]
    await daemon.publish("a", 2)

    query = f"topic=a&last=0&lastEventId={epoch}:1"
    async with await open_stream(daemon.port, EVENTS, query) as stream:
        items = await stream.items(2)

    assert seen(items) == [("a", 2)]


async def test_nothing_follows_the_end_of_a_stream() -> None:
    """One pattern has ended it in the beginning; the next one is not begun."""
    async with running(max_topics_per_connection=3) as daemon:
        for pattern in ("p", "q"):
            for number in range(5):
                await daemon.publish(f"{pattern}.{number}", 1)
        query = "pattern=p.*&pattern=q.*"
        async with await open_stream(daemon.port, LINES, query) as lines:
            items = await lines.to_the_end()
        url = f"{daemon.url}/subscribe?{query}"
        async with daemon.http.ws_connect(url) as socket:
            frames = [frame async for frame in socket]
        assert (daemon.hub.subscribers, len(daemon.hub.patterns)) == (0, 0)
        assert totals_of(daemon.hub.topics).delivered == len(seen(items)) + len(frames)

    assert items[-1].json["code"] == "too_many_topics"
    assert lines.is_whole
    assert {topic[0] for topic, _ in seen(items)} == {"p"}
    assert {json.loads(frame.data)["topic"][0] for frame in frames} == {"p"}
    assert socket.close_code == 1013


async def test_position_that_a_matched_topic_has_not_reached_is_told_as_such(
    daemon: Daemon,
) -> None:
    """It is not that there were too many, and coming back with the same is of no use.

    An EventSource comes back with the same, so it is told a gap and goes on.
    """
    epoch = (await daemon.publish("p.1", 1))["epoch"]
    query = f"pattern=p.*&last_event_id={quote(f'{epoch}:7@p.1,*')}"

    async with await open_stream(daemon.port, LINES, f"{query}&control=1") as told_lines:
        told, *_ = await told_lines.items(2)
    async with await open_stream(daemon.port, LINES, query) as lines:
        *_, last = await lines.to_the_end()
    async with await open_stream(daemon.port, EVENTS, query) as events:
        greeting, gap, first, _ = await events.items(4)
    async with daemon.http.ws_connect(f"{daemon.url}/subscribe?{query}") as socket:
        frames = [frame async for frame in socket]

    for each in (told, last):
        assert (each.kind, each.json["code"]) == ("error", "invalid_request")
        assert "ahead of the topic" in each.json["error"]
        assert each.json["retryable"] is False
    assert (frames, socket.close_code) == ([], 4004)
    assert (greeting.kind, gap.kind, gap.json["reason"]) == ("subscribed", "gap", "epoch")
    assert first.json["offset"] == 1


async def test_id_resumes_a_websocket_as_well(daemon: Daemon) -> None:
    """One position for all transports, patterns included."""
    for topic in ("a", "p.1"):
        await daemon.publish(topic, 1)
    query = "topic=a&pattern=p.*"
    async with await open_stream(daemon.port, EVENTS, query) as stream:
        last_id = (await stream.items(5))[-1].id
    for topic in ("a", "p.1", "p.2"):
        await daemon.publish(topic, 2)

    url = f"{daemon.url}/subscribe?{query}&control=1&last_event_id={quote(str(last_id))}"
    async with daemon.http.ws_connect(url) as socket:
        frames = [json.loads((await socket.receive()).data) for _ in range(7)]

    assert sorted((f["topic"], f["offset"]) for f in frames if "id" in f) == [
        ("a", 2),
        ("p.1", 2),
        ("p.2", 1),
    ]
    assert all(f["recovered"] for f in frames if f.get("type") == "subscribed")


# --- polls ---------------------------------------------------------------------------------------


async def test_poll_of_several_topics_has_them_in_the_order_of_time(daemon: Daemon) -> None:
    """With a position for each, and one word that says them all."""
    for number in range(3):
        for topic in ("a", "p.1"):
            await daemon.publish(topic, number)

    answer = await poll(daemon, "topic=a&topic=b&pattern=p.*&last=2")

    found = [(each["topic"], each["offset"]) for each in answer["messages"]]
    assert found == [("a", 2), ("p.1", 2), ("a", 3), ("p.1", 3)]
    assert {name: at["offset"] for name, at in answer["positions"].items()} == {
        "a": 3,
        "b": 0,
        "p.1": 3,
    }
    assert (answer["recovered"], answer["gaps"]) == (False, [])


async def test_poll_of_several_topics_says_whether_it_has_everything(daemon: Daemon) -> None:
    """Where every topic was resumed and none of them lacks anything; a single gap is a no."""
    epochs = [(await daemon.publish(topic, 1))["epoch"] for topic in ("a", "p.1")]
    for topic in ("a", "p.1"):
        await daemon.publish(topic, 2)
    a, p = epochs
    query = "topic=a&pattern=p.*&timeout=0"

    answers = {
        last_id: await poll(daemon, f"{query}&last_event_id={quote(last_id)}")
        for last_id in (
            f"{a}:1/0,{p}:1@p.1,*",
            f"{a}:2/0,{p}:2@p.1,*",
            f"old:1/0,{p}:1@p.1,*",
            f"{a}:1/0,old:1@p.1,*",
        )
    }
    waiting = await poll(daemon, f"{query}&last_event_id={quote(f'{a}:2/0,{p}:2@p.1,*')}&last=0")
    anew = [await poll(daemon, f"{query}&last={last}") for last in (0, 2)]
    pairs = f"topic=a&offset=1&epoch={a}&topic=p.1&offset=1&epoch={p}"
    by_pairs = await poll(daemon, pairs)
    # Patterns that match nothing: it has everything where that is known from before.
    empty = [
        await poll(daemon, f"pattern=q.*&timeout=0{more}") for more in ("", "&last_event_id=*")
    ]

    assert [each["recovered"] for each in answers.values()] == [True, True, False, False]
    assert [len(each["messages"]) for each in answers.values()] == [2, 0, 3, 3]
    assert [len(each["gaps"]) for each in answers.values()] == [0, 0, 1, 1]
    assert (waiting["recovered"], [each["recovered"] for each in anew]) == (True, [False, False])
    assert (by_pairs["recovered"], len(by_pairs["messages"])) == (True, 2)
    assert [each["recovered"] for each in empty] == [False, True]


async def test_polls_one_after_the_other_miss_nothing_in_any_topic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While publishers push on, topics begin, and answers hold only a part."""
    monkeypatch.setattr("clevrd.connections.poll.POLL_MAX_MESSAGES", 7)
    topics = ("a", "b", "p.1", "p.2")
    async with running(catch_up_messages=0) as daemon:

        async def push() -> None:
            for number in range(60):
                for topic in topics[: 2 + number // 20]:
                    await daemon.publish(topic, number)

        query, had = "topic=a&topic=b&pattern=p.*", []
        answer = await poll(daemon, f"{query}&timeout=0")
        pushing = asyncio.create_task(push())
        while not pushing.done() or answer["messages"]:
            had += [(each["topic"], each["offset"]) for each in answer["messages"]]
            assert answer["gaps"] == []
            assert len(answer["messages"]) <= 7
            last_id = quote(answer["last_event_id"])
            timeout = 0 if pushing.done() else 2
            answer = await poll(daemon, f"{query}&last_event_id={last_id}&timeout={timeout}")
        figures = await daemon.get_json("/metrics")

    counts = {"a": 60, "b": 60, "p.1": 40, "p.2": 20}
    for topic, count in counts.items():
        assert [offset for name, offset in had if name == topic] == list(range(1, count + 1))
    assert_conserved(figures)
    assert figures["messages"]["delivered"] == sum(counts.values())


async def test_poll_waits_for_any_of_its_topics_and_for_one_that_begins(daemon: Daemon) -> None:
    """It is a subscriber of each until it is answered, by the first of them."""
    await daemon.publish("p.1", 1)
    for topic in ("b", "p.1", "p.new"):
        waiter = asyncio.create_task(poll(daemon, "topic=a&topic=b&pattern=p.*&last=0"))
        await until(lambda: daemon.hub.subscribers >= 3)

        await daemon.publish(topic, 1)
        answer = await waiter

        assert [each["topic"] for each in answer["messages"]] == [topic]
        assert len(daemon.polls) == daemon.hub.subscribers == len(daemon.hub.patterns) == 0


async def test_poll_has_all_of_one_turn_in_the_order_of_time(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is published together to several topics is one answer."""
    # However slow the machine, the batch is worked off in one turn.
    monkeypatch.setattr("clevrd.scheduling.fair_turns.SHARE_S", 10.0)
    waiter = asyncio.create_task(poll(daemon, "topic=a&topic=b&last=0"))
    await until(lambda: daemon.hub.subscribers == 2)

    body = b"".join(b'{"topic":"%c","data":1}\n' % topic for topic in b"abbaab")
    async with daemon.http.post(f"{daemon.url}/publish/batch", data=body) as response:
        assert response.status == 200
    answer = await waiter

    assert "".join(each["topic"] for each in answer["messages"]) == "abbaab"


async def test_poll_tells_gaps_at_once(daemon: Daemon) -> None:
    """Of each topic, with where to go on; of one that comes back while it waits, too."""
    async with asyncio.timeout(10):
        lost = await poll(daemon, "topic=a&topic=b&last_event_id=old:4/0,old:2/1&timeout=60")
        known = quote("old:4@p.1,*")
        waiter = asyncio.create_task(poll(daemon, f"pattern=p.*&last_event_id={known}&timeout=60"))
        await until(lambda: len(daemon.hub.patterns) == 1)
        await daemon.publish("p.1", 1)
        back = await waiter

    assert [(gap["topic"], gap["reason"]) for gap in lost["gaps"]] == [
        ("a", "epoch"),
        ("b", "epoch"),
    ]
    assert lost["messages"] == []
    assert [(gap["topic"], gap["reason"]) for gap in back["gaps"]] == [("p.1", "epoch")]


@pytest.mark.parametrize("seconds", ["0", "0.05"])
async def test_poll_that_ends_without_a_message_keeps_its_place(
    daemon: Daemon, seconds: str
) -> None:
    """Also of topics that are not there now."""
    epoch = (await daemon.publish("a", 1))["epoch"]
    last_id = f"{epoch}:1/0,old:4@p.1,*"

    answer = await poll(
        daemon, f"topic=a&pattern=p.*&last_event_id={quote(last_id)}&timeout={seconds}"
    )

    assert (answer["messages"], answer["gaps"]) == ([], [])
    assert set(answer["last_event_id"].split(",")) == set(last_id.split(","))
    assert daemon.hub.subscribers == 0


async def test_poll_that_is_cut_short_has_found_all_the_same(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time runs from the beginning, but where to go on is known only when all is found."""
    monkeypatch.setattr(daemon.hub.patterns.queue, "units_per_turn", 1)
    for number in range(20):
        for _ in range(3):
            await daemon.publish(f"p.{number}", 1)

    answer = await poll(daemon, "pattern=p.*&last=2&timeout=0.001")

    assert len(answer["messages"]) == 40
    assert len(answer["positions"]) == 20
    assert "*" in answer["last_event_id"].split(",")


async def test_topic_that_is_forgotten_while_a_poll_looks_is_found_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for in a life that has ended."""
    monkeypatch.setattr(daemon.hub.patterns.queue, "units_per_turn", 1)
    for number in range(20):
        await daemon.publish(f"p.{number}", 0)
    waiter = asyncio.create_task(poll(daemon, "topic=a&pattern=p.*&last=0"))
    await until(lambda: len(daemon.hub.patterns) == 1)
    for topic in daemon.hub.topics.evict_idle(1e12):
        daemon.hub.patterns.topic_forgotten(topic)
    await until(lambda: daemon.hub.subscribers == 1)

    await daemon.publish("p.0", 1)
    answer = await waiter

    assert [(each["topic"], each["offset"]) for each in answer["messages"]] == [("p.0", 1)]
    assert answer["gaps"] == []


async def test_poll_is_refused_whose_topic_was_forgotten_and_has_no_room_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not wait without an end for a search that could not be finished."""
    async with running(max_topics=21) as daemon:
        monkeypatch.setattr(daemon.hub.patterns.queue, "units_per_turn", 1)
        for number in range(20):
            await daemon.publish(f"p.{number}", 0)
        daemon.hub.topic(TENANT, "a")
        request = Request("GET", "/subscribe", {})
        query = {"topic": ["a"], "pattern": ["p.*"]}
        wanted = read_request(request, query, 0, 0, is_events=False, takes_any_id=False)

        answer = daemon.polls.answer_many(TENANT, wanted, 100, 60.0)
        for topic in daemon.hub.topics.evict_idle(1e12):
            daemon.hub.patterns.topic_forgotten(topic)
        for number in range(21):
            daemon.hub.topic(TENANT, f"other.{number}")
        async with asyncio.timeout(5.0):
            with pytest.raises(Unavailable):
                await answer

        assert len(daemon.polls) == len(daemon.hub.patterns) == 0


@pytest.mark.parametrize(("messages", "per_turn"), [(1, POLLS_PER_TURN), (500, 4)])
async def test_many_polls_are_answered_by_turns(
    daemon: Daemon, messages: int, per_turn: int
) -> None:
    """Messages for hundreds of them hold up nobody else."""
    request = Request("GET", "/subscribe", {})
    query = {"topic": ["a", "b"]}
    wanted = read_request(request, query, 0, 0, is_events=False, takes_any_id=False)
    topic = daemon.hub.topic(TENANT, "a")
    polls = [daemon.polls.answer_many(TENANT, wanted, 100, 60.0) for _ in range(3 * POLLS_PER_TURN)]
    for _ in range(messages):
        daemon.hub.publish(topic, PublishRequest("a", msgspec.Raw(b"1")))
    answered = [0]
    while answered[-1] < len(polls):
        await asyncio.sleep(0)
        answered.append(sum(each.done() for each in polls))

    assert max(after - before for before, after in pairwise(answered)) == per_turn
    assert daemon.hub.subscribers == 0


@pytest.mark.parametrize("query", ["topic=a", "topic=a&topic=b&pattern=p.*"])
async def test_poll_that_was_answered_is_gone(daemon: Daemon, query: str) -> None:
    """What it knew does not wait for the collector, which would stop the daemon for it."""
    waiter = asyncio.create_task(poll(daemon, f"{query}&last=0"))
    await until(lambda: daemon.hub.subscribers == query.count("topic"))
    gc.collect()
    gc.disable()
    try:
        await daemon.publish("a", 1)
        await waiter
        await until(lambda: polls_in_memory() == 0)
    finally:
        gc.enable()


def polls_in_memory() -> int:
    """Return how many polls there are, those included that wait for the collector."""
    return sum(isinstance(each, Poll) for each in gc.get_objects())


async def test_poll_is_refused_as_one_whatever_else_it_accepts(daemon: Daemon) -> None:
    """200 with an event would be an answer without messages to it."""
    daemon.hub.is_draining = True

    (answer,) = responses(
        await talk(daemon.port, [get("/subscribe?topic=a&poll=1", f"Accept: {EVENTS}")], shut=True)
    )

    assert (answer.status, answer.code) == (503, "unavailable")


async def test_poll_that_matches_too_much_is_refused() -> None:
    """In words, and it is no subscriber any more."""
    async with running(max_topics_per_connection=3) as daemon:
        for number in range(5):
            await daemon.publish(f"p.{number}", 1)
        answer = await poll(daemon, "pattern=p.*&last=0")
        await until(lambda: len(daemon.hub.patterns) == 0)

    assert answer["code"] == "invalid_request"
    assert "CLEVRD_MAX_TOPICS_PER_CONNECTION" in answer["error"]
    assert daemon.hub.subscribers == 0


async def test_poller_that_goes_and_a_stop_leave_nothing_behind() -> None:
    """Nobody is waited for who won't read the answer; who waits at a stop is answered."""
    query = "topic=a&topic=b&pattern=p.*&timeout=60"
    async with running(shutdown_timeout_s=20.0) as daemon:
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(get(f"/subscribe?poll=1&{query}"))
        await until(lambda: daemon.hub.subscribers == 2)
        reset_by_peer(writer)
        await until(lambda: len(daemon.polls) == 0)
        assert (daemon.hub.subscribers, len(daemon.hub.patterns)) == (0, 0)
        staying = asyncio.create_task(poll(daemon, query))
        await until(lambda: daemon.hub.subscribers == 2)
        await daemon.server.stop()
        answer = await staying

    assert answer["messages"] == []
    assert set(answer["positions"]) == {"a", "b"}
