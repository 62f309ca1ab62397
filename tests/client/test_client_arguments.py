"""What is passed to the client's calls, and what its data can be: taken as it is meant, or refused
with a sentence where the call is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec
import pytest
from daemons import running
from fake_server import FakeServer, Feed, message

from clevrd.client import (
    BadData,
    BadRecord,
    BadUrl,
    Client,
    ClientError,
    Message,
    Outgoing,
    Position,
)
from clevrd.client.values import data_json
from clevrd.client.wire import read_message

URL = "http://127.0.0.1:1"
AWARE = datetime(2026, 1, 31, 13, 0, 0, 5, tzinfo=timezone(timedelta(hours=1)))


# --- where a subscription begins, and what it reads ---


@pytest.mark.parametrize(
    ("given", "query"),
    [
        ({"since": timedelta(minutes=5)}, {"since": "300s"}),
        ({"since": timedelta(milliseconds=1500)}, {"since": "2s"}),
        ({"since": timedelta(0)}, {"since": "0s"}),
        ({"since": timedelta(days=20_000)}, {"since": "20000d"}),
        ({"since": timedelta.max}, {"since": "999999999d"}),
        ({"since": AWARE}, {"since": "2026-01-31T12:00:00.000005Z"}),
        ({"since": AWARE.replace(microsecond=0)}, {"since": "2026-01-31T12:00:00Z"}),
        ({"position": "e:1"}, {"epoch": "e", "offset": "1"}),
        ({"positions": {"t": "e:1"}}, {"epoch": "e", "offset": "1"}),
        ({"positions": {"t": Position("e", 1)}}, {"epoch": "e", "offset": "1"}),
    ],
)
async def test_beginnings_are_taken_as_they_are_meant(
    given: dict[str, Any],
    query: dict[str, str],
    server: FakeServer,
    new_client: Callable[..., Client],
) -> None:
    """Python's own times, and positions as they were stored."""
    async with new_client() as client, client.subscribe("t", **given):
        pass

    assert dict(server.requests[0].query) == {"topic": "t", **query}


async def test_daemon_takes_the_times_that_are_made() -> None:
    """An hour ago is an hour ago, however it is said."""
    async with running() as daemon, Client(daemon.url) as client:
        await client.publish("t", 1)
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        for since in (timedelta(hours=1), hour_ago, timedelta(days=20_000), timedelta.max):
            async with client.subscribe("t", since=since) as items:
                # The topic is younger than that, which is told as a gap.
                assert [await anext(items), (await anext(items)).topic][1] == "t"


async def test_topics_may_be_a_list(server: FakeServer, new_client: Callable[..., Client]) -> None:
    """Of one topic, or of several; it is not the name of a topic."""
    async with new_client() as client, client.subscribe(["a"]), client.subscribe(topic="a"):
        pass
    several = Client(URL).subscribe(["a", "b"], "c", patterns=("p.*",))

    assert [dict(request.query) for request in server.requests] == [{"topic": "a"}] * 2
    assert several._feed.name == "a,b,c,p.*"


