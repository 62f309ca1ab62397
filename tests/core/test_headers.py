"""Headers of messages: which are carried, which are refused, and frames that have some."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from fakes import FakeSink, TopicDriver, make_topic, sink_of
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.drop_strategy import DROP_NEWEST, DROP_OLDEST, LATEST, DropStrategy
from clevrd.core.message import KeyedMessage, Message, message_of
from clevrd.core.message_headers import (
    MAX_HEADERS,
    MAX_HEADERS_BYTES,
    check_headers,
    headers_of_head,
    headers_of_record,
    known_headers,
    together,
    trace_of_head,
)
from clevrd.core.publish_request import (
    PublishRequest,
    decode_logged,
    decode_plain,
    decode_publish,
    decode_socket_publish,
    with_head,
)
from clevrd.core.server_frames import (
    FrameEncoder,
    frame_with_headers,
    headers_of,
    key_of,
    message_id_of,
    payload_of,
    payloads_in,
    plain_frame_of,
    plain_payload_of,
    text_frame,
    ttl_of,
)
from clevrd.core.stream_forms import (
    FRAMES,
    FRAMES_WITH_HEADERS,
    NDJSON_BARE,
    SSE_BARE,
    StreamForm,
    with_headers,
)
from clevrd.core.subscriber import Subscriber
from clevrd.core.trace_context import TraceParent, is_tracestate, parse_traceparent
from clevrd.errors import InvalidRequest
from clevrd.handlers.commands.commands import decode_command

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
OTHER = f"00-{TRACE}-00f067aa0ba902b7-00"
EVENT = {
    "ce-specversion": "1.0",
    "ce-id": "17",
    "ce-source": "/mill",
    "ce-type": "ground",
}
ID = "msg-20261123-171935.587355"


def body_of(headers: str) -> bytes:
    """Return a publish object with ``headers`` as they are given."""
    return f'{{"topic":"t","data":1,"headers":{headers}}}'.encode()


def many(count: int, size: int = 1) -> dict[str, str]:
    """Return so many headers with values of so many characters."""
    return {f"ce-x{number}": "v" * size for number in range(count)}


# --- the trace ---------------------------------------------------------------------------------


def test_traceparent_is_read_as_w3c_has_it() -> None:
    """Its parts come apart; a later version may have more fields."""
    assert parse_traceparent(PARENT) == TraceParent(TRACE, "b7ad6b7169203331", 1)
    assert parse_traceparent(f"cc-{TRACE}-b7ad6b7169203331-00-more") is not None
    sampled, other = parse_traceparent(PARENT), parse_traceparent(OTHER)
    assert sampled is not None
    assert other is not None
    assert (sampled.is_sampled, other.is_sampled) == (True, False)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT + "-more",
        PARENT + " ",
        f"ff-{TRACE}-b7ad6b7169203331-01",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-b7ad6b7169203331",
        f"{PARENT}, {PARENT}",
        f"cc-{TRACE}-b7ad6b7169203331-00-" + "x" * 256,
        f"00-{TRACE}-b7ad6b7169203331-\u06601",
    ],
)
def test_wrong_traceparent_is_none(value: str) -> None:
    """It is not valid, so a head that has it has no trace, and a field is refused."""
    assert parse_traceparent(value) is None
    assert trace_of_head({"traceparent": value, "tracestate": "a=1"}) is None
    with pytest.raises(InvalidRequest, match="The traceparent in headers is not valid"):
        check_headers({"traceparent": value})


@pytest.mark.parametrize("value", ["a=1", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "t@v=1 , ,"])
def test_tracestate_is_carried_beside_its_traceparent(value: str) -> None:
    """A list of members, some of them empty, is passed on as it came."""
    assert is_tracestate(value)
    assert trace_of_head({"traceparent": PARENT, "tracestate": value}) == {
        "traceparent": PARENT,
        "tracestate": value,
    }


@pytest.mark.parametrize(
    "value", ["", "a", "A=1", "a=b=c", "a=\x01", "a=é", "a=" + "x" * 511, ",".join(["a=1"] * 33)]
)
def test_wrong_tracestate_is_left_out_of_a_head_and_refused_in_a_field(value: str) -> None:
    """The traceparent stays, as W3C asks for."""
    head = {"traceparent": PARENT, "tracestate": value}

    assert not is_tracestate(value)
    assert trace_of_head(head) == {"traceparent": PARENT}
    with pytest.raises(InvalidRequest, match="The tracestate in headers is not valid"):
        check_headers(head)


# --- the event ---------------------------------------------------------------------------------


def test_event_in_binary_mode_is_carried_with_its_values_decoded() -> None:
    """Values are unquoted, then percent-decoded once; other fields are no part of it."""
    head = {
        **EVENT,
        "ce-subject": "Euro%20%E2%82%AC%20%F0%9F%98%80%2525",
        "ce-comment": '"a \\"b\\" %41"',
        "ce-rate": "100%",
        "content-type": "application/json",
        "x-ce": "no",
        "traceparent": PARENT,
    }

    assert headers_of_head(head) == {
        "traceparent": PARENT,
        **EVENT,
        "ce-subject": "Euro € 😀%25",
        "ce-comment": 'a "b" A',
        "ce-rate": "100%",
    }


def test_ce_fields_of_no_event_are_nobodys() -> None:
    """Without ce-specversion it is no event, and whatever its fields hold passes as ever."""
    assert headers_of_head({"ce-id": "%FF", "ce-a_b": "x"}) is None
    assert headers_of_head({}) is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"ce-id": ""}, "has ce-specversion and no ce-id; an event has"),
        ({"ce-specversion": "one"}, "must be a version such as 1.0"),
        ({"ce-specversion": ""}, "must be a version such as 1.0"),
        ({"ce-my_own": "x"}, "'ce-my_own' is no attribute of an event"),
        ({"ce-": "x"}, "'ce-' is no attribute of an event"),
        ({"ce-subject": "%C0%A0"}, "ce-subject is not UTF-8 once percent-decoded"),
        ({"ce-subject": "caf\udce9"}, "ce-subject is not UTF-8 once percent-decoded"),
        ({"ce-subject": "a%0Ab"}, "ce-subject holds a control character"),
        ({"ce-subject": "v" * 4_096}, "bytes as JSON, and 4096 are allowed"),
        (many(29), "has 33 headers of an event, and 32 are allowed"),
    ],
    ids=[
        *("no id", "version", "no version", "name", "no name", "overlong", "latin", "lf"),
        *("large", "many"),
    ],
)
def test_half_an_event_is_refused_with_a_sentence(fields: dict[str, str], sentence: str) -> None:
    """A request that says it has an event, and has not a right one, is told what to do."""
    with pytest.raises(InvalidRequest, match=sentence):
        headers_of_head({**EVENT, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {f"ce-x{number}": "1" for number in range(MAX_HEADERS - len(EVENT))},
        {"ce-x": "x" * (MAX_HEADERS_BYTES - 120)},
    ],
    ids=["many", "large"],
)
def test_event_is_carried_without_a_trace_for_which_there_is_no_room(
    fields: dict[str, str],
) -> None:
    """A library that adds a trace to each request has no event refused that is right."""
    event = {**EVENT, **fields}
    assert headers_of_head(event) == event

    assert headers_of_head({**event, "traceparent": PARENT}) == event


def test_event_without_a_required_attribute_is_refused() -> None:
    """The sentence names the attribute, and those that each event has."""
    for name in ("ce-id", "ce-source", "ce-type"):
        head = {key: value for key, value in EVENT.items() if key != name}
        with pytest.raises(InvalidRequest, match=f"and no {name}; an event has"):
            headers_of_head(head)


# --- the field ---------------------------------------------------------------------------------


def test_field_is_read_and_none_is_none() -> None:
    """An object of strings; null and an empty one are no headers."""
    headers = {"traceparent": PARENT, "tracestate": "a=1", "ce-type": "grün"}

    assert decode_publish(body_of(msgspec.json.encode(headers).decode())).headers == headers
    assert not decode_publish(body_of("null")).headers
    assert not decode_publish(body_of("{}")).headers
    assert decode_publish(b'{"topic":"t","data":1}').headers is None


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ('{"ce-id":5}', "The header 'ce-id' is a number; send an object of strings"),
        ('{"ce-id":null}', "The header 'ce-id' is null; send an object of strings"),
        ('{"ce-id":"a\\u0000"}', "The header ce-id holds a control character; remove it."),
        ('{"traceparent":"x"}', "The traceparent in headers is not valid; send one as W3C"),
        ('{"tracestate":"a=1"}', "have a tracestate without a traceparent; send both, or neither"),
        (msgspec.json.encode(many(33)).decode(), "have 33 names, and 32 are allowed; send fewer"),
        (msgspec.json.encode(many(8, 600)).decode(), "bytes as JSON, and 4096 are allowed"),
    ],
    ids=[
        *("value", "null", "nul", "parent", "state"),
        *("many", "large"),
    ],
)
def test_wrong_field_is_refused_with_a_sentence(headers: str, sentence: str) -> None:
    """Each mistake is said; in a log it is left out, since other nodes count the message."""
    with pytest.raises(InvalidRequest, match=sentence):
        decode_publish(body_of(headers))

    logged = decode_logged(body_of(headers))
    assert (logged.topic, bytes(logged.data)) == ("t", b"1")


@pytest.mark.parametrize(
    ("headers", "kept", "sentence"),
    [
        ("5", None, "The field headers is a number and is ignored; send an object of strings"),
        ("[1]", None, "The field headers is an array and is ignored; send an object of strings"),
        ('{"X-Mine":{"a":[1]}}', None, "The header 'X-Mine' is not carried and is ignored; trace"),
        ('{"CE-ID":"a"}', None, "The header 'CE-ID' is not carried and is ignored"),
        ('{"baggage":"a","ce-id":"1"}', {"ce-id": "1"}, "The header 'baggage' is not carried"),
        ('{"baggage":7,"ce-id":"1"}', {"ce-id": "1"}, "The header 'baggage' is not carried"),
    ],
    ids=["number", "array", "object", "case", "strings", "mixed"],
)
def test_field_of_a_publishers_own_is_ignored_and_told(
    headers: str, kept: dict[str, str] | None, sentence: str
) -> None:
    """As other fields are that are not known: publishers had them before there were headers."""
    body = body_of(headers)
    command = json.dumps({"type": "publish", **json.loads(body)}).encode()

    for request in (decode_publish(body), decode_socket_publish(body), decode_command(command)):
        assert isinstance(request, PublishRequest)
        assert request.headers == kept
        (told,) = request.warnings()
        assert told.startswith(sentence)
    assert decode_logged(body).headers == kept
    assert known_headers(headers.encode()) == kept
    assert decode_plain([body, body], "t") == []


def test_what_is_told_of_headers_is_bounded() -> None:
    """A field with a thousand names is no answer of a thousand sentences."""
    names = json.dumps({f"X-{number}": "" for number in range(1_000)})

    assert len(decode_publish(body_of(names)).warnings()) == 4


def test_log_keeps_the_headers_that_are_known() -> None:
    """What a later clevrd may carry does not cost those that this one carries."""
    line = body_of(f'{{"baggage":"a","traceparent":"{PARENT}","ce-id":"1","ce-n":2}}')

    assert decode_logged(line).headers == {"traceparent": PARENT, "ce-id": "1"}
    assert known_headers(b'{"tracestate":"a=1"}') is None
    assert known_headers(b'{"ce-id":"%b"}' % (b"v" * MAX_HEADERS_BYTES)) is None
    assert known_headers(b"7") is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"topic":"t","headers":5}',
        b'{"topic":5,"data":1,"headers":5}',
        b'{"topic":"t","data":1,"headers":5',
        b'{"topic":"t","data":1,"headers":{"ce-id":"\xff"}}',
        b'{"topic":"t","data":1,"ttl_s":-1,"headers":5}',
        b'{"topic":"t","data":1,"headers":' + b"[" * 600 + b"]" * 600 + b"}",
    ],
    ids=["data", "topic", "end", "utf8", "ttl", "deep"],
)
def test_wrong_line_of_a_log_is_refused_whatever_its_headers(line: bytes) -> None:
    """Only the headers are forgiven: all else is judged as for a publish."""
    with pytest.raises(InvalidRequest):
        decode_logged(line)


def test_record_of_another_system_keeps_what_can_be_carried() -> None:
    """Kafka spells attributes with an underscore, NATS percent-encodes them; nothing is refused."""
    kafka = {
        "ce_specversion": b"1.0",
        "ce_id": b"1",
        "ce_subject": "50%25 é".encode(),
        "ce_bad-name": b"x",
        "ce_latin": b"\xe9",
        "traceparent": PARENT.encode(),
        "tracestate": b"?",
        "region": b"eu",
    }
    nats = {"Ce-Specversion": b"1.0", "ce-subject": b"50%25 %C3%A9", "ce-wrong": b"%ff"}

    assert headers_of_record(kafka, "ce_", is_encoded=False) == {
        "traceparent": PARENT,
        "ce-specversion": "1.0",
        "ce-id": "1",
        "ce-subject": "50%25 é",
    }
    assert headers_of_record(nats, "ce-", is_encoded=True) == {
        "ce-specversion": "1.0",
        "ce-subject": "50% é",
    }
    assert headers_of_record({"ce_id": b"1", "region": b"eu"}, "ce_", is_encoded=False) is None


# --- a head and a field together -----------------------------------------------------------------


def test_field_counts_more_than_the_head() -> None:
    """Both parts of a trace come from one place; of the event each header by itself."""
    of_head = {"traceparent": PARENT, "tracestate": "a=1", **EVENT}

    assert together(of_head, None) == of_head
    assert together(of_head, {"traceparent": OTHER}) == {**EVENT, "traceparent": OTHER}
    assert together(of_head, {"ce-type": "x"}) == {**of_head, "ce-type": "x"}


def test_trace_of_the_head_that_does_not_fit_is_left_out() -> None:
    """The publisher's own headers are never refused for want of room for another's trace."""
    own = many(MAX_HEADERS)

    assert together({"traceparent": PARENT}, own) == own
    with pytest.raises(InvalidRequest, match="have 36 names together, and 32 are allowed"):
        together({**EVENT, "traceparent": PARENT}, own)
    with pytest.raises(InvalidRequest, match="4096 are allowed"):
        together(EVENT, many(5, 800))


def test_head_goes_into_the_request() -> None:
    """What the endpoint adds is what a subscriber sees."""
    request = decode_publish(b'{"topic":"t","data":1,"headers":{"ce-id":"2"}}')

    assert with_head(request, {"traceparent": PARENT}).headers == {
        "traceparent": PARENT,
        "ce-id": "2",
    }


# --- frames --------------------------------------------------------------------------------------

# As a publisher would spell a value to be taken for the field's name.
HEADERS = b'{"ce-id":",\\"headers\\":{}}","traceparent":"00"}'


def frames_of(data: bytes) -> list[bytes]:
    """Return plain frames: with data alone, with a key, with a time to live, and with both."""
    encode = FrameEncoder().frame
    raw, key = msgspec.Raw(data), ',"headers":{"a":"b"}}'
    stamp = ID, "2026"
    return [
        encode(Message(*(ID, "t", "acme", raw, "2026", 5))),
        encode(KeyedMessage(*(ID, "t", "acme", raw, "2026", 5, key))),
        encode(message_of(stamp, "t", "acme", raw, 5, None, 60)),
        encode(message_of(stamp, "t", "acme", raw, 5, key, 0.5)),
    ]


@pytest.mark.parametrize("data", [b'{"headers":{"a":"b"}}', b"1", b'"' + b"x" * 70_000 + b'"'])
def test_headers_are_the_last_field_and_come_off_again(data: bytes) -> None:
    """With them the JSON is whole; without them it is what it would be, byte for byte."""
    for plain in frames_of(data):
        frame = frame_with_headers(plain, HEADERS)
        message = msgspec.json.decode(payload_of(frame))

        assert payloads_in(frame + plain) == [payload_of(frame), payload_of(plain)]
        assert list(message)[-1] == "headers"
        assert message == {
            **msgspec.json.decode(payload_of(plain)),
            "headers": msgspec.json.decode(HEADERS),
        }
        assert (plain_frame_of(frame), headers_of(frame)) == (plain, HEADERS)
        assert plain_payload_of(frame) == payload_of(plain)


@pytest.mark.parametrize("data", [b'{"headers":{"a":"b"}}', b"1"])
def test_what_a_frame_says_of_its_message_is_the_same_with_headers(data: bytes) -> None:
    """Id, key and time to live are read from frames, also behind data that looks like headers."""
    for plain in frames_of(data):
        frame = frame_with_headers(plain, HEADERS)

        assert plain_frame_of(plain) is plain
        assert (plain_payload_of(plain), headers_of(plain)) == (payload_of(plain), b"")
        assert message_id_of(frame) == ID.encode()
        assert key_of(frame) == key_of(plain)
        assert ttl_of(frame) == ttl_of(plain)
    assert [ttl_of(each) for each in frames_of(data)] == [None, None, 60.0, 0.5]


def test_frame_that_only_looks_as_if_it_had_headers_is_left_alone() -> None:
    """A file of a planned restart may be anybody's, and its frames anything."""
    odd = text_frame(b'{"a":{}}')

    assert (plain_frame_of(odd), headers_of(odd), key_of(odd)) == (odd, b"", b"")
    assert plain_payload_of(odd) == b'{"a":{}}'


