"""Names that nearly are known ones: which are, and that whoever sends one is told on every way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest
from clients import reset_by_peer, upgrade_request
from daemons import Daemon, running, until
from http_wire import ask, get, post, responses, talk
from hypothesis import given
from hypothesis import strategies as st
from streams import EVENTS, LINES, open_stream

from clevrd.client import Client
from clevrd.core.message import MAX_NAMED_BYTES, decode_publish
from clevrd.core.near_names import (
    MAX_NAME_CHARS,
    MAX_NAMES,
    MAX_WARNINGS,
    PUBLISH_FIELDS,
    SUBSCRIBE_OPTIONS,
    meant,
    quoted,
)

PUBLISH = ("topic", "data", "key", "idempotency_key")


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """Return a daemon, with and without the raw path."""
    async with running(raw_paths=request.param) as started:
        yield started


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("idempotencyKey", "idempotency_key"),
        ("Idempotency-Key", "idempotency_key"),
        ("IDEMPOTENCYKEY", "idempotency_key"),
        ("idempotncy_key", "idempotency_key"),
        ("idempotency_keys", "idempotency_key"),
        ("Topic", "topic"),
        ("tpoic", "topic"),
        ("topc", "topic"),
        ("topics", "topic"),
        ("ttopic", "topic"),
        ("topix", "topic"),
        ("DATA", "data"),
        ("payload", "data"),
        ("Message", "data"),
        ("channel", "topic"),
        ("dat", None),
        ("date", None),
        ("keys", None),
        ("tpics", None),
        ("tropics", None),
        ("source", None),
        ("", None),
        ("_", None),
        ("topic" * 20, None),
    ],
)
def test_what_is_near(name: str, known: str | None) -> None:
    """Case, hyphens and underscores; one letter in a longer name; a few other words."""
    assert meant(name, PUBLISH, {"payload": "data", "message": "data", "channel": "topic"}) == known


@given(st.sampled_from((*PUBLISH, "last_event_id", "policy")), st.data())
def test_one_letter_is_near_in_long_names(known: str, data: st.DataObject) -> None:
    """Wherever it is put in, left out or changed."""
    at = data.draw(st.integers(0, len(known)))
    letter = data.draw(st.sampled_from("abcxyz"))
    for name in (
        known[:at] + letter + known[at:],
        known[:at] + known[at + 1 :],
        known[:at] + letter + known[at + 1 :],
    ):
        found = meant(name, [known], {})
        assert found == (known if len(known) >= 5 else found)


@given(st.text(max_size=60), st.sampled_from([PUBLISH_FIELDS, SUBSCRIBE_OPTIONS]))
def test_any_name_is_judged_in_printable_ascii(name: str, names: Any) -> None:
    """What was sent is told in part, escaped, and never more than a little."""
    for sentence in names.warnings([name]):
        assert sentence.isascii()
        assert sentence.isprintable()
        assert len(sentence) < 200


def test_known_name_that_is_there_was_not_meant() -> None:
    """A publisher may have fields of its own."""
    assert PUBLISH_FIELDS.warnings(["topic", "data", "payload", "topics"]) == ()
    assert len(PUBLISH_FIELDS.warnings(["topic", "payload"])) == 1


def test_warnings_are_bounded_and_remembered_in_bounds() -> None:
    """A few of them, of a few names, and of long names none."""
    many = [f"Topic{'_' * n}" for n in range(MAX_NAMES)]

    assert len(PUBLISH_FIELDS.warnings(many)) == MAX_WARNINGS
    assert PUBLISH_FIELDS.warnings(["x"] * MAX_NAMES + ["payload"]) == ()
    assert PUBLISH_FIELDS.warnings(["topic" + "_" * MAX_NAME_CHARS]) == ()
    for number in range(1_000):
        PUBLISH_FIELDS.warnings([f"own-{number}"])
    assert len(PUBLISH_FIELDS._seen) <= 256


def test_large_bodies_are_not_searched() -> None:
    """Reading the names of a body costs as many fields as it has."""
    body = b'{"topic":"t","data":1,"Key":"k"%b}'

    assert decode_publish(body % b"").warnings() != ()
    assert decode_publish(body % (b" " * MAX_NAMED_BYTES)).warnings() == ()


def test_no_field_of_a_body_becomes_a_warning() -> None:
    """Whatever it is called, and whatever it holds."""
    for value in (b'["x"]', b"1", b"null"):
        assert decode_publish(b'{"topic":"t","data":1,"":%b}' % value).warnings() == ()
        assert decode_publish(b'{"topic":"t","data":1,"told":%b}' % value).warnings() == ()


def test_quoted_is_short_and_printable() -> None:
    """Control characters and what is no ASCII are escaped."""
    assert quoted("a\nb\x7fé") == r"'a\nb\x7f\xe9'"
    assert len(quoted("\U0001f600" * 100)) < 350


# --- publishing ----------------------------------------------------------------------------------

KEY_WARNING = "The field 'idempotencyKey' is not known and is ignored; idempotency_key is the name."


async def test_publish_is_taken_and_told(daemon: Daemon) -> None:
    """The contract says that other fields are ignored, so it is published."""
    misspelt = await ask(daemon.port, post('{"topic":"t","data":1,"idempotencyKey":"k"}'))
    own = await ask(daemon.port, post('{"topic":"t","data":1,"source":"x"}'))
    by_query = await ask(
        daemon.port, post('{"topic":"t","data":1}', line="POST /publish?tenant_id=a HTTP/1.1")
    )

    assert (misspelt.status, misspelt.json["warnings"]) == (200, [KEY_WARNING])
    assert misspelt.json["offset"] == 1
    assert "warnings" not in own.json
    (told,) = by_query.json["warnings"]
    assert told == "The option 'tenant_id' is not known and is ignored; tenant is the name."


async def test_publish_that_waits_or_has_a_key_is_told(daemon: Daemon) -> None:
    """On each way to its answer; a repeat is told of itself."""
    sent = post('{"topic":"t","data":1,"Key":"k","idempotency_key":"i"}')

    first, again = [await ask(daemon.port, sent) for _ in range(2)]
    daemon.hub.must_wait = lambda topic: True
    waited = await ask(daemon.port, post('{"topic":"t","data":1,"Key":"k"}'))

    for answer in (first, again, waited):
        assert "'Key' is not known" in answer.json["warnings"][0]
    assert again.json["repeated"] is True


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"topic":"t","payload":1}', "The data is missing or null;*'payload'*data is the name."),
        ('{"topic":"t","Data":1}', "The data is missing or null;*'Data'*data is the name."),
        ('{"channel":"t","data":1}', "The topic is missing;*'channel'*topic is the name."),
        ('{"subject":"t","message":1}', "The topic is missing;*'subject'*'message'*"),
    ],
)
async def test_refusal_says_what_came_instead(daemon: Daemon, body: str, words: str) -> None:
    """The field that is missing, and the one that was perhaps meant for it."""
    answer = await ask(daemon.port, post(body))

    assert answer.status == 400
    at = 0
    for part in words.split("*"):
        at = answer.json["error"].index(part, at)


async def test_items_of_a_batch_are_told_each() -> None:
    """In a run, with a key of their own, and refused."""
    items = [
        '{"topic":"t","data":1}',
        '{"topic":"t","data":2,"Key":"k"}',
        '{"topic":"t","data":3,"Key":"k","idempotency_key":"i"}',
        '{"topic":"t","value":4}',
    ]
    line = "POST /publish/batch?Tenant=a HTTP/1.1"
    async with running() as daemon:
        answer = await ask(daemon.port, post("\n".join(items), line=line))

    plain, in_run, keyed, refused = answer.json["results"]
    assert "warnings" not in plain
    assert "'Key' is not known" in in_run["warnings"][0]
    assert in_run["offset"] == 2
    assert "'Key' is not known" in keyed["warnings"][0]
    assert "'value' is not known" in refused["error"]
    assert "'Tenant' is not known" in answer.json["warnings"][0]


async def test_frames_with_a_ref_are_told(daemon: Daemon) -> None:
    """On a publish socket, and as commands; without a ref nothing is answered."""
    url = f"{daemon.ws_url}/publish?tenant-=a"
    async with daemon.http.ws_connect(url) as socket:
        told = socket._response.headers["Clevrd-Warning"]
        await socket.send_str('{"topic":"t","data":1,"Key":"k"}')
        await socket.send_str('{"topic":"t","data":2,"Key":"k","ref":""}')
        await socket.send_str('{"topic":"t","data":3,"Key":"k","ref":7,"idempotency_key":"i"}')
        answers = [await socket.receive_json() for _ in range(2)]
    async with daemon.http.ws_connect(f"{daemon.ws_url}/ws", protocols=["clevrd.v1"]) as socket:
        await socket.send_str('{"type":"publish","topic":"t","data":4,"Key":"k","ref":8}')
        await socket.send_str('{"type":"publish","topic":"t","data":5,"ref":9,"other":1}')
        commands = [await socket.receive_json() for _ in range(2)]

    assert "'tenant-' is not known" in told
    assert [(each["ref"], each["offset"]) for each in answers] == [("", 2), (7, 3)]
    assert all("'Key' is not known" in each["warnings"][0] for each in (*answers, commands[0]))
    assert [each["offset"] for each in commands] == [4, 5]
    assert "warnings" not in commands[1]


# --- subscribing ---------------------------------------------------------------------------------

QUERY = "topic=t&polcy=drop_newest&limit=5&control=1&mine=1"
TOLD = [
    "The option 'polcy' is not known and is ignored; policy is the name.",
    "The option 'limit' is not known and is ignored; last is the name.",
]
HEADER = ", ".join(f'"{each}"' for each in TOLD)


@pytest.mark.parametrize("accept", [EVENTS, LINES])
async def test_streams_are_told_in_head_and_greeting(daemon: Daemon, accept: str) -> None:
    """An EventSource can't see the head."""
    async with await open_stream(daemon.port, accept, QUERY) as stream:
        (greeting,) = await stream.items(1)

    assert stream.head["Clevrd-Warning"] == HEADER
    assert greeting.json["warnings"] == TOLD