@pytest.mark.parametrize(
    ("topics", "options", "error", "words"),
    [
        ((), {}, ValueError, "Name a topic or a pattern"),
        (([],), {}, ValueError, "Name a topic or a pattern"),
        ((5,), {}, TypeError, "A topic is text, not an int"),
        ((None,), {}, TypeError, "A topic is text, not None"),
        ((b"t",), {}, TypeError, "A topic is text, not a bytes"),
        (({"t": 1},), {}, TypeError, "A topic is text, not a dict"),
        (([["t"]],), {}, TypeError, "A topic is text, not a list"),
        (("",), {}, ValueError, "The topic is empty"),
        (("x" * 256,), {}, ValueError, "256 bytes; 255 are allowed"),
        (("a\n",), {}, ValueError, "control character"),
        (("\ud800",), {}, ValueError, "lone surrogate"),
        (("t", "t"), {}, ValueError, "'t' is named twice"),
        (("t", ["t"]), {}, ValueError, "'t' is named twice"),
        ((), {"patterns": "a.*"}, ValueError, r"write patterns=\['a.\*'\]"),
        ((), {"patterns": 5}, TypeError, "A pattern is text, not an int"),
        ((), {"patterns": [None]}, TypeError, "A pattern is text, not None"),
        ((), {"patterns": ["ord*"]}, ValueError, "a star stands for a whole word"),
        ((), {"patterns": ["orders"]}, ValueError, "A pattern has a star in it"),
        ("t", {"policy": 5}, TypeError, "policy is text, not an int"),
        ("t", {"policy": ""}, ValueError, "policy is one of drop_oldest,"),
        ("t", {"policy": "drop"}, ValueError, "policy is one of drop_oldest,"),
        ("t", {"buffer": 0}, ValueError, "buffer is 1 or more, not 0"),
        ("t", {"buffer": "5"}, TypeError, "buffer is a whole number, not a str"),
        ("t", {"buffer": True}, TypeError, "buffer is a whole number, not a bool"),
        ("t", {"last": -1}, ValueError, "last is 0 or more, not -1"),
        ("t", {"last": 1.5}, TypeError, "last is a whole number, not a float"),
        ("t", {"since": 300}, TypeError, 'since is text such as "5m", a timedelta or a datetime'),
        ("t", {"since": date(2026, 1, 31)}, TypeError, "a datetime with a time zone, not a date"),
        ("t", {"since": datetime(2026, 1, 31)}, ValueError, "without a time zone; give it one"),
        ("t", {"since": timedelta(-1)}, ValueError, "how long ago"),
        (
            "t",
            {"since": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))},
            ValueError,
            "beyond what a time can be",
        ),
        ("t", {"since": ""}, ValueError, 'since is empty; it is like "5m"'),
        ("t", {"since": "\ud800"}, ValueError, "since holds half a surrogate pair"),
        ("t", {"position": "\ud800:1"}, ValueError, "is no position; it is like f7502dc3:41"),
        ("t", {"position": Position("\ud800", 1)}, ValueError, "is no position; it is like"),
        ("t", {"position": "e:" + "9" * 5000}, ValueError, "'e:9+...' is no position; it is like"),
        ("t", {"position": "x" * 5000}, ValueError, "'x+...' is no position; it is like"),
        ("t", {"position": f"e:{2**63}"}, ValueError, "is no position; it is like"),
        (
            "t",
            {"position": Position("e", 10**5000)},
            ValueError,
            "offset is beyond what one can be",
        ),
        ("t", {"positions": {"t": "\ud800:1"}}, ValueError, "is no position; it is like"),
        ("t", {"positions": {"\ud800": "e:1"}}, ValueError, "lone surrogate"),
        ("t", {"positions": {"": "e:1"}}, ValueError, "The topic is empty"),
        ("t", {"buffer": 10**5000}, ValueError, "buffer is at most 9223372036854775807"),
        ("t", {"last": 2**63}, ValueError, "last is at most 9223372036854775807"),
        ("t", {"last": -(10**5000)}, ValueError, "last is 0 or more, not less"),
        ("t", {"position": "e"}, ValueError, "'e' is no position; it is like f7502dc3:41"),
        ("t", {"position": ""}, ValueError, "'' is no position"),
        ("t", {"position": 5}, TypeError, "A position is text like f7502dc3:41, not an int"),
        ("t", {"position": Position("e", -1)}, ValueError, "'e:-1' is no position"),
        ("t", {"position": Position("", 1)}, ValueError, "':1' is no position"),
        ("t", {"position": Position(5, "x")}, TypeError, "text for its epoch"),  # type: ignore[arg-type]
        ("t", {"positions": "e:1"}, TypeError, "positions are by topic"),
        ("t", {"positions": {5: "e:1"}}, TypeError, "A topic of positions is text, not an int"),
        ("t", {"positions": {"t": None}}, TypeError, "A position is text like"),
        ("t", {"position": "e:1", "last": 1}, ValueError, "give one of them"),
        ("ab", {"position": "e:1"}, ValueError, "give positions, by topic"),
        ("t", {"subscriber_id": 5}, TypeError, "subscriber_id is text, not an int"),
        (
            "t",
            {"subscriber_id": ""},
            ValueError,
            "The subscriber_id is empty; give one of 1 to 128",
        ),
        ("t", {"subscriber_id": "x" * 129}, ValueError, "has 129 bytes; 128 are allowed"),
        ("t", {"subscriber_id": "a\n"}, ValueError, "holds a control character"),
        ("t", {"subscriber_id": "\ud800"}, ValueError, "holds a lone surrogate"),
        ("t", {"headers": {"a": "b"}}, TypeError, "headers is True or False, not a dict"),
        ("t", {"reconnect": 1}, TypeError, "reconnect is True or False, not an int"),
    ],
)
def test_subscription_that_can_not_be_is_refused_when_it_is_made(
    topics: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Not in the loop that reads it, nor in a task."""
    with pytest.raises(error, match=words):
        Client(URL).subscribe(*topics, **options)


def test_positions_of_topics_that_are_not_read_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What was stored may hold topics that nobody wants any more; a misspelt one looks the same."""
    client = Client(URL)
    begun = {"t": "e:1", "p.a": "e:1"}

    client.subscribe("t", patterns=["p.*"], positions=begun)
    client.subscribe("t", positions={"t": "e:1"})
    assert caplog.messages == []
    client.subscribe("t", positions=begun)
    client.subscribe("t", patterns=["p.*"], positions={**begun, "zz": "e:1", "p.a.b": "e:1"})

    assert caplog.messages == [
        "positions holds 1 topic that is not subscribed, 'p.a'; it is ignored, so check its name.",
        "positions holds 2 topics that are not subscribed, such as 'zz'; they are ignored, so check"
        " their names.",
    ]


# --- clients ---


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"url": None}, TypeError, "The URL is text, not None"),
        ({"url": b"http://a"}, TypeError, "The URL is text, not a bytes"),
        ({"url": "localhost"}, BadUrl, "The URL must be like http://127.0.0.1:8080"),
        ({"url": "ftp://a"}, BadUrl, "The URL must be like"),
        ({"url": "http://a:99999"}, BadUrl, "The URL must be like"),
        ({"url": "http://"}, BadUrl, "The URL must be like"),
        ({"url": "unix:s"}, BadUrl, "is absolute"),
        ({"tenant": 5}, TypeError, "The tenant is text, not an int"),
        ({"tenant": ""}, BadUrl, "The tenant is empty; leave it out"),
        ({"tenant": "a\r\nb"}, BadUrl, "printable ASCII"),
        ({"headers": [("a", "b")]}, TypeError, "a dict of names and values, not a list"),
        ({"headers": []}, TypeError, "a dict of names and values, not a list"),
        ({"headers": {"": "b"}}, ValueError, "'' can't be the name of a header"),
        ({"headers": {"a": 5}}, TypeError, "Names and values of headers are text"),
        ({"headers": {"a b": "c"}}, ValueError, "'a b' can't be the name of a header"),
        ({"headers": {"a": "b\r\nc: d"}}, ValueError, "holds what no header can"),
        ({"headers": {"a": "\ud800"}}, ValueError, "holds what no header can"),
        ({"tls": True}, TypeError, "tls is an ssl.SSLContext, not a bool"),
        ({"retry_for_s": "1"}, TypeError, "retry_for_s is a number of seconds, not a str"),
        ({"retry_for_s": -1}, ValueError, "0 or more, not -1"),
        ({"retry_for_s": -(10**5000)}, ValueError, "0 or more, not less"),
        ({"retry_for_s": math.nan}, ValueError, "0 or more, not nan"),
    ],
)
def test_client_that_can_not_be_is_refused_when_it_is_made(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Before there is anything that could fail later."""
    with pytest.raises(error, match=words):
        Client(**{"url": URL, **arguments})


def test_time_of_retries_is_as_long_as_it_is_said() -> None:
    """Also beyond what a float holds; no publish meets that as an error of Python."""
    assert Client(URL, retry_for_s=10**400)._retry_for_s == math.inf
    assert Client(URL, retry_for_s=60)._retry_for_s == 60


@pytest.mark.parametrize("url", ["http://a..b:8080", f"http://{'x' * 64}.org", "http://[::1"])
async def test_host_that_can_not_be_is_a_bad_url(url: str) -> None:
    """Of the resolver's own errors none comes out."""
    with pytest.raises(ClientError) as caught:
        async with Client(url) as client:
            await client.publish("t", 1)

    assert caught.type is BadUrl


@pytest.mark.parametrize("number", [0, -1, True, "5", 1.5, None])
async def test_counts_are_whole_numbers(number: Any) -> None:
    """One or more, of the bounds of a batch and of a publish stream."""
    client = Client(URL)

    for name in ("max_items", "max_bytes"):
        with pytest.raises((TypeError, ValueError), match=f"{name} is"):
            await client.publish_batch([], **{name: number})
    with pytest.raises((TypeError, ValueError), match="max_in_flight is"):
        client.publisher(max_in_flight=number)


# --- messages ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"topic": None}, "The topic is text, not None"),
        ({"topic": ["t"]}, "The topic is text, not a list"),
        ({"topic": "\ud800"}, "The topic holds half a surrogate pair"),
        ({"key": 5}, "key is text, not an int"),
        ({"key": "\udfff"}, "key holds half"),
        ({"key": ""}, "key is empty; leave it out for a message without one"),
        ({"idempotency_key": b"x"}, "idempotency_key is text, not a bytes"),
        ({"idempotency_key": "\ud800"}, "idempotency_key holds half"),
        ({"idempotency_key": ""}, "idempotency_key is empty; leave it out to have one drawn"),
        ({"headers": [("a", "b")]}, "headers are a dict of names and values, not a list"),
        ({"headers": {"a": 5}}, "Names and values of headers are text; 'a' is not"),
        ({"headers": {"\udfff": "b"}}, "A header's name holds half a surrogate pair"),
        ({"headers": {"ce-a": "\ud800"}}, "The header 'ce-a' holds half a surrogate pair"),
        ({"ttl_s": "60"}, "ttl_s is a number of seconds, not a str"),
        ({"ttl_s": True}, "ttl_s is a number of seconds, not a bool"),
        ({"ttl_s": timedelta(1)}, "ttl_s is a number of seconds, not a timedelta"),
        *(
            (
                {"ttl_s": ttl_s},
                "The ttl_s must be a number of seconds from 0.001 to 100000000; leave",
            )
            for ttl_s in (0, -1, 0.0009, 100_000_001, math.inf, math.nan, 10**400)
        ),
    ],
)
async def test_fields_of_a_message_are_what_they_can_be(
    arguments: dict[str, Any], words: str, server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """For one message, for a batch and for a stream alike; nothing is sent."""
    given = {"key": None, "idempotency_key": None, "ttl_s": None, **arguments}
    topic = given.pop("topic", "t")

    async with new_client() as client:
        for publish in (client.publish, client.publish_raw):
            with pytest.raises((TypeError, ValueError), match=words):
                await publish(topic, "1", **given)
        with pytest.raises(BadRecord, match=f"Item 1 of the batch: {words}"):
            await client.publish_batch([("t", 1), Outgoing(topic, 1, **given)])
        publisher = client.publisher()
        for publish_one in (publisher.publish, publisher.publish_raw):
            with pytest.raises((TypeError, ValueError), match=words):
                await publish_one(topic, "1", **given)

    assert (server.bodies, server.batches) == ([], [])


@pytest.mark.parametrize("raw", ['{"a": "ä"}', '{"a": "ä"}'.encode()])
@pytest.mark.parametrize("kind", [lambda raw: raw, bytearray, memoryview])
async def test_raw_data_may_be_text(
    raw: Any, kind: Any, server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """JSON is text before it is bytes; it is sent as it stands."""
    given = kind(raw) if isinstance(raw, bytes) else raw

    async with new_client() as client:
        await client.publish_raw("t", given)

    assert server.data == ['{"a": "ä"}'.encode()]


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        ({"a": 1}, TypeError, r"JSON as bytes or text, not a dict; publish\(\) takes Python"),
        (None, TypeError, "not None"),
        ("{", BadRecord, "Not JSON: it ends before the value does"),
        ("[1}", BadRecord, r"Not JSON: expected ',' or ']' \(byte 2\)"),
        ('"\\ud800"', BadRecord, r"Not Unicode: \\ud800 at byte 1 is half a surrogate pair"),
        ('["\\ud83d\\ude00\\\\", "\\uDC00 and more"]', BadRecord, r"\\uDC00 at byte 20 is half"),
        ('"\\ud800\\ud800 and more"', BadRecord, r"\\ud800 at byte 1 is half"),
        ('"\\\\ud800', BadRecord, "Not JSON: it ends before the value does"),
        ('"\ud800"', BadRecord, "Not Unicode at character 1"),
        (b'"\xff"', BadRecord, "Not UTF-8 at byte 1"),
        ("NaN", BadRecord, "Not JSON"),
        ('1,"key":"x"', BadRecord, "Not JSON"),
    ],
)
async def test_raw_data_is_one_json_value(raw: Any, error: type[Exception], words: str) -> None:
    """Anything else is refused before it is put between other bytes."""
    with pytest.raises(error, match=words):
        await Client(URL).publish_raw("t", raw)


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        (None, TypeError, "not None"),
        ("t", TypeError, "not a str"),
        ({"t": 1}, TypeError, "not a dict"),
        (["t"], BadRecord, r"Item 0 of the batch: An item is a pair \(topic, data\)"),
        ([("t",)], BadRecord, "Item 0 of the batch: An item is a pair"),
        ([("t", 1), ("t", math.inf)], BadRecord, "Item 1 of the batch: data holds inf"),
        ([("t", b"1")], BadRecord, "Item 0 of the batch: data is bytes"),
        ([("t", object())], BadRecord, "Item 0 of the batch: data has no JSON form"),
    ],
)
async def test_batch_of_what_is_no_item_is_refused(
    items: Any, error: type[Exception], words: str, new_client: Callable[..., Client]
) -> None:
    """The sentence says which item it is."""
    async with new_client() as client:
        with pytest.raises(error, match=words):
            await client.publish_batch(items)


