"""What a subscriber may send, what it is told otherwise, and how connections end; over sockets.

Every rule is tried with the bytes themselves, since no library would send most of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from clients import (
    CLOSE,
    PING,
    PONG,
    RECORD,
    SMALL_BUFFERS,
    TEXT,
    RawSubscriber,
    masked,
    publishing,
    raw_subscriber,
    subscribe,
)
from daemons import Daemon, running, until
from websockets.exceptions import ConnectionClosedError

from clevrd.connections import farewells
from clevrd.connections.websocket import (
    BUDGET_BYTES,
    BUDGET_FRAMES,
    MAX_CLIENT_MESSAGE_BYTES,
    SubscriberWebSocket,
)
from clevrd.hub import rounds

BINARY = 0x2
CONTINUATION = 0x0
WITHOUT_FIN = 0x7F


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    """Return a daemon that takes connections below aiohttp, and then one that does not."""
    async with running(raw_paths=request.param) as started:
        yield started


@pytest.fixture
async def reader(daemon: Daemon) -> AsyncIterator[RawSubscriber]:
    """Return a subscriber of topic t that says only what the test tells it to say."""
    async with await raw_subscriber(daemon.port) as opened:
        yield opened


def header(first: int, length: int, *, is_masked: bool = True) -> bytes:
    """Return a frame's header alone, with ``length`` in the shortest form that holds it."""
    mask_bit = 0x80 if is_masked else 0
    if length < 126:
        return bytes((first, mask_bit | length))
    if length < 65_536:
        return bytes((first, mask_bit | 126)) + length.to_bytes(2, "big")
    return bytes((first, mask_bit | 127)) + length.to_bytes(8, "big")


async def is_served(daemon: Daemon, reader: RawSubscriber) -> bool:
    """Whether the subscriber still gets what is published."""
    answer = await daemon.publish("t", "still there?")
    frame = await reader.frame()
    return frame.opcode == TEXT and b'"offset":%d}' % answer["offset"] in frame.payload


# --- what is allowed -----------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"x", b"y" * 125])
async def test_ping_is_answered_with_its_own_bytes(reader: RawSubscriber, payload: bytes) -> None:
    """RFC 6455 §5.5.3: a pong carries what the ping carried."""
    reader.send(masked(PING, payload))

    assert await reader.frame() == (PONG, payload)


async def test_small_talk_is_ignored(daemon: Daemon, reader: RawSubscriber) -> None:
    """Some libraries send a text now and then to keep a proxy awake: no reason to close."""
    reader.send(masked(TEXT, b"hello"), masked(BINARY, b"\xff"), masked(PONG, b"unasked"))
    reader.send(masked(TEXT, "grüße".encode()), masked(TEXT), masked(BINARY))

    assert await is_served(daemon, reader)


async def test_fragments_with_a_ping_between_them_are_one_message(
    daemon: Daemon, reader: RawSubscriber
) -> None:
    """RFC 6455 §5.4: control frames may stand between fragments, and UTF-8 may be cut by them."""
    reader.send(masked(TEXT, b"\xc3", first=TEXT), masked(PING, b"between"))
    reader.send(masked(CONTINUATION, b"\xa4"))

    assert await reader.frame() == (PONG, b"between")
    assert await is_served(daemon, reader)


async def test_bytes_one_at_a_time_are_the_same_frames(reader: RawSubscriber) -> None:
    """How frames are cut into segments means nothing."""
    for byte in masked(TEXT, b"a" * 200) + masked(PING, b"whole"):
        reader.send(bytes((byte,)))
        await asyncio.sleep(0)

    assert await reader.frame() == (PONG, b"whole")


async def test_largest_message_allowed_is_taken(daemon: Daemon, reader: RawSubscriber) -> None:
    """The limit itself is allowed; the byte after it is not."""
    reader.send(masked(BINARY, b"x" * MAX_CLIENT_MESSAGE_BYTES))

    assert await is_served(daemon, reader)