# --- readers -------------------------------------------------------------------------------------


def test_readers_that_do_not_ask_cost_nothing_before_there_are_headers() -> None:
    """They read the ring's own frames until a message has headers, and are given plain ones then.

    Readers that ask read the ring's own frames all the time.
    """
    topic = make_topic()
    free_bytes = topic.portion.texts.left_bytes
    encode = FrameEncoder().frame
    plain = [
        encode(Message(ID, "t", "acme", msgspec.Raw(b"%d" % offset), "2026", offset))
        for offset in range(1, 4)
    ]
    readers = [Subscriber(FakeSink(), form=form) for form in (None, None, FRAMES_WITH_HEADERS)]
    for reader in readers:
        topic.join(reader, 0, 0.0)
        topic.mark_live(reader)

    topic.extend(1, plain[:1], 0.0)
    first = topic.begin_round(0.0)
    lagging = Subscriber(FakeSink())
    topic.join(lagging, 1, 0.0)
    topic.leave(readers[1], 0.0)
    topic.note_headers()
    topic.extend(2, [frame_with_headers(plain[1], HEADERS), plain[2]], 0.0)
    second = topic.begin_round(0.0)
    later = Subscriber(FakeSink())
    topic.join(later, 3, 0.0)
    caught_up = [topic.read(reader, 1 << 20, 0.0) for reader in (later, lagging)]

    assert first is not None
    assert (first.then, first.payload) == (None, plain[0])
    assert first.payload is plain[0]
    given = {}
    step = second
    while step is not None:
        given.update(dict.fromkeys(step.readers, step.payload))
        step = step.then
    assert given == {
        readers[0]: plain[1] + plain[2],
        readers[2]: frame_with_headers(plain[1], HEADERS) + plain[2],
    }
    assert caught_up == [plain, plain]
    for reader in (readers[0], later, lagging, readers[2]):
        topic.leave(reader, 0.0)
    assert readers[0].spelling is FRAMES
    assert not topic._texts.shared
    assert topic.portion.texts.left_bytes == free_bytes