async def test_batch_that_fails_in_the_middle_tells_what_was_published(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """Items are taken as they are sent, so earlier requests have been answered."""
    async with new_client() as client:
        with pytest.raises(BadRecord, match="Item 3") as caught:
            await client.publish_batch([("t", 0), ("t", 1), ("t", 2), ("t", math.nan)], max_items=2)

    assert [result.offset for result in caught.value.results] == [1, 2]


# --- data ---


class Point(msgspec.Struct):
    """A struct with a number."""

    x: float


@dataclass
class Spot:
    """A dataclass with a number."""

    x: float


class Level(Enum):
    """An enumeration of numbers."""

    NONE = math.nan


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (math.inf, "data holds inf, which JSON has no form for"),
        (-math.inf, "data holds -inf,"),
        (math.nan, "data holds nan,"),
        ([None, {"a": [1, math.nan]}], r"data holds nan at \[1\].a\[1\],"),
        ((1, math.inf), r"at \[1\],"),
        ({math.inf}, r"at \[0\],"),
        (Point(math.nan), "at x,"),
        (Spot(math.nan), "at x,"),
        ([Point(1.0), Spot(math.inf)], r"at \[1\].x,"),
        ({"a": {"b": Point(math.inf)}}, "at a.b.x,"),
        ([Level.NONE], r"data holds nan at \[0\]"),
        (Decimal("NaN"), r"data holds Decimal\('NaN'\)"),
        ({"price": Decimal("-Infinity")}, r"data holds Decimal\('-Infinity'\) at price"),
        (Decimal("sNaN"), "data holds Decimal"),
        ({math.inf: 1}, "data holds the key inf; use text for it"),
        ({-math.inf: None}, "data holds the key -inf;"),
        ([{"a": {math.nan: 1}}], r"data holds the key nan at \[0\].a;"),
        ({Decimal("Infinity"): 1}, r"data holds the key Decimal\('Infinity'\);"),
        ({Decimal(1): [math.inf]}, r"data holds inf at 1\[0\],"),
        ("\ud800", "half a surrogate pair"),
        ({"a": ["\udfff"]}, "half a surrogate pair"),
        (LOOP, "nested too deeply, or holds itself"),
        ([10**5000], "data has no JSON form: Exceeds the limit"),
    ],
)
def test_data_that_json_has_no_form_for_is_refused(data: Any, words: str) -> None:
    """It would be null, or an error of a library; the sentence says where it is."""
    with pytest.raises(BadRecord, match=words):
        data_json(data)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [None, "NaN", "Infinity", "null", {"null": "-Infinity"}],
        {"a": 1e308, "b": -0.0, "c": 2**80, "d": Decimal("1.5"), "e": [None]},
        {"raw": msgspec.Raw(b"null"), "x": None},
        [b"x", None],
        {Decimal(1): None, 2.5: "inf", 3: "nan", UUID(int=4): None, date(2026, 1, 31): None},
        {"inf": 1, "-inf": 2, "nan": 3},
    ],
)
def test_data_that_only_looks_like_it_is_taken(data: Any) -> None:
    """Words, nothing at all, and large numbers are data."""
    assert data_json(data) == msgspec.json.encode(data)


