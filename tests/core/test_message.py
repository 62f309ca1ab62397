"""Decoding publishes, every refusal with its sentence, and ids that only rise."""

from __future__ import annotations

import contextlib
import json
import re
from datetime import UTC, datetime, timedelta

import fakes  # noqa: F401  # it sets how much hypothesis tries
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core import message_ids
from clevrd.core.message_ids import MessageIds, id_at, rfc3339, us_of_id
from clevrd.core.names import MAX_TOPIC_BYTES, check_topic
from clevrd.core.publish_request import (
    MAX_REF_CHARS,
    PublishRequest,
    decode_plain,
    decode_plain_socket,
    decode_publish,
    decode_socket_publish,
)
from clevrd.errors import InvalidRequest

NESTED = 100_000
# 2026-01-31 12:00:00 UTC.
NOON_US = 1_769_860_800 * 1_000_000
HOUR_US = 3_600 * 1_000_000
ID = re.compile(r"msg-\d{8}-\d{6}\.\d{6}")


def body_of(data: bytes) -> bytes:
    """Return a publish of ``data``, which is put in as it is."""
    return b'{"topic":"t","data":' + data + b"}"


# --- what passes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"0",
        b"-0",
        b"1.50",
        b"1E+400",
        b"123456789012345678901234567890.000",
        b"true",
        b"false",
        b'""',
        b'"null"',
        b'"\\u0041\\/"',
        b'"\\ud83d\\ude00"',
        '"grüße 😀 \u2028"'.encode(),
        b"[]",
        b"{}",
        b'{"b":1,"a":2,"b":3}',
        b'{ "a" :\n[ 1 ,\t2 ] }',
    ],
)
def test_data_is_kept_byte_for_byte(data: bytes) -> None:
    """No number is rounded, no key sorted, no escape and no inner whitespace changed."""
    assert bytes(decode_publish(body_of(data)).data) == data


def test_whitespace_around_data_is_not_data() -> None:
    """What stands between the tokens of the request belongs to the request."""
    request = decode_publish(b' {\r\n"topic" : "t" ,\n"data" :\t [1,\n 2] \n} \n')

    assert bytes(request.data) == b"[1,\n 2]"


def test_unknown_fields_are_ignored() -> None:
    """A request of a later version, or with a publisher's own notes, is a good request."""
    request = decode_publish(
        b'{"x":[{"y":null}],"topic":"t","keys":7,"data":1,"ref":{},"Idempotency_Key":""}'
    )

    assert (request.topic, bytes(request.data)) == ("t", b"1")


def test_last_of_a_repeated_name_counts() -> None:
    """RFC 8259 §4 leaves this open; browsers and Python take the last one, and so do we."""
    request = decode_publish(b'{"topic":"a","data":null,"topic":"b","data":2}')

    assert (request.topic, bytes(request.data)) == ("b", b"2")


def test_escapes_in_a_topic_are_read() -> None:
    """The name is what the JSON string means, not how it was written."""
    assert decode_publish(b'{"topic":"\\u0061\\/b","data":1}').topic == "a/b"