async def test_sockets_are_told_in_head_and_greeting(daemon: Daemon) -> None:
    """A page can't see the head."""
    async with daemon.http.ws_connect(f"{daemon.ws_url}/subscribe?{QUERY}") as socket:
        header = socket._response.headers["Clevrd-Warning"]
        greeting = await socket.receive_json()

    assert header == HEADER
    assert greeting["warnings"] == TOLD


@pytest.mark.parametrize("more", ["", "&topic=u"], ids=["one", "several"])
@pytest.mark.parametrize("is_there", [True, False], ids=["at once", "later"])
async def test_polls_are_told_in_the_head(daemon: Daemon, more: str, is_there: bool) -> None:
    """Whether they are answered at once or have to wait."""
    if is_there:
        await daemon.publish("t", 1)
    request = get(f"/subscribe?{QUERY}{more}&poll=1&timeout=5")

    asking = asyncio.create_task(ask(daemon.port, request))
    if not is_there:
        await until(lambda: daemon.hub.subscribers > 0)
        await daemon.publish("t", 1)
    answer = await asking

    assert answer.headers["clevrd-warning"] == HEADER
    assert answer.headers["cache-control"] == "no-store"
    assert len(answer.json["messages"]) == 1


async def test_poll_that_is_told_ends_with_its_client() -> None:
    """It is a subscriber as long as its client waits, and no longer."""
    async with running() as daemon:
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(get(f"/subscribe?{QUERY}&poll=1&timeout=60"))
        await until(lambda: daemon.hub.subscribers == 1)
        reset_by_peer(writer)
        await until(lambda: daemon.hub.subscribers == 0)


