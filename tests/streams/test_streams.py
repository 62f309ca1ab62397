"""SSE and NDJSON over a real socket: heads, framing, options, resuming, slow readers, the end.

What is the same for every transport (policies, positions, rounds) is tested with WebSockets; here
it is shown to hold for streams as well.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from clients import RECORD, SMALL_BUFFERS, RawPublisher, needs_curl, publishing, subscribe
from daemons import Daemon, running, until
from http_wire import get, responses, talk
from httpx_sse import aconnect_sse
from streams import EVENTS, LINES, Stream, open_stream

from clevrd.config import Config
from clevrd.connections.stream import MAX_IGNORED_BYTES
from clevrd.errors import Unavailable
from clevrd.hub import rounds
from clevrd.server import Server, Setup
from clevrd.tenants import Tenant

FORMS = pytest.mark.parametrize("accept", [EVENTS, LINES])
VERSIONS = pytest.mark.parametrize("version", ["1.0", "1.1"])


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    """Return a running daemon."""
    async with running(ring_messages=100) as started:
        yield started


async def fill(daemon: Daemon, count: int) -> str:
    """Publish ``count`` messages to topic t and return its epoch."""
    async with publishing(daemon.port) as publisher:
        await publisher.send("t", count)
    return daemon.hub.topic(Tenant("default-tenant"), "t").epoch


def assert_conserved(figures: dict[str, dict[str, int]]) -> None:
    """Fail unless every message offered is accounted for."""
    sums = figures["messages"]
    lost = sum(sums["dropped"].values())  # type: ignore[attr-defined]
    assert sums["offered"] == sums["delivered"] + lost + sums["discarded"] + sums["queued"]


# --- the response --------------------------------------------------------------------------------


@FORMS
@VERSIONS
async def test_stream_begins_with_the_past_and_goes_on_live(
    daemon: Daemon, accept: str, version: str
) -> None:
    """The same messages in the same order as on a WebSocket, in both versions of HTTP."""
    await fill(daemon, 60)

    async with await open_stream(daemon.port, accept, version=version) as stream:
        past = await stream.offsets(60)
        await fill(daemon, 3)
        live = await stream.offsets(63)

    assert past == list(range(11, 61))
    assert live == [61, 62, 63]
    assert stream.head["Content-Type"] == f"{accept}; charset=utf-8"
    assert stream.head["Cache-Control"] == "no-cache, no-transform"
    assert stream.head["X-Accel-Buffering"] == "no"
    assert stream.head["Connection"] == "close"
    assert ("Transfer-Encoding" in stream.head) is (version == "1.1")
    assert stream.head.keys() >= {"Server", "Date"}


async def test_message_is_the_same_object_on_every_transport(daemon: Daemon) -> None:
    """Byte for byte, but for line ends between tokens, which are spaces in streams."""
    data = b'{ "a" : 1.50e0,\r\n"\\u00e4":"\xc3\xa4" }'
    async with (
        subscribe(daemon.ws_url) as socket,
        await open_stream(daemon.port, EVENTS) as events,
        await open_stream(daemon.port, LINES) as lines,
        publishing(daemon.port) as publisher,
    ):
        await publisher.send("t", 1, data)
        frame = str(await socket.recv())
        await events.items(2)
        await lines.item()

    assert '"data":{ "a" : 1.50e0,\r\n"\\u00e4":"ä" }' in frame
    text = frame.replace("\r\n", "  ").encode()
    assert lines.body == text + b"\n"
    assert events.body.endswith(b"data: " + text + b"\n\n")


async def test_events_begin_with_where_they_begin(daemon: Daemon) -> None:
    """An EventSource that was cut before any message comes back to the very place."""
    epoch = await fill(daemon, 60)

    async with await open_stream(daemon.port, EVENTS, "topic=t&last=2") as stream:
        greeting, first = await stream.items(2)

    assert (greeting.kind, greeting.id) == ("subscribed", f"{epoch}:58")
    assert (greeting.json["epoch"], greeting.json["offset"]) == (epoch, 58)
    assert (first.kind, first.id) == ("", f"{epoch}:59")
    assert 1_000 <= (stream.retry_ms or 0) < 5_000


@pytest.mark.parametrize("control", [0, 1])
async def test_lines_have_control_frames_only_for_who_asks(daemon: Daemon, control: int) -> None:
    """A pipe into jq gets messages; a client that resumes gets the rest as well."""
    await fill(daemon, 1)

    async with await open_stream(daemon.port, LINES, f"topic=t&control={control}") as stream:
        first = await stream.item()

    assert first.kind == ("subscribed" if control else "")


@FORMS
async def test_head_asks_for_the_head_alone(daemon: Daemon, accept: str) -> None:
    """HEAD is answered as GET, without the body, and subscribes nobody."""
    answer = await talk(
        daemon.port, [get("/subscribe?topic=t", f"Accept: {accept}", method="HEAD")]
    )

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Type: {accept}".encode() in head
    assert body == b""
    assert daemon.hub.subscribers == 0


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("text/event-stream", EVENTS),
        ("TEXT/Event-Stream;q=0.9", EVENTS),
        ("application/x-ndjson, */*", LINES),
        ("application/x-ndjson;q=0.5, text/event-stream", EVENTS),
        ("text/event-stream; q=0.1,application/x-ndjson ;q=0.2", LINES),
        ("text/event-stream;q=x", EVENTS),
    ],
)
async def test_accept_chooses_the_stream(daemon: Daemon, accept: str, content_type: str) -> None:
    """The one that is named, and of two the one with the greater weight."""
    async with await open_stream(daemon.port, accept) as stream:
        assert stream.head["Content-Type"].startswith(content_type)


@pytest.mark.parametrize("accept", ["*/*", "text/html", "text/event-stream;q=0", "", "text/*"])
async def test_who_names_no_transport_is_told_which_there_are(daemon: Daemon, accept: str) -> None:
    """A browser's address bar and a bare curl get 426 and a sentence."""
    (answer,) = responses(
        await talk(daemon.port, [get("/subscribe?topic=t", f"Accept: {accept}")], shut=True)
    )

    assert (answer.status, answer.code) == (426, "upgrade_required")
    for words in ("WebSocket", "text/event-stream", "application/x-ndjson", "poll=1"):
        assert words in answer.json["error"]


