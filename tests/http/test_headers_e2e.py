"""Headers of messages over real sockets: every way in, every way out, and all between the two."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clients import client_of, subscribe
from daemons import Daemon, running, until
from http_wire import Response, ask, get, post
from streams import EVENTS, LINES, open_stream

from clevrd.raw_http import PlainGrammar
from clevrd.server import Server

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
OTHER = f"00-{TRACE}-00f067aa0ba902b7-00"
TRACED = {"traceparent": PARENT, "tracestate": "a=1"}
EVENT = {"ce-specversion": "1.0", "ce-id": "17", "ce-source": "/mill", "ce-type": "ground"}
TO_TOPIC = "POST /topics/t/messages HTTP/1.1"


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a running daemon."""
    async with running() as started:
        yield started


def lines_of(headers: dict[str, str]) -> list[str]:
    """Return header fields as lines of a head."""
    return [f"{name}: {value}" for name, value in headers.items()]


async def send(daemon: Daemon, data: Any, headers: dict[str, str] | None, **fields: Any) -> None:
    """Publish one message to ``t`` with headers as a field of its object."""
    body = {"topic": "t", "data": data, **fields, **({"headers": headers} if headers else {})}
    answer = await ask(daemon.port, post(msgspec.json.encode(body)))
    assert answer.status == 200, answer.body


async def carried(daemon: Daemon, topic: str = "t") -> list[dict[str, str] | None]:
    """Return the headers of the topic's messages; None for those without any."""
    answer = await daemon.get_json(f"/topics/{topic}/messages?headers=true")
    return [each.get("headers") for each in answer["messages"]]


def split(text: str | bytes) -> tuple[bytes, dict[str, str] | None]:
    """Return a message's JSON as it is without headers, and the headers, which stand last."""
    text = text.encode() if isinstance(text, str) else text
    before, found, headers = text.partition(b',"headers":')
    return (before + b"}", json.loads(headers[:-1])) if found else (text, None)


# --- the ways in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [False, True], ids=["raw", "aiohttp"])
async def test_head_of_a_publish_is_carried(daemon: Daemon, origin: bool) -> None:
    """On both ways in; the field counts more, and what is not valid in a head is no trace."""
    own = [f"Origin: http://127.0.0.1:{daemon.port}", "X: 1"] if origin else []
    host = f"127.0.0.1:{daemon.port}"
    body = b'{"topic":"t","data":1}'
    own_trace = msgspec.json.encode({"topic": "t", "data": 1, "headers": {"traceparent": OTHER}})
    for content, headers in (
        (body, {}),
        (body, TRACED),
        (body, {"Traceparent": PARENT, "tracestate": "?"}),
        (body, {"traceparent": "00-1", "tracestate": "a=1"}),
        (body, {"ce-id": "%ff"}),
        (body, {**TRACED, **EVENT, "Ce-Subject": "%C3%BC"}),
        (own_trace, {**TRACED, **EVENT}),
    ):
        answer = await ask(daemon.port, post(content, *own, *lines_of(headers), host=host))
        assert answer.status == 200, answer.body

    assert await carried(daemon) == [
        None,
        TRACED,
        {"traceparent": PARENT},
        None,
        None,
        {**TRACED, **EVENT, "ce-subject": "ü"},
        {**EVENT, "traceparent": OTHER},
    ]


async def test_every_way_to_publish_carries_headers(daemon: Daemon) -> None:
    """A batch's trace is that of its lines without one; sockets and commands have the field."""
    lines = b"\n".join(
        msgspec.json.encode({"topic": "t", "data": 1, **fields})
        for fields in ({}, {"headers": {"traceparent": OTHER}}, {"headers": EVENT})
    )
    item = {"topic": "t", "data": 1, "headers": EVENT}
    batch = "POST /publish/batch HTTP/1.1"
    answer = await ask(daemon.port, post(lines, *lines_of({**TRACED, **EVENT}), line=batch))
    async with client_of(f"{daemon.ws_url}/publish") as socket:
        await socket.send(json.dumps({**item, "ref": 1}))
        await socket.recv()
    async with client_of(f"{daemon.ws_url}/ws", subprotocols=["clevrd.v1"]) as socket:
        await socket.send(json.dumps({"type": "publish", **item, "ref": 1}))
        await socket.recv()
        await socket.send(json.dumps({"type": "publish", **item, "ref": 2, "headers": {"a": "b"}}))
        told = json.loads(await socket.recv())

    assert await carried(daemon) == [
        TRACED,
        {"traceparent": OTHER},
        {**TRACED, **EVENT},
        EVENT,
        EVENT,
        None,
    ]
    assert "ce-* headers of a batch are not carried" in answer.json["warnings"][0]
    assert "The header 'a' is not carried" in told["warnings"][0]


