"""What a client can do to an HTTP server: framing, slowness, size, silence; and what it gets.

On the raw path and through aiohttp, over real sockets. Who abuses WebSocket frames is elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator

import psutil
import pytest
from clients import SMALL_BUFFERS, small_socket
from daemons import Daemon, running, until
from http_corpus import CHUNKED, hostile
from http_wire import (
    Response,
    Steady,
    ask,
    chunked,
    get,
    post,
    read_response,
    responses,
    split_each,
    talk,
)
from streams import EVENTS, LINES, open_stream

from clevrd.config import Config
from clevrd.pace import MIN_SENT_BYTES_PER_S
from clevrd.raw_http import MAX_LINGERING, MAX_PROBES

MIB = 1 << 20
LIMIT = Config().max_message_bytes
BODY = b'{"topic":"t","data":1}'
OK = post(BODY)
LIVE = get("/health/live")
HOSTILE = dict(hostile())
# Shorter than the defaults by as much as a busy machine allows.
REQUEST_S = 0.4
IDLE_S = 0.8


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """A daemon with its default limits; each test has it answer both ways."""
    async with running(raw_paths=request.param) as running_daemon:
        yield running_daemon


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def impatient(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """A daemon that waits for requests, and for readers of answers, less than a second."""
    async with running(
        raw_paths=request.param, request_timeout_s=REQUEST_S, keepalive_timeout_s=IDLE_S
    ) as running_daemon:
        yield running_daemon


# --- framing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=HOSTILE)
async def test_ambiguous_framing_is_refused_and_the_connection_closed(
    daemon: Daemon, sent: bytes
) -> None:
    """One 4xx in our own shape, then the end, long before any time limit; nothing is published."""
    [answer] = responses(await talk(daemon.port, [sent], timeout_s=5))

    assert 400 <= answer.status < 500
    assert answer.json.keys() == {"success", "error", "code", "retryable"}
    assert answer.json["error"].endswith(".")
    assert "Traceback" not in answer.json["error"]
    assert len(daemon.hub.topics) == 0
    assert sum(daemon.hub.counters.refused.values()) == 1


async def test_refused_connections_leave_nothing_behind(daemon: Daemon) -> None:
    """After all of them at once: no task, no descriptor, no connection more than before."""
    await ask(daemon.port, LIVE)
    process = psutil.Process()
    tasks, descriptors = len(asyncio.all_tasks()), process.num_fds()

    await asyncio.gather(*(talk(daemon.port, [sent]) for sent in HOSTILE.values()))

    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    await until(lambda: process.num_fds() <= descriptors)
    assert not daemon.listener.raw.open | daemon.listener.raw.lingering
    assert (await ask(daemon.port, OK)).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        post(BODY, "X: " + "a" * 9000),
        post(BODY, line=f"POST /publish?{'a' * 9000} HTTP/1.1"),
        get(
            "/subscribe?topic=t", "Upgrade: websocket", "Sec-WebSocket-Protocol: " + "a, " * 350_000
        ),
    ],
    ids=["field", "line", "a megabyte of subprotocols"],
)
async def test_line_over_8_kib_is_431(daemon: Daemon, sent: bytes) -> None:
    """It is refused before the rest of it is read, and the refusal can be read."""
    answer = await ask(daemon.port, sent)

    assert (answer.status, answer.code) == (431, "header_too_large")
    assert "8190 bytes" in answer.json["error"]


async def test_http_1_0_is_answered_and_closed_unless_asked_to_stay(daemon: Daemon) -> None:
    """Old clients and health checkers of load balancers."""
    line = "POST /publish HTTP/1.0"

    closed = responses(await talk(daemon.port, [post(BODY, line=line)], timeout_s=5))
    kept = await ask(daemon.port, post(BODY, "Connection: keep-alive", line=line))

    assert [answer.status for answer in closed] == [200]
    assert (kept.status, kept.headers["connection"]) == (200, "keep-alive")


async def test_client_that_shuts_its_side_is_answered(daemon: Daemon) -> None:
    """As `nc -N` does behind what it sends: every answer comes, also to a publish that waits."""
    sent = [OK, LIVE, OK + LIVE + OK, OK * 100]

    transcripts = [await talk(daemon.port, [each], shut=True, timeout_s=5) for each in sent]

    assert [len(responses(each)) for each in transcripts] == [1, 1, 3, 100]


async def test_body_that_ends_early_is_400_at_once(daemon: Daemon) -> None:
    """The client says that nothing more comes, so nobody waits for it."""
    [answer] = responses(await talk(daemon.port, [OK[:-3]], shut=True, timeout_s=5))

    assert (answer.status, answer.code) == (400, "invalid_request")
    assert "cut short; send all of it" in answer.json["error"]
    assert len(daemon.hub.topics) == 0


SIZE, END, TRAILER = "hexadecimal", "must follow its data", "follows the last chunk"
# What may stand between chunks, the byte that may not follow it, and a word of the refusal.
BROKEN_CHUNKS = [
    (b"", b"z", SIZE),
    (b"", b"\r", SIZE),
    (b"1", b"-", SIZE),
    (b"1", b"\n", SIZE),
    (b"1\r", b"x", SIZE),
    (b"1" * 16, b"1", SIZE),
    (b"1;a", b" ", SIZE),
    (b"1;a=b", b"=", SIZE),
    (b'1;a="b\\', b"\x01", SIZE),
    (b'1;a="b', b"\r", SIZE),
    (b"1\r\n{", b"X", END),
    (b"1\r\n{\r", b"X", END),
    (b"0\r\n", b"\n", TRAILER),
    (b"0\r\n\r", b"X", TRAILER),
    (b"0\r\nA", b" ", TRAILER),
    (b"0\r\nA: b\r", b"C", TRAILER),
    (b"0\r\nA: b", b"\x00", TRAILER),
    (b"0\r\nA: b\r\n", b" ", TRAILER),
    (b"0\r\nContent-Length: 3\r", b"\n", TRAILER),
    (b"1;a=" + b"b" * 8_186, b"b", "over 8190 bytes"),
    (b"0\r\n" + b"A: b\r\n" * 10_922 + b"A: b", b"b", "over 65536 bytes"),
]


@pytest.mark.parametrize(("before", "broken", "word"), BROKEN_CHUNKS)
async def test_chunk_that_breaks_late_is_400_at_once(
    daemon: Daemon, before: bytes, broken: bytes, word: str
) -> None:
    """Its head was fine and its body is being read: nobody waits for what can never be whole."""
    head = post(b"", CHUNKED, length=None)

    for pieces in (
        [head, chunked(BODY, 9)[:-5], before, broken],
        [head, before + broken + OK],
        [OK + head + before + broken + OK],
    ):
        transcript = await talk(daemon.port, pieces, timeout_s=5)

        answer = responses(transcript)[-1]
        assert (answer.status, answer.code) == (400, "invalid_request")
        assert word in answer.json["error"]
        assert answer.headers["connection"] == "close"
    assert [topic.head for topic in daemon.hub.topics] == [1]


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_chunk_breaks_in_a_request_with_upgrade_as_in_others(
    daemon: Daemon, upgrade: str
) -> None:
    """Some clients offer an upgrade with whatever they ask first; chunks are followed as well."""
    head = post(b"", CHUNKED, f"Upgrade: {upgrade}", length=None)

    broken = await talk(daemon.port, [head, b"1\r\n{", b"X"], timeout_s=5)
    whole = await ask(daemon.port, head + chunked(BODY, 9))

    [answer] = responses(broken)
    assert answer.status == 400
    assert END in answer.json["error"]
    assert whole.status == 200


async def test_trailers_are_ignored(daemon: Daemon) -> None:
    """RFC 9110 §6.5.1: they are no fields of the head, in whatever reads they come."""
    sent = post(chunked(BODY, 9, trailer=b"X-Tenant-ID: evil\r\nHost: x\r\n"), CHUNKED, length=None)

    for pieces in ([sent], [sent[:-25], sent[-25:-3], sent[-3:]], [sent[:-2], sent[-2:]]):
        [answer] = responses(await talk(daemon.port, [*pieces, b""], shut=True, timeout_s=5))
        assert answer.status == 200

    assert {topic.tenant for topic in daemon.hub.topics} == {"default-tenant"}


# --- expectations --------------------------------------------------------------------------------


async def test_continue_is_sent_to_who_waits_for_it(daemon: Daemon) -> None:
    """RFC 9110 §10.1.1: a 100 once the head is fine, then the answer to the whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    sent = post(BODY, "Expect: 100-continue")

    writer.write(sent[: -len(BODY)])
    interim = await reader.readuntil(b"\r\n\r\n")
    writer.write(BODY)
    answer = await read_response(reader)

    writer.close()
    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.status == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (post(b"", "Expect: 100-continue", length="99999999"), 413),
        (post(b"", "Expect: 100-continue", "Content-Encoding: br", length="10"), 415),
        (post(b"", "Expect: 100-continue", line="POST /nope HTTP/1.1", length="10"), 404),
    ],
    ids=["too large", "coded", "nowhere"],
)
async def test_continue_is_not_sent_when_the_head_is_refused(
    daemon: Daemon, head: bytes, status: int
) -> None:
    """The final answer comes at once, and the body is never sent."""
    [answer] = responses(await talk(daemon.port, [head], timeout_s=5))

    assert (answer.status, answer.headers["connection"]) == (status, "close")