async def test_websocket_handshake_wins_over_accept(daemon: Daemon) -> None:
    """Whatever else it accepts, who asks for a WebSocket gets one."""
    async with subscribe(daemon.ws_url) as _:
        pass
    request = get(
        "/subscribe?topic=t&poll=1",
        f"Accept: {EVENTS}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )

    assert (await talk(daemon.port, [request], shut=True)).startswith(b"HTTP/1.1 101 ")


@FORMS
@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "topic is missing"),
        ("topic=t&policy=x", "Unknown policy"),
        ("topic=t&buffer=0", "option buffer"),
        ("topic=t&offset=1", "position is offset and epoch"),
        ("topic=t&poll=2", "option poll"),
        ("topic=t&topic=t", "given twice"),
        ("pattern=t", "has a star"),
        ("topic=t&topic=u&poll=1&timeout=61", "option timeout"),
    ],
)
async def test_bad_option_is_a_400(daemon: Daemon, accept: str, query: str, words: str) -> None:
    """What can't be meant is refused before the stream begins."""
    request = get(f"/subscribe?{query}", f"Accept: {accept}")

    (answer,) = responses(await talk(daemon.port, [request], shut=True))

    assert (answer.status, answer.code) == (400, "invalid_request")
    assert words in answer.json["error"]


@FORMS
async def test_request_with_a_body_is_refused(daemon: Daemon, accept: str) -> None:
    """What would be the body here could be the next request elsewhere."""
    request = get("/subscribe?topic=t", f"Accept: {accept}", "Content-Length: 2") + b"{}"

    (answer,) = responses(await talk(daemon.port, [request], shut=True))

    assert answer.status == 400
    assert daemon.hub.subscribers == 0


# --- what comes behind the request ---------------------------------------------------------------


async def test_requests_behind_a_stream_are_not_answered(daemon: Daemon) -> None:
    """The response does not end, so nothing can follow it; the stream goes on."""
    behind = get("/health") * 400

    async with await open_stream(daemon.port, LINES, behind=behind) as stream:
        stream.writer.write(get("/health"))
        await fill(daemon, 2)
        seen = await stream.offsets(2)

    # That it left is heard too, though aiohttp had stopped reading.
    await until(lambda: len(daemon.server.connections) == 0)
    assert seen == [1, 2]
    assert b"healthy" not in stream.body


@FORMS
async def test_client_that_talks_on_is_let_go_with_a_reason(daemon: Daemon, accept: str) -> None:
    """A subscriber only receives; what it sends is bounded, and it is told."""
    async with await open_stream(daemon.port, accept) as stream:
        stream.writer.write(b"x" * (MAX_IGNORED_BYTES + 1))
        last = (await stream.to_the_end())[-1]

    assert (last.kind, last.json["code"]) == ("error", "subscribers_only_receive")
    assert daemon.hub.subscribers == 0
    assert daemon.hub.counters.closed == {1008: 1}