# What a reader reads, and what its twin does. Streams are bare, so that no length of a chunk
# has to be compared.
FORMS: list[tuple[StreamForm | None, StreamForm | None]] = [
    (None, None),
    (FRAMES_WITH_HEADERS, None),
    (SSE_BARE, SSE_BARE),
    (with_headers(SSE_BARE), SSE_BARE),
    (NDJSON_BARE, NDJSON_BARE),
    (with_headers(NDJSON_BARE), NDJSON_BARE),
]
STRATEGIES = (DROP_OLDEST, DROP_NEWEST, LATEST)
OPERATIONS = st.one_of(
    st.tuples(st.just("publish"), st.lists(st.booleans(), min_size=1, max_size=6)),
    st.tuples(
        st.just("join"),
        st.tuples(st.sampled_from(FORMS), st.sampled_from(STRATEGIES), st.integers(0, 8)),
    ),
    st.tuples(st.sampled_from(["flush", "begin", "block", "unblock", "leave"]), st.integers(0, 9)),
)


class Twins:
    """Two topics with the same readers and messages, of which one has the messages' headers."""

    def __init__(self) -> None:
        self.drivers = [TopicDriver(make_topic(ring_messages=8, window=5)) for _ in range(2)]
        self.readers: list[tuple[Subscriber, Subscriber]] = []
        self._encode = FrameEncoder().frame

    def publish(self, flags: list[bool]) -> None:
        """Append messages, of which some have headers in the first topic."""
        first = self.drivers[0].topic.head + 1
        frames: list[list[bytes]] = [[], []]
        for offset, has_headers in enumerate(flags, first):
            key = "abc"[offset % 3]
            message = KeyedMessage(*(ID, "t", "acme", msgspec.Raw(b"{}"), "2026", offset, key))
            plain = self._encode(message)
            headers = b'{"ce-id":"%d"}' % offset
            frames[0].append(frame_with_headers(plain, headers) if has_headers else plain)
            frames[1].append(plain)
        if any(flags) and not self.drivers[0].topic.has_headers:
            self.drivers[0].topic.note_headers()
        for driver, own in zip(self.drivers, frames, strict=True):
            driver.topic.extend(first, own, 0.0)

    def join(
        self, forms: tuple[StreamForm | None, StreamForm | None], strategy: DropStrategy, last: int
    ) -> None:
        """Join a reader of each topic, of which the second never asks for headers."""
        pair = [
            driver.join(Subscriber(FakeSink(), strategy, form=form), last)
            for driver, form in zip(self.drivers, forms, strict=True)
        ]
        self.readers.append((pair[0], pair[1]))

    def do(self, what: str, number: int) -> None:
        """Carry out ``what`` in both topics alike, for one of the readers or for all."""
        if what in ("flush", "begin"):
            for driver in self.drivers:
                driver.flush() if what == "flush" else driver.begin()
        elif self.readers:
            for driver, reader in zip(
                self.drivers, self.readers[number % len(self.readers)], strict=True
            ):
                if what == "leave":
                    driver.topic.leave(reader, 0.0)
                elif what == "block" and not reader.is_blocked:
                    driver.block(reader)
                elif what == "unblock" and reader.is_blocked:
                    driver.unblock(reader)


