"""Stopping: what was acknowledged arrives, everybody is told, nothing lingers, and it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from clients import (
    RECORD,
    SMALL_BUFFERS,
    PublishRefused,
    RawSubscriber,
    publish_request,
    publishing,
    raw_subscriber,
    read_to_the_end,
    subscribe,
)
from daemons import DaemonProcess, daemon_process, running, until
from websockets.asyncio.client import unix_connect

from clevrd.config import Config
from clevrd.control.adaptive_throttler import ThrottleSample
from clevrd.daemon_signals import EXIT_FORCED
from clevrd.server import Server, Setup
from clevrd.server.stop import StopTimes, times_of_stop


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[DaemonProcess]:
    """Return a daemon process; a test's parameter is its environment.

    It is started outside the test's loop, since waiting for it would hold the loop.
    """
    with daemon_process(**getattr(request, "param", {})) as daemon:
        yield daemon


async def exit_code(daemon: DaemonProcess, timeout_s: float = 15.0) -> int:
    """Wait until the process has ended and return its exit code."""
    return await asyncio.to_thread(daemon.process.wait, timeout_s)


async def logged(daemon: DaemonProcess, words: str) -> None:
    """Wait until the process logs a line with ``words`` in it."""
    assert daemon.process.stderr is not None
    while words not in (line := await asyncio.to_thread(daemon.process.stderr.readline)):
        assert line, f"the daemon ended before it logged {words!r}"


# --- a real process ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "started",
    [{"CLEVRD_RAW_PATHS": "true"}, {"CLEVRD_RAW_PATHS": "false"}],
    indirect=True,
    ids=["raw", "aiohttp"],
)
async def test_everything_acknowledged_reaches_every_reader_before_its_1012(
    started: DaemonProcess,
) -> None:
    """SIGTERM under load: four publishers push on while twenty readers are brought up to date."""
    async with AsyncExitStack() as stack, asyncio.timeout(20):
        readers = [await stack.enter_async_context(subscribe(started.ws_url)) for _ in range(20)]
        reading = asyncio.gather(*(read_to_the_end(reader) for reader in readers))
        under_way = asyncio.Event()
        pushing = asyncio.gather(*(push(started.port, under_way) for _ in range(4)))
        await under_way.wait()

        started.process.send_signal(signal.SIGTERM)
        acknowledged = {offset for each in await pushing for offset in each}
        endings = await reading
    assert await exit_code(started) == 0

    assert len(acknowledged) >= 100
    for seen, close_code, reason in endings:
        assert (close_code, reason) == (1012, "restarting")
        assert seen == list(range(1, len(seen) + 1))
        assert acknowledged <= set(seen)
    # Nobody else holds the port, and the daemon no longer does.
    socket.create_server(("127.0.0.1", started.port)).close()


async def push(port: int, under_way: asyncio.Event) -> list[int]:
    """Publish until the daemon refuses or goes away; return what it acknowledged."""
    async with publishing(port) as publisher:
        with suppress(PublishRefused, asyncio.IncompleteReadError, ConnectionError):
            while True:
                await publisher.send("t", 10, RECORD)
                if len(publisher.acknowledged) >= 100:
                    under_way.set()
    return publisher.acknowledged


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_idle_connections_delay_nothing(
    started: DaemonProcess, number: signal.Signals
) -> None:
    """Kept connections, silent ones and half a request don't hold the process for a moment."""
    health = b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n"
    publish = publish_request("t", b"1")
    async with AsyncExitStack() as stack:
        for request in (b"", publish, publish[:40], health, health[:24]):
            reader, writer = await asyncio.open_connection("127.0.0.1", started.port)
            stack.callback(writer.close)
            writer.write(request)
            if request in (publish, health):
                await reader.readuntil(b"\r\n\r\n")

        started.process.send_signal(number)

        assert await exit_code(started, timeout_s=5.0) == 0