@FORMS
async def test_client_that_leaves_is_no_subscriber(daemon: Daemon, accept: str) -> None:
    """Also one that only shuts down its sending side: it looks no different."""
    async with await open_stream(daemon.port, accept) as stream:
        await until(lambda: daemon.hub.subscribers == 1)
        stream.writer.write_eof()
        await stream.to_the_end()

    await until(lambda: len(daemon.server.connections) == 0)
    assert daemon.hub.subscribers == 0


async def test_unix_socket_serves_streams(tmp_path: Path) -> None:
    """Behind a proxy on the same machine, where the kernel has no timeout to set."""
    path = tmp_path / "clevrd.sock"
    server = Server(Setup(Config(address=f"unix:{path}", shutdown_timeout_s=2.0)))
    await server.start()

    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(get("/subscribe?topic=t", f"Accept: {EVENTS}"))
    async with Stream(reader, writer) as stream:
        await stream.read_head()
        greeting = await stream.item()
        await server.stop()
        *_, last = await stream.to_the_end()

    assert (greeting.kind, last.kind) == ("subscribed", "going_away")


async def test_stream_counts_as_a_connection() -> None:
    """`max_connections` holds for streams as for everything."""
    async with running(max_connections=1) as daemon, await open_stream(daemon.port):
        refused = await talk(daemon.port, [get("/metrics")])

    assert responses(refused)[0].code == "unavailable"


# --- resuming ------------------------------------------------------------------------------------


async def test_event_source_comes_back_to_what_followed_its_last_event(daemon: Daemon) -> None:
    """The header counts, and not what the URL, which an EventSource can't change, began with."""
    epoch = await fill(daemon, 60)
    header = f"Last-Event-ID: {epoch}:57"

    for query in ("last=0", "last=5", f"offset=3&epoch={epoch}", "since=all", "last_event_id=x:1"):
        async with await open_stream(daemon.port, EVENTS, f"topic=t&{query}", header) as stream:
            greeting, *messages = await stream.items(4)

        assert (greeting.json["recovered"], greeting.json["offset"]) == (True, 57), query
        assert [message.json["offset"] for message in messages] == [58, 59, 60]


async def test_header_beside_a_query_form_is_a_400_where_the_url_can_change(
    daemon: Daemon,
) -> None:
    """Only an EventSource has no choice."""
    request = get("/subscribe?topic=t&since=all", f"Accept: {LINES}", "Last-Event-ID: f7502dc3:4")

    (answer,) = responses(await talk(daemon.port, [request], shut=True))

    assert answer.status == 400


async def test_events_that_the_ring_has_lost_are_told_with_the_place_behind_them(
    daemon: Daemon,
) -> None:
    """Cut between greeting and gap, an EventSource is told of the gap again."""
    epoch = await fill(daemon, 150)

    for known, missing in (
        (f"{epoch}:20", (21, 50, "retention")),
        ("old:9", (None, None, "epoch")),
    ):
        header = f"Last-Event-ID: {known}"
        async with await open_stream(daemon.port, EVENTS, "topic=t", header) as stream:
            greeting, gap, first = await stream.items(3)

        assert (greeting.kind, greeting.id) == ("subscribed", None)
        assert (gap.kind, gap.id) == ("gap", f"{epoch}:50")
        assert (gap.json["from"], gap.json["to"], gap.json["reason"]) == missing
        assert first.json["offset"] == 51


# --- slow readers --------------------------------------------------------------------------------


async def push_until_blocked(daemon: Daemon, publisher: RawPublisher) -> None:
    """Publish until the one reader's transport is full."""
    (connection,) = daemon.server.connections._open
    while not connection.subscription.is_paused:  # type: ignore[attr-defined]
        await publisher.send("t", 10, RECORD)