# --- slowness ------------------------------------------------------------------------------------

BEGUN = {
    "half a line": b"POST /publ",
    "half a head": OK[:50],
    "half a head of aiohttp's": b"GET /health HTTP/1.1\r\nHost: te",
    "half a body": OK[:-5],
    "half a body of aiohttp's": post(BODY, "Expect: 100-continue")[:-5],
    "half a chunk": post(b"16\r\n{", CHUNKED, length=None),
}


async def test_request_that_does_not_arrive_is_408_and_closed(impatient: Daemon) -> None:
    """On a new connection as on a kept one; time runs from the request's first byte."""
    cases = [(before, begun) for before in (b"", OK, LIVE) for begun in BEGUN.values()]

    transcripts = await asyncio.gather(
        # An empty piece is a turn of the loop, in which what came before is answered.
        *(talk(impatient.port, [before, *[b""] * 20, begun]) for before, begun in cases)
    )

    for (before, begun), transcript in zip(cases, transcripts, strict=True):
        answers = [answer for answer in responses(transcript) if answer.status != 100]
        assert [answer.status for answer in answers] == [200] * bool(before) + [408], begun
        assert answers[-1].headers["connection"] == "close"
        assert (answers[-1].code, answers[-1].json["retryable"]) == ("request_timeout", True)
        assert f"within {REQUEST_S} s" in answers[-1].json["error"]