async def test_answers_to_pings_cost_no_budget(daemon: Daemon, reader: RawSubscriber) -> None:
    """What the daemon asks for is never too much, however often it asks."""
    connection = daemon.only_subscriber()

    for _ in range(BUDGET_FRAMES + 5):
        connection.ping()
        assert (await reader.frame()).opcode == PING
        reader.send(masked(PONG))
        await until(lambda: not connection.awaits_pong)

    assert await is_served(daemon, reader)


# --- what is too much: 1008 and 1009 -------------------------------------------------------------


@pytest.mark.parametrize(
    "flood",
    [
        masked(TEXT, b"hi") * (BUDGET_FRAMES + 1),
        masked(BINARY) * (BUDGET_FRAMES + 1),
        masked(PONG) * (BUDGET_FRAMES + 1),
        masked(BINARY, b"x" * MAX_CLIENT_MESSAGE_BYTES) * (BUDGET_BYTES // 4096 + 1),
        masked(TEXT, first=TEXT) + masked(CONTINUATION, first=CONTINUATION) * 1000,
    ],
    ids=["texts", "binaries", "pongs", "bytes", "continuations"],
)
async def test_talking_beyond_the_budget_is_1008(
    daemon: Daemon, reader: RawSubscriber, flood: bytes
) -> None:
    """A subscriber has next to nothing to say; one that talks on is closed and told why."""
    reader.send(flood)

    goodbye = await reader.goodbye()

    assert goodbye.code == 1008
    assert goodbye.reason
    await until(lambda: len(daemon.hub.topics) == 0 or daemon.hub.subscribers == 0)
    assert (await daemon.get_json("/metrics"))["connections"]["closed"] == {"1008": 1}


async def test_ten_thousand_pings_are_1008_and_the_close_is_read(reader: RawSubscriber) -> None:
    """A flood of pings ends with a close frame that the client gets to read, not with a reset."""
    reader.send(masked(PING, b"ping!") * 10_000)

    goodbye = await reader.goodbye()

    assert goodbye.code == 1008
    assert len(goodbye.before) <= BUDGET_FRAMES


@pytest.mark.parametrize(
    "start",
    [
        header(0x81, MAX_CLIENT_MESSAGE_BYTES + 1),
        header(0x82, 1 << 20),
        header(0x82, 2**63 - 1),
        masked(TEXT, b"x" * MAX_CLIENT_MESSAGE_BYTES, first=TEXT) + header(0x80, 1),
    ],
    ids=["byte over", "megabyte", "2^63-1", "in fragments"],
)
async def test_oversize_is_1009_before_it_is_sent(reader: RawSubscriber, start: bytes) -> None:
    """The declared length is enough to refuse; nobody waits for the bytes."""
    reader.send(start)

    assert (await reader.goodbye()).code == 1009


# --- what is malformed: 1002 and 1007 ------------------------------------------------------------


def close_with(code: int, reason: bytes = b"") -> bytes:
    """Return a client's close frame."""
    return masked(CLOSE, code.to_bytes(2, "big") + reason)


@pytest.mark.parametrize(
    "malformed",
    [
        b"\x81\x02hi",
        b"\x89\x00",
        *(masked(TEXT, b"x", first=0x80 | rsv | TEXT) for rsv in (0x40, 0x20, 0x10, 0x70)),
        *(bytes((0x80 | opcode, 0x80)) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
        *(masked(opcode, first=opcode) for opcode in (PING, PONG, CLOSE)),
        *(header(0x80 | opcode, 126) for opcode in (PING, PONG, CLOSE)),
        masked(CONTINUATION, b"x"),
        masked(TEXT, b"x", first=TEXT) + masked(TEXT, b"y"),
        masked(TEXT, b"x", first=TEXT) + masked(BINARY, b"y", first=BINARY),
        b"\x81\xfe\x00\x7d",
        b"\x81\xff\x00\x00\x00\x00\x00\x00\xff\xff",
        masked(CLOSE, b"\x03"),
        *(close_with(code) for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000)),
    ],
    ids=lambda data: data[:12].hex(),
)
async def test_malformed_frame_is_1002_at_once(reader: RawSubscriber, malformed: bytes) -> None:
    """Each rule of RFC 6455 §5 that a header can break is refused as soon as it is seen."""
    reader.send(malformed)

    goodbye = await reader.goodbye()

    assert (goodbye.code, goodbye.before) == (1002, [])


@pytest.mark.parametrize("data", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"ok\xe2\x82"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: masked(TEXT, data),
        lambda data: masked(TEXT, data[:1], first=TEXT) + masked(CONTINUATION, data[1:]),
        lambda data: close_with(1000, data),
    ],
    ids=["text", "fragments", "close reason"],
)
async def test_text_that_is_not_utf8_is_1007(
    reader: RawSubscriber, wrap: Callable[[bytes], bytes], data: bytes
) -> None:
    """Bad, overlong, surrogate and cut UTF-8 are refused wherever text stands."""
    reader.send(wrap(data))

    assert (await reader.goodbye()).code == 1007


