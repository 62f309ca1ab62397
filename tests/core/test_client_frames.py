"""The strict reader of what subscribers send: RFC 6455's own examples, every header, any split."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from fakes import frames_in
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.frames import Close

from clevrd.core.client_frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    MAX_FRAMES_PER_FEED,
    PING,
    PONG,
    TEXT,
    ClientFrames,
    FrameError,
    close_code_of,
)

FIN = 0x80
MASK = b"\x37\xfa\x21\x3d"
MAX = 4_096

# What a run of bytes came to: the messages, and the code it is to be closed with if any.
Outcome = tuple[list[tuple[int, bytes]], int | None]


def masked(payload: bytes, mask: bytes = MASK) -> bytes:
    """Return ``payload`` as it looks on the wire (RFC 6455 §5.3)."""
    return bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))


def frame(opcode: int, payload: bytes = b"", fin: int = FIN, mask: bytes = MASK) -> bytes:
    """Return one masked frame with the shortest header."""
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 65_536:
        length = b"\xfe" + struct.pack(">H", size)
    else:
        length = b"\xff" + struct.pack(">Q", size)
    return bytes((fin | opcode,)) + length + mask + masked(payload, mask)


def outcome(parts: Iterable[bytes], max_bytes: int = MAX) -> Outcome:
    """Return what a reader makes of ``parts``, fed one after the other."""
    reader = ClientFrames(max_bytes)
    messages: list[tuple[int, bytes]] = []
    for part in parts:
        try:
            messages += reader.feed(part)
        except FrameError as error:
            return messages + error.completed, error.close_with
    return messages, None


def code_for(data: bytes, max_bytes: int = MAX) -> int | None:
    """Return the code that ``data`` is closed with, None when it is not."""
    return outcome([data], max_bytes)[1]


def one_by_one(data: bytes) -> list[bytes]:
    """Return ``data`` as its single bytes."""
    return [data[index : index + 1] for index in range(len(data))]


# --- what is read ----------------------------------------------------------------------------

HELLO = bytes.fromhex("818537fa213d7f9f4d5158")


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        pytest.param(HELLO, [(TEXT, b"Hello")], id="rfc_5_7_masked_text"),
        pytest.param(
            bytes.fromhex("898537fa213d7f9f4d5158"), [(PING, b"Hello")], id="rfc_5_7_ping"
        ),
        pytest.param(
            bytes.fromhex("8a8537fa213d7f9f4d5158"), [(PONG, b"Hello")], id="rfc_5_7_pong"
        ),
        pytest.param(
            frame(TEXT, b"Hel", fin=0) + frame(CONTINUATION, b"lo"),
            [(TEXT, b"Hello")],
            id="rfc_5_7_fragmented",
        ),
        pytest.param(frame(BINARY, b"\xff" * 256), [(BINARY, b"\xff" * 256)], id="rfc_5_7_256"),
        pytest.param(frame(TEXT), [(TEXT, b"")], id="empty_text"),
        pytest.param(frame(PING), [(PING, b"")], id="empty_ping"),
        pytest.param(frame(PING, b"x" * 125), [(PING, b"x" * 125)], id="longest_ping"),
        pytest.param(frame(TEXT, b"x" * MAX), [(TEXT, b"x" * MAX)], id="longest_text"),
        pytest.param(frame(TEXT, b"abc", mask=b"\0\0\0\0"), [(TEXT, b"abc")], id="zero_mask"),
        pytest.param(frame(CLOSE), [(CLOSE, b"")], id="close_without_code"),
        pytest.param(
            frame(CLOSE, b"\x03\xe8" + b"x" * 123),
            [(CLOSE, b"\x03\xe8" + b"x" * 123)],
            id="longest_close",
        ),
        pytest.param(
            frame(TEXT, "grü".encode()[:3], fin=0)
            + frame(PING, b"between")
            + frame(CONTINUATION, b"", fin=0)
            + frame(PONG)
            + frame(CONTINUATION, "grü".encode()[3:]),
            [(PING, b"between"), (PONG, b""), (TEXT, "grü".encode())],
            id="control_frames_between_fragments_that_split_a_character",
        ),
        pytest.param(b"", [], id="nothing"),
    ],
)
def test_frames_are_read(data: bytes, messages: list[tuple[int, bytes]]) -> None:
    """Whole, and a byte at a time, what was sent is what is read."""
    assert outcome([data]) == (messages, None)
    assert outcome(one_by_one(data)) == (messages, None)


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 255, 256, 65_535, 65_536, 100_000])
def test_every_length_is_read(size: int, opcode: int) -> None:
    """Across each boundary of the length's encoding, with the payload unmasked right."""
    payload = (bytes(range(128)) * (size // 128 + 1))[:size]

    messages, code = outcome([frame(opcode, payload)], max_bytes=100_000)

    assert (messages, code) == ([(opcode, payload)], None)


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_frames_of_every_length_are_read_one_behind_the_other(opcode: int) -> None:
    """However many a read brings: each length is read where its own frame begins."""
    sizes = [0, 125, 126, 127, 255, 256, 257, 511, 512, 4_095, 65_280, 65_535, 65_536, 300, 1]
    payloads = [(b"%d." % size * size)[:size] for size in sizes]
    data = b"".join(frame(opcode, payload) for payload in payloads)

    whole = outcome([data], max_bytes=100_000)
    in_two = outcome([data[:70_000], data[70_000:]], max_bytes=100_000)

    assert whole == in_two == ([(opcode, payload) for payload in payloads], None)


def test_nothing_is_read_after_a_close() -> None:
    """RFC 6455 §5.5.1: no more is sent after a close; if it is, it is not looked at."""
    reader = ClientFrames(MAX)

    messages = reader.feed(frame(CLOSE, b"\x03\xe9") + b"\xff" * 100)

    assert messages == [(CLOSE, b"\x03\xe9")]
    assert reader.feed(frame(PING)) == []
    assert close_code_of(messages[0][1]) == 1001


def test_reader_without_anything_held_back_is_idle() -> None:
    """Only then may it be thrown away and a new one be used for the next bytes."""
    reader = ClientFrames(MAX)
    whole, fragment = frame(PING, b"x"), frame(TEXT, b"", fin=0)
    seen = [reader.is_idle]

    for part in (whole, whole[:1], whole[1:], fragment, frame(CONTINUATION), frame(CLOSE)):
        reader.feed(part)
        seen.append(reader.is_idle)

    assert seen == [True, True, False, True, False, True, False]


def test_frames_of_every_kind_are_counted() -> None:
    """The budget counts empty fragments too, so that they can't be sent for ever."""
    reader = ClientFrames(MAX)

    reader.feed(frame(TEXT, fin=0) + frame(CONTINUATION, fin=0) * 50 + frame(PING))

    assert reader.frames_seen == 52


# --- what is refused -------------------------------------------------------------------------


def test_every_first_byte() -> None:
    """Of the 256, only whole and fragmented data and whole control frames may begin."""
    good = {FIN | opcode for opcode in (TEXT, BINARY, CLOSE, PING, PONG)} | {TEXT, BINARY}

    alone = {first: code_for(bytes((first,))) for first in range(256)}
    with_rest = {first: code_for(bytes((first, 0x80)) + MASK) for first in range(256)}

    assert alone == {first: None if first in good else 1002 for first in range(256)}
    assert with_rest == alone


def test_every_first_byte_within_a_message() -> None:
    """Between fragments only the next fragment or a control frame may come."""
    good = {FIN | opcode for opcode in (CONTINUATION, CLOSE, PING, PONG)} | {CONTINUATION}
    begun = frame(TEXT, b"x", fin=0)

    codes = {first: code_for(begun + bytes((first,))) for first in range(256)}

    assert codes == {first: None if first in good else 1002 for first in range(256)}


def test_every_second_byte() -> None:
    """Unmasked is refused as soon as it shows, and so is a control frame over 125 bytes."""
    text = {second: code_for(bytes((FIN | TEXT, second))) for second in range(256)}
    ping = {second: code_for(bytes((FIN | PING, second))) for second in range(256)}

    assert text == {second: None if second >= 0x80 else 1002 for second in range(256)}
    assert ping == {second: None if 0x80 <= second <= 0xFD else 1002 for second in range(256)}


@pytest.mark.parametrize("size", [MAX + 1, 65_536, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_declared_length_over_the_limit(size: int) -> None:
    """It is closed with 1009 once the length is read, before mask or payload."""
    length = (
        b"\xfe" + struct.pack(">H", size) if size < 65_536 else b"\xff" + struct.pack(">Q", size)
    )

    codes = [code_for(first + length) for first in (b"\x81", b"\x82", b"\x01")]

    assert codes == [1009, 1009, 1009]
    assert code_for(b"\x82" + length[:-1]) is None


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_whole_message_over_the_limit(opcode: int) -> None:
    """It is as large as it was before a read brought all of it at once; what precedes it counts."""
    fits, too_big = frame(opcode, b"x" * MAX), frame(opcode, b"x" * (MAX + 1))

    assert outcome([fits + too_big + fits]) == ([(opcode, b"x" * MAX)], 1009)


def test_fragments_over_the_limit_together() -> None:
    """The limit is the message's: each fragment may be small."""
    parts = [frame(BINARY, b"x" * 1_000, fin=0), *[frame(CONTINUATION, b"x" * 1_000, fin=0)] * 4]

    messages, code = outcome(parts)

    assert (messages, code) == ([], 1009)
    assert outcome(parts[:4]) == ([], None)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"\x82\xfe" + struct.pack(">H", 0), id="0_in_two_bytes"),
        pytest.param(b"\x82\xfe" + struct.pack(">H", 125), id="125_in_two_bytes"),
        pytest.param(b"\x82\xff" + struct.pack(">Q", 125), id="125_in_eight_bytes"),
        pytest.param(b"\x82\xff" + struct.pack(">Q", 65_535), id="65535_in_eight_bytes"),
    ],
)
def test_length_must_be_the_shortest(header: bytes) -> None:
    """RFC 6455 §5.2: the minimal number of bytes must be used, of whichever kind the frame is."""
    whole = header[1:] + MASK + bytes(70_000)

    codes = [code_for(first + header[1:], 100_000) for first in (b"\x81", b"\x82", b"\x01")]
    whole_codes = [code_for(first + whole, 100_000) for first in (b"\x81", b"\x82", b"\x01")]

    assert codes == whole_codes == [1002] * 3


def test_every_close_code() -> None:
    """What may be sent by RFC 6455 §7.4 and its registry is read; the rest is a fault."""
    may_be_sent = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}

    codes = {code: code_for(frame(CLOSE, struct.pack(">H", code))) for code in range(65_536)}

    assert {code for code, answer in codes.items() if answer is None} == may_be_sent
    assert set(codes.values()) == {None, 1002}


