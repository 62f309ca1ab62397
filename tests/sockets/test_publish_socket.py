"""GET /publish as a WebSocket: order, answers by ref, refusals, backpressure, goodbyes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from clients import SMALL_BUFFERS, client_of, masked, small_socket, subscribe
from daemons import Daemon, running, until
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from clevrd.tenants import Tenant

TEXT, PING, CLOSE = 0x1, 0x9, 0x8


def publish_socket(daemon: Daemon, query: str = "") -> Any:
    """Return a client of the publish socket, made by a library that this project did not write."""
    return client_of(f"{daemon.ws_url}/publish{query}")


async def ask(socket: ClientConnection, **frame: Any) -> dict[str, Any]:
    """Send one frame and return the next answer."""
    await socket.send(json.dumps(frame))
    answer: dict[str, Any] = json.loads(await socket.recv())
    return answer


async def offsets(reader: ClientConnection, count: int) -> list[int]:
    """Return the offsets of the next ``count`` messages."""
    return [json.loads(await reader.recv())["offset"] for _ in range(count)]


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
def raw_paths(request: pytest.FixtureRequest) -> bool:
    """Go through the raw handshake and through aiohttp's."""
    return bool(request.param)


async def test_frame_with_ref_is_answered_with_it(raw_paths: bool) -> None:
    """The answer says what an HTTP publish says, and which frame it is for."""
    async with running(raw_paths=raw_paths) as daemon, publish_socket(daemon) as socket:
        by_text = await ask(socket, topic="t", data={"a": 1}, ref="x")
        by_number = await ask(socket, topic="t", data=2, ref=7)

    assert (by_text["success"], by_text["offset"], by_text["ref"]) == (True, 1, "x")
    assert (by_number["offset"], by_number["ref"]) == (2, 7)
    assert by_text.keys() == {
        "success",
        "message_id",
        "offset",
        "epoch",
        "subscribers",
        "lagging",
        "slow",
        "ref",
    }


async def test_frames_without_ref_are_published_in_order_and_silently() -> None:
    """Nine hundred frames in one go, more than a turn serves: all there, in order, no answer."""
    # The reader takes nothing until all are sent: it may lose what is beyond its window of 1,000.
    count = 900
    async with (
        running() as daemon,
        publish_socket(daemon) as socket,
        subscribe(daemon.ws_url, "t") as reader,
    ):
        for number in range(count):
            await socket.send(f'{{"topic":"t","data":{number}}}')
        seen = [json.loads(await reader.recv())["data"] for _ in range(count)]
        last = await ask(socket, topic="t", data=0, ref="end")

    assert seen == list(range(count))
    assert last["offset"] == count + 1


@pytest.mark.parametrize(
    ("frame", "ref"),
    [
        ('{"topic":"t","ref":7}', 7),
        ('{"topic":"t","data":null,"ref":"a"}', "a"),
        ('{"topic":"","data":1,"ref":"a"}', "a"),
        ('{"topic":"t","data":1,"ref":{}}', None),
        ('{"topic":"t","data":1,"ref":"' + "r" * 129 + '"}', None),
        ("nonsense", None),
        ("[" * 5_000, None),
    ],
)
async def test_bad_frame_is_refused_and_the_socket_kept(frame: str, ref: object) -> None:
    """Refusals come with or without a ref, carry it where it can be read, and publish nothing."""
    async with running() as daemon, publish_socket(daemon) as socket:
        await socket.send(frame)
        refusal = json.loads(await socket.recv())
        after = await ask(socket, topic="t", data=1, ref="after")

    assert (refusal["success"], refusal["code"]) == (False, "invalid_request")
    assert refusal.get("ref") == ref
    assert after["offset"] == 1


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (masked(0x2, b"binary"), 1003),
        (masked(TEXT, b"\xff"), 1007),
        (masked(TEXT, b"x" * 2_000), 1009),
        (b"\x81\x05hello", 1002),
    ],
    ids=["binary", "bad UTF-8", "oversize", "unmasked"],
)
async def test_what_breaks_the_protocol_closes_the_socket(sent: bytes, code: int) -> None:
    """What came whole before it is published all the same."""
    async with running(max_message_bytes=1024) as daemon:
        async with publish_socket(daemon) as socket:
            good = masked(TEXT, b'{"topic":"t","data":1}')
            socket.transport.write(good + sent)
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()

        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == code
        assert (await daemon.publish("t", 2))["offset"] == 2


async def test_flood_of_pings_is_closed_with_1008() -> None:
    """Control frames are paid from a budget, publishes are not."""
    async with running() as daemon, publish_socket(daemon) as socket:
        socket.transport.write(masked(PING, b"") * 5_000)

        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()

    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008


async def test_tenant_of_the_socket_is_that_of_its_handshake() -> None:
    """One socket, one tenant; another's readers see nothing of it."""
    async with (
        running() as daemon,
        subscribe(daemon.ws_url, "t", tenant="acme") as own,
        subscribe(daemon.ws_url, "t") as other,
        publish_socket(daemon, "?tenant=acme") as socket,
    ):
        await ask(socket, topic="t", data=1, ref=1)

        assert json.loads(await own.recv())["tenant_id"] == "acme"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(other.recv(), 0.1)


async def test_rate_limit_counts_frames() -> None:
    """The third of two is refused with the code that says when to come back."""
    async with (
        running(publish_rate=0.001, publish_burst=2) as daemon,
        publish_socket(daemon) as socket,
    ):
        codes = [(await ask(socket, topic="t", data=1, ref=n)).get("code") for n in range(3)]

    assert codes == [None, None, "rate_limited"]


