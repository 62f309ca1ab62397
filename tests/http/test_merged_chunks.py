"""Many small chunks become one before aiohttp is given them: the body stays what it was."""

from __future__ import annotations

import random
from collections.abc import Sequence

import h11
import pytest
from http_corpus import CHUNKED
from http_wire import chunked, post, split_each
from hypothesis import given
from hypothesis import strategies as st

from clevrd.aiohttp_front.framing import Framing, merge_chunks

BODY = b'{"topic":"t","data":"%b"}' % (b"x" * 2_000)


def passed_of(pieces: Sequence[bytes]) -> bytes:
    """Return what is passed on of one request in ``pieces``."""
    framing = Framing()
    passed = b""
    for piece in pieces:
        rest = piece
        while rest:
            some, followed_bytes, fault = framing.take(rest)
            assert fault is None
            rest = rest[followed_bytes:]
            passed += some
    return passed


def body_of(sent: bytes) -> bytes:
    """Return the body of a request as h11 reads it."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(sent)
    body = b""
    while not isinstance(event := server.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA
        if isinstance(event, h11.Data):
            body += bytes(event.data)
    return body


@pytest.mark.parametrize("size", [1, 2, 15, 16, 100])
def test_many_small_chunks_become_one(size: int) -> None:
    """Wherever reads cut them; what is passed on has a few chunks for each read."""
    sent = post(chunked(BODY, size), CHUNKED, length=None)
    source = random.Random(size)  # noqa: S311  # not a secret

    whole = passed_of([sent])
    pieces = split_each(sent, sorted(source.sample(range(len(sent)), 6)))
    in_pieces = passed_of(pieces)

    assert body_of(whole) == body_of(in_pieces) == BODY
    # The line of a chunk's size, and the end of the chunk.
    head = sent.index(b"\r\n\r\n") + 4
    assert whole.count(b"\r\n", head) <= 6
    assert in_pieces.count(b"\r\n", head) <= 8 * len(pieces) + 40


def test_large_chunks_are_passed_on_as_they_are() -> None:
    """Nothing is gained by a copy of them."""
    sent = post(chunked(BODY * 20, 1_000), CHUNKED, length=None)

    assert passed_of([sent]) == sent


@given(
    contents=st.lists(
        st.sampled_from([b"x", b"\r\n", b"1\r\nx\r\n", b"\r", b"1\r\na\r\n1", b"y" * 20]),
        min_size=8,
    ),
    odd=st.sets(st.integers(0, 20)),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
def test_body_stays_what_it_was(contents: list[bytes], odd: set[int], cuts: list[int]) -> None:
    """Also where it looks like chunks itself, and where some sizes have zeros or extensions."""
    chunks = b"".join(
        b"%b%x%b\r\n%b\r\n"
        % (b"00" if number in odd else b"", len(each), b";a=b" if number + 1 in odd else b"", each)
        for number, each in enumerate(contents)
    )
    sent = post(chunks + b"0\r\n\r\n", CHUNKED, length=None)
    pieces = split_each(sent, sorted({min(cut, len(sent)) for cut in cuts}))

    assert body_of(passed_of(pieces)) == b"".join(contents)


def test_what_line_ends_alone_do_not_tell_is_left() -> None:
    """A content with a line end, and a size with an extension, are left as they came."""
    assert merge_chunks(b"1\r\nx\r\n" * 8) == b"8\r\nxxxxxxxx\r\n"
    assert merge_chunks(b"1\r\nx\r\n" * 7) == b""
    assert merge_chunks(b"1\r\nx\r\n" * 8 + b"4\r\n1\r\nx\r\n") == b""
    assert merge_chunks(b"1\r\nx\r\n" * 8 + b"7\r\n1\r\na\r\n1\r\n") == b""
    assert merge_chunks(b"2\r\n\r\n\r\n" * 8) == b""
    assert merge_chunks(b"1\r\nx\r\n" * 8 + b"1;a\r\nx\r\n") == b""
