"""Several topics on one connection, patterns, and commands on /ws, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import pytest
from clients import SMALL_BUFFERS, client_of, small_socket
from daemons import Daemon, running, until
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from clevrd.connections.command_websocket import CommandWebSocket
from clevrd.connections.websocket import SubscriberWebSocket

CONTROL = [Subprotocol("clevrd.v1")]


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    async with running(raw_paths=request.param) as daemon:
        yield daemon


def reader_of(daemon: Daemon, *options: tuple[str, object], **settings: Any) -> connect:
    """Return a client of /subscribe with control frames and these options, in this order."""
    url = f"{daemon.ws_url}/subscribe?{urlencode(options)}"
    return client_of(url, **{"subprotocols": CONTROL, **settings})


def socket_of(daemon: Daemon, **settings: Any) -> connect:
    """Return a client of /ws."""
    return client_of(f"{daemon.ws_url}/ws", subprotocols=CONTROL, **settings)


async def say(socket: ClientConnection, type_: str, **fields: object) -> None:
    """Send one command."""
    await socket.send(json.dumps({"type": type_, **fields}))


async def hear(socket: ClientConnection) -> dict[str, Any]:
    """Return the next frame."""
    frame: dict[str, Any] = json.loads(await socket.recv())
    return frame


async def hear_many(socket: ClientConnection, count: int) -> list[dict[str, Any]]:
    """Return the next ``count`` frames."""
    return [await hear(socket) for _ in range(count)]


async def found(reader: ClientConnection) -> list[dict[str, Any]]:
    """Return the frames of what a pattern found, up to the one that says it is all."""
    frames = [await hear(reader)]
    while frames[-1].get("type") != "watching":
        frames.append(await hear(reader))
    return frames[:-1]


async def ask(socket: ClientConnection, type_: str, **fields: object) -> dict[str, Any]:
    """Send one command and return the next frame, which is its answer."""
    await say(socket, type_, **fields)
    return await hear(socket)


def seen(frames: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return topic and offset of the messages among ``frames``."""
    return [(frame["topic"], frame["offset"]) for frame in frames if "id" in frame]


# --- several topics on a URL ---------------------------------------------------------------------


async def test_one_connection_reads_several_topics(daemon: Daemon) -> None:
    """Each topic has its own greeting, catch-up and offsets; plain clients see `topic`."""
    await daemon.publish("a", 1)
    async with reader_of(daemon, ("topic", "a"), ("topic", "b")) as reader:
        begin = await hear_many(reader, 3)
        await daemon.publish("b", 1)
        await daemon.publish("a", 2)
        live = await hear_many(reader, 2)

    assert [(f["type"], f["topic"]) for f in begin if "type" in f] == [
        ("subscribed", "a"),
        ("subscribed", "b"),
    ]
    assert seen(begin) == [("a", 1)]
    assert seen(live) == [("b", 1), ("a", 2)]


