"""Frames, read back by an independent parser."""

from __future__ import annotations

import json

import msgspec
import pytest
from fakes import frames_in
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Close, Frame, Opcode

from clevrd.core.message import KeyedMessage, Message, message_of
from clevrd.core.message_ids import MessageIds
from clevrd.core.server_frames import (
    SPLICED_BYTES,
    FrameEncoder,
    close_frame,
    ping_frame,
    pong_frame,
    text_frame,
)

BOUNDARIES = [125, 126, 127, 2_047, 2_048, 65_535, 65_536, 65_537]


def parse(data: bytes) -> Frame:
    """Return the one frame that ``data`` is, as a client reads it: whole and not masked."""
    (frame,) = frames_in(data)
    assert frame.fin
    return frame


def message(data: bytes = b"1", **fields: object) -> Message:
    """Return a message with ``data`` as it is."""
    values: dict[str, object] = {
        "id": "msg-20260131-120000.000042",
        "topic": "orders",
        "tenant_id": "default-tenant",
        "timestamp": "2026-01-31T12:00:00.000042Z",
        "offset": 42,
    }
    return Message(data=msgspec.Raw(data), **{**values, **fields})  # type: ignore[arg-type]


def padded_to(size: int) -> Message:
    """Return a message whose JSON has ``size`` bytes."""
    bare = len(parse(FrameEncoder().frame(message(b'""'))).data)
    return message(b'"' + b"x" * (size - bare) + b'"')


def test_message_reads_as_documented() -> None:
    """The fields, their order and their types are what clients rely on."""
    frame = parse(FrameEncoder().frame(message(b'{"price":1.50}')))

    assert frame.opcode is Opcode.TEXT
    assert frame.data == (
        b'{"id":"msg-20260131-120000.000042","topic":"orders","tenant_id":"default-tenant",'
        b'"data":{"price":1.50},"timestamp":"2026-01-31T12:00:00.000042Z","offset":42}'
    )


@pytest.mark.parametrize(
    "data", [b"1.50", b'"\\u0041\\/"', '"grüße 😀\u2028"'.encode(), b'{ "a" :\n[ 1 ,\t2 ] }']
)
def test_data_is_sent_byte_for_byte(data: bytes) -> None:
    """The publisher's JSON is not parsed, sorted, rounded or escaped anew."""
    frame = parse(FrameEncoder().frame(message(data)))

    assert b'"data":' + data + b',"timestamp"' in frame.data


@given(topic=st.text(st.characters(exclude_categories=["Cs"])), offset=st.integers(1, 1 << 53))
def test_names_are_escaped(topic: str, offset: int) -> None:
    """Whatever is in a name, the frame stays one JSON object that says it."""
    frame = parse(FrameEncoder().frame(message(topic=topic, offset=offset)))

    assert json.loads(bytes(frame.data)) == {
        "id": "msg-20260131-120000.000042",
        "topic": topic,
        "tenant_id": "default-tenant",
        "data": 1,
        "timestamp": "2026-01-31T12:00:00.000042Z",
        "offset": offset,
    }


@pytest.mark.parametrize("size", [size for size in BOUNDARIES if size > 127])
def test_header_fits_every_size_of_message(size: int) -> None:
    """Across each boundary of the length's encoding the frame is read back whole."""
    frame = FrameEncoder().frame(padded_to(size))

    assert len(parse(frame).data) == size


@pytest.mark.parametrize("size", [0, 1, *BOUNDARIES])
def test_text_frame_fits_every_size(size: int) -> None:
    """The same for a payload that is there already; the smallest are control frames' business."""
    payload = b"x" * size

    frame = text_frame(payload)

    assert parse(frame).opcode is Opcode.TEXT
    assert parse(frame).data == payload


@given(size=st.integers(0, 70_000))
def test_header_is_the_shortest(size: int) -> None:
    """RFC 6455 §5.2: the minimal number of bytes must be used to encode the length."""
    header = len(text_frame(b"x" * size)) - size

    assert header == (2 if size < 126 else 4 if size < 65_536 else 10)


def test_encoder_is_used_again_after_any_message() -> None:
    """A large message, or one that can't be encoded, leaves nothing behind for the next."""
    encoder = FrameEncoder()
    small = encoder.frame(message())

    encoder.frame(padded_to(65_536))
    with pytest.raises(UnicodeEncodeError):
        encoder.frame(message(topic="\ud800"))

    assert encoder.frame(message()) == small


