"""Headers of messages: which are carried, which are refused, and frames that have some."""

from __future__ import annotations

import msgspec
import pytest

from clevrd.core.message import KeyedMessage, Message
from clevrd.core.message_headers import (
    MAX_HEADERS,
    MAX_HEADERS_BYTES,
    check_headers,
    event_headers,
    headers_of_head,
    known_headers,
    together,
    trace_of_head,
)
from clevrd.core.publish_request import (
    PublishRequest,
    content_bytes,
    decode_logged,
    decode_publish,
    with_head,
)
from clevrd.core.server_frames import (
    HEADERS_OVERHEAD_BYTES,
    FrameEncoder,
    FrameWithHeaders,
    frame_with_headers,
    headers_of,
    key_of,
    message_id_of,
    payload_of,
    payload_with_headers,
    payloads_in,
    without_shown_headers,
)
from clevrd.core.trace_context import TraceParent, is_tracestate, parse_traceparent
from clevrd.errors import InvalidRequest

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
        (many(29), "has 33 headers of an event and a trace, and 32 are allowed"),
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
        ("5", "The field headers is a number; send an object of strings"),
        ("[]", "The field headers is an array; send an object of strings"),
        ('{"ce-id":5}', "The header 'ce-id' is a number; send an object of strings"),
        ('{"ce-id":null}', "The header 'ce-id' is null; send an object of strings"),
        ('{"baggage":"a"}', "The header 'baggage' can't be carried; traceparent, tracestate"),
        ('{"CE-ID":"a"}', "The header 'CE-ID' can't be carried"),
        ('{"ce-id":"a\\u0000"}', "The header ce-id holds a control character; remove it."),
        ('{"traceparent":"x"}', "The traceparent in headers is not valid; send one as W3C"),
        ('{"tracestate":"a=1"}', "have a tracestate without a traceparent; send both, or neither"),
        (msgspec.json.encode(many(33)).decode(), "have 33 names, and 32 are allowed; send fewer"),
        (msgspec.json.encode(many(8, 600)).decode(), "bytes as JSON, and 4096 are allowed"),
    ],
    ids=[
        *("number", "array", "value", "null", "name", "case", "nul", "parent", "state"),
        *("many", "large"),
    ],
)
def test_wrong_field_is_refused_with_a_sentence(headers: str, sentence: str) -> None:
    """Each mistake is said; in a log it is left out, since other nodes count the message."""
    with pytest.raises(InvalidRequest, match=sentence):
        decode_publish(body_of(headers))

    logged = decode_logged(body_of(headers))
    assert (logged.topic, bytes(logged.data)) == ("t", b"1")


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


# --- what counts as the same ---------------------------------------------------------------------


def test_another_trace_is_the_same_message_and_another_event_is_not() -> None:
    """A client that tries again has another span; an event with another id is another event."""

    def content(headers: dict[str, str] | None, key: str | None = None) -> bytes:
        return content_bytes(PublishRequest("t", msgspec.Raw(b"1"), "i", key, None, headers))

    plain = content(None)
    assert plain == b"1"
    assert content({"traceparent": PARENT}) == content({"traceparent": OTHER}) == plain
    assert content({"ce-id": "1"}) != plain
    assert content({"ce-id": "1"}) != content({"ce-id": "2"})
    assert content({"ce-id": "1", "ce-type": "x"}) == content({"ce-type": "x", "ce-id": "1"})
    assert content({"ce-id": "1"}, "k") != content({"ce-id": "1"})
    assert content(None, "k") == b"1\0k"
    assert event_headers(None) == {}


# --- frames --------------------------------------------------------------------------------------


def frames_of(headers: bytes, data: bytes = b'{"a":{}}') -> list[tuple[bytes, FrameWithHeaders]]:
    """Return plain frames, each with the same one that has headers."""
    encode = FrameEncoder().frame
    raw = msgspec.Raw(data)
    messages = [
        Message(ID, "t", "acme", raw, "2026", 5),
        KeyedMessage(ID, "t", "acme", raw, "2026", 5, ',"headers":{"a":"b"}}'),
    ]
    return [(encode(each), FrameWithHeaders(encode(each), headers)) for each in messages]


@pytest.mark.parametrize("data", [b'{"headers":{"a":"b"}}', b'"' + b"x" * 70_000 + b'"'])
def test_frame_with_headers_is_the_plain_frame_to_who_does_not_ask(data: bytes) -> None:
    """Its bytes, joined or not, are the plain ones; its length is what it takes of the bounds."""
    headers = b'{"ce-id":",\\"headers\\":{}}"}'
    for plain, frame in frames_of(headers, data):
        assert frame == plain
        assert b"".join([frame]) == plain
        assert b"".join([frame, plain]) == plain + plain
        assert (payload_of(frame), key_of(frame)) == (payload_of(plain), key_of(plain))
        assert message_id_of(frame) == ID.encode()
        assert len(frame) == len(plain) + len(headers) + HEADERS_OVERHEAD_BYTES


@pytest.mark.parametrize("data", [b'{"headers":{"a":"b"}}', b'"' + b"x" * 70_000 + b'"'])
def test_headers_are_the_last_field_for_who_asks(data: bytes) -> None:
    """The JSON is whole, and what was saved in this form comes back as it was."""
    headers = b'{"ce-id":",\\"headers\\":{}}"}'
    for plain, frame in frames_of(headers, data):
        shown = frame_with_headers(frame)
        message = msgspec.json.decode(payload_with_headers(frame))
        back = without_shown_headers(shown)

        assert payloads_in(shown + plain) == [payload_with_headers(frame), payload_of(plain)]
        assert list(message)[-1] == "headers"
        assert message == {
            **msgspec.json.decode(payload_of(plain)),
            "headers": msgspec.json.decode(headers),
        }
        assert (back, headers_of(back)) == (plain, headers)
        assert without_shown_headers(plain) is plain
        assert frame_with_headers(plain) is plain
        assert payload_with_headers(plain) == payload_of(plain)
        assert headers_of(plain) == b""