async def test_only_the_first_notice_is_told(daemon: Daemon) -> None:
    """Of several topics that of the first; of patterns alone the one that all were found."""
    await daemon.publish("p.1", 1)
    async with await open_stream(daemon.port, EVENTS, f"topic=u&{QUERY}") as stream:
        first, second = await stream.items(2)
    async with await open_stream(daemon.port, LINES, "pattern=p.*&polcy=x&control=1") as stream:
        items = await stream.items(3)

    assert first.json["warnings"] == TOLD
    assert "warnings" not in second.json
    assert [item.kind for item in items if "warnings" in item.json] == ["watching"]


async def test_who_is_not_told_sees_nothing_new(daemon: Daemon) -> None:
    """Neither a header nor a field, where all is spelled right."""
    query = "topic=t&last=1&control=1&mine=1"
    async with await open_stream(daemon.port, EVENTS, query) as stream:
        (greeting,) = await stream.items(1)
    (answer,) = responses(await talk(daemon.port, [upgrade_request("topic=t")], shut=True))

    assert not {"Clevrd-Warning", "clevrd-warning"} & (stream.head.keys() | answer.headers.keys())
    assert "warnings" not in greeting.json


@pytest.mark.parametrize(
    ("topic", "is_told"),
    [("demo.*", True), ("a.**", True), ("a*", False), ("demo.*.*x", False), ("*", True)],
)
async def test_topic_that_looks_like_a_pattern_is_told(
    daemon: Daemon, topic: str, is_told: bool
) -> None:
    """It may be a name all the same, so it is subscribed; on a URL and as a command."""
    async with await open_stream(daemon.port, EVENTS, f"topic={quote(topic)}") as stream:
        (greeting,) = await stream.items(1)
    async with daemon.http.ws_connect(f"{daemon.ws_url}/ws", protocols=["clevrd.v1"]) as socket:
        await socket.send_json({"type": "subscribe", "topic": topic, "ref": 1})
        subscribed = await socket.receive_json()

    for notice in (greeting.json, subscribed):
        assert notice["topic"] == topic
        assert ("warnings" in notice) == is_told
    if is_told:
        assert f"The topic {topic!r} is taken as a name" in greeting.json["warnings"][0]