async def test_dripping_bytes_buy_no_time(impatient: Daemon) -> None:
    """Slowloris: a byte every now and then, in head and body; each is ended all the same."""

    async def drip(sent: bytes, start: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
        reading = asyncio.ensure_future(reader.read())
        writer.write(sent[:start])
        for byte in sent[start:-1]:
            writer.write(bytes((byte,)))
            done, _ = await asyncio.wait([reading], timeout=REQUEST_S / 4)
            if done:
                break
        writer.close()
        return await reading

    long_head = post(BODY, "X: " + "a" * 1000)
    page = get("/health", "X: " + "a" * 1000)
    transcripts = await asyncio.gather(
        drip(long_head, 40), drip(page, 40), drip(post(b" " * 1000), 80), drip(OK, 1)
    )

    statuses = [[answer.status for answer in responses(each)] for each in transcripts]
    assert statuses == [[408]] * 4


async def upload(daemon: Daemon, path: str, pieces: list[bytes]) -> Response:
    """Send a head and then a body a piece at a time, one in a fortieth of the time it has."""
    size = sum(map(len, pieces))
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    answering = asyncio.ensure_future(read_response(reader))
    writer.write(head.encode())
    for piece in pieces:
        writer.write(piece)
        done, _ = await asyncio.wait([answering], timeout=REQUEST_S / 40)
        if done:
            break
    try:
        return await answering
    finally:
        writer.close()


@pytest.mark.parametrize("path", ["/publish", "/publish/batch"])
async def test_slow_and_steady_upload_is_taken(impatient: Daemon, path: str) -> None:
    """It takes twice the time a request has; what arrives in each of them is enough."""
    piece = b" " * int(10 * MIN_SENT_BYTES_PER_S * REQUEST_S / 40)

    answer = await upload(impatient, path, [*[piece] * 80, b'{"topic":"t","data":1}'])

    assert answer.status == 200, answer


async def test_upload_below_the_floor_is_408(impatient: Daemon) -> None:
    """Half a floor's bytes a second buy no time, on either way in."""
    piece = b" " * int(MIN_SENT_BYTES_PER_S * REQUEST_S / 40 / 2)

    answer = await upload(impatient, "/publish", [*[piece] * 200, BODY])

    assert answer.status == 408


async def test_upload_that_stops_is_408(impatient: Daemon) -> None:
    """However much it began with: nearly a MiB at once, and then nothing more."""
    begun = post(b" " * 1_000_000 + BODY)[:-5]

    (answer,) = responses(await talk(impatient.port, [begun]))

    assert answer.status == 408


async def test_slow_clients_keep_nobody_out(impatient: Daemon) -> None:
    """Hundreds of begun requests: others are served meanwhile, and all of them end."""
    slow = [
        asyncio.ensure_future(talk(impatient.port, [begun]))
        for begun in BEGUN.values()
        for _ in range(40)
    ]
    await until(lambda: impatient.hub.counters.connections >= len(slow))

    answer = await ask(impatient.port, OK)

    transcripts = await asyncio.gather(*slow)
    assert answer.status == 200
    ends = [[a.status for a in responses(each) if a.status != 100] for each in transcripts]
    assert ends == [[408]] * len(slow)


async def test_idle_connection_is_closed_without_a_word(impatient: Daemon) -> None:
    """Between requests nothing is owed; also when the last thing was an empty line."""
    sent = [[b""], [OK], [LIVE], [OK + b"\r\n"], [OK, *[b""] * 20, b"\r\n"]]

    transcripts = await asyncio.gather(*(talk(impatient.port, each) for each in sent))

    ends = [[answer.status for answer in responses(each)] for each in transcripts]
    assert ends == [[], [200], [200], [200], [200]]


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [LIMIT + 1, 3 * MIB, 12 * MIB])
async def test_client_that_sends_too_much_can_read_why(daemon: Daemon, size: int) -> None:
    """It sends all of its body before it reads: a 413 then, not a reset."""
    sent = [post(b"", length=str(size)), *[b" " * MIB] * (size // MIB), b" " * (size % MIB)]

    [answer] = responses(await talk(daemon.port, sent))

    assert (answer.status, answer.headers["connection"]) == (413, "close")


@pytest.mark.parametrize("chunk_bytes", [1, 100, 100_000])
async def test_chunks_over_the_limit_are_413_before_all_is_read(
    daemon: Daemon, chunk_bytes: int
) -> None:
    """Chunks of one byte as well, which are a multiple of their size on the wire."""
    chunk = b"%x\r\n%b\r\n" % (chunk_bytes, b" " * chunk_bytes)
    sent = chunk * (3 * MIB // chunk_bytes)

    [answer] = responses(await talk(daemon.port, [post(b"", CHUNKED, length=None), sent]))

    assert (answer.status, answer.code) == (413, "message_too_large")
    assert answer.headers["connection"] == "close"
    assert (await ask(daemon.port, OK)).status == 200


@pytest.mark.parametrize("size", [b"8000000000000000", b"7FFFFFFFFFFFFFFF", b"100001", b"0100001"])
@pytest.mark.parametrize("before", [b"", b"1\r\n{\r\n", chunked(b" " * 99_999, 1)[:-5]])
async def test_chunk_that_is_too_large_is_413_by_its_size(
    daemon: Daemon, before: bytes, size: bytes
) -> None:
    """Nothing of it is waited for: its sender may wait for an answer."""
    head = post(b"", CHUNKED, length=None)

    [whole] = responses(await talk(daemon.port, [head + before + size + b"\r\n"], timeout_s=5))
    [split] = responses(
        await talk(daemon.port, [head, before + size[:3], size[3:] + b"\r", b"\n"], timeout_s=5)
    )

    assert [each.status for each in (whole, split)] == [413, 413]
    assert "is larger than" in whole.json["error"]


async def test_chunk_of_the_whole_limit_is_taken(daemon: Daemon) -> None:
    """The limit itself is none too many, in one chunk and behind small ones."""
    limit = daemon.server.config.max_message_bytes
    body = b'{"topic":"t","data":"%b"}' % (b"x" * (limit - 23))

    one = await ask(daemon.port, post(chunked(body, limit), CHUNKED, length=None))
    small = chunked(body[:999], 1)[:-5] + chunked(body[999:], limit)
    behind = await ask(daemon.port, post(small, CHUNKED, length=None))

    assert len(body) == limit
    assert (one.status, behind.status) == (200, 200)


async def test_request_line_and_fields_end_at_their_limit(daemon: Daemon) -> None:
    """8,190 bytes of each are taken and 8,191 are not, whatever the line consists of."""
    line = "GET /?{} HTTP/1.1"
    query = "a" * (8_190 - len(line) + 2)
    name = "X: "
    value = "a" * (8_190 - len(name))

    taken = [
        await ask(daemon.port, get(f"/?{query}")),
        await ask(daemon.port, get("/", name + value)),
        await ask(daemon.port, get("/", "X:" + " " * 8_187 + "a")),
    ]
    refused = [
        await ask(daemon.port, get(f"/?{query}a")),
        await ask(daemon.port, get("/", name + value + "a")),
        await ask(daemon.port, get("/", "X:" + " " * 8_188 + "a")),
        await ask(daemon.port, get("/", "X:a" + " " * 8_188)),
    ]

    assert [each.status for each in taken] == [200] * 3
    assert [each.status for each in refused] == [431] * 4


@pytest.mark.parametrize("version", ["0.9", "2.0", "1.2", "1.9", "3.0"])
async def test_version_that_is_not_spoken_is_refused_in_one_that_is(
    daemon: Daemon, version: str
) -> None:
    """RFC 9110 §2.5: the answer is in HTTP/1.1, whatever the request was in, and the last one."""
    sent = OK + post(BODY, line=f"POST /publish HTTP/{version}") + OK

    first, refusal = responses(await talk(daemon.port, [sent]))

    assert (first.version, first.status) == ("HTTP/1.1", 200)
    assert (refusal.version, refusal.status) == ("HTTP/1.1", 400)
    assert refusal.json["error"] == "Only HTTP/1.1 and HTTP/1.0 are spoken here."
    assert refusal.headers["connection"] == "close"


@pytest.mark.parametrize("before", [b"", OK, LIVE, post(chunked(BODY, 9), CHUNKED, length=None)])
@pytest.mark.parametrize(
    "cut", [b"G", b"GET /health", b"GET / HTTP/1.1\r", OK[:30], OK[: -len(BODY) - 2]]
)
async def test_head_that_is_cut_off_is_400_at_once(
    daemon: Daemon, before: bytes, cut: bytes
) -> None:
    """As a body is; the requests before it have their answers first."""
    *others, refusal = responses(await talk(daemon.port, [before + cut], shut=True))

    assert [each.status for each in others] == [200] * bool(before)
    assert (refusal.status, refusal.code) == (400, "invalid_request")
    assert "cut short" in refusal.json["error"]


async def test_empty_lines_are_no_head(daemon: Daemon) -> None:
    """Who sends nothing else and leaves is told nothing."""
    assert await talk(daemon.port, [b"\r\n\r\n\r"], shut=True) == b""


async def test_body_may_not_be_mostly_framing(daemon: Daemon) -> None:
    """A mebibyte is allowed, but not in chunks of one byte: six times that on the wire."""
    body = b'{"topic":"t","data":"%b"}' % (b"x" * (LIMIT - 100))

    in_ones = await ask(daemon.port, post(b"1\r\n \r\n" * MIB, CHUNKED, length=None))
    in_hundreds = await ask(daemon.port, post(chunked(body, 100), CHUNKED, length=None))

    assert (in_ones.status, in_hundreds.status) == (413, 200)


async def test_refusal_of_small_chunks_says_that_it_is_the_chunks(daemon: Daemon) -> None:
    """The body is within its limit, so it is not called larger."""
    sent = post(b"1\r\n \r\n" * 500_000 + b"0\r\n\r\n", CHUNKED, length=None)

    answer = await ask(daemon.port, sent)

    assert (answer.status, answer.code) == (413, "message_too_large")
    assert "chunks are too small" in answer.json["error"]
    assert "larger than" not in answer.json["error"]


# --- silence -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw_paths", "asked"),
    [(True, OK), (True, get("/")), (False, get("/"))],
    ids=["raw", "handed over", "aiohttp"],
)
async def test_client_that_never_reads_its_answers_is_cut(raw_paths: bool, asked: bytes) -> None:
    """Its place and its descriptor are free again soon, however much is left unsent."""
    # From what the kernel takes whole, by less than a transport's buffer, to far too much.
    counts = [*range(100, 2000, 200), 5_000]
    async with running(
        raw_paths=raw_paths, max_connections=len(counts), keepalive_timeout_s=IDLE_S
    ) as daemon:
        writers = [await unread(daemon, asked * count) for count in counts]
        await until(lambda: daemon.hub.counters.connections == len(counts))

        await until(lambda: not sockets_of(daemon), timeout_s=15)

        assert (await ask(daemon.port, LIVE)).status == 200
        for writer in writers:
            writer.transport.abort()


async def test_slow_reader_of_a_large_answer_has_it_whole() -> None:
    """It takes less than half of it in the time between two looks, and goes on reading."""
    data = "x" * 1000
    async with running(keepalive_timeout_s=IDLE_S, send_buffer_bytes=8192) as daemon:
        for number in range(400):
            await daemon.publish("t", [number, data])
        reader, writer = await asyncio.open_connection(sock=small_socket(daemon.port), limit=1024)
        writer.write(get("/subscribe?topic=t&poll=1&last=400", "Connection: close"))

        transcript = b""
        for _ in range(60):
            transcript += await reader.read(2048)
            await asyncio.wait([asyncio.ensure_future(asyncio.sleep(IDLE_S / 20))])
        transcript += await reader.read()
        writer.close()

    assert len(responses(transcript)[0].json["messages"]) == 400


async def unread(daemon: Daemon, sent: bytes) -> asyncio.StreamWriter:
    """Send ``sent`` over a connection of which next to nothing will be read."""
    _, writer = await asyncio.open_connection(sock=small_socket(daemon.port), limit=1024)
    writer.write(sent)
    return writer


def sockets_of(daemon: Daemon) -> int:
    """Return how many connections the daemon's side still has open."""
    found = psutil.Process().net_connections("tcp")
    return sum(each.laddr.port == daemon.port and each.status != "LISTEN" for each in found)


async def test_shutdown_waits_for_no_client_that_does_not_read() -> None:
    """Answers that nobody takes hold neither the stop nor the process."""
    for raw_paths, asked in ((True, OK), (False, OK), (False, get("/"))):
        async with running(raw_paths=raw_paths, shutdown_timeout_s=0.5) as daemon:
            writer = await unread(daemon, asked * 5_000)
            await until(Steady(writer.transport.get_write_buffer_size), timeout_s=15)

        await until(lambda: not sockets_of(daemon))
        writer.transport.abort()


async def ask_until_admitted(daemon: Daemon, request: bytes) -> Response:
    """Ask again and again until there is a place for one more connection."""
    async with asyncio.timeout(15):
        while True:
            answer = await ask(daemon.port, request)
            if answer.status != 503:
                return answer


@pytest.mark.parametrize("resets", [True, False], ids=["RST", "FIN"])
async def test_client_that_goes_away_is_no_error(
    daemon: Daemon, resets: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a head, of a body, of its answers: not a line in the log."""
    for sent in (b"", OK[:30], OK[:-3], post(b"5\r\nab", CHUNKED, length=None), OK * 50, LIVE * 50):
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(sent)
        # Behind it in the daemon's loop, so what was sent is being dealt with.
        await ask(daemon.port, LIVE)

        if resets:
            at_once = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()
        await until(lambda: not sockets_of(daemon))

    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert daemon.hub.counters.background_errors == 0
    # A FIN says that no more of it comes; after a reset nobody is there to be refused.
    assert daemon.hub.counters.refused == ({} if resets else {"invalid_request": 3})


# --- too many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
async def test_connection_over_the_limit_is_told_so(raw_paths: bool) -> None:
    """503 that says when to come back, although it had sent its request; then there is room."""
    async with running(raw_paths=raw_paths, max_connections=1) as daemon:
        _, holder = await asyncio.open_connection("127.0.0.1", daemon.port)
        await until(lambda: daemon.hub.counters.connections)

        refused = [responses(await talk(daemon.port, [OK])) for _ in range(3)]
        holder.close()
        answer = await ask_until_admitted(daemon, OK)

        assert [[each.status for each in answers] for answers in refused] == [[503]] * 3
        assert refused[0][0].headers["retry-after"] == "1"
        assert refused[0][0].json["retryable"] is True
        assert answer.json["offset"] == 1


async def test_refusals_of_connections_are_bounded() -> None:
    """A crowd of refused connections does not use up the descriptors that are kept back."""
    async with running(max_connections=1) as daemon:
        streams = [
            await asyncio.open_connection("127.0.0.1", daemon.port)
            for _ in range(3 * MAX_LINGERING)
        ]
        await until(lambda: daemon.hub.counters.connections == len(streams))

        lingering = len(daemon.listener.raw.lingering)

        for _, writer in streams:
            writer.close()
        assert lingering == MAX_LINGERING
        await until(lambda: not daemon.listener.raw.lingering)


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
async def test_full_daemon_still_says_how_it_is(raw_paths: bool, path: str) -> None:
    """A liveness probe is answered over the limit, as below it, and its connection closed."""
    asked = get(path, "User-Agent: kube-probe/1.29", "Accept: */*")
    async with running(raw_paths=raw_paths, max_connections=1) as daemon:
        _, holder = await asyncio.open_connection("127.0.0.1", daemon.port)
        await until(lambda: daemon.hub.counters.connections)

        (full,) = responses(await talk(daemon.port, [asked]))
        (in_parts,) = responses(await talk(daemon.port, [asked[:9], asked[9:40], asked[40:]]))
        (old,) = responses(await talk(daemon.port, [b"GET %b HTTP/1.0\r\n\r\n" % path.encode()]))

        assert [each.status for each in (full, in_parts, old)] == [200] * 3
        assert full.json["status"] in ("ok", "healthy")
        assert full.headers["connection"] == "close"
        assert daemon.hub.counters.refused == {}
        assert daemon.listener.raw.probing == {}
        holder.close()


@pytest.mark.parametrize(
    "sent",
    [
        OK,
        get("/metrics"),
        get("/healthy"),
        get("/health/../publish"),
        get("/health", "Content-Length: 2") + b"{}",
        get("/health", "Upgrade: websocket"),
        get("/health", "Transfer-Encoding: chunked"),
        get("/subscribe?topic=t"),
        get("/subscribe?topic=t", f"Accept: {LINES}"),
        get("/subscribe?topic=t", f"Accept: {EVENTS};q=0.5, {LINES}"),
        get("/subscribe?topic=t", f"Accept: {EVENTS}", "Upgrade: websocket"),
        get("/subscribe?topic=t", f"Accept: {EVENTS}", "Content-Length: 2") + b"{}",
        get("/subscribe?topic=t", f"Accept: {EVENTS}", "Transfer-Encoding: chunked"),
        get("/subscribe?topic=t", f"Accept: {EVENTS}", f"Accept: {EVENTS}"),
        get("/subscribe?topic=t", f"Accept: {EVENTS}", version="2.0"),
        get("/subscribe?topic=t", f"Accept: {EVENTS}", method="HEAD"),
        get("/subscribe?topic=t", f"Accept: {EVENTS}", method="POST"),
        get("/subscribers?topic=t", f"Accept: {EVENTS}"),
        get("/metrics", f"Accept: {EVENTS}"),
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 10_000,
        b"\0",
    ],
)
async def test_probe_over_the_limit_may_ask_nothing_else(sent: bytes) -> None:
    """Whatever is not plainly a question for the daemon's health gets the 503 at once."""
    async with running(max_connections=1) as daemon:
        _, holder = await asyncio.open_connection("127.0.0.1", daemon.port)
        await until(lambda: daemon.hub.counters.connections)

        answers = responses(await talk(daemon.port, [sent]))

        assert [each.status for each in answers] == [503]
        assert daemon.hub.counters.refused == {"unavailable": 1}
        assert len(daemon.hub.topics) == 0
        holder.close()


async def test_probe_over_the_limit_is_one_question() -> None:
    """What is pipelined behind it is not served."""
    async with running(max_connections=1) as daemon:
        _, holder = await asyncio.open_connection("127.0.0.1", daemon.port)
        await until(lambda: daemon.hub.counters.connections)

        answers = responses(await talk(daemon.port, [get("/health/live") + OK]))

        assert [each.status for each in answers] == [200]
        assert len(daemon.hub.topics) == 0
        holder.close()


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_event_source_over_the_limit_is_told_to_come_back(
    raw_paths: bool, version: str
) -> None:
    """A stream of one `error` event and its end, since after a 503 it would give up for good."""
    asked = get("/subscribe?topic=t", f"Accept: {EVENTS}", "Cookie: a=1", version=version)
    async with running(raw_paths=raw_paths, max_connections=1) as daemon:
        _, holder = await asyncio.open_connection("127.0.0.1", daemon.port)
        await until(lambda: daemon.hub.counters.connections)

        async with await open_stream(daemon.port, version=version) as stream:
            (event,) = await stream.to_the_end()
        (in_parts,) = responses(await talk(daemon.port, [asked[:9], asked[9:40], asked[40:]]))
        (piped,) = responses(await talk(daemon.port, [asked + asked + OK]))

        assert (event.kind, event.json["type"], event.id) == ("error", "error", None)
        assert (event.json["code"], event.json["retryable"]) == ("unavailable", True)
        assert stream.retry_ms is not None
        assert (stream.head["Retry-After"], stream.head["Connection"]) == ("1", "close")
        assert int(stream.head["Content-Length"]) == len(stream.body)
        assert [each.headers["content-type"] for each in (in_parts, piped)] == [
            f"{EVENTS}; charset=utf-8"
        ] * 2
        assert daemon.hub.counters.refused == {"unavailable": 3}
        assert daemon.listener.raw.probing == {}
        assert len(daemon.hub.topics) == 0
        holder.close()


async def test_half_asked_for_events_over_the_limit_are_bounded() -> None:
    """Who begins to ask and does not go on has a place and a time as one that says nothing."""
    begun = get("/subscribe?topic=t", f"Accept: {EVENTS}")[:-2]
    async with running(max_connections=1) as daemon:
        _, holder = await asyncio.open_connection("127.0.0.1", daemon.port)
        await until(lambda: daemon.hub.counters.connections)
        talks = [asyncio.ensure_future(talk(daemon.port, [begun])) for _ in range(MAX_PROBES + 1)]
        done, _ = await asyncio.wait(talks, return_when=asyncio.FIRST_COMPLETED)
        probing = list(daemon.listener.raw.probing)

        for connection in probing:
            daemon.listener.raw.deadlines.set(connection, 0.0)
        daemon.listener.raw.deadlines.run_due()
        answers = [responses(transcript)[0] for transcript in await asyncio.gather(*talks)]

        assert (len(done), len(probing)) == (1, MAX_PROBES)
        assert [each.status for each in answers] == [503] * (MAX_PROBES + 1)
        holder.close()


async def test_silent_crowd_does_not_keep_a_probe_out() -> None:
    """There are so many places for probes; who has said nothing for the longest makes room."""
    async with running(max_connections=1) as daemon:
        streams = [
            await asyncio.open_connection("127.0.0.1", daemon.port) for _ in range(3 * MAX_PROBES)
        ]
        await until(lambda: daemon.hub.counters.connections == len(streams))
        probing = len(daemon.listener.raw.probing)

        (answer,) = responses(await talk(daemon.port, [get("/health/live")]))

        assert probing == MAX_PROBES
        assert answer.status == 200
        daemon.listener.raw.deadlines.run_due()
        assert len(daemon.listener.raw.probing) == MAX_PROBES - 1
        for connection in daemon.listener.raw.probing:
            daemon.listener.raw.deadlines.set(connection, 0.0)
        daemon.listener.raw.deadlines.run_due()
        assert daemon.listener.raw.probing == {}
        for _, writer in streams:
            writer.close()


# --- secrets -------------------------------------------------------------------------------------

CANARY = "s3cr3t-canary"


def with_canary() -> list[bytes]:
    """Requests of every kind, good and bad, with a secret in all places that may hold one."""
    query = f"topic=t&token={CANARY}"
    fields = (f"Authorization: Bearer {CANARY}", f"Cookie: a={CANARY}", f"X: {CANARY}")
    upgrade = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        *fields,
    )
    body = b'{"topic":"t","data":"%b"}' % CANARY.encode()
    line = f"POST /publish?{query} HTTP/1.1"
    publish = post(body, *fields, line=line)
    return [
        publish,
        publish[:-5],
        post(body[:-5], *fields, line=line),
        post(body, *fields, f"X-Tenant-ID: {CANARY}:", line=line),
        post(body, *fields, " folded", line=line),
        post(body, *fields, "Content-Length: 1", line=line),
        post(body, f"X: {CANARY * 900}", line=line),
        post(body, line=f"POST /publish?{CANARY * 900} HTTP/1.1"),
        post(body, line=f"POST /publish?{CANARY}\x01 HTTP/1.1"),
        post(body, line=f"{CANARY} /publish HTTP/1.1"),
        post(body, line=f"POST http://{CANARY}@x:x/{CANARY} HTTP/1.1"),
        post(b"zz" + body, CHUNKED, *fields, length=None, line=line),
        get(f"/health?{query}", *fields),
        get(f"/{CANARY}", *fields),
        get(f"/subscribe?{query}", *upgrade),
        get(f"/subscribe?{query}", *upgrade, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        get(f"/subscribe?{query}&policy={CANARY}", *upgrade),
    ]


@pytest.mark.parametrize("shut", [True, False])
async def test_no_secret_reaches_the_log(
    impatient: Daemon, shut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Not from a query, a header or a body, however broken the request, at the lowest level."""
    caplog.set_level(logging.DEBUG)

    async def send(sent: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
        writer.write(sent)
        if shut:
            writer.write_eof()
        await reader.read(1)
        writer.transport.abort()

    await asyncio.gather(*map(send, with_canary()))
    await ask(impatient.port, LIVE)

    assert CANARY not in caplog.text
    metrics = await impatient.get_json("/metrics")
    assert CANARY not in str(metrics)


# --- who does not read what it is answered -------------------------------------------------------


@pytest.mark.parametrize("last", [get("/health"), get("/subscribe?topic=t"), b"nonsense\r\n\r\n"])
async def test_connection_that_is_not_read_is_not_handed_over_paused(last: bytes) -> None:
    """What follows a pipeline whose answers back up is answered once they have been read."""
    publish = post('{"topic":"t","data":1}', "Connection: keep-alive")
    async with running(**SMALL_BUFFERS) as daemon:
        for count in range(20, 60, 5):
            reader, writer = await asyncio.open_connection(sock=small_socket(daemon.port))
            writer.write(publish * count + last)
            await asyncio.sleep(0.01)
            writer.write_eof()
            async with asyncio.timeout(5):
                answers = responses(await reader.read())

            assert len(answers) == count + 1
            writer.close()


async def test_awaited_answer_begins_the_keepalive_time_anew() -> None:
    """A publisher that is throttled is not cut by the time its first request had."""
    publish = post('{"topic":"t","data":1}', "Connection: keep-alive")
    async with running(
        request_timeout_s=0.3, keepalive_timeout_s=60.0, throttle_scope="global"
    ) as daemon:
        daemon.hub.throttler._until_s = daemon.server._loop.time() + 60
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(publish)
        await reader.readuntil(b"}")
        (connection,) = daemon.listener.raw.open

        assert connection.deadline_s > daemon.server._loop.time() + 30
        writer.close()


async def test_reset_behind_a_pipeline_leaves_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A client that pipelines and goes away must not fill the log."""
    publish = post('{"topic":"t","data":1}', "Connection: keep-alive")
    async with running() as daemon:
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.write(publish + get("/health"))
            writer.transport.abort()
        await daemon.get_json("/health")
        await until(lambda: not daemon.listener.raw.open)

    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("count", [1, 31, 33, 300])
@pytest.mark.parametrize(
    "fault",
    [
        b"GET  / HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET / HTTP/3.0\r\nHost: test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: test\r\nNo Field\r\n\r\n",
        b"POST /publish HTTP/1.1\r\nHost: test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /" + b"a" * 9_000,
    ],
    ids=["line", "version", "field", "length", "long"],
)
async def test_every_request_before_a_fault_is_answered(count: int, fault: bytes) -> None:
    """aiohttp's parser drops those that it was given at once with a fault, or keeps them back."""
    async with running(raw_paths=False) as daemon:
        sent = LIVE * (count - 1) + post(BODY) + fault

        answers = responses(await daemon.send_raw(sent, timeout_s=20))
        [topic] = daemon.hub.topics

    assert [answer.status for answer in answers[:-1]] == [200] * count
    assert 400 <= answers[-1].status < 600
    assert topic.head == 1


async def test_long_pipeline_with_bodies_is_answered_in_order() -> None:
    """No request waits for ever that is held until aiohttp has room."""
    async with running(raw_paths=False) as daemon:
        coded = post(chunked(BODY, 5), CHUNKED, length=None)
        sent = (LIVE + post(BODY) + coded) * 100

        pieces = split_each(sent, [7, 9_000, 20_000])
        answers = responses(await talk(daemon.port, pieces, shut=True, timeout_s=20))

    assert [answer.status for answer in answers] == [200] * 300
    assert [answer.json["offset"] for answer in answers if "offset" in answer.json] == [
        *range(1, 201)
    ]