async def test_second_signal_forces_the_end(started: DaemonProcess) -> None:
    """Who can't wait for a stalled reader says so, and the exit code tells it was not in order."""
    async with stalled_reader(started.port):
        started.process.send_signal(signal.SIGTERM)
        await logged(started, "stopping signal=SIGTERM")
        started.process.send_signal(signal.SIGINT)

        assert await exit_code(started) == EXIT_FORCED == 1


@asynccontextmanager
async def stalled_reader(port: int) -> AsyncIterator[RawSubscriber]:
    """Subscribe a reader that reads nothing of the megabytes that are published for it."""
    async with (
        await raw_subscriber(port, receive_bytes=4096) as reader,
        publishing(port) as publisher,
    ):
        await publisher.send("t", 40, b'"%b"' % (b"x" * 50_000))
        yield reader


@pytest.mark.parametrize("turns", range(4))
async def test_request_that_has_just_begun_delays_nothing(turns: int) -> None:
    """However far its connection has come when the stop begins: accepted, read or handed over."""
    async with running(shutdown_timeout_s=20.0) as daemon:
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(b"GET /health HTTP/1.1\r\nHo")
        for _ in range(turns):
            await asyncio.sleep(0)

        async with asyncio.timeout(5):
            await daemon.server.stop()

        writer.close()


# --- in this process -----------------------------------------------------------------------------


async def test_stalled_reader_delays_the_stop_no_longer_than_was_allowed() -> None:
    """It gets the time that was configured, and is cut then."""
    async with (
        running(shutdown_timeout_s=0.3, **SMALL_BUFFERS) as daemon,
        stalled_reader(daemon.port),
    ):
        async with asyncio.timeout(3):
            await daemon.server.stop()

        await until(lambda: len(daemon.server.connections) == 0)
        assert daemon.hub.subscribers == 0


async def test_stalled_reader_that_wakes_up_gets_what_it_was_promised() -> None:
    """While there is time, a reader that lags is served: the messages, then its 1012."""
    async with (
        running(**SMALL_BUFFERS) as daemon,
        subscribe(daemon.ws_url, stalls=True) as reader,
        publishing(daemon.port) as publisher,
    ):
        await publisher.send("t", 500, RECORD)
        stopping = asyncio.create_task(daemon.server.stop())
        await until(lambda: daemon.hub.is_draining)

        seen, code, _ = await read_to_the_end(reader)

        await stopping
    assert seen == list(range(1, 501))
    assert code == 1012


async def test_reader_of_some_kilobytes_a_second_is_waited_for() -> None:
    """It lives on what its connection holds for seconds; while that shrinks it is waited for.

    Every look is the last before patience ends, and no message is handed over between two.
    """
    async with running(**SMALL_BUFFERS) as daemon, stalled_reader(daemon.port):
        left = [5_000, 4_990, 4_980, 4_980, 0]
        connection = daemon.only_subscriber()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clevrd.hub.drain._PATIENCE_S", 0.0)
            patch.setattr("clevrd.hub.drain._POLL_S", 0.0)
            patch.setattr(type(connection), "unsent_bytes", lambda _: left.pop(0))

            await daemon.hub.drain(asyncio.get_running_loop().time() + 5.0)

        assert daemon.only_reader().is_joined
        assert left == [0]


async def test_unsent_bytes_are_also_what_the_kernel_holds() -> None:
    """A kernel's buffer hides a slow reader's progress from everyone who doesn't ask it."""
    async with running(**SMALL_BUFFERS) as daemon, stalled_reader(daemon.port) as reader:
        connection = daemon.only_subscriber()
        unsent_bytes = connection.unsent_bytes()
        in_daemon_bytes = connection.transport.get_write_buffer_size()

        await reader.read(1 << 20)
        await until(lambda: connection.unsent_bytes() != unsent_bytes)

        assert unsent_bytes > in_daemon_bytes > 0