async def test_body_alone_is_published_to_the_topic_in_the_path(daemon: Daemon) -> None:
    """Binary mode: the body is the data, byte for byte, and everything else is in the head."""
    line = "POST /topics/t/messages?key=k&ttl_s=60.5 HTTP/1.1"
    json_type = "Content-Type: application/json; charset=utf-8"
    first = post(b' {"a": [1, 2]}\n', json_type, *lines_of({**EVENT, **TRACED}), line=line)
    answer = await ask(daemon.port, first)
    plain = await ask(daemon.port, post(b'"x"', line=TO_TOPIC))
    key = ("Idempotency-Key: a", *lines_of(EVENT))
    once = [
        await ask(daemon.port, post(body, *key, *lines_of(more), line=TO_TOPIC))
        for body, more in ((b"1", TRACED), (b"1", {}), (b"2", TRACED))
    ]
    found = await daemon.get_json("/topics/t/messages?headers=true")

    assert sorted(answer.json) == sorted(plain.json)
    assert [each["data"] for each in found["messages"]] == [{"a": [1, 2]}, "x", 1]
    assert list(found["messages"][0])[-4:] == ["offset", "ttl_s", "key", "headers"]
    assert (found["messages"][0]["ttl_s"], found["messages"][0]["key"]) == (60.5, "k")
    assert found["messages"][0]["headers"] == {**EVENT, **TRACED}
    assert found["messages"][2]["headers"] == {**TRACED, **EVENT}
    # Another span is a client that tries again.
    assert [each.status for each in once] == [200, 200, 400]
    assert once[1].headers["idempotency-replayed"] == "true"


# Requests, and the status and a part of the sentence that each is answered with.
MISTAKES: list[tuple[bytes, int, str]] = [
    (
        post(b"1", "Content-Type: text/plain", *lines_of(EVENT), line=TO_TOPIC),
        *(415, "The data of an event must be JSON; send Content-Type: application/json"),
    ),
    (
        post(b"a=1", "Content-Type: application/x-www-form-urlencoded", line=TO_TOPIC),
        *(400, "The body is not JSON at byte 0; send the data alone"),
    ),
    (
        post(b"{}", "Content-Type: application/cloudevents+json", line=TO_TOPIC),
        *(415, "Events are taken in binary mode"),
    ),
    (
        post(b"[]", "Content-Type: application/cloudevents-batch+json", line=TO_TOPIC),
        *(415, "Events are taken in binary mode"),
    ),
    (post(b"", line=TO_TOPIC), 400, "The body is empty; send the data alone"),
    (post(b"null", line=TO_TOPIC), 400, "The data is null; send the data alone"),
    (post(b"1 2", line=TO_TOPIC), 400, "The body is not JSON at byte 3; send the data alone"),
    (post(b'"\xff"', line=TO_TOPIC), 400, "not valid UTF-8"),
    (post(b"[" * 600 + b"]" * 600, line=TO_TOPIC), 400, "nested"),
    (
        post(b"1", line="POST /topics/t/messages?ttl_s=soon HTTP/1.1"),
        *(400, "The option ttl_s must be a number of seconds"),
    ),
    (
        post(b"1", line="POST /topics/t/messages?ttl_s=0 HTTP/1.1"),
        *(400, "The ttl_s must be a number of seconds"),
    ),
    (
        post(b"1", line="POST /topics/t/messages?key= HTTP/1.1"),
        *(400, "The key is empty"),
    ),
    (
        post(b"1", line="POST /topics/%ff/messages HTTP/1.1"),
        *(400, "The topic in the path is not UTF-8"),
    ),
    (
        post(b"1", "ce-specversion: 1.0", "ce-id: 1", "ce-source: a", line=TO_TOPIC),
        *(400, "has ce-specversion and no ce-type"),
    ),
    (
        post(b'{"topic":"t","data":1}', *lines_of({**EVENT, "ce-a_b": "1"})),
        *(400, "'ce-a_b' is no attribute of an event"),
    ),
    (
        post(b'{"topic":"t","data":1}', *lines_of({**EVENT, "ce-subject": "v" * 4_096})),
        *(400, "4096 are allowed; send shorter ones"),
    ),
    (
        post(b'{"topic":"t","data":1,"headers":{"traceparent":"x"}}'),
        *(400, "The traceparent in headers is not valid"),
    ),
    (get("/topics/t/messages?headers=1"), 400, "The option headers must be true or false"),
    (get("/subscribe?topic=t&poll=1&headers="), 400, "The option headers must be true or"),
]