async def test_several_topics_resume_each_at_its_position(daemon: Daemon) -> None:
    """Positions stand in the order of the topics, as pairs or as a list of event ids."""
    epochs = {}
    for topic in ("a", "b"):
        for number in range(4):
            epochs[topic] = (await daemon.publish(topic, number))["epoch"]
    pairs = [
        ("topic", "a"),
        ("offset", 3),
        ("epoch", epochs["a"]),
        ("topic", "b"),
        ("offset", 2),
        ("epoch", epochs["b"]),
    ]
    ids = f"{epochs['a']}:3,{epochs['b']}:2"

    async with reader_of(daemon, *pairs) as by_pairs:
        from_pairs = await hear_many(by_pairs, 5)
    async with reader_of(daemon, ("topic", "a"), ("topic", "b"), ("last_event_id", ids)) as by_ids:
        from_ids = await hear_many(by_ids, 5)
    header = {"Last-Event-ID": ids}
    async with reader_of(
        daemon, ("topic", "a"), ("topic", "b"), additional_headers=header
    ) as by_header:
        from_header = await hear_many(by_header, 5)

    assert seen(from_pairs) == [("a", 4), ("b", 3), ("b", 4)]
    assert [f["recovered"] for f in from_pairs if "type" in f] == [True, True]
    assert from_ids == from_pairs
    assert from_header == from_pairs


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("topic=a&topic=b&offset=1&epoch=x", "offset has 1 values for 2 topics"),
        ("topic=a&topic=b&last_event_id=x:1", "last_event_id has 1 values for 2 topics"),
        ("topic=a&topic=b&last_event_id=x:1,y", "last_event_id must be epoch:offset"),
        ("topic=a&topic=b&since=5m&last_event_id=x:1,x:1", "each say where to resume"),
        ("topic=a&topic=b&last_event_id=x:1,x:1&lastEventId=x:1,x:1", "each say where to resume"),
        ("topic=a&topic=b&last_event_id=x:1/0&lastEventId=x:1/0", "each say where to resume"),
        ("topic=a&pattern=b.*&last_event_id=x:1/0,*&lastEventId=x:1/0,*", "each say where"),
        (
            "topic=a&topic=b&offset=1&offset=1&epoch=x&epoch=x&last_event_id=x:1/0,x:1/1",
            "last_event_id and offset each say where to resume",
        ),
        (
            "topic=a&topic=b&offset=1&offset=1&epoch=x&epoch=x&last_event_id=x:1,x:1",
            "offset and last_event_id each say where to resume",
        ),
        (
            "topic=a&topic=b&offset=1&offset=1&epoch=x&epoch=x&since=5m",
            "offset and since each say where to resume",
        ),
        ("topic=a&topic=b&offset=1&offset=1&epoch=x&epoch=x&last=5", "leave it out to resume"),
        ("&".join(f"topic=t{n}" for n in range(51)), "50 topics and patterns; subscribe to more"),
        ("&".join(f"topic=t{n}" for n in range(700)), "more than 256 fields"),
        ("topic=a&pattern=b.*&pattern=b.*", "given twice"),
        ("topic=a&pattern=b", "has a star"),
        ("topic=a&pattern=b.*&offset=1&epoch=x", "can't resume by a position here"),
        ("topic=a&topic=b%0A", "control character"),
    ],
)
async def test_bad_list_of_topics_is_a_400_that_names_it(
    daemon: Daemon, query: str, words: str
) -> None:
    """What can't be meant is refused before the handshake, and no topic is made of it."""
    with pytest.raises(InvalidStatus) as refused:
        await client_of(f"{daemon.ws_url}/subscribe?{query}")

    assert refused.value.response.status_code == 400
    assert words in json.loads(refused.value.response.body)["error"]
    assert len(daemon.hub.topics) == 0


@pytest.mark.parametrize("last_id", ["x:1/0", "x:1,x:1", "x:1/0,*"])
async def test_header_and_option_that_both_say_where_to_begin_are_a_400(
    daemon: Daemon, last_id: str
) -> None:
    """Where several topics are asked for too, over a WebSocket and in a poll."""
    answers = []
    for query in (
        f"topic=a&topic=b&last_event_id={last_id}",
        "topic=a&topic=b&offset=1&offset=1&epoch=x&epoch=x",
    ):
        header = {"Last-Event-ID": last_id}
        with pytest.raises(InvalidStatus) as refused:
            await client_of(f"{daemon.ws_url}/subscribe?{query}", additional_headers=header)
        answers.append((refused.value.response.status_code, refused.value.response.body))
        url = f"{daemon.url}/subscribe?poll=1&{query}"
        async with daemon.http.get(url, headers=header) as response:
            answers.append((response.status, await response.read()))

    for status, body in answers:
        assert (status, json.loads(body)["code"]) == (400, "invalid_request")
        assert "each say where to resume" in json.loads(body)["error"]
    assert len(daemon.hub.topics) == 0


