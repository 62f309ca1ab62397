"""Nothing is begun for a connection that has ended, and nothing is read behind a fault.

What was received whole before the end counts: publishes are published even if their sender has
gone. Subscriptions are not, since nobody would ever end them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from clients import (
    command,
    commands_socket,
    masked,
    publish_socket,
    raw_subscriber,
)
from daemons import Daemon, running, until
from http_wire import get

from clevrd.connections.websocket import SubscriberWebSocket
from clevrd.http_values import Upgrade, attach_upgrade

TEXT, BINARY, CLOSE, PING = 0x1, 0x2, 0x8, 0x9
# SO_LINGER of no time: close() resets the connection instead of finishing it. socket(7).
RESET = struct.pack("ii", 1, 0)


@pytest.fixture(params=[True, False], ids=["raw", "aiohttp"])
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    async with running(raw_paths=request.param) as daemon:
        yield daemon
        assert daemon.hub.counters.background_errors == 0


PUBLISH = command(type="publish", topic="flood", data=1)
FLOODS = {
    "pings": command(type="ping") * 1_200,
    "publishes": PUBLISH * 1_200,
    "pings with refs": b"".join(command(type="ping", ref=n) for n in range(1_200)),
}
LAST_COMMANDS = {
    "topic": command(type="subscribe", topic="t"),
    "pattern": command(type="subscribe", pattern="t*.*"),
}


async def send_and_leave(port: int, data: bytes, *, with_reset: bool) -> None:
    """Send ``data`` in one go over a new connection and end it without reading."""
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setblocking(False)
        await loop.sock_sendall(client, data)
        if with_reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


async def everybody_gone(daemon: Daemon) -> None:
    """Wait until the daemon has seen each connection end, and has no work left over."""
    await until(lambda: daemon.hub.counters.connections and not daemon.server.connections)
    await until(lambda: not daemon.hub.tasks)
    # What was held back for a later turn is served by now.
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize("with_reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("last", LAST_COMMANDS)
@pytest.mark.parametrize("flood", FLOODS)
async def test_subscribe_behind_a_flood_dies_with_its_connection(
    daemon: Daemon, flood: str, last: str, with_reset: bool
) -> None:
    """A subscribe that is due only after its connection was lost leaves no reader behind."""
    data = commands_socket() + FLOODS[flood] + LAST_COMMANDS[last]

    for _ in range(3):
        await send_and_leave(daemon.port, data, with_reset=with_reset)
    await everybody_gone(daemon)
    await daemon.publish("t.made.later", 1)
    await daemon.publish("t", 1)

    assert daemon.hub.subscribers == 0
    assert len(daemon.hub.patterns) == 0


async def test_publishes_of_a_publisher_that_has_gone_are_published(daemon: Daemon) -> None:
    """All that was received whole counts, however many turns it takes."""
    data = commands_socket() + PUBLISH * 1_200

    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(data)
    writer.write_eof()
    await reader.read()
    writer.close()
    await everybody_gone(daemon)

    (topic,) = daemon.hub.topics
    assert topic.head == 1_200


FAULTS = {
    "binary": masked(BINARY, b"x"),
    "reserved bits": masked(TEXT, b"{}", first=0xC1),
    "two thousand pings": masked(PING) * 2_100,
    "close": masked(CLOSE, b"\x03\xe8"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["commands", "publish socket"])
async def test_nothing_is_read_behind_a_fault(
    daemon: Daemon, kind: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the bytes of one write: what stands before the fault counts, what follows doesn't."""
    if kind == "commands":
        opening = commands_socket()
        before, behind = PUBLISH, command(type="subscribe", topic="t") + PUBLISH
    else:
        opening = publish_socket()
        before = behind = masked(TEXT, b'{"topic":"flood","data":1}')

    with caplog.at_level(logging.WARNING):
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(opening + before + FAULTS[fault] + behind)
        ending = await reader.read()
        writer.close()
        await everybody_gone(daemon)

    assert b"\x88" in ending
    assert [topic.name for topic in daemon.hub.topics] == ["flood"]
    assert next(iter(daemon.hub.topics)).head == 1
    assert daemon.hub.subscribers == 0
    assert not caplog.records


async def test_poll_pipelined_behind_other_requests_ends_with_its_connection(
    daemon: Daemon,
) -> None:
    """A client that has gone before its poll is taken up leaves no reader behind."""
    head = b"POST /publish/batch HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n"
    body = b'{"topic":"t","data":1}\n' * 2_000
    poll = get("/subscribe?topic=t&poll=1&last=0&timeout=60")

    for data in (head % len(body) + body + poll, poll):
        # Not one that is closed in order: who only shuts its side down still waits for the answer.
        await send_and_leave(daemon.port, data, with_reset=True)
    await until(lambda: not daemon.listener.front.in_flight)
    await everybody_gone(daemon)

    assert daemon.hub.subscribers == 0


def test_transport_that_is_closing_is_given_to_nobody() -> None:
    """What begins on a closed transport would never hear of its end."""

    class ClosedTransport(asyncio.Transport):
        is_aborted = False

        def is_closing(self) -> bool:
            return True

        def abort(self) -> None:
            self.is_aborted = True

    begun: list[bytes] = []
    transport = ClosedTransport()

    attach_upgrade(
        Upgrade(b"", lambda transport, early_data: begun.append(early_data)),
        transport,
        b"early",
        lambda error: None,
    )

    assert begun == []
    assert transport.is_aborted


async def test_fault_of_one_connection_does_not_spoil_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that can't be closed in order is cut; the others are told, as ever."""
    async with running() as daemon, AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(await raw_subscriber(daemon.port)) for _ in range(3)
        ]
        await until(lambda: daemon.hub.subscribers == 3)
        close = SubscriberWebSocket.close
        closed: list[SubscriberWebSocket] = []

        def fail_first(self: SubscriberWebSocket, code: int, reason: str) -> None:
            closed.append(self)
            if self is closed[0]:
                raise AttributeError("'NoneType' object has no attribute 'fileno'")
            close(self, code, reason)

        monkeypatch.setattr(SubscriberWebSocket, "close", fail_first)
        await daemon.server.stop()
        endings = [await reader.goodbye() for reader in readers]

        assert sorted(ending.code or 0 for ending in endings) == [0, 1012, 1012]
        assert daemon.hub.subscribers == 0
        assert daemon.hub.counters.background_errors == 1


async def test_fault_of_one_step_does_not_spoil_the_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever fails on the way, readers get their goodbye and the state is saved."""
    async with running(state_dir=str(tmp_path)) as daemon:
        await daemon.publish("t", 1)
        async with await raw_subscriber(daemon.port) as reader:

            def fail(*_: object) -> None:
                raise AttributeError("broken")

            monkeypatch.setattr(daemon.hub, "drain", fail)
            monkeypatch.setattr(daemon.polls, "end_all", fail)
            await daemon.server.stop()
            ending = await reader.goodbye()

        assert ending.code == 1012
        # Polls are ended twice: when readers are sent away, and when publishers are.
        assert daemon.hub.counters.background_errors == 3
        monkeypatch.undo()
    async with running(state_dir=str(tmp_path)) as daemon:
        assert [topic.head for topic in daemon.hub.topics] == [1]