async def test_commands_are_told_in_their_answer(daemon: Daemon) -> None:
    """Of a topic and of a pattern; other commands are as they were."""
    async with daemon.http.ws_connect(f"{daemon.ws_url}/ws", protocols=["clevrd.v1"]) as socket:
        await socket.send_json({"type": "subscribe", "topic": "t", "limit": 3, "ref": 1})
        await socket.send_json({"type": "subscribe", "pattern": "p.*", "buffr": 3, "ref": 2})
        await socket.send_json({"type": "ping", "ref": 3, "mine": 1})
        await socket.send_json({"type": "unsubscribe", "topic": "t", "mine": 1, "ref": 4})
        answers = [await socket.receive_json() for _ in range(4)]

    assert [each["type"] for each in answers] == ["subscribed", "watching", "pong", "unsubscribed"]
    assert "'limit' is not known" in answers[0]["warnings"][0]
    assert "'buffr' is not known" in answers[1]["warnings"][0]
    assert not any("warnings" in each for each in answers[2:])


async def test_header_is_a_list_of_strings_whatever_was_sent(daemon: Daemon) -> None:
    """RFC 8941 §3.3.3: quotes and backslashes are escaped, nothing ends the field."""
    name = quote('"L\\ast\r\nX: y"', safe="")
    starred = quote('é".*', safe="")

    by_name = await ask(daemon.port, get(f"/subscribe?topic=t&{name}=1&-last=1&poll=1&timeout=0"))
    by_value = await ask(daemon.port, get(f"/subscribe?topic={starred}&poll=1&timeout=0"))

    assert by_name.headers["clevrd-warning"].startswith("\"The option '-last' is not known")
    assert by_value.headers["clevrd-warning"].startswith("\"The topic '\\\\xe9\\\".*' is taken")
    assert "x" not in by_name.headers


# --- the client ----------------------------------------------------------------------------------


async def test_client_logs_what_the_server_warns_of(caplog: pytest.LogCaptureFixture) -> None:
    """Each sentence once, under the name of the client; and the answer has it."""
    async with running() as daemon, Client(daemon.url) as client:
        async with client.subscribe("demo.*", last=0):
            pass
        async with client.subscribe("demo.*", "u", patterns=["p.*"], last=0):
            pass
        body = b'{"topic":"t","data":1,"Key":"k"}'
        answer = await client._http.publish(body)

    sentences = [each.message for each in caplog.records if each.name == "clevrd.client"]
    assert len(sentences) == 2
    assert "taken as a name" in sentences[0]
    assert answer.warnings == (sentences[1],)
    assert {each.levelno for each in caplog.records if each.name == "clevrd.client"} == {
        logging.WARNING
    }