async def test_stalled_connection_lags_in_all_its_topics_and_is_told_in_each() -> None:
    """What one transport holds up, it holds up for all; each topic counts and tells its own."""
    async with running(**SMALL_BUFFERS) as daemon:
        topics = [("topic", "a"), ("topic", "b"), ("buffer", 1)]
        stalled = {"max_queue": 1, "sock": small_socket(daemon.port)}
        async with reader_of(daemon, *topics, **stalled) as reader:
            for number in range(300):
                for topic in ("a", "b"):
                    await daemon.publish(topic, "x" * 200 + str(number))
            frames: list[dict[str, Any]] = []
            while {(f["topic"], f["offset"]) for f in frames if "id" in f} < {("a", 300)}:
                frames.append(await hear(reader))
            while ("b", 300) not in seen(frames):
                frames.append(await hear(reader))
        views = (await daemon.get_json("/metrics"))["topics"]

    for topic in ("a", "b"):
        have = [offset for name, offset in seen(frames) if name == topic]
        lost = [
            number
            for gap in frames
            if gap.get("type") == "gap" and gap["topic"] == topic
            for number in range(gap["from"], gap["to"] + 1)
        ]
        (view,) = (each for each in views if each["name"].endswith(f":{topic}"))
        assert sorted(have + lost) == list(range(1, 301))
        assert have == sorted(have)
        assert view["messages_dropped"] == len(lost) > 0


# --- patterns ------------------------------------------------------------------------------------


async def test_pattern_reads_topics_that_are_and_that_come(daemon: Daemon) -> None:
    """A topic made later is read from its first message on; others are left alone. Between the two
    it is told that everything was found.
    """
    await daemon.publish("orders.eu", 1)
    async with reader_of(daemon, ("pattern", "orders.*")) as reader:
        begin = await found(reader)
        await daemon.publish("orders", 1)
        await daemon.publish("orders.eu.paid", 1)
        await daemon.publish("orders.us", 1)
        later = await hear_many(reader, 2)

    assert [(f["topic"], f["pattern"]) for f in begin if "type" in f] == [("orders.eu", "orders.*")]
    assert seen(begin) == [("orders.eu", 1)]
    assert later[0]["type"] == "subscribed"
    assert (later[0]["offset"], later[0]["recovered"]) == (0, True)
    assert seen(later) == [("orders.us", 1)]


@pytest.mark.parametrize("pattern", ["*", "**", "*.eu"])
async def test_pattern_that_could_match_everything_needs_permission(pattern: str) -> None:
    """Without it: 403, in words; with it: everything of the own tenant, and nothing else."""
    async with running() as daemon:
        with pytest.raises(InvalidStatus) as refused:
            await reader_of(daemon, ("pattern", pattern))
        async with socket_of(daemon) as socket:
            answer = await ask(socket, "subscribe", pattern=pattern, ref=1)
    async with running(match_all_patterns=True) as daemon:
        topic = "x.eu" if "." in pattern else "x"
        async with reader_of(daemon, ("pattern", pattern)) as reader:
            assert await found(reader) == []
            await daemon.publish(topic, 1, **{"X-Tenant-ID": "other"})
            await daemon.publish(topic, 2)
            frames = await hear_many(reader, 2)

    assert refused.value.response.status_code == 403
    assert "CLEVRD_MATCH_ALL_PATTERNS" in json.loads(refused.value.response.body)["error"]
    assert (answer["type"], answer["code"], answer["ref"]) == ("error", "forbidden", 1)
    assert frames[1]["data"] == 2


async def test_topics_of_a_pattern_are_forgotten_for_want_of_use_and_found_again() -> None:
    """A pattern keeps no topic alive; one that comes back is read from its new beginning."""
    async with (
        running(topic_idle_s=0.1) as daemon,
        reader_of(daemon, ("pattern", "a.*")) as reader,
    ):
        await found(reader)
        await daemon.publish("a.b", 1)
        first = await hear_many(reader, 2)
        gone = await hear(reader)
        assert len(daemon.hub.topics) == daemon.hub.subscribers == 0
        await daemon.publish("a.b", 2)
        second = await hear_many(reader, 2)

    assert gone == {**gone, "type": "forgotten", "topic": "a.b", "offset": 1}
    assert gone["epoch"] == first[0]["epoch"] != second[0]["epoch"]
    assert [f["data"] for f in (first[1], second[1])] == [1, 2]