@given(st.lists(OPERATIONS, min_size=5, max_size=40))
def test_headers_change_nothing_for_anybody_but_those_who_ask(
    operations: list[tuple[str, Any]],
) -> None:
    """Over random schedules of readers that join, lag and leave: the same bytes as without any.

    Readers that ask have the same messages, each with its own headers.
    """
    twins = Twins()
    for what, value in operations:
        if what == "publish":
            twins.publish(value)
        elif what == "join":
            twins.join(*value)
        else:
            twins.do(what, value)
    for number in range(len(twins.readers)):
        twins.do("unblock", number)
    twins.do("flush", 0)

    for given_headers, plain in twins.readers:
        received, wanted = sink_of(given_headers).received, sink_of(plain).received
        form = given_headers.form
        if form is None or not form.has_headers:
            assert received == wanted
        elif form is FRAMES_WITH_HEADERS:
            frames = [text_frame(each) for each in payloads_in(received)]
            assert b"".join(map(plain_frame_of, frames)) == wanted
            assert all(own_headers(payload_of(frame)) for frame in frames)
        else:
            lines = [each for each in received.split(b"\n") if b"offset" in each]
            assert HEADERS_IN.sub(b"", received) == wanted
            assert all(own_headers(line.removeprefix(b"data: ")) for line in lines)
    for driver in twins.drivers:
        for reader in list(driver.topic.live) + list(driver.topic.lagging):
            driver.topic.leave(reader, 0.0)
    assert not twins.drivers[0].topic._texts.shared


HEADERS_IN = re.compile(rb',"headers":\{"ce-id":"[0-9]+"\}')


def own_headers(message: bytes) -> bool:
    """Return whether a message has no headers, or its own."""
    found = msgspec.json.decode(message)
    own = {"ce-id": str(found["offset"])}
    return bool(found.get("headers", own) == own)