@pytest.mark.parametrize("topic", ["a", " ", "a:b", "grüße", "a\u2028b", "x" * 255, "é" * 127])
def test_names_that_can_be_topics(topic: str) -> None:
    """1 to 255 bytes of UTF-8, and any character that is no control character."""
    check_topic(topic)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello", id="not_json"),
        pytest.param(b'\xef\xbb\xbf{"topic":"t","data":1}', id="byte_order_mark"),
        pytest.param(b'{"topic":"t","data":1', id="truncated"),
        pytest.param(b'{"topic":"t","data":{"a":"b', id="truncated_in_string"),
        pytest.param(b'{"topic":"t","data":1}{}', id="something_after_it"),
        pytest.param(b'["topic","data"]', id="array"),
        pytest.param(b'"topic"', id="string"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"data":1}', id="topic_missing"),
        pytest.param(b'{"Topic":"t","data":1}', id="topic_in_capitals"),
        pytest.param(b'{"topic":"","data":1}', id="topic_empty"),
        pytest.param(b'{"topic":null,"data":1}', id="topic_null"),
        pytest.param(b'{"topic":7,"data":1}', id="topic_number"),
        pytest.param(b'{"topic":["t"],"data":1}', id="topic_array"),
        pytest.param(b'{"topic":"' + b"x" * 256 + b'","data":1}', id="topic_256_bytes"),
        pytest.param(b'{"topic":"%b","data":1}' % ("é" * 128).encode(), id="topic_256"),
        pytest.param(b'{"topic":"a\\nb","data":1}', id="topic_newline"),
        pytest.param(b'{"topic":"a\\u0000","data":1}', id="topic_nul"),
        pytest.param(b'{"topic":"a\\u007f","data":1}', id="topic_del"),
        pytest.param(b'{"topic":"a\xc2\x85","data":1}', id="topic_c1"),
        pytest.param(b'{"topic":"\\ud800","data":1}', id="topic_lone_surrogate"),
        pytest.param(b'{"topic":"t"}', id="data_missing"),
        pytest.param(b'{"topic":"t","data":null}', id="data_null"),
        pytest.param(b'{"topic":"t","data": null }', id="data_null_with_spaces"),
        pytest.param(b'{"topic":"t","data":1,"data":null}', id="data_null_at_last"),
        pytest.param(b'{"topic":"t","data":}', id="data_nothing"),
        pytest.param(b'{"topic":"t","data":"\xff"}', id="bad_utf8_in_data"),
        pytest.param(b'{"topic":"\xff","data":1}', id="bad_utf8_in_topic"),
        pytest.param(b'{"topic":"t","data":1,"\xff":1}', id="bad_utf8_in_name"),
        pytest.param(b'{"topic":"t","data":1,"x":"\xff"}', id="bad_utf8_in_ignored"),
        pytest.param(b'{"topic":"t","data":"\xc0\xaf"}', id="overlong_utf8"),
        pytest.param(b'{"topic":"t","data":"\xed\xa0\x80"}', id="surrogate_in_utf8"),
        pytest.param(b'{"topic":"t","data":"\xf4\x90\x80\x80"}', id="beyond_unicode"),
        pytest.param(body_of(b"[" * NESTED + b"]" * NESTED), id="nested_data"),
        pytest.param(body_of(b"[" * NESTED), id="nested_and_truncated"),
        pytest.param(b"[" * NESTED, id="nested_only"),
        pytest.param(b'{"topic":"t","data":1,"x":' + b"[" * NESTED, id="nested_ignored"),
    ],
)
def test_bad_request_is_refused(body: bytes) -> None:
    """Each is a 400 with one sentence, short however long the body."""
    with pytest.raises(InvalidRequest) as refusal:
        decode_publish(body)

    assert refusal.value.status == 400
    assert str(refusal.value).endswith(".")
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize(
    "data",
    [
        *(b"01", b"1.", b".5", b"-", b"+1", b"1e", b"0x1", b"NaN", b"-Infinity", b"nul", b"True"),
        *(b"'a'", b'"\\q"', b'"\\u12"', b'"\\ud800"', b'"a\nb"', b'"\t"', b'"\x00"'),
        *(b"[1,]", b"[1 2]", b"[}", b'{"a":1,}', b'{"a"}', b"{a:1}", b"1//x", b"/**/1", b"1 2"),
    ],
)
def test_data_that_is_no_json_is_refused(data: bytes) -> None:
    """Though it is only passed on, data is checked: it becomes part of everybody's message."""
    with pytest.raises(InvalidRequest):
        decode_publish(body_of(data))


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_no_control_character_in_a_topic(code: int) -> None:
    """C0, DEL and C1, each of them, anywhere in the name."""
    with pytest.raises(InvalidRequest, match="control character"):
        check_topic(f"a{chr(code)}b")