def test_joined_frames_are_read_one_by_one() -> None:
    """A round is frames joined: the receiver finds each message in it."""
    frames = [FrameEncoder().frame(message(offset=offset)) for offset in range(1, 4)]

    read = frames_in(b"".join(frames))

    assert [json.loads(bytes(frame.data))["offset"] for frame in read] == [1, 2, 3]


@pytest.mark.parametrize("payload", [b"", b"x", b"\xff" * 125])
def test_pings_and_pongs_carry_their_payload(payload: bytes) -> None:
    """RFC 6455 §5.5.3: a pong has the bytes of the ping it answers."""
    ping, pong = parse(ping_frame(payload)), parse(pong_frame(payload))

    assert (ping.opcode, ping.data) == (Opcode.PING, payload)
    assert (pong.opcode, pong.data) == (Opcode.PONG, payload)


def test_close_carries_code_and_reason() -> None:
    """Both are read back by a client."""
    assert Close.parse(parse(close_frame(4101, "circuit_open")).data) == Close(4101, "circuit_open")
    assert Close.parse(parse(close_frame(1012)).data) == Close(1012, "")


@given(reason=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_close_reason_is_cut_on_a_character(reason: str) -> None:
    """A control frame holds 125 bytes; what is left of a longer reason is still UTF-8."""
    frame = parse(close_frame(1001, reason))
    shown = Close.parse(frame.data).reason

    assert reason.startswith(shown)
    assert len(frame.data) <= 125
    assert shown == reason or len(frame.data) > 125 - 4


@pytest.mark.parametrize("size", [SPLICED_BYTES - 1, SPLICED_BYTES, 70_000, 1_000_000])
@pytest.mark.parametrize("key", [None, 'k\u0000é"'])
def test_large_data_is_put_in_its_place(size: int, key: str | None) -> None:
    """However it is put together, the frame is what encoding all of it makes."""
    data = b'"%b"' % (b"x" * (size - 2))
    plain = message(data, topic='t\u0000\u2028"', tenant_id="té")
    fields = {name: getattr(plain, name) for name in Message.__struct_fields__}
    wanted = plain if key is None else KeyedMessage(**fields, key=key)

    frame = FrameEncoder().frame(wanted)

    assert frame == text_frame(msgspec.json.encode(wanted))


@given(
    st.lists(
        st.sampled_from(
            [
                b"1",
                b'"a"',
                b'{ "a" :\n[1]}',
                b'"\\n"',
                b'"%b"' % (b"x" * 1_022),
                b'"%b"' % (b"y" * 900),
            ]
        ),
        min_size=1,
        max_size=100,
    ),
    st.sampled_from(["plain", "keyed", "expiring"]),
)
def test_frames_of_several_are_those_of_each(data: list[bytes], kind: str) -> None:
    """Whatever their number, their sizes and the line feeds in them."""
    stamp = ("msg-20260131-120000.000042", "2026-01-31T12:00:00.000042Z")
    messages: list[Message] = []
    for number, each in enumerate(map(msgspec.Raw, data)):
        if kind == "plain":
            messages.append(message(bytes(each), offset=number))
        elif kind == "keyed":
            messages.append(KeyedMessage(stamp[0], "t", "d", each, stamp[1], number, "k\n"))
        else:
            messages.append(message_of(stamp, "t", "d", each, number, "k", 1.5))
    encoder = FrameEncoder()

    assert encoder.frames(messages) == [encoder.frame(each) for each in messages]


@given(
    st.lists(
        st.sampled_from(
            [b"1", b'"a"', b'{"a":[1]}', b'"%b"' % (b"x" * 1_900), b'"%b"' % (b"y" * 70_000)]
        ),
        min_size=1,
        max_size=20,
    ),
    st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=10),
    st.integers(0, 10_000_000),
    st.sampled_from([1, 8, 700]),
    st.sampled_from([0, 5_000]),
)
def test_frames_that_are_put_together_are_those_that_are_encoded(
    data: list[bytes], name: str, offset: int, step: int, ahead_us: int
) -> None:
    """Byte for byte, for names, sizes and offsets of every kind."""
    first_us = 1_769_860_800_000_042
    wall_us = first_us - ahead_us
    parts = MessageIds().spell_alike(first_us, len(data), step, wall_us)
    data = data[: len(parts.digits)]
    stamps = MessageIds().spell_run(first_us, len(data), step, wall_us)
    encoder = FrameEncoder()

    found = encoder.plain_frames(name, name + '"', data, offset, parts)

    assert found == [
        encoder.frame(Message(stamp[0], name, name + '"', msgspec.Raw(each), stamp[1], number))
        for number, (each, stamp) in enumerate(zip(data, stamps, strict=True), offset)
    ]
