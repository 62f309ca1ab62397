"""What has begun to arrive is bounded: each by size and time, all together by a budget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from clients import masked
from daemons import Daemon, running, until

from clevrd.connections.publish_websocket import PublishConnection
from clevrd.core.portions import ONE_PORTION, OTHERS, Weights
from clevrd.input_budget import InputBudget, Sender
from clevrd.pace import MIN_SENT_BYTES_PER_S
from clevrd.tenants import DEFAULT_TENANT

TEXT = 0x1
HANDSHAKE = (
    b"GET /publish HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
HALF_A_POST = b"POST /publish HTTP/1.1\r\nHost: t\r\nContent-Length: 60000\r\n\r\n" + b"x" * 50_000
CHUNKED_POST = (
    b"POST /publish HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"C350\r\n" + b"x" * 50_000 + b"\r\n"
)
HALF_A_FRAME = HANDSHAKE + masked(TEXT, b"x" * 60_000)[:50_000]
# A whole publish.
BODY = b'{"topic":"t","data":"' + b"x" * 20_000 + b'"}'
each_way = pytest.mark.parametrize(
    ("begun", "whole"),
    [
        (HALF_A_POST, b"POST /publish HTTP/1.1\r\nHost: t\r\nContent-Length: 20023\r\n\r\n" + BODY),
        (
            CHUNKED_POST,
            b"POST /publish HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"4E37\r\n" + BODY + b"\r\n0\r\n\r\n",
        ),
        (HALF_A_FRAME, HANDSHAKE + masked(TEXT, BODY)),
    ],
    ids=["raw", "aiohttp", "websocket"],
)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def test_giving_back_is_always_right() -> None:
    """A full budget refuses to grow and never refuses to shrink."""
    budget = InputBudget(100, lambda: ONE_PORTION)
    sender = budget.sender("acme", "10.0.0.1")

    assert budget.change(0, 50, sender)
    assert not budget.change(0, 1, sender)
    assert budget.change(1, 0, sender)
    assert budget.change(50, 20, sender)
    assert budget.used_bytes == 20


def test_who_comes_first_leaves_others_their_parts() -> None:
    """Beyond a half tenants have theirs by weight, and addresses theirs in equal parts."""
    weights = Weights({"acme": 3.0}, 1.0)
    budget = InputBudget(1_600, lambda: weights)
    greedy = budget.sender("anyone", "10.0.0.1")
    assert greedy == Sender(OTHERS, "10.0.0.1")
    assert budget.change(0, 800, greedy)
    assert not budget.change(800, 801, greedy)
    assert budget.change(801, 800, greedy)

    acme = budget.sender("acme", "10.0.0.1")
    assert budget.change(0, 300, acme)
    assert not budget.change(300, 301, acme)
    assert budget.change(301, 300, acme)
    unknown = budget.sender(None, "10.0.0.2")
    assert unknown.portion is None
    # Of the addresses' 400 there are two parts.
    assert not budget.change(0, 201, unknown)
    assert budget.change(201, 100, unknown)
    assert budget.used_bytes == 1_200


def test_never_is_more_taken_than_there_is() -> None:
    """However many addresses there are, the sum is bounded, and the tenants' part is left."""
    weights = Weights({"acme": 1.0}, 1.0)
    budget = InputBudget(1_600, lambda: weights)
    for number in range(1_000):
        sender = budget.sender(None, f"10.0.{number >> 8}.{number & 255}")
        if not budget.change(0, 10, sender):
            budget.change(10, 0, sender)

    assert 800 <= budget.used_bytes <= 1_200
    assert budget.change(0, 200, budget.sender("acme", "10.9.9.9"))
    assert budget.used_bytes <= 1_600


@pytest.fixture
async def tight() -> AsyncIterator[Daemon]:
    """A daemon where one client has room for two and a half of the unfinished inputs below."""
    async with running(request_timeout_s=60.0) as daemon:
        daemon.hub.input_budget.max_bytes = 250_000
        yield daemon


async def begin(daemon: Daemon, sent: bytes, client: str = "127.0.0.1") -> Streams:
    """Send what is not whole and keep the connection open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port, local_addr=(client, 0))
    writer.write(sent)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize(
    ("sent", "refusal"),
    [(HALF_A_POST, b" 503 "), (CHUNKED_POST, b" 503 "), (HALF_A_FRAME, b"too_much_unfinished")],
    ids=["raw", "aiohttp", "websocket"],
)
async def test_input_over_the_budget_is_refused_and_given_back(
    tight: Daemon, sent: bytes, refusal: bytes
) -> None:
    """The third is told so; the two before it go on; when all have gone nothing is counted."""
    budget = tight.hub.input_budget
    first, second = await begin(tight, sent), await begin(tight, sent)
    await until(lambda: budget.used_bytes >= 2 * 49_000)

    third = await begin(tight, sent)
    async with asyncio.timeout(5):
        said = await third[0].read()

    assert refusal in said
    assert 2 * 49_000 <= budget.used_bytes <= budget.max_bytes
    for _, writer in (first, second, third):
        writer.close()
    await until(lambda: budget.used_bytes == 0)


@each_way
async def test_one_client_leaves_room_for_another_one(
    tight: Daemon, begun: bytes, whole: bytes
) -> None:
    """A client that has all it may have does not keep another address from sending."""
    await check_room(tight, begun, whole, "127.0.0.2")


@each_way
async def test_one_tenant_leaves_room_for_another_one(
    tight: Daemon, begun: bytes, whole: bytes
) -> None:
    """Tenants behind one address don't keep each other from sending."""
    # A third of a quarter of 250,000 bytes.
    weights = Weights({"acme": 1.0, DEFAULT_TENANT: 1.0}, 1.0)
    tight.hub.input_budget._weights = lambda: weights
    await check_room(tight, begun, whole.replace(b"\r\n", b"\r\nX-Tenant-ID: acme\r\n", 1))


