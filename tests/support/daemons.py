"""Daemons for tests: one in this process's loop, or a real one in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from tls import Pair, make_pair, tunnel

from clevrd.config import Config
from clevrd.connections.one_subscription import OneSubscription
from clevrd.connections.websocket import SubscriberWebSocket
from clevrd.control.system_stats import NOTHING_HELD, HeldMemory, LoadSample
from clevrd.journal.settings import read_journal
from clevrd.server import Server, Setup
from clevrd.sources.settings import read_sources
from clevrd.tenants.settings import OPEN, Access

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


class FakeStats:
    """A source of load figures that a test sets."""

    def __init__(self, cpu: float = 0.1, memory: float = 0.1) -> None:
        self.cpu = cpu
        self.memory = memory
        self.held = NOTHING_HELD

    def held_memory(self) -> HeldMemory:
        """Return what is set."""
        return self.held

    def sample(self) -> LoadSample:
        """Return the figures as they are set now."""
        return LoadSample(
            cpu_system=self.cpu,
            cpu_loop=self.cpu,
            memory_system=self.memory,
            memory_process=self.memory,
            rss_bytes=50 << 20,
            available_bytes=8 * GIB,
        )


class Daemon:
    """A running daemon with its addresses, and its inside for tests that must look there."""

    def __init__(self, server: Server, http: aiohttp.ClientSession, url: str = "") -> None:
        """Wrap ``server``, which is reached at ``url`` if not at its own address."""
        self.server = server
        self.hub = server.hub
        self.listener = server.parts.ways_in.for_clients
        self.polls = server.parts.clients.polls
        self.http = http
        self.url = url or server.addresses[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def only_subscriber(self) -> SubscriberWebSocket:
        """Return the connection of the only subscriber."""
        (connection,) = self.server.connections._open
        assert isinstance(connection, SubscriberWebSocket)
        return connection

    def only_reader(self) -> OneSubscription:
        """Return the reader of the only subscriber, which has one topic."""
        subscription = self.only_subscriber().subscription
        assert isinstance(subscription, OneSubscription)
        return subscription

    @property
    def ws_url(self) -> str:
        """The URL for WebSocket clients, without a path."""
        return f"ws://127.0.0.1:{self.port}"

    async def publish(self, topic: str, data: Any, **headers: str) -> dict[str, Any]:
        """Publish, fail unless it succeeds, and return the answer."""
        body = msgspec.json.encode({"topic": topic, "data": data})
        async with self.http.post(f"{self.url}/publish", data=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    async def get_json(self, path: str) -> dict[str, Any]:
        """GET ``path`` and return its JSON."""
        async with self.http.get(f"{self.url}{path}") as response:
            found: dict[str, Any] = await response.json()
            return found

    async def send_raw(self, data: bytes, *, timeout_s: float = 5.0) -> bytes:
        """Send ``data`` over a new connection; return everything received until its end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(timeout_s):
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def running(
    *,
    stats: FakeStats | None = None,
    access: Access = OPEN,
    folder: Path = Path(),
    journal_table: Mapping[str, Any] | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> AsyncIterator[Daemon]:
    """Run a daemon in this loop on a free port, with ``settings`` as fields of Config.

    Args:
        access: who may ask for what.
        folder: where the files are that ``access`` names.
        journal_table: the table ``journal`` of a configuration file.
        sources: the tables ``sources`` of it.
    """
    pair = _tunnel_pair()
    if pair is not None:
        settings = {**pair.settings, **settings}
    config = Config(**{"address": "127.0.0.1:0", "shutdown_timeout_s": 2.0, **settings})
    if journal_table is None and os.environ.get("CLEVRD_TEST_JOURNAL"):
        # With this variable every test that uses `running` keeps its messages in a journal.
        journal_table = {"directory": tempfile.mkdtemp(prefix="clevrd-journal-")}
    journal = None if journal_table is None else read_journal({"journal": journal_table}, "")
    read = read_sources({"sources": list(sources)}, access)
    server = Server(
        Setup(config, access, folder, stats=stats or FakeStats(), journal=journal, read=read)
    )
    await server.start()
    try:
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(aiohttp.ClientSession())
            url = ""
            if pair is not None and config.address.startswith("127.0.0.1"):
                own = int(server.addresses[0].rsplit(":", 1)[1])
                port = await stack.enter_async_context(tunnel(own, pair.client()))
                url = f"http://127.0.0.1:{port}"
            yield Daemon(server, http, url)
    finally:
        await server.stop()


@cache
def _tunnel_pair() -> Pair | None:
    """Return the certificate of daemons that are reached over TLS; None where they are not.

    With CLEVRD_TEST_TLS every test that uses `running` asks its questions over TLS.
    """
    if not os.environ.get("CLEVRD_TEST_TLS"):
        return None
    return make_pair(Path(tempfile.mkdtemp(prefix="clevrd-tls-")))


@asynccontextmanager
async def at_a_socket(path: Path, admin_address: str = "") -> AsyncIterator[Server]:
    """Run a daemon at a Unix socket alone."""
    config = Config(address=f"unix:{path}", shutdown_timeout_s=2.0, admin_address=admin_address)
    server = Server(Setup(config, stats=FakeStats()))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def until(claim: Any, *, timeout_s: float = 20.0) -> None:
    """Wait until ``claim()`` is true; fail when it never becomes so.

    The limit is long, for a busy machine; a test that asserts durations uses a clock that it sets
    itself.
    """
    async with asyncio.timeout(timeout_s):
        while not claim():  # noqa: ASYNC110  # the daemon has no event for every claim
            await asyncio.sleep(0.005)


class DaemonProcess:
    """A real daemon: `python -m clevrd serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.ws_url = f"ws://127.0.0.1:{port}"

    def stop(self, timeout_s: float = 20.0) -> int:
        """Stop the daemon by a signal and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextmanager
def daemon_process(**variables: str) -> Iterator[DaemonProcess]:
    """Start a daemon process on a free port with ``variables`` in its environment."""
    environ = {**os.environ, "ADDRESS": "127.0.0.1:0", **variables}
    process = subprocess.Popen(
        [sys.executable, "-m", "clevrd", "serve"],
        cwd=ROOT,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield DaemonProcess(process, _port_of(process))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(5)
        if process.stderr is not None:
            process.stderr.close()


@contextmanager
def shell_daemon(
    setup: str, log: list[str] | None = None, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a daemon by a shell command; yield its process and port, and kill it in the end.

    Its standard error is read into ``log`` up to the line with its address.
    """
    environ = {**os.environ, "ADDRESS": "127.0.0.1:0", **variables}
    command = f'{setup}; exec "{sys.executable}" -m clevrd serve'
    with subprocess.Popen(
        ["/bin/sh", "-c", command], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, _port_of(process, log)
        finally:
            if process.poll() is None:
                process.kill()


def _port_of(process: subprocess.Popen[str], log: list[str] | None = None) -> int:
    """Return the port in the daemon's log; keep the lines before it in ``log``.

    A daemon that ends before it listens fails the test.
    """
    assert process.stderr is not None
    for line in process.stderr:
        if log is not None:
            log.append(line)
        if match := re.search(r"listening .*address=https?://127\.0\.0\.1:(\d+)", line):
            return int(match[1])
    raise AssertionError("the daemon ended before it listened")