@FORMS
@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
async def test_slow_stream_loses_by_its_policy_and_is_told(accept: str, policy: str) -> None:
    """What it received and what it was told is exactly what was published, in order and once."""
    query = f"topic=t&policy={policy}&buffer=20&control=1"
    async with (
        running(**SMALL_BUFFERS) as daemon,
        await open_stream(daemon.port, accept, query, receive_bytes=4096) as stream,
        publishing(daemon.port) as publisher,
    ):
        await push_until_blocked(daemon, publisher)
        await publisher.send("t", 500, RECORD)
        figures = await daemon.get_json("/metrics")
        reading = asyncio.create_task(read_with_gaps(stream, len(publisher.acknowledged) + 1))
        await until(lambda: all(topic.live for topic in daemon.hub.topics))
        await publisher.send("t", 1, RECORD)
        lost = await reading

    assert lost == sum(figures["messages"]["dropped"].values()) > 400
    assert figures["slow_subscribers"] == 1
    assert_conserved(figures)


async def read_with_gaps(stream: Stream, upto: int) -> int:
    """Read messages and gaps up to offset ``upto``; return how many were told lost."""
    at, lost = 0, 0
    while at < upto:
        item = await stream.item()
        if item.kind == "gap":
            assert item.json["from"] == at + 1
            lost += item.json["count"]
            at = item.json["to"]
        elif not item.kind:
            at += 1
            assert item.json["offset"] == at
    return lost


@FORMS
async def test_open_circuit_says_why(accept: str) -> None:
    """There is no close code, so the last event or line has the word of it."""
    query = "topic=t&policy=circuit_breaker&buffer=20"
    async with (
        running(**SMALL_BUFFERS, circuit_breaker_openings=0) as daemon,
        await open_stream(daemon.port, accept, query, receive_bytes=4096) as stream,
        publishing(daemon.port) as publisher,
    ):
        await push_until_blocked(daemon, publisher)
        await publisher.send("t", 200, RECORD)
        await until(lambda: daemon.hub.subscribers == 0)
        *_, last = await stream.to_the_end()
        figures = await daemon.get_json("/metrics")

    assert (last.kind, last.json["code"]) == ("error", "circuit_open")
    assert stream.is_whole
    assert figures["connections"]["closed"] == {"4101": 1}
    assert_conserved(figures)


async def test_stalled_stream_is_cut_when_its_kernel_acknowledges_nothing_more() -> None:
    """A peer that is gone, or that reads nothing for too long, is found without an answer to a
    ping: what was sent is not acknowledged.
    """
    async with (
        running(**SMALL_BUFFERS, ping_interval_s=0.5, pong_timeout_s=0.3) as daemon,
        await open_stream(daemon.port, receive_bytes=4096),
        publishing(daemon.port) as publisher,
    ):
        await push_until_blocked(daemon, publisher)

        await until(lambda: len(daemon.server.connections) == 0, timeout_s=10)
        figures = await daemon.get_json("/metrics")

    assert figures["total_subscribers"] == 0
    assert_conserved(figures)


@FORMS
@VERSIONS
async def test_silent_stream_is_kept_alive(accept: str, version: str) -> None:
    """Something that means nothing goes over it now and then, so that no proxy cuts it."""
    async with (
        running(ping_interval_s=0.1, pong_timeout_s=0.1) as daemon,
        await open_stream(daemon.port, accept, version=version) as stream,
    ):
        if accept == EVENTS:
            await stream.item()
        for _ in range(60):
            daemon.server.connections.ping_due()
        await fill(daemon, 1)
        item = await stream.item()

    assert item.json["offset"] == 1
    assert stream.keep_alives >= 2
    assert daemon.hub.counters.pings_cut == 0


# --- many at once --------------------------------------------------------------------------------