async def test_not_ready_as_soon_as_it_drains() -> None:
    """While it drains: probes on kept connections say so, and new connections are refused."""
    async with (
        running(shutdown_timeout_s=0.5, **SMALL_BUFFERS) as daemon,
        await raw_subscriber(daemon.port, receive_bytes=4096),
        publishing(daemon.port) as publisher,
    ):
        await publisher.send("t", 500, RECORD)
        assert (await daemon.get_json("/health/ready"))["status"] == "ok"

        stopping = asyncio.create_task(daemon.server.stop())
        await until(lambda: daemon.hub.is_draining)
        async with daemon.http.get(f"{daemon.url}/health/ready") as response:
            refusal = await response.json()
        live = await daemon.get_json("/health/live")
        health = await daemon.get_json("/health")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", daemon.port)

        await stopping
    assert (response.status, refusal["code"]) == (503, "unavailable")
    assert response.headers["Retry-After"] == "1"
    assert live["status"] == "ok"
    assert health["status"] == "draining"


@pytest.mark.parametrize("raw_paths", [True, False], ids=["raw", "aiohttp"])
async def test_publishes_that_wait_are_finished_first(raw_paths: bool) -> None:
    """A publish that a throttle holds back when the stop begins is published and answered."""
    async with (
        running(raw_paths=raw_paths, throttle_scope="global") as daemon,
        subscribe(daemon.ws_url) as reader,
        AsyncExitStack() as stack,
    ):
        publishers = [await stack.enter_async_context(publishing(daemon.port)) for _ in range(10)]
        overload = ThrottleSample(subscribers=1, slow_subscribers=1, cpu=1.0, memory=1.0)
        daemon.hub.throttler.evaluate(overload, asyncio.get_running_loop().time())
        sending = asyncio.gather(*(publisher.send("t", 1) for publisher in publishers))
        await until(lambda: daemon.hub.publishing.waiting.count == 10)

        stopping = asyncio.create_task(daemon.server.stop())
        await sending
        seen, code, _ = await read_to_the_end(reader)

        await stopping
    assert sorted(each.acknowledged[0] for each in publishers) == list(range(1, 11))
    assert (seen, code) == (list(range(1, 11)), 1012)


async def test_unix_socket_is_served_and_removed(tmp_path: Path) -> None:
    """A daemon on a Unix socket takes its file along when it goes."""
    path = tmp_path / "clevrd.sock"
    server = Server(Setup(Config(address=f"unix:{path}", shutdown_timeout_s=2.0)))
    await server.start()
    assert stat.S_ISSOCK(path.stat().st_mode)

    async with unix_connect(str(path), "ws://localhost/subscribe?topic=t") as reader:
        await server.stop()
        seen, code, _ = await read_to_the_end(reader)

    assert (seen, code) == ([], 1012)
    assert not path.exists()


async def test_nothing_is_left_after_a_stop() -> None:
    """No task, no timer and no connection of a stopped daemon goes on in its loop."""
    before = asyncio.all_tasks()
    async with running() as daemon, subscribe(daemon.ws_url) as reader:
        await daemon.publish("t", 1)

        await daemon.server.stop()
        await read_to_the_end(reader)

        assert len(daemon.server.connections) == 0
        assert daemon.listener.raw.open == set()
        assert daemon.server.addresses == []
    await until(lambda: asyncio.all_tasks() == before)


@pytest.mark.parametrize(("drain_s", "drained_by_s"), [(10.0, 110.0), (60.0, 121.0)])
def test_drain_leaves_time_for_the_last_goodbyes_and_for_saving(
    drain_s: float, drained_by_s: float
) -> None:
    """Each part of the stop has its end, and the last one is that of all."""
    config = Config(shutdown_timeout_s=30.0, drain_s=drain_s)

    times = times_of_stop(100.0, config, saving_takes_s=4.0)

    assert times == StopTimes(100.0, drained_by_s, deadline_s=126.0, end_s=130.0)