async def test_more_topics_than_a_connection_may_have_are_told() -> None:
    """Nothing that matches is left out in silence: an error frame, or for plain clients a close."""
    async with (
        running(max_topics_per_connection=3) as daemon,
        reader_of(daemon, ("pattern", "a.*")) as reader,
        client_of(f"{daemon.ws_url}/subscribe?pattern=a.*") as plain,
    ):
        await found(reader)
        for number in range(4):
            await daemon.publish(f"a.{number}", 1)
        frames = await hear_many(reader, 5)
        await plain.wait_closed()
        await daemon.publish("a.0", 2)
        goes_on = await hear(reader)

    assert (frames[-1]["type"], frames[-1]["code"]) == ("error", "invalid_request")
    assert "CLEVRD_MAX_TOPICS_PER_CONNECTION" in frames[-1]["error"]
    assert (plain.close_code, plain.close_reason) == (1013, "too_many_topics")
    assert goes_on["offset"] == 2


async def test_pattern_over_many_topics_joins_them_all(daemon: Daemon) -> None:
    """More topics than one turn joins are joined all the same, and live ones beside."""
    count = 300
    for number in range(count):
        await daemon.publish(f"p.{number}", 1)
    async with reader_of(daemon, ("pattern", "p.*")) as reader:
        frames = await found(reader)

    assert {f["topic"] for f in frames if "type" in f} == {f"p.{n}" for n in range(count)}
    assert sorted(seen(frames)) == sorted((f"p.{n}", 1) for n in range(count))


# --- commands ------------------------------------------------------------------------------------


async def test_socket_subscribes_publishes_and_pings_by_command(daemon: Daemon) -> None:
    """Each command is answered with its ref; messages are those that other subscribers get."""
    async with socket_of(daemon) as socket:
        begin = await ask(socket, "subscribe", topic="t", ref="s1")
        await say(socket, "publish", topic="t", data={"a": 1}, ref=2)
        both = await hear_many(socket, 2)
        pong = await ask(socket, "ping", ref=3)
        left = await ask(socket, "unsubscribe", topic="t", ref=4)
        await daemon.publish("t", 2)
        quiet = await ask(socket, "ping")
    (published,) = (f for f in both if f.get("type") == "published")
    (message,) = (f for f in both if "id" in f)

    assert (begin["type"], begin["ref"], begin["offset"]) == ("subscribed", "s1", 0)
    assert (published["ref"], published["offset"], published["success"]) == (2, 1, True)
    assert (message["data"], message["offset"]) == ({"a": 1}, 1)
    assert pong == {"type": "pong", "ref": 3}
    assert left["positions"] == {"t": {"epoch": begin["epoch"], "offset": 1}}
    assert (left["type"], left["ref"]) == ("unsubscribed", 4)
    assert quiet == {"type": "pong"}


async def test_socket_resumes_a_topic_and_a_pattern_whole(daemon: Daemon) -> None:
    """By offset and epoch for a topic; by positions for a pattern, new topics from their start."""
    for topic in ("a.1", "a.1", "a.2", "b"):
        await daemon.publish(topic, 1)
    async with socket_of(daemon) as socket:
        await say(socket, "subscribe", pattern="a.*", ref=1)
        await say(socket, "subscribe", topic="b", last=0, ref=2)
        first = await hear_many(socket, 7)
        positions = (await ask(socket, "unsubscribe", pattern="a.*"))["positions"]
        at_b = (await ask(socket, "unsubscribe", topic="b"))["positions"]["b"]
    for topic in ("a.1", "b", "a.3"):
        await daemon.publish(topic, 2)

    async with socket_of(daemon) as socket:
        await say(socket, "subscribe", pattern="a.*", positions=positions)
        await say(socket, "subscribe", topic="b", **at_b)
        again = await hear_many(socket, 8)

    assert {"type": "watching", "pattern": "a.*", "ref": 1} in first
    assert sorted(seen(first)) == [("a.1", 1), ("a.1", 2), ("a.2", 1)]
    assert set(positions) == {"a.1", "a.2"}
    assert sorted(seen(again)) == [("a.1", 3), ("a.3", 1), ("b", 2)]
    assert all(f["recovered"] for f in again if f.get("type") == "subscribed")