def test_refusal_names_what_was_wrong() -> None:
    """The sentence says what to send instead."""
    with pytest.raises(InvalidRequest, match=r"not valid UTF-8 at byte 21"):
        decode_publish(body_of(b'"\xff"')[:-1])
    with pytest.raises(InvalidRequest, match="256 bytes; 255 are allowed"):
        check_topic("é" * 128)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "The body is empty; send {"),
        (b" \n", "The body is empty; send {"),
        (b"hello", "The body is not JSON at byte 0; send {"),
        (b'{"topic":"t","data":1', "The body is not complete JSON; send {"),
        (b' [{"topic":"t"}]', "The body is an array, not an object; send {"),
        (b"-1", "The body is a number, not an object; send {"),
        (b'{"data":1}', "The topic is missing; send {"),
        (b'{"topic":false,"data":1}', "The topic is a boolean; send {"),
        (b'{"topic":{"a":1},"data":1}', "The topic is an object; send {"),
        (b'{"topic":1,"data":tru}', "The body is not JSON at byte "),
        (
            b'{"topic":1,"data":' + b"[" * NESTED,
            "The body is nested too deeply (512 levels are allowed), flatten it; send",
        ),
        (b"\xef\xbb\xbf", "The body begins with a byte order mark"),
        (b'\xef\xbb\xbf{"topic":"t","data":1}', "The body begins with a byte order mark"),
        (
            b'{"topic":"\\ud800","data":1}',
            "The body has \\ud800 at byte 10, which is half a surrogate",
        ),
        (b'{"topic":"\\uDFFF","data":1}', "The body has \\uDFFF at byte 10, which is half"),
        (b'{"topic":"t","data":"\\ud800"}', "The body has \\ud800 at byte 21, which is half"),
        (
            b'{"topic":"t","data":"\\ud83d\\u0041"}',
            "The body has \\ud83d at byte 21, which is half",
        ),
        (b'{"topic":"t","data":"\\ud83d\\ude00\\ude00"}', "The body has \\ude00 at byte 33, which"),
        (b'{"topic":"t","data":{"\\\\ud800":"\\udbff"}}', "The body has \\udbff at byte 32, which"),
        (b'{"topic":"t","\\ud800":1,"data":1}', "The body has \\ud800 at byte 14, which is half"),
        (b'{"topic":"t",data:"\\ud800"}', "The body is not JSON at byte 13"),
        (b'{"topic":"t","data":"\\ud8"}', "The body is not JSON at byte"),
        (b'{"topic":"t","data":"\\\\ud800', "The body is not complete JSON"),
        (b'{"topic":"t","data":1,"ref":1.5}', "The ref is a number; send a string of at most 128"),
        (b'{"topic":"t","data":1,"ref":[]}', "The ref is an array; send a string of at most 128"),
        (b'{"topic":"t","idempotency_key":7,"ref":7}', "The idempotency_key is a number; send a"),
        (b'{"topic":1,"topic":"t","data":1}', "A field of the body can't have the value it has"),
    ],
)
def test_refusal_says_in_plain_words_what_to_do(body: bytes, says: str) -> None:
    """What is wrong, by the names the publisher knows, and what to send instead."""
    with pytest.raises(InvalidRequest) as refusal:
        decode_socket_publish(body)

    sentence = str(refusal.value)
    assert sentence.startswith(says)
    assert "`" not in sentence
    assert "$" not in sentence


@given(body=st.binary(max_size=60))
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    """No input makes the decoder raise anything else."""
    with contextlib.suppress(InvalidRequest):
        decode_publish(body)


# Python's json writes NaN and Infinity, which RFC 8259 §6 doesn't know.
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)


@given(
    topic=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60),
    data=JSON,
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_any_json_passes_unchanged(
    topic: str, data: object, indent: int | None, ascii_only: bool
) -> None:
    """What the standard library writes is accepted, and the data comes out as it went in."""
    spelled = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    if re.search(r"(?i)\\ud[89a-f]|[\ud800-\udfff]", spelled) or data is None:
        return
    body = f'{{"topic": {json.dumps(topic)}, "data": {spelled}}}'.encode()

    request = decode_publish(body)

    assert request.topic == topic
    assert bytes(request.data) == spelled.encode()


@given(data=JSON, cut=st.integers(0, 100), place=st.integers(0, 100), byte=st.integers(0, 255))
def test_what_passes_is_json(data: object, cut: int, place: int, byte: int) -> None:
    """Data from a damaged request, if it passes at all, is JSON to the standard library too."""
    body = bytearray(
        json.dumps({"topic": "t", "data": data}, ensure_ascii=False), "utf-8", "replace"
    )
    body[place % len(body)] = byte
    del body[len(body) - cut % 3 :]

    try:
        request = decode_publish(bytes(body))
    except InvalidRequest:
        return

    assert json.loads(bytes(request.data)) is not None
    assert 1 <= len(request.topic.encode()) <= MAX_TOPIC_BYTES