def test_close_with_half_a_code() -> None:
    """RFC 6455 §5.5.1: a close has no body, or a code of two bytes first."""
    assert code_for(frame(CLOSE, b"\x03")) == 1002


BAD_UTF8 = [
    pytest.param(b"\xff", id="no_such_byte"),
    pytest.param(b"\x80", id="continuation_alone"),
    pytest.param(b"\xc3", id="cut"),
    pytest.param(b"\xc0\xaf", id="overlong_2"),
    pytest.param(b"\xe0\x80\xaf", id="overlong_3"),
    pytest.param(b"\xf0\x80\x80\xaf", id="overlong_4"),
    pytest.param(b"\xed\xa0\x80", id="high_surrogate"),
    pytest.param(b"\xed\xbf\xbf", id="low_surrogate"),
    pytest.param(b"\xf4\x90\x80\x80", id="beyond_unicode"),
    pytest.param(b"\xf8\x88\x80\x80\x80", id="five_bytes"),
]


@pytest.mark.parametrize("text", BAD_UTF8)
def test_text_that_is_no_utf8(text: bytes) -> None:
    """RFC 6455 §8.1: 1007, in one frame, in fragments, and in a close's reason."""
    assert code_for(frame(TEXT, b"ok" + text)) == 1007
    assert code_for(frame(TEXT, text[:1], fin=0) + frame(CONTINUATION, text[1:])) == 1007
    assert code_for(frame(CLOSE, b"\x03\xe8" + text)) == 1007
    assert code_for(frame(BINARY, text)) is None
    assert code_for(frame(PING, text)) is None