async def check_room(daemon: Daemon, begun: bytes, whole: bytes, client: str = "127.0.0.1") -> None:
    """Check that ``whole`` is published in two parts while others have begun all they may."""
    budget = daemon.hub.input_budget
    greedy = [await begin(daemon, begun) for _ in range(2)]
    await until(lambda: budget.used_bytes >= 2 * 49_000)
    greedy.append(await begin(daemon, begun))
    async with asyncio.timeout(5):
        await greedy[-1][0].read()
    # Of the half that comes first less is left than the other client sends.
    greedy.append(await begin(daemon, begun[:-29_000]))
    before_bytes = 2 * 49_000 + 19_000
    await until(lambda: budget.used_bytes >= before_bytes)

    other = await begin(daemon, whole[:-100], client)
    await until(lambda: budget.used_bytes >= before_bytes + 19_000)
    assert budget.used_bytes > budget.max_bytes // 2
    other[1].write(whole[-100:])

    await until(lambda: [topic.published for topic in daemon.hub.topics] == [1])
    for _, each in (*greedy, other):
        each.close()
    await until(lambda: budget.used_bytes == 0)


@pytest.mark.parametrize("sent", [HALF_A_POST, CHUNKED_POST, HALF_A_FRAME])
async def test_unfinished_input_ends_in_time_and_is_given_back(sent: bytes) -> None:
    """Nobody holds memory by never finishing: 408, or 1008 on a socket."""
    async with running(request_timeout_s=0.2) as daemon:
        reader, writer = await begin(daemon, sent)
        async with asyncio.timeout(5):
            said = await reader.read()

        assert b" 408 " in said or b"message_too_slow" in said
        assert daemon.hub.input_budget.used_bytes == 0
        writer.close()


@pytest.mark.parametrize("path", [b"/publish", b"/ws"])
async def test_slow_and_steady_message_is_taken(path: bytes) -> None:
    """It takes twice the time a message has, on a socket as in a request."""
    timeout_s = 0.4
    piece = b" " * int(10 * MIN_SENT_BYTES_PER_S * timeout_s / 40)
    text = b'{"topic":"t","data":1%b,"ref":7}' % (piece * 80)
    if path == b"/ws":
        text = b'{"type":"publish",' + text[1:]
    frame = masked(TEXT, text)
    async with running(request_timeout_s=timeout_s) as daemon:
        offer = b"Sec-WebSocket-Protocol: clevrd.v1\r\n\r\n"
        handshake = HANDSHAKE.replace(b"/publish", path).removesuffix(b"\r\n") + offer
        reader, writer = await begin(daemon, handshake)
        await reader.readuntil(b"\r\n\r\n")
        answering = asyncio.ensure_future(reader.read(65_536))
        for start in range(0, len(frame), len(piece)):
            writer.write(frame[start : start + len(piece)])
            await asyncio.wait([answering], timeout=timeout_s / 40)
        said = await answering
        writer.close()

    assert b'"success":true' in said


async def test_message_is_not_late_while_nobody_reads_it() -> None:
    """A publish that waits holds up what follows it, which is not the client's doing."""
    async with running() as daemon:
        reader, writer = await begin(daemon, HALF_A_FRAME)
        await reader.readuntil(b"\r\n\r\n")
        await until(lambda: daemon.hub.input_budget.used_bytes > 0)
        sockets = daemon.server.connections
        (connection,) = sockets._open
        assert isinstance(connection, PublishConnection)

        connection._is_held = True
        sockets._messages.set(sockets._unfinished[connection], 0.0)
        sockets._messages.run_due()
        is_kept, has_time = not connection.is_closing, connection in sockets._unfinished
        connection._is_held = False
        sockets._messages.set(sockets._unfinished[connection], 0.0)
        sockets._messages.run_due()

        assert (is_kept, has_time) == (True, True)
        assert connection.is_closing
        writer.close()


async def test_finished_messages_owe_nothing() -> None:
    """Publishes that arrive in pieces, on every way in, leave the budget as it was."""
    body = b'{"topic":"t","data":"' + b"x" * 60_000 + b'"}'
    post = b"POST /publish HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with running() as daemon:
        for sent in (post, HANDSHAKE + masked(TEXT, body)):
            _, writer = await begin(daemon, sent[:30_000])
            await until(lambda: daemon.hub.input_budget.used_bytes > 0)
            writer.write(sent[30_000:])
            await until(lambda: daemon.hub.input_budget.used_bytes == 0)
            writer.close()

        (topic,) = daemon.hub.topics
        await until(lambda: topic.published == 2)
