"""Framing: where requests begin and end, whatever the pieces; what is refused, and where.

That it agrees with aiohttp's parser is test_raw_and_aiohttp_agree.py's, over real sockets. Bytes
are compared here as they came; how small chunks become one is test_merged_chunks.py's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from http_corpus import CHUNKED, CORPUS
from http_wire import chunked, get, post, split_each
from hypothesis import given
from hypothesis import strategies as st

from clevrd.aiohttp_front import framing
from clevrd.aiohttp_front.framing import (
    MAX_LINE_BYTES,
    Framing,
    KnownHeads,
    line_fault,
)
from clevrd.errors import ClevrdError, HeaderTooLarge, InvalidRequest
from clevrd.head_cache import MAX_KNOWN_HEAD_BYTES, MAX_KNOWN_HEADS

BODY = b'{"topic":"t","data":1}'


@pytest.fixture(autouse=True)
def unmerged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have chunks passed on as they come."""
    monkeypatch.setattr(framing, "merge_chunks", lambda _: b"")


LOOP = asyncio.new_event_loop()
LOOP.close()
CHUNK_PARTS = [
    b"0",
    b"1",
    b"2",
    b"a",
    b"f" * 16,
    b";",
    b"=",
    b'"',
    b"\\",
    b" ",
    b"\t",
    b"\r",
    b"\n",
]
CHUNK_PARTS += [
    b"\r\n",
    b"1\r\n",
    b"1\r\nx\r\n",
    b"0\r\n",
    b"A:",
    b"x",
    b":",
    b"\xe9",
    b"\0",
    b";a",
    b'="',
]

# What is left out of what is passed on.
TRAILERS = (b"A: b\r\nC: d\r\n", b"X-Tenant-ID: evil\r\n")


def without_trailers(sent: bytes) -> bytes:
    """Return what is passed on of ``sent``, which is well-formed."""
    for trailer in TRAILERS:
        sent = sent.replace(b"\r\n0\r\n" + trailer, b"\r\n0\r\n")
    return sent


def taken(pieces: Sequence[bytes], known: KnownHeads | None = None) -> tuple[bytes, str]:
    """Return all that is passed on of ``pieces``, and the sentence of the first fault, if any."""
    follower = Framing(known)
    passed = b""
    for piece in pieces:
        rest = piece
        while rest:
            some, followed_bytes, fault = follower.take(rest)
            assert followed_bytes
            rest = rest[followed_bytes:]
            passed += some
            if fault is not None:
                return passed, str(fault)
    return passed, ""


@pytest.mark.parametrize("sent", [sent for _, sent in CORPUS], ids=range(1, len(CORPUS) + 1))
def test_pieces_do_not_matter(sent: bytes) -> None:
    """The same fault, and the same is passed on of what comes before it."""
    source = random.Random(sent)  # noqa: S311  # not a secret
    sent = sent[:3_000]
    whole, fault = taken([sent])

    for _ in range(5):
        cuts = sorted(source.sample(range(len(sent) + 1), min(len(sent), 12)))
        passed, same_fault = taken(split_each(sent, cuts))

        assert same_fault == fault
        assert passed == whole or (fault and whole.startswith(passed[: len(whole)]))
    if not fault:
        # A line that is not whole yet is held.
        expected = without_trailers(sent)
        assert expected.startswith(whole)
        assert b"\r\n" not in expected[len(whole) :].strip(b"\r\n")


MIXED = b"1\r\n{\r\n0F;x=y\r\n%b\r\nf\r\n%bx\r\n0\r\n\r\n" % (b"x" * 15, b"\r\n" * 7)
REQUESTS = {
    "plain": post(BODY),
    "none": get("/"),
    "empty": post(b"", length="0"),
    "chunked": post(chunked(BODY, 7), CHUNKED, length=None),
    "ones": post(chunked(BODY, 1), CHUNKED, length=None),
    "mixed": post(MIXED, CHUNKED, length=None),
    "trailers": post(chunked(BODY, 7, trailer=TRAILERS[0]), CHUNKED, length=None),
    "empty lines": b"\r\n\r\n" + post(BODY),
}


@pytest.mark.parametrize("first", REQUESTS)
@pytest.mark.parametrize("second", REQUESTS)
def test_fault_behind_whole_requests_is_found(first: str, second: str) -> None:
    """So it knows where each of them ends, also one byte at a time; and all of them pass."""
    before = REQUESTS[first] + REQUESTS[second]
    sent = before + b"GET  / HTTP/1.1\r\n"

    for pieces in (
        [sent],
        [before, sent[len(before) :]],
        [sent[at : at + 1] for at in range(len(sent))],
    ):
        passed, fault = taken(pieces)

        assert passed == without_trailers(before)
        assert "is not HTTP/1.1" in fault