@pytest.mark.parametrize("data", [object(), {"a": object()}, {(1, 2): 3}])
def test_data_without_a_json_form_is_a_type_error(data: Any) -> None:
    """In a sentence."""
    with pytest.raises(TypeError, match=r"^data has no JSON form: .*\.$"):
        data_json(data)


def with_data(raw: bytes) -> Message:
    """Return a message with this data, as it is received."""
    return read_message(b'{"id":"m","topic":"t","data":%b,"offset":7}' % raw, "e")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"1e999", "a number beyond a float's range"),
        (b'{"a":[-1e999]}', "a number beyond a float's range - at `$[...][0]`"),
        (b"9" * 5000, "an integer of more than 4,300 digits"),
        (b"[-" + b"9" * 5000 + b"]", "an integer of more than 4,300 digits - at `$[0]`"),
        # Python 3.14 goes as deep as the stack is.
        (b"[" * 500_000 + b"]" * 500_000, "nested too deeply"),
    ],
)
def test_data_that_python_has_no_value_for_is_named(raw: bytes, words: str) -> None:
    """The daemon takes it, so readers meet it; its JSON is there all the same."""
    if raw.startswith(b"[["):
        # As a message of an older daemon; no struct is asked to skip it here.
        item = with_data(b"0")
        msgspec.structs.force_setattr(item, "_data", msgspec.Raw(raw))
    else:
        item = with_data(raw)

    with pytest.raises(BadData) as caught:
        _ = item.data

    assert str(caught.value) == (
        f"The data of message 7 of 't' holds what Python has no value for ({words}); raw has its"
        " JSON."
    )
    assert isinstance(caught.value, ClientError)
    assert item.raw == raw
    with pytest.raises(BadData, match="is not of that kind"):
        item.decode(float)