async def test_each_mistake_has_its_sentence(daemon: Daemon) -> None:
    """Nothing is published, and the sentence says what to do."""
    await daemon.publish("t", 0)

    for request, status, sentence in MISTAKES:
        answer = await ask(daemon.port, request)

        assert answer.status == status, (request, answer.body)
        assert sentence in answer.json["error"], request
    assert len(await carried(daemon)) == 1


async def test_misspelt_names_are_told(daemon: Daemon) -> None:
    """Options of a message's own path, and the field."""
    option = post(b"1", line="POST /topics/t/messages?ttl=60 HTTP/1.1")
    answers = [
        await ask(daemon.port, each)
        for each in (option, post(b'{"topic":"t","data":1,"header":{"ce-id":"1"}}'))
    ]

    told = [each.json["warnings"][0] for each in answers]
    assert ("ttl_s is the name" in told[0], "headers is the name" in told[1]) == (True, True)


async def test_only_heads_that_come_again_are_kept() -> None:
    """A trace, an event or a key is one publish's: kept, these would push out all others."""
    async with running() as daemon:
        grammar = grammar_of(daemon.server)
        for fields in ({}, TRACED, EVENT, {"Idempotency-Key": "a"}, {"ce-id": "1"}):
            await ask(daemon.port, post(b'{"topic":"t","data":1}', *lines_of(fields)))

        assert len(grammar._cache) == 2


def grammar_of(server: Server) -> PlainGrammar:
    """Return what recognises the daemon's plain requests."""
    grammar = server.parts.ways_in.for_clients.raw.grammar
    assert grammar is not None
    return grammar


# --- the ways out --------------------------------------------------------------------------------


async def test_websockets_that_ask_get_headers_and_others_todays_bytes(daemon: Daemon) -> None:
    """In one topic, caught up and live, by one topic, by several, by a pattern and by command."""
    commands = client_of(f"{daemon.ws_url}/ws", subprotocols=["clevrd.v1"])
    several = f"{daemon.ws_url}/subscribe?topic=t&topic=u&headers=true"
    await send(daemon, 1, None)
    await send(daemon, 2, TRACED, key="k")
    async with (
        subscribe(daemon.ws_url) as plain,
        subscribe(daemon.ws_url, headers="false", control=0) as refusing,
        subscribe(daemon.ws_url, headers="true") as asking,
        client_of(several) as many,
        client_of(f"{daemon.ws_url}/subscribe?pattern=t.**&topic=t&headers=true") as pattern,
        commands as socket,
    ):
        await socket.send(json.dumps({"type": "subscribe", "topic": "t", "headers": True}))
        subscribed = json.loads(await socket.recv())
        await until(lambda: daemon.hub.subscribers == 7)
        await send(daemon, 3, {**TRACED, **EVENT})
        await send(daemon, 4, None, ttl_s=60)
        askers = (asking, many, pattern, socket)
        readers = (plain, refusing, *askers)
        received = [[await each.recv() for _ in range(4)] for each in readers]

    wanted = [None, TRACED, {**TRACED, **EVENT}, None]
    assert subscribed["type"] == "subscribed"
    assert received[0] == received[1]
    assert not any("headers" in each for each in received[0])
    for texts in received[2:]:
        assert [split(each) for each in texts] == [
            (text.encode(), headers)
            for text, headers in zip(map(str, received[0]), wanted, strict=True)
        ]