async def test_throttled_frames_wait_in_order() -> None:
    """Each waits 10 ms for its turn, none overtakes, and the goodbye waits for them all."""
    async with running(throttle_scope="global") as daemon, subscribe(daemon.ws_url, "t") as reader:
        daemon.hub.throttler._until_s = daemon.server._loop.time() + 60
        async with publish_socket(daemon) as socket:
            for number in range(10):
                await socket.send(f'{{"topic":"t","data":{number}}}')

        assert await offsets(reader, 10) == list(range(1, 11))


async def test_frames_that_waited_together_are_published_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What goes with the first frame that waits is not held back as well."""
    async with running() as daemon, publish_socket(daemon) as socket:
        must_wait = iter([True])
        monkeypatch.setattr(daemon.hub, "must_wait", lambda topic: next(must_wait, False))

        socket.transport.write(masked(TEXT, b'{"topic":"t","data":1}') * 10)
        last = await ask(socket, topic="t", data=1, ref="last")
        after = await ask(socket, topic="t", data=1, ref="after")

    assert (last["offset"], last["ref"]) == (11, "last")
    assert (after["offset"], after["ref"]) == (12, "after")


async def test_publisher_that_leaves_abruptly_has_published_what_it_sent() -> None:
    """What was received whole is published, though nobody is left to be told."""
    async with running(throttle_scope="global") as daemon:
        daemon.hub.throttler._until_s = daemon.server._loop.time() + 60
        async with subscribe(daemon.ws_url, "t") as reader:
            socket = await publish_socket(daemon)
            frames = masked(TEXT, b'{"topic":"t","data":1,"ref":1}') * 5
            socket.transport.write(frames)
            await until(lambda: daemon.hub.publishing.waiting.count > 0)
            socket.transport.abort()

            assert await offsets(reader, 5) == [1, 2, 3, 4, 5]


async def test_fault_behind_frames_that_wait_comes_behind_their_answers() -> None:
    """What was sent before it is published and answered; nothing behind it is read."""
    async with running(throttle_scope="global") as daemon, publish_socket(daemon) as socket:
        daemon.hub.throttler._until_s = daemon.server._loop.time() + 60
        fault = b"\x81\x01x"  # not masked
        publish = masked(TEXT, b'{"topic":"t","data":1,"ref":1}')

        socket.transport.write(publish * 5 + fault + publish * 3)
        answers = [json.loads(await socket.recv()) for _ in range(5)]
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()

    assert [answer["offset"] for answer in answers] == [1, 2, 3, 4, 5]
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1002
    assert daemon.hub.topic(Tenant("default-tenant"), "t").head == 5


async def test_publisher_that_shuts_its_side_down_while_frames_wait_has_its_answers() -> None:
    """What it sent is published and answered although nothing more comes, and then it is closed."""
    async with running(throttle_scope="global") as daemon:
        daemon.hub.throttler._until_s = daemon.server._loop.time() + 60
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(
            b"GET /publish HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.write(masked(TEXT, b'{"topic":"t","data":1,"ref":1}') * 5)
        await until(lambda: daemon.hub.publishing.waiting.count > 0)
        writer.write_eof()

        answers = await asyncio.wait_for(reader.read(), 10)
        writer.close()

    assert answers.count(b'"success":true') == 5


async def test_publisher_that_reads_no_answers_is_not_read_either() -> None:
    """A hundred thousand answers owed to somebody who does not read them are not kept."""
    async with running(**SMALL_BUFFERS) as daemon:
        reader, writer = await asyncio.open_connection(sock=small_socket(daemon.port), limit=1024)
        writer.write(
            b"GET /publish HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        burst = masked(TEXT, b'{"topic":"t","data":1,"ref":1}') * 1_000

        for _ in range(2_000):
            writer.write(burst)
            try:
                await asyncio.wait_for(writer.drain(), 0.1)
            except TimeoutError:
                break
        else:
            pytest.fail("the daemon reads on")

        (connection,) = daemon.server.connections._open
        assert connection.transport.get_write_buffer_size() < 1 << 20
        writer.transport.abort()


async def test_plain_get_is_told_what_this_is() -> None:
    """A browser's address bar gets 426 and a sentence."""
    async with running() as daemon, daemon.http.get(f"{daemon.url}/publish") as response:
        assert response.status == 426
        assert (await response.json())["code"] == "upgrade_required"


async def test_draining_daemon_refuses_new_sockets_and_closes_old_ones() -> None:
    """Publish sockets get the same goodbye as subscribers: 1012, come back elsewhere."""
    async with running() as daemon, publish_socket(daemon) as socket:
        await ask(socket, topic="t", data=1, ref=1)
        daemon.hub.is_draining = True

        refusal = await ask(socket, topic="t", data=2, ref=2)
        with pytest.raises(InvalidStatus) as refused:
            await publish_socket(daemon)
        await daemon.server.stop()
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()

    assert (refusal["code"], refusal["retryable"]) == ("unavailable", True)
    assert refused.value.response.status_code == 503
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012


async def test_publisher_that_is_held_back_owes_no_pong() -> None:
    """Its pong can't be read while its frames wait for the throttle, so it is not cut for that."""
    async with running(ping_interval_s=0.3, pong_timeout_s=0.1, throttle_scope="global") as daemon:
        daemon.hub.throttler._until_s = daemon.server._loop.time() + 60
        async with (
            subscribe(daemon.ws_url, "t") as reader,
            publish_socket(daemon) as socket,
        ):
            socket.transport.write(masked(TEXT, b'{"topic":"t","data":1}') * 80)

            assert await offsets(reader, 80) == list(range(1, 81))
        assert daemon.hub.counters.pings_cut == 0