async def test_positions_beside_last_are_of_some_topics_only(daemon: Daemon) -> None:
    """Who was cut before the pattern had found all goes on with what it knows of it."""
    epochs = {}
    for topic in ("a.1", "a.2"):
        for number in range(3):
            epochs[topic] = (await daemon.publish(topic, number))["epoch"]
    known = {"a.1": {"epoch": epochs["a.1"], "offset": 1}}
    async with socket_of(daemon) as socket:
        await say(socket, "subscribe", pattern="a.*", positions=known, last=1)
        frames = await found(socket)
        both = await ask(socket, "subscribe", topic="b", last=1, since="all")

    assert sorted(seen(frames)) == [("a.1", 2), ("a.1", 3), ("a.2", 3)]
    assert "last and since each say where to begin" in both["error"]


async def test_position_of_a_topic_that_began_anew_is_a_gap_by_pattern(daemon: Daemon) -> None:
    """A topic that was known and is gone is told as lost when it comes back, not skipped."""
    position = {"a.1": {"epoch": "before", "offset": 7}}
    async with socket_of(daemon) as socket:
        await say(socket, "subscribe", pattern="a.*", positions=position)
        await hear(socket)
        await daemon.publish("a.1", 1)
        frames = await hear_many(socket, 3)

    assert [f.get("type") for f in frames] == ["subscribed", "gap", None]
    assert frames[0]["recovered"] is False
    assert frames[1]["reason"] == "epoch"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("{", "not complete JSON"),
        ("{x", "not JSON at byte 1"),
        ('\ufeff{"type":"ping"}', "begins with a byte order mark"),
        ('{"type":"publish","topic":"a","data":"\\ud800"}', "half a surrogate pair"),
        ("[]", "is none"),
        ('{"type":"dance","ref":7}', "wrong type"),
        ('{"ref":7}', "has no type"),
        ('{"type":"subscribe","ref":7}', "Name a topic or a pattern"),
        ('{"type":"subscribe","topic":"a","pattern":"a.*","ref":7}', "only one of them"),
        ('{"type":"subscribe","topic":"","ref":7}', "empty"),
        ('{"type":"subscribe","topic":7,"ref":7}', "wrong topic"),
        ('{"type":"subscribe","topic":"a","policy":"x","ref":7}', "Unknown policy"),
        ('{"type":"subscribe","topic":"a","buffer":0,"ref":7}', "field buffer"),
        ('{"type":"subscribe","topic":"a","last":-1,"ref":7}', "field last"),
        ('{"type":"subscribe","topic":"a","last":1,"since":"all","ref":7}', "last and since"),
        ('{"type":"subscribe","topic":"a","offset":1,"ref":7}', "offset and epoch together"),
        ('{"type":"subscribe","topic":"a","offset":-1,"epoch":"x","ref":7}', "offset and epoch"),
        ('{"type":"subscribe","topic":"a","offset":1,"epoch":"é x","ref":7}', "offset and epoch"),
        ('{"type":"subscribe","topic":"a","since":"x","ref":7}', "since must be"),
        ('{"type":"subscribe","topic":"a","positions":{},"ref":7}', "are for a pattern"),
        ('{"type":"subscribe","pattern":"a","ref":7}', "has a star"),
        ('{"type":"subscribe","pattern":"a.*","offset":1,"epoch":"x","ref":7}', "by positions"),
        ('{"type":"unsubscribe","topic":"a","ref":7}', "not subscribed"),
        ('{"type":"unsubscribe","pattern":"a.*","ref":7}', "not subscribed"),
        ('{"type":"publish","topic":"a","ref":7}', "data is missing"),
        ('{"type":"publish","data":1,"ref":7}', "has no topic"),
        ('{"type":"publish","channel":"a","data":1,"ref":7}', "'channel' is not known"),
        ('{"type":"publish","topic":"a","payload":1,"ref":7}', "'payload' is not known"),
        ('{"type":"subscribe","subject":"a","ref":7}', "'subject' is not known"),
        ('{"type":"ping","ref":"%s"}' % ("x" * 129), "128 characters"),
        ('{"type":"ping","ref":"%s"}' % ("x" * 500_000), "128 characters"),
        ('{"type":"ping","ref":[1]}', "wrong ref"),
        ('{"type":"publish","topic":"a","data":' + "[" * 5_000, "nested too deeply"),
    ],
)
async def test_bad_command_is_an_error_frame_and_the_socket_goes_on(
    daemon: Daemon, command: str, words: str
) -> None:
    """What is wrong is said in words, with the ref where it could be read; nothing else ends."""
    async with socket_of(daemon) as socket:
        await socket.send(command)
        refused = await hear(socket)
        still = await ask(socket, "ping", ref=8)

    assert refused["type"] == "error"
    assert words in refused["error"]
    assert refused.get("ref") == (7 if '"ref":7' in command else None)
    assert refused["code"] == "invalid_request"
    assert still == {"type": "pong", "ref": 8}
    assert len(daemon.hub.topics) == 0