# --- the close frame is read, and the last thing that is sent ------------------------------------


@pytest.mark.parametrize("chunk", [masked(BINARY, b"x" * 4096) * 16, b"\xff" * 65_536])
async def test_client_that_keeps_sending_still_reads_the_close(
    reader: RawSubscriber, chunk: bytes
) -> None:
    """Closing a socket with unread bytes would reset it and take the close frame with it."""
    sending = asyncio.create_task(send_for_ever(reader, chunk))

    goodbye = await reader.goodbye()

    sending.cancel()
    assert goodbye.code in (1002, 1008)


async def send_for_ever(reader: RawSubscriber, chunk: bytes) -> None:
    """Send as fast as the daemon takes it."""
    while True:
        reader.send(chunk)
        await reader.writer.drain()


async def test_nothing_is_sent_behind_a_close_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages, pings and pongs stop at the close, in the middle of a flood and of a round too."""
    monkeypatch.setattr(rounds, "WRITES_PER_SLICE", 1)
    async with running(ping_interval_s=0.1) as daemon, AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(await raw_subscriber(daemon.port))
        publisher = await stack.enter_async_context(publishing(daemon.port))
        flood = asyncio.create_task(publish_for_ever(daemon.port))
        for number in range(30):
            async with await raw_subscriber(daemon.port) as reader:
                assert (await reader.frame()).opcode in (TEXT, PING)
                reader.send(masked(PING), b"\x81\x00" if number % 2 else close_with(1000))
                reader.send(masked(PING))
                goodbye = await reader.goodbye()
                assert goodbye.code == (1002 if number % 2 else 1000)
        flood.cancel()
        await publisher.send("t", 1)
        figures = await daemon.get_json("/metrics")
    assert figures["connections"]["background_errors"] == 0


async def publish_for_ever(port: int) -> None:
    """Publish in batches until cancelled."""
    async with publishing(port) as publisher:
        while True:
            await publisher.send("t", 20)


async def test_pings_behind_the_daemons_close_are_not_answered(
    daemon: Daemon, reader: RawSubscriber
) -> None:
    """RFC 6455 §5.5.1: not even a pong follows; the peer's close ends it."""
    connection = daemon.only_subscriber()
    connection.close(4321, "because")

    reader.send(masked(PING, b"late"), close_with(4321))

    assert await reader.goodbye() == (4321, "because", [])


# --- the closing handshake -----------------------------------------------------------------------


@pytest.mark.parametrize("code", [1000, 1001, 1011, 3000, 4000, 4999])
async def test_close_is_answered_with_its_own_code(reader: RawSubscriber, code: int) -> None:
    """RFC 6455 §5.5.1; the connection ends behind the answer, from the daemon's side."""
    reader.send(close_with(code, b"bye"))

    assert await reader.goodbye() == (code, "", [])


async def test_close_without_a_code_is_answered_without_one(reader: RawSubscriber) -> None:
    """A code that was not given is not made up."""
    reader.send(masked(CLOSE))

    assert (await reader.goodbye()).code == 1005


async def test_bytes_behind_a_close_mean_nothing(reader: RawSubscriber) -> None:
    """RFC 6455 §1.4: after a close frame further data is discarded, broken or not."""
    reader.send(close_with(1000), masked(PING, b"late"), b"\xff\xff\xff")

    assert await reader.goodbye() == (1000, "", [])