# --- ids and timestamps ----------------------------------------------------------------------


def test_id_and_timestamp_spell_the_clock() -> None:
    """Both are UTC, to the microsecond, with all their zeros."""
    assert MessageIds().next(NOON_US + 42) == (
        "msg-20260131-120000.000042",
        "2026-01-31T12:00:00.000042Z",
    )
    assert MessageIds().next(0) == ("msg-19700101-000000.000000", "1970-01-01T00:00:00.000000Z")
    assert rfc3339(NOON_US - 1) == "2026-01-31T11:59:59.999999Z"


def test_ties_move_on_by_a_microsecond() -> None:
    """A burst within one tick of the clock still has rising ids, across a second's end too."""
    ids = MessageIds()

    made = [ids.next(NOON_US - 2)[0] for _ in range(4)]

    assert made == [
        "msg-20260131-115959.999998",
        "msg-20260131-115959.999999",
        "msg-20260131-120000.000000",
        "msg-20260131-120000.000001",
    ]


def test_clock_set_back_leaves_ids_rising_and_times_true() -> None:
    """After the clock went back an hour, ids creep on and timestamps follow the clock."""
    ids = MessageIds()
    before = ids.next(NOON_US)

    after = [ids.next(NOON_US - HOUR_US + tick) for tick in range(3)]
    later = ids.next(NOON_US + 1_000_000)

    assert before[0] < after[0][0] < after[1][0] < after[2][0] < later[0]
    assert [time for _, time in after] == [f"2026-01-31T11:00:00.00000{tick}Z" for tick in range(3)]
    assert later == ("msg-20260131-120001.000000", "2026-01-31T12:00:01.000000Z")


def test_long_burst_keeps_its_timestamps_within_a_millisecond() -> None:
    """However many messages share a tick, their timestamps don't run away from the clock."""
    ids = MessageIds()

    stamps = [datetime.fromisoformat(ids.next(NOON_US)[1]) for _ in range(5_000)]

    noon = datetime.fromtimestamp(NOON_US / 1e6, UTC)
    assert all(abs(stamp - noon) <= timedelta(milliseconds=1) for stamp in stamps)


@given(
    st.integers(0, 3 * 10**6),
    st.lists(st.tuples(st.integers(1, 1_200), st.integers(-2_000, 10**6)), min_size=1, max_size=3),
)
def test_run_of_ids_is_that_of_each(start_us: int, runs: list[tuple[int, int]]) -> None:
    """Over the end of a second, with a clock that stands still, is set back, or leaps."""
    each, together = MessageIds(), MessageIds()
    wall_us = NOON_US + start_us
    for count, step_us in runs:
        wall_us += step_us

        found = together.next_run(count, wall_us)

        assert found == [each.next(wall_us) for _ in range(count)]
        assert together.last_us == each.last_us


@given(st.integers(0, 10**6), st.integers(0, 3_000), st.integers(1, 300), st.integers(1, 64))
def test_run_that_was_counted_is_spelled_as_each(
    start_us: int, ahead_us: int, count: int, step: int
) -> None:
    """Ids some microseconds apart that begin at the clock's time or run ahead of it."""
    wall_us = NOON_US + start_us
    first_us = wall_us + ahead_us
    ids = range(first_us, first_us + count * step, step)

    found = MessageIds().spell_run(first_us, count, step, wall_us)

    spell = MessageIds().spell
    assert found == [spell(us, wall_us) for us in ids]


def test_ids_ahead_of_the_clock_have_their_time_spelled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large record's ids run ahead; a time costs as much as the rest of many messages."""
    spelled: list[int] = []

    def counted(wall_us: int) -> str:
        spelled.append(wall_us)
        return rfc3339(wall_us)

    monkeypatch.setattr(message_ids, "rfc3339", counted)

    stamps = MessageIds().spell_run(NOON_US, 4_000, 1, NOON_US)

    assert len(stamps) == 4_000
    assert spelled == [NOON_US]