def test_too_many_frames_at_once() -> None:
    """A read full of empty frames is closed with 1008 before it has held the loop for long."""
    messages, code = outcome([frame(PING) * 40_000])

    assert (len(messages), code) == (MAX_FRAMES_PER_FEED, 1008)
    assert outcome([frame(PING) * MAX_FRAMES_PER_FEED])[1] is None


def test_million_empty_fragments_hold_nothing() -> None:
    """Endless continuations are the budget's to end; until then they take no memory."""
    reader = ClientFrames(MAX)
    reader.feed(frame(TEXT, fin=0))
    part = frame(CONTINUATION, fin=0) * MAX_FRAMES_PER_FEED

    for _ in range(50):
        reader.feed(part)

    assert reader.frames_seen == 50 * MAX_FRAMES_PER_FEED + 1
    assert (len(reader._buffer), len(reader._fragments)) == (0, 0)


def test_what_came_before_a_fault_is_not_lost() -> None:
    """The error says what was whole, however the bytes arrived."""
    data = frame(PING, b"1") + HELLO + b"\x83" + frame(PING, b"2")

    assert outcome([data]) == outcome(one_by_one(data)) == ([(PING, b"1"), (TEXT, b"Hello")], 1002)


def test_fault_says_what_it_was() -> None:
    """The reason is a short machine word, for the close frame and for the log."""
    with pytest.raises(FrameError, match=r"^unmasked_frame$") as fault:
        ClientFrames(MAX).feed(b"\x81\x00")

    assert (fault.value.reason, fault.value.close_with) == ("unmasked_frame", 1002)