async def test_commands_out_of_order_are_refused_one_by_one(daemon: Daemon) -> None:
    """Twice subscribed, twice ended, named and matched: an error each, and the rest as it was."""
    async with socket_of(daemon) as socket:
        await ask(socket, "subscribe", topic="a.1")
        twice = await ask(socket, "subscribe", topic="a.1")
        await ask(socket, "subscribe", pattern="b.*")
        watched_twice = await ask(socket, "subscribe", pattern="b.*")
        matched = await ask(socket, "subscribe", topic="b.1")
        await daemon.publish("b.2", 1)
        await hear_many(socket, 2)
        by_pattern = await ask(socket, "unsubscribe", topic="b.2")
        await ask(socket, "unsubscribe", pattern="b.*")
        await daemon.publish("a.1", 1)
        goes_on = await hear(socket)

    assert "subscribed already" in twice["error"]
    assert "subscribed already" in watched_twice["error"]
    assert "comes by the pattern b.*" in matched["error"]
    assert "unsubscribe the pattern" in by_pattern["error"]
    assert goes_on["offset"] == 1


async def test_socket_needs_the_protocol(daemon: Daemon) -> None:
    """Who does not offer clevrd.v1 is told so, before the handshake."""
    with pytest.raises(InvalidStatus) as refused:
        await client_of(f"{daemon.ws_url}/ws")

    assert refused.value.response.status_code == 400
    assert "clevrd.v1" in json.loads(refused.value.response.body)["error"]


async def test_everything_is_let_go_when_a_socket_ends(daemon: Daemon) -> None:
    """Readers and patterns of a connection that is gone are gone with it."""
    async with socket_of(daemon) as socket:
        await ask(socket, "subscribe", topic="a")
        await ask(socket, "subscribe", pattern="b.*")
        await daemon.publish("b.1", 1)
        await hear_many(socket, 2)
        assert (daemon.hub.subscribers, len(daemon.hub.patterns)) == (2, 1)

    await until(lambda: daemon.hub.subscribers == 0)
    assert len(daemon.hub.patterns) == 0