@given(steps=st.lists(st.one_of(st.integers(-3, 3), st.integers(-2 * HOUR_US, 2 * HOUR_US))))
def test_ids_rise_whatever_the_clock_does(steps: list[int]) -> None:
    """Strictly rising as strings, each of the documented form, each time near the clock's."""
    ids = MessageIds()
    wall_us = NOON_US
    previous = ""

    for step in steps:
        wall_us += step
        message_id, timestamp = ids.next(wall_us)
        shown = datetime.fromisoformat(timestamp)
        true = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=wall_us)

        assert ID.fullmatch(message_id)
        assert message_id > previous
        assert timedelta() <= shown - true <= timedelta(milliseconds=1)
        previous = message_id


@given(
    st.from_regex(r"msg-(19[7-9]|[2-9][0-9]{2})[0-9]{5}-[0-9]{6}\.[0-9]{6}", fullmatch=True),
    st.data(),
)
def test_id_is_a_time_also_where_its_digits_are_none(message_id: str, data: st.DataObject) -> None:
    """Ids are compared as text, so a 13th month is a time at the end of its year."""
    us = us_of_id(message_id)

    near_us = data.draw(
        st.integers(max(0, us - 3), min(us + 3, us_of_id("msg-99991231-235959.999999")))
    )
    assert (id_at(near_us) <= message_id) == (near_us <= us)


@given(st.integers(0, 4 * 10**15))
def test_id_is_read_as_it_is_spelled(us: int) -> None:
    """In both directions, and by a spelling that goes on from any other time."""
    spell = MessageIds().spell
    spell(NOON_US, NOON_US)

    assert us_of_id(id_at(us)) == us
    assert spell(us, us) == (id_at(us), rfc3339(us))
    # An id that has run ahead of the clock has the clock's time.
    assert spell(us + 2_000, us) == (id_at(us + 2_000), rfc3339(us))


# --- several at once ---------------------------------------------------------------------------

ITEMS = [
    b'{"topic":"t","data":1}',
    b' {"data" : {"topic":"u", "key":"\\u0041"} ,"topic":"t"}\r',
    '{"topic":"t","data":"grüße 😀"}'.encode(),
    b'{"topic":"t","data":[1],"key":"k"}',
    b'{"topic":"t","data":2,"ttl_s":1.5}',
    b'{"topic":"t","data":2,"idempotency_key":"a"}',
    b'{"topic":"u","data":1}',
    b'{"topic":"t","data":null}',
    b'{"topic":"t"}',
    b'{"topic":"t","data":1,"key":""}',
    b'{"topic":"t","data":1,"ttl_s":0}',
    b'{"topic":"t","data":1,"Key":"k"}',
    b'{"topic":"t","data":"\xff"}',
    b'{"topic":"t","data":"' + b"x" * 2_000 + b'"}',
    # One publish over two lines, and two on one.
    b'{"topic":"t","data":[1',
    b",2]}",
    b'{"topic":"t","data":1}{"topic":"t","data":2}',
    b'{"topic":"t","data":1},{"topic":"t","data":2}',
    b"",
]


@given(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=8))
def test_several_at_once_are_what_each_is_by_itself(items: list[bytes]) -> None:
    """As far as they go: those that have to be looked at singly are left to that."""
    found = decode_plain(items, "t")

    assert found == [decode_publish(each) for each in items[: len(found)]]
    assert all(each.topic == "t" and each.idempotency_key is None for each in found)


def test_several_plain_ones_are_decoded_at_once() -> None:
    """With keys, times to live and any language, up to the first of another topic."""
    assert len(decode_plain(ITEMS[:5], "t")) == 5
    assert len(decode_plain([*ITEMS[:5], ITEMS[6], ITEMS[0]], "t")) == 5
    assert decode_plain([*ITEMS[:5], b"no JSON"], "t") == []
    assert [type(each) for each in decode_plain(ITEMS[:2], "t")] == 2 * [PublishRequest]


@pytest.mark.parametrize("ref", [b"7", b'"r"', b'"' + b"r" * (MAX_REF_CHARS + 1) + b'"'])
def test_refs_of_several_at_once_are_as_of_each(ref: bytes) -> None:
    """One that is too long is left to the decoder of a single one, which says so."""
    frame = b'{"topic":"t","data":1,"ref":%b}' % ref
    found = decode_plain_socket([frame, frame], "t")

    if len(ref) > MAX_REF_CHARS:
        assert found == []
    else:
        assert found == 2 * [decode_socket_publish(frame)]