def test_data_at_the_bounds_is_had() -> None:
    """Integers beyond 64 bits, 512 levels, pairs of surrogates and small numbers are values."""
    deep = b"[" * 512 + b"]" * 512

    assert with_data(b"9" * 4300).data == int("9" * 4300)
    assert with_data(b"1e-999").data == 0.0
    assert with_data(b'"\\ud83d\\ude00"').data == "\U0001f600"
    assert json.dumps(with_data(deep).data, separators=(",", ":")).encode() == deep


def test_data_of_another_kind_is_told_as_before() -> None:
    """It is msgspec's error too, since `decode` has said so from its beginning."""
    with pytest.raises(msgspec.ValidationError, match=r"Expected `int`, got `str` - at `\$\[0\]`"):
        with_data(b'["x"]').decode(list[int])


async def test_reader_goes_on_behind_data_that_it_can_not_have(
    server: FakeServer, new_client: Callable[..., Client]
) -> None:
    """One message that nobody can decode ends no subscription."""
    poison = message(1).replace(b'{"n":1}', b"1e999")
    server.feeds.append(Feed([poison, message(2)]))
    had: list[Any] = []

    async with new_client() as client, client.subscribe("t") as items:
        async for item in items:
            assert isinstance(item, Message)
            try:
                had.append(item.data)
            except BadData:
                had.append(item.raw)
            if len(had) == 2:
                break

    assert had == [b"1e999", {"n": 2}]