async def test_stalled_socket_is_not_read_on_and_still_answers_in_the_end() -> None:
    """Commands of who does not read its messages wait, bounded; its pongs don't."""
    async with (
        running(**SMALL_BUFFERS) as daemon,
        socket_of(daemon, max_queue=1, sock=small_socket(daemon.port)) as socket,
    ):
        await ask(socket, "subscribe", topic="t")
        for _ in range(300):
            await daemon.publish("t", "x" * 200)
        (connection,) = daemon.server.connections._open
        await until(lambda: connection._is_write_paused)  # type: ignore[attr-defined]
        await say(socket, "ping", ref="late")
        frames: list[dict[str, Any]] = []
        while not frames or frames[-1].get("ref") != "late":
            frames.append(await hear(socket))
        async with asyncio.timeout(5):
            while ("t", 300) not in seen(frames):
                frames.append(await hear(socket))

    have = [offset for _, offset in seen(frames)]
    assert have == sorted(set(have))


@pytest.mark.parametrize("path", ["/ws", "/subscribe"])
async def test_socket_that_reads_on_is_kept_though_the_ping_is_far_behind(path: str) -> None:
    """What it takes shows that somebody is there, as on a socket with one topic."""
    async with running(**SMALL_BUFFERS) as daemon:
        stalled: dict[str, Any] = {"max_queue": 1, "sock": small_socket(daemon.port)}
        topics = [("topic", "t"), ("topic", "u")]
        client = (
            socket_of(daemon, **stalled) if path == "/ws" else reader_of(daemon, *topics, **stalled)
        )
        async with client as socket:
            if path == "/ws":
                await ask(socket, "subscribe", topic="t")
            (connection,) = daemon.server.connections._open
            assert isinstance(connection, CommandWebSocket | SubscriberWebSocket)
            number = 0
            while not connection.subscription.is_paused:
                number += 1
                await daemon.publish("t", "x" * 200)
            connection.ping()
            assert connection.awaits_pong

            seen_offset = 0
            while connection.subscription.is_paused:
                seen_offset = (await hear(socket)).get("offset", 0)

            # Before it can have come to the ping and answered it.
            assert not connection.awaits_pong
            assert seen_offset < number


async def test_going_away_has_the_position_of_every_topic() -> None:
    """At a planned stop each connection is told where it was in all its topics."""
    async with (
        running() as daemon,
        socket_of(daemon) as socket,
        reader_of(daemon, ("topic", "a"), ("topic", "b")) as reader,
    ):
        await hear_many(reader, 2)
        await ask(socket, "subscribe", topic="a")
        await daemon.publish("a", 1)
        await hear(reader)
        await hear(socket)
        stopping = asyncio.create_task(daemon.server.stop())
        from_reader, from_socket = await hear(reader), await hear(socket)
        await stopping

    assert {t: p["offset"] for t, p in from_reader["positions"].items()} == {"a": 1, "b": 0}
    assert {t: p["offset"] for t, p in from_socket["positions"].items()} == {"a": 1}


async def test_reading_a_name_makes_no_topic(daemon: Daemon) -> None:
    """Patterns find what was published; who only read is forgotten, and comes back to the same."""
    async with reader_of(daemon, ("pattern", "p.*")) as pattern:
        assert await found(pattern) == []
        async with reader_of(daemon, ("topic", "p.read")) as reader:
            begin = await hear(reader)
            async with daemon.http.get(f"{daemon.url}/subscribe?topic=p.polled&poll=1&timeout=0"):
                pass
            async with reader_of(daemon, ("topic", "p.bad"), ("offset", 9), ("epoch", "x")):
                pass
            await daemon.publish("p.made", 1)
            told = await hear_many(pattern, 2)
            async with reader_of(daemon, ("pattern", "p.*")) as later:
                assert {frame["topic"] for frame in await found(later)} == {"p.made"}
        await until(lambda: daemon.hub.subscribers == 1)
    daemon.hub.topics.evict_idle(asyncio.get_running_loop().time() + 60)

    assert [frame["topic"] for frame in told] == ["p.made", "p.made"]
    assert [topic.name for topic in daemon.hub.topics] == ["p.made"]
    async with reader_of(
        daemon, ("topic", "p.read"), ("offset", 0), ("epoch", begin["epoch"])
    ) as reader:
        assert (await hear(reader))["recovered"] is True