# --- any bytes, in any pieces ----------------------------------------------------------------

MASKS = st.binary(min_size=4, max_size=4)
CONTROLS = st.builds(frame, st.sampled_from([PING, PONG]), st.binary(max_size=125), mask=MASKS)
WHOLE_MESSAGES = st.one_of(
    st.builds(frame, st.just(BINARY), st.binary(max_size=300), mask=MASKS),
    st.builds(frame, st.just(TEXT), st.text(max_size=300).map(str.encode), mask=MASKS),
)


@st.composite
def fragmented(draw: st.DrawFn) -> bytes:
    """Return a message in fragments with control frames in between."""
    pieces = draw(st.lists(st.binary(max_size=40), min_size=2, max_size=5))
    data = b""
    for index, piece in enumerate(pieces):
        fin = FIN if index == len(pieces) - 1 else 0
        data += frame(CONTINUATION if index else BINARY, piece, fin, draw(MASKS))
        data += draw(CONTROLS) if draw(st.booleans()) else b""
    return data


GOOD = st.lists(st.one_of(CONTROLS, WHOLE_MESSAGES, fragmented()), max_size=5).map(b"".join)
ANY = st.one_of(
    GOOD, st.binary(max_size=60), st.builds(bytes.__add__, GOOD, st.binary(max_size=20))
)


@given(data=ANY, cuts=st.lists(st.integers(0, 2_000)))
@example(data=frame(CLOSE) + b"\xff", cuts=[6])
def test_splits_make_no_difference(data: bytes, cuts: list[int]) -> None:
    """Good or bad, the bytes mean the same whole, cut anywhere, and one at a time."""
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    parts = [data[start:end] for start, end in pairwise(edges)]

    whole = outcome([data])

    assert outcome(parts) == whole
    assert outcome(one_by_one(data)) == whole


@given(data=GOOD)
def test_good_frames_are_read_as_another_parser_reads_them(data: bytes) -> None:
    """An independent implementation finds the same messages."""
    expected: list[tuple[int, bytes]] = []
    message, opcode = b"", CONTINUATION
    for read in frames_in(data, masked=True):
        if read.opcode in (PING, PONG):
            expected.append((read.opcode, bytes(read.data)))
            continue
        opcode = read.opcode or opcode
        message += bytes(read.data)
        if read.fin:
            expected.append((opcode, message))
            message = b""

    assert outcome([data]) == (expected, None)


@given(
    code=st.one_of(st.integers(1000, 1015), st.integers(3000, 4999), st.integers(0, 65_535)),
    reason=st.one_of(st.binary(max_size=123), st.text(max_size=30).map(str.encode)),
)
def test_closes_are_judged_as_another_parser_judges_them(code: int, reason: bytes) -> None:
    """A close that is accepted says the same to an independent implementation."""
    payload = struct.pack(">H", code) + reason

    messages, refused = outcome([frame(CLOSE, payload)])

    if refused is None:
        assert messages == [(CLOSE, payload)]
        assert Close.parse(payload) == Close(code, reason.decode())
        assert close_code_of(payload) == code