@pytest.mark.parametrize("accept", [EVENTS, LINES])
@pytest.mark.parametrize(
    ("topics", "version"),
    [
        ("topic=t", "1.1"),
        ("topic=t", "1.0"),
        ("topic=t&topic=u", "1.1"),
        ("pattern=t.**&topic=t", "1.0"),
    ],
)
async def test_streams_that_ask_get_headers_and_others_todays_bytes(
    accept: str, topics: str, version: str
) -> None:
    """Events and lines, with chunks and without, of one topic and of several."""
    async with running() as daemon:
        await send(daemon, 1, None)
        async with (
            bare_stream(daemon.port, accept, topics, version) as plain,
            bare_stream(daemon.port, accept, f"{topics}&headers=true", version) as asking,
        ):
            await until(lambda: daemon.hub.subscribers >= 2)
            await send(daemon, 2, TRACED)
            await send(daemon, 3, EVENT)
            texts = [await messages_in(each, b'"offset":3') for each in (plain, asking)]

    assert len(texts[0]) == 3
    assert not any(b"headers" in each for each in texts[0])
    assert [split(each) for each in texts[1]] == list(
        zip(texts[0], (None, TRACED, EVENT), strict=True)
    )


@asynccontextmanager
async def bare_stream(
    port: int, accept: str, query: str, version: str
) -> AsyncIterator[asyncio.StreamReader]:
    """Ask for a stream; give what the daemon sends, byte for byte."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"GET /subscribe?{query} HTTP/{version}", "Host: test", f"Accept: {accept}", "", ""]
    writer.write("\r\n".join(lines).encode())
    try:
        yield reader
    finally:
        writer.close()


async def messages_in(reader: asyncio.StreamReader, upto: bytes) -> list[bytes]:
    """Return the messages' JSON up to the one that holds ``upto``, from any framing."""
    found: list[bytes] = []
    async with asyncio.timeout(5):
        while not found or upto not in found[-1]:
            line = (await reader.readline()).strip().removeprefix(b"data: ")
            if line.startswith(b'{"id":'):
                found.append(line)
    return found


@pytest.mark.parametrize("topics", ["topic=t", "topic=t&topic=u"])
async def test_polls_that_ask_get_headers_and_others_todays_bytes(
    daemon: Daemon, topics: str
) -> None:
    """Answered at once, and when something comes."""
    await send(daemon, 1, TRACED)
    path = f"/subscribe?{topics}&poll=1"
    at_once = [await ask(daemon.port, get(f"{path}{more}")) for more in ("", "&headers=true")]
    waiting = [
        asyncio.create_task(ask(daemon.port, get(f"{path}&last=0{more}")))
        for more in ("", "&headers=true")
    ]
    await until(lambda: daemon.hub.subscribers >= 2 * len(topics.split("&")))
    await send(daemon, 2, EVENT)
    later = await asyncio.gather(*waiting)

    for (plain, asking), headers in ((at_once, TRACED), (later, EVENT)):
        assert b"headers" not in plain.body
        assert without_headers(asking) == plain.json
        assert asking.json["messages"][0]["headers"] == headers


def without_headers(answer: Response) -> Any:
    """Return the JSON of a poll's answer as it is for who does not ask."""
    found = answer.json
    found["messages"] = [
        {name: value for name, value in each.items() if name != "headers"}
        for each in found["messages"]
    ]
    return found


async def test_pages_that_ask_have_a_tag_of_their_own(daemon: Daemon) -> None:
    """A cache that has the one form is not told that it has the other."""
    await send(daemon, 1, TRACED)
    epoch = (await daemon.get_json("/topics/t"))["epoch"]
    path = f"/topics/t/messages?limit=1&offset=0&epoch={epoch}"
    plain = await ask(daemon.port, get(path))
    asking = await ask(daemon.port, get(f"{path}&headers=true"))
    tag = f"If-None-Match: {plain.headers['etag']}"
    again = [await ask(daemon.port, get(f"{path}{more}", tag)) for more in ("", "&headers=true")]

    assert b"headers" not in plain.body
    assert without_headers(asking) == plain.json
    assert [each.status for each in again] == [304, 200]


# --- between the two -----------------------------------------------------------------------------


async def test_headers_outlive_what_a_message_outlives(daemon: Daemon) -> None:
    """`latest` by key, time to live, and a clear, behind which nothing of before comes back."""
    for number, key in enumerate("aabb", 1):
        await send(daemon, number, {"ce-id": str(number)}, key=key, ttl_s=60)
    async with subscribe(daemon.ws_url, headers="true", policy="latest") as reader:
        newest = [json.loads(await reader.recv()) for _ in range(2)]
        async with daemon.http.delete(f"{daemon.url}/topics/t/messages") as response:
            assert response.status == 200
        await send(daemon, 5, {"ce-id": "5"})
        after = json.loads(await reader.recv())

    assert [each["headers"] for each in newest] == [{"ce-id": "2"}, {"ce-id": "4"}]
    assert (after["offset"], after["headers"]) == (1, {"ce-id": "5"})
    assert await carried(daemon) == [{"ce-id": "5"}]