def test_known_heads_do_not_matter() -> None:
    """All of the corpus, and all requests in pairs, are taken as by a framing that knows none."""
    known = KnownHeads()
    everything = [sent for _, sent in CORPUS]
    everything += [first + second for first in REQUESTS.values() for second in REQUESTS.values()]
    source = random.Random(1)  # noqa: S311  # not a secret
    for _ in range(3):
        source.shuffle(everything)
        for sent in everything:
            for pieces in ([sent], split_each(sent, [source.randrange(len(sent) + 1)])):
                assert taken(pieces, known) == taken(pieces)


def test_known_heads_are_used_and_bounded() -> None:
    """A head that comes again is found; long ones, and those of too many clients, are forgotten."""
    known = KnownHeads()
    head = post(BODY).removesuffix(BODY)
    long_head = post(BODY, "A: " + "a" * MAX_KNOWN_HEAD_BYTES).removesuffix(BODY)
    taken([post(BODY), long_head + BODY], known)

    assert known.find(b"123" + head, 3) is not None
    assert known.find(long_head, 0) is None

    for number in range(MAX_KNOWN_HEADS + 1):
        taken([get(f"/{number}")], known)
    assert known.find(head, 0) is None
    assert known.find(get(f"/{MAX_KNOWN_HEADS}"), 0) is not None


@pytest.mark.parametrize(
    "sent",
    [
        post(BODY, "Transfer-Encoding: gzip", length=None),
        post(BODY, CHUNKED),
        post(BODY, "Content-Length: 5"),
        post(BODY, length="x"),
        post(BODY, "Upgrade: websocket"),
        b"CONNECT test:80 HTTP/1.1\r\nHost: test\r\n\r\n",
    ],
)
def test_what_it_cannot_follow_passes(sent: bytes) -> None:
    """aiohttp refuses that, or the bytes behind it are no HTTP."""
    behind = b"GET  / HTTP/1.1\r\n\r\n" * 3

    assert taken([sent, behind, behind]) == (sent + behind + behind, "")


@given(st.lists(st.sampled_from(CHUNK_PARTS), max_size=12).map(b"".join))
def test_what_passes_between_chunks_passes_aiohttp(chunks: bytes) -> None:
    """aiohttp tells the reader of a body of no fault, so each has to be found before."""
    head = post(b"", CHUNKED, length=None)
    passed, _ = taken([head + chunks])
    parser = HttpRequestParser(BaseProtocol(LOOP), LOOP, 2**16)
    parser.feed_data(head)

    parser.feed_data(passed[len(head) :])


def test_nothing_is_kept_of_long_lines() -> None:
    """A line is held up to its limit, whatever state it comes in, and then refused."""
    for begin in (b"GET /", b"GET / HTTP/1.1\r\nX: "):
        framing = Framing()
        framing.take(begin)
        fault: ClevrdError | None = None
        sent = 0
        while fault is None and sent < 2 * MAX_LINE_BYTES:
            _, _, fault = framing.take(b"a" * 1_000)
            sent += 1_000
        assert isinstance(fault, HeaderTooLarge)
        assert sent <= MAX_LINE_BYTES + 1_000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"GET / HTTP/1.1", None),
        (b"get /?a#b HTTP/1.0", None),
        (b"OPTIONS * HTTP/1.1", None),
        (b"GET  / HTTP/1.1", "is not HTTP/1.1"),
        (b"GET /  HTTP/1.1", "is not HTTP/1.1"),
        (b"GET / HTTP/1.1 ", "is not HTTP/1.1"),
        (b" GET / HTTP/1.1", "is not HTTP/1.1"),
        (b"GET\t/ HTTP/1.1", "is not HTTP/1.1"),
        (b"GET /", "is not HTTP/1.1"),
        (b"GET", "is not HTTP/1.1"),
        (b"GET / http/1.1", "is not HTTP/1.1"),
        (b"GET / HTTP/1.11", "is not HTTP/1.1"),
        (b"A" * 25 + b" / HTTP/1.1", "is not HTTP/1.1"),
        (b"GET /\x7f HTTP/1.1", "is not HTTP/1.1"),
        ("GET /é HTTP/1.1".encode(), "percent-encode"),
        ("GET é HTTP/1.1".encode(), "percent-encode"),
        (b"GET / HTTP/2.0", "Only HTTP/1.1 and HTTP/1.0"),
        (b"GET / HTTP/0.9", "Only HTTP/1.1 and HTTP/1.0"),
    ],
)
def test_request_line(line: bytes, words: str | None) -> None:
    """RFC 9112 §3: a method, a target and a version with one space between, and nothing else."""
    fault = line_fault(line, is_whole=True)

    assert (fault is None) == (words is None)
    if words is not None:
        assert words in str(fault)
        assert isinstance(fault, InvalidRequest)


def test_what_can_never_be_a_request_is_refused_at_its_first_byte() -> None:
    """A TLS greeting has no line end to wait for."""
    assert Framing().take(b"\x16\x03\x01\x02\x00")[2] is not None