@pytest.mark.timeout(60)
async def test_joining_a_flood_is_seamless_on_every_transport(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounds that take several turns, all forms on one topic: nothing twice, missing, reordered."""
    monkeypatch.setattr(rounds, "WRITES_PER_SLICE", 3)
    total = 2_000
    async with running() as daemon, asyncio.timeout(40):

        async def push() -> None:
            async with publishing(daemon.port) as publisher:
                for _ in range(total // 25):
                    await publisher.send("t", 25)

        async def read(number: int) -> list[int]:
            await until(lambda: any(topic.head >= number * 40 for topic in daemon.hub.topics))
            accept, version = (EVENTS, LINES)[number % 2], ("1.1", "1.0")[number % 3 == 0]
            query = f"topic=t&last={number * 7}"
            async with await open_stream(daemon.port, accept, query, version=version) as stream:
                return await stream.offsets(total)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(push())
            readings = [tasks.create_task(read(number)) for number in range(24)]

        for reading in readings:
            seen = reading.result()
            assert seen == list(range(seen[0], total + 1))
        figures = await daemon.get_json("/metrics")
    assert_conserved(figures)
    assert sum(figures["messages"]["dropped"].values()) == 0
    assert figures["connections"]["background_errors"] == 0


# --- the end -------------------------------------------------------------------------------------


@FORMS
@VERSIONS
async def test_planned_stop_says_when_to_come_back_and_ends_whole(
    accept: str, version: str
) -> None:
    """Everything acknowledged, the position, and an end that looks like one."""
    async with running() as daemon:
        query = "topic=t&control=1"
        async with await open_stream(daemon.port, accept, query, version=version) as stream:
            epoch = await fill(daemon, 5)

            await daemon.server.stop()
            greeting, *messages, going = await stream.to_the_end()

    assert greeting.kind == "subscribed"
    assert [message.json["offset"] for message in messages] == [1, 2, 3, 4, 5]
    assert going.kind == "going_away"
    assert going.json["positions"] == {"t": {"epoch": epoch, "offset": 5}}
    assert stream.is_whole
    if accept == EVENTS:
        assert stream.retry_ms == going.json["reconnect_after_ms"]
        assert going.id is None
    assert daemon.hub.counters.closed == {1012: 1}


async def test_plain_lines_end_with_a_reason() -> None:
    """Who takes messages only is told once why they stop: it has nothing else to tell by."""
    async with running() as daemon, await open_stream(daemon.port, LINES) as stream:
        await fill(daemon, 2)

        await daemon.server.stop()
        *messages, last = await stream.to_the_end()

    assert [message.json["offset"] for message in messages] == [1, 2]
    assert (last.kind, last.json["code"]) == ("error", "restarting")
    assert stream.is_whole


async def test_draining_sends_event_sources_away_so_that_they_come_back(daemon: Daemon) -> None:
    """After any status but 200 an EventSource never returns; others get the status."""
    daemon.hub.is_draining = True

    async with daemon.http.get(
        f"{daemon.url}/subscribe?topic=t", headers={"Accept": EVENTS}
    ) as answer:
        body = await answer.text()
    async with daemon.http.get(
        f"{daemon.url}/subscribe?topic=t", headers={"Accept": LINES}
    ) as other:
        code = (await other.json())["code"]

    assert (answer.status, answer.headers["Content-Type"]) == (200, f"{EVENTS}; charset=utf-8")
    assert body.startswith("retry: ")
    assert f'"code":"{Unavailable.code}"' in body
    assert (other.status, code) == (503, "unavailable")
    assert daemon.hub.counters.refused == {"unavailable": 2}


# --- clients that this project did not write -----------------------------------------------------


async def test_httpx_sse_reads_the_stream(daemon: Daemon) -> None:
    """Messages as plain events with ids, control frames as named ones."""
    epoch = await fill(daemon, 3)

    async with (
        httpx.AsyncClient(trust_env=False) as client,
        aconnect_sse(client, "GET", f"{daemon.url}/subscribe?topic=t") as source,
    ):
        events = source.aiter_sse()
        found = [await anext(events) for _ in range(4)]
        await events.aclose()

    assert [event.event for event in found] == ["subscribed", *["message"] * 3]
    assert [event.id for event in found] == [f"{epoch}:{offset}" for offset in range(4)]
    assert [json.loads(event.data)["offset"] for event in found[1:]] == [1, 2, 3]


@needs_curl
@pytest.mark.parametrize("options", [[], ["--http1.0"]])
async def test_curl_reads_lines(daemon: Daemon, options: list[str]) -> None:
    """`curl -N` shows each message as it comes, and ends without complaint when the daemon does."""
    await fill(daemon, 2)
    curl = await asyncio.create_subprocess_exec(
        *("curl", "-sSN", *options, "-H", f"Accept: {LINES}"),
        f"{daemon.url}/subscribe?topic=t",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert curl.stdout is not None
    lines = [json.loads(await curl.stdout.readline()) for _ in range(2)]

    await daemon.server.stop()
    _, complaint = await curl.communicate()

    assert [line["offset"] for line in lines] == [1, 2]
    assert (curl.returncode, complaint) == (0, b"")


@needs_curl
async def test_cut_lines_are_an_error_to_curl(daemon: Daemon) -> None:
    """A stream that was cut does not look like one that ended (curl: exit code 18)."""
    curl = await asyncio.create_subprocess_exec(
        *("curl", "-sN", "-H", f"Accept: {LINES}", f"{daemon.url}/subscribe?topic=t")
    )
    await until(lambda: daemon.hub.subscribers == 1)
    (connection,) = daemon.server.connections._open

    connection.transport.close()

    assert await curl.wait() == 18