async def test_kept_messages_have_their_headers() -> None:
    """A reader that keeps the oldest is given frames that the ring has given up."""
    async with (
        running(ring_messages=100, catch_up_messages=0) as daemon,
        subscribe(
            daemon.ws_url, stalls=True, policy="drop_newest", headers="true", buffer=150
        ) as reader,
    ):
        await until(lambda: daemon.hub.subscribers == 1)
        data = "x" * 20_000
        topic = daemon.hub.topics.find("default-tenant", "t")
        assert topic is not None
        for number in range(1, 400):
            await send(daemon, data, {"ce-id": str(number)})
            if topic.kept.size_bytes > 50 * 20_000:
                break
        assert topic.kept.size_bytes
        reader_of = daemon.only_reader()
        kept = {offset for first, last in reader_of.kept for offset in range(first + 1, last + 1)}
        received = [json.loads(await reader.recv()) for _ in range(max(kept))]

    assert {each["offset"] for each in received} >= kept
    assert all(each["headers"] == {"ce-id": str(each["offset"])} for each in received)


async def test_bounds_count_headers(daemon: Daemon) -> None:
    """The ring of a topic is larger by them, so that all bounds on memory hold."""
    await send(daemon, 1, None)
    plain = (await daemon.get_json("/topics/t"))["held_bytes"]
    await send(daemon, 1, {"ce-id": "x" * 1_000})

    assert (await daemon.get_json("/topics/t"))["held_bytes"] > 2 * plain + 1_000


async def test_headers_outlive_a_planned_restart(tmp_path: Path) -> None:
    """The state file has them, and who does not ask gets the same bytes as before."""
    async with running(state_dir=str(tmp_path)) as daemon:
        await send(daemon, 1, TRACED, key="k", ttl_s=60)
        await send(daemon, 2, None)
        before = await ask(daemon.port, get("/topics/t/messages"))
    async with running(state_dir=str(tmp_path)) as daemon:
        assert await carried(daemon) == [TRACED, None]
        after = await ask(daemon.port, get("/topics/t/messages"))
        poll = await ask(daemon.port, get("/subscribe?topic=t&poll=1"))
        async with subscribe(daemon.ws_url) as reader:
            texts = [json.loads(await reader.recv()) for _ in range(2)]

    assert after.body == before.body
    assert poll.body == before.body
    assert texts == before.json["messages"]


async def test_history_has_headers_on_every_transport(tmp_path: Path) -> None:
    """Messages that are in the journal alone have what they had live."""
    pytest.importorskip("apsw")
    table = {"directory": str(tmp_path / "journal")}
    async with running(ring_messages=100, journal_table=table) as daemon:
        await send(daemon, 1, TRACED, key="k")
        await send(daemon, 2, None)
        await send(daemon, 3, EVENT, ttl_s=60)
        live = await ask(daemon.port, get("/topics/t/messages"))
    async with running(ring_messages=100, journal_table=table) as daemon:
        plain = await ask(daemon.port, get("/topics/t/messages?since=all"))
        assert await carried(daemon) == [TRACED, None, EVENT]
        async with (
            subscribe(daemon.ws_url, since="all", headers="true") as reader,
            subscribe(daemon.ws_url, since="all") as other,
            await open_stream(daemon.port, LINES, "topic=t&since=all&headers=true") as stream,
        ):
            texts = [await reader.recv() for _ in range(3)]
            plain_texts = [await other.recv() for _ in range(3)]
            items = [each.json.get("headers") for each in await stream.items(3)]
        poll = await daemon.get_json("/subscribe?topic=t&poll=1&since=all&headers=true")

    assert plain.json["messages"] == live.json["messages"]
    assert b"headers" not in plain.body
    assert [split(text) for text in texts] == [
        (str(text).encode(), headers)
        for text, headers in zip(plain_texts, (TRACED, None, EVENT), strict=True)
    ]
    assert items == [TRACED, None, EVENT]
    assert [each.get("headers") for each in poll["messages"]] == [TRACED, None, EVENT]