async def test_libraries_see_a_clean_close(daemon: Daemon) -> None:
    """A `websockets` client that closes gets its answer, and the daemon forgets it."""
    async with subscribe(daemon.ws_url) as client:
        await client.close(code=4321, reason="done")

    assert client.close_code == 4321
    assert client.protocol.close_rcvd_then_sent is False
    await until(lambda: len(daemon.server.connections) == 0)
    assert len(daemon.server.connections._farewells) == 0


async def test_close_from_the_daemon_is_a_handshake_too(daemon: Daemon) -> None:
    """The peer's answer ends the connection; nothing has to time out."""
    async with subscribe(daemon.ws_url) as client:
        await until(lambda: len(daemon.server.connections) == 1)
        connection = daemon.only_subscriber()

        connection.close(4321, "because")
        with pytest.raises(ConnectionClosedError) as closed:
            await client.recv()

    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4321, "because")
    await until(lambda: len(daemon.server.connections) == 0)


@pytest.mark.parametrize("violation", [b"", b"\x81\x00"], ids=["asked to go", "broke a rule"])
async def test_peer_that_does_not_answer_a_close_is_gone_in_time(
    monkeypatch: pytest.MonkeyPatch, violation: bytes
) -> None:
    """Whoever ignores a close is disconnected after a while, and its socket is closed."""
    monkeypatch.setattr(farewells, "CLOSE_LOOK_S", 0.02)
    monkeypatch.setattr(farewells, "CLOSE_TIMEOUT_S", 0.1)
    async with running() as daemon, await raw_subscriber(daemon.port) as reader:
        connection = daemon.only_subscriber()

        reader.send(violation)
        if not violation:
            connection.close(4321, "because")

        await until(lambda: len(daemon.server.connections) == 0)
        goodbye = await reader.goodbye()
    assert goodbye.code == (1002 if violation else 4321)
    assert len(daemon.server.connections._farewells) == 0


async def test_stalled_peer_that_is_closed_is_gone_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A close frame that waits behind what nobody reads does not wait for ever."""
    await leave_while_stalled(monkeypatch, lambda reader, connection: connection.close(4321, "x"))


async def test_stalled_peer_that_says_goodbye_is_gone_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer to a close waits no longer than a close does."""
    await leave_while_stalled(monkeypatch, lambda reader, _: reader.send(close_with(1000)))


async def test_stalled_peer_that_shuts_its_side_down_is_gone_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A FIN without a close frame from a peer that does not read leaves nothing behind."""
    await leave_while_stalled(monkeypatch, lambda reader, _: reader.writer.write_eof())


async def leave_while_stalled(
    monkeypatch: pytest.MonkeyPatch,
    leave: Callable[[RawSubscriber, SubscriberWebSocket], None],
) -> None:
    """Fill a connection that nobody reads, begin to end it, and wait until it is gone."""
    monkeypatch.setattr(farewells, "CLOSE_LOOK_S", 0.02)
    monkeypatch.setattr(farewells, "CLOSE_FLUSH_TIMEOUT_S", 0.1)
    async with (
        running(**SMALL_BUFFERS) as daemon,
        await raw_subscriber(daemon.port, receive_bytes=4096) as reader,
        publishing(daemon.port) as publisher,
    ):
        connection = daemon.only_subscriber()
        while not daemon.only_reader().is_blocked:
            await publisher.send("t", 10, RECORD)

        leave(reader, connection)

        await until(lambda: len(daemon.server.connections) == 0)
        assert len(daemon.server.connections._farewells) == 0
        assert daemon.hub.subscribers == 0


async def test_half_closed_peer_is_let_go(daemon: Daemon, reader: RawSubscriber) -> None:
    """Who sends a FIN can't answer a ping any more, so it is no subscriber."""
    reader.writer.write_eof()

    goodbye = await reader.goodbye()

    assert goodbye.code is None
    await until(lambda: len(daemon.server.connections) == 0)
    assert daemon.hub.subscribers == 0
