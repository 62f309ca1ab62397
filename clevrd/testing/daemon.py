"""A daemon in the caller's event loop, and the faults that it can be asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from clevrd.client import Client, Gap, Message, Published, Subscription
from clevrd.client.wire import read_message
from clevrd.config import Config
from clevrd.control.system_stats import LoadSample
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub import Hub
from clevrd.server import Server
from clevrd.tenants import Tenant
from clevrd.testing.faults import (
    TIMEOUT_S,
    cut_readers,
    lose,
    messages_of,
    readers_of,
    topics_named,
    transport_of,
    until,
)

DEFAULT_TENANT: Final = "default-tenant"
# A test ends soon also when its clients don't answer the close.
SHUTDOWN_TIMEOUT_S: Final = 0.5


class CalmMachine:
    """Load figures of a machine at rest, so that a busy one does not slow publishers down."""

    def sample(self) -> LoadSample:
        """Return them."""
        return LoadSample(
            cpu_system=0.0,
            cpu_loop=0.0,
            memory_system=0.0,
            memory_process=0.0,
            rss_bytes=50 << 20,
            available_bytes=8 << 30,
        )


class SlowReader:
    """A subscriber that takes nothing until it `resume`\\ s; then iterate over it."""

    def __init__(self, items: Subscription, hub: Hub, topic: Topic) -> None:
        self._items = items
        self._hub = hub
        self._topic = topic
        self._reader = _reader_of(topic, items)
        # What a full connection does; nothing fills it, so nothing wakes it.
        hub.paused(topic, self._reader)

    async def resume(self) -> None:
        """Read on: what it may still have comes, and gaps where it lost something."""
        self._hub.resumed(self._topic, self._reader)

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Message | Gap:
        """Return the next message or gap."""
        return await anext(self._items)


class RunningDaemon:
    """A daemon on a free port of this machine, and the faults it can be asked for.

    Use `running_daemon`, or the fixture ``clevrd_daemon``.
    """

    def __init__(self, **settings: Any) -> None:
        settings = {
            "address": "127.0.0.1:0",
            "shutdown_timeout_s": SHUTDOWN_TIMEOUT_S,
            **settings,
        }
        self._config = Config(**settings)
        # None while it is stopped.
        self._server: Server | None = None
        # Where it listens; the same after a restart.
        self.url = ""
        self._clients: dict[str | None, Client] = {}
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start it."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it, and close its own clients and slow readers."""
        await self._exits.aclose()
        await self.stop()

    # --- what it is for --------------------------------------------------------------------------

    @property
    def ws_url(self) -> str:
        """Its address for WebSocket clients, without a path."""
        return self.url.replace("http", "ws", 1)

    @property
    def server(self) -> Server:
        """Its inside, for who must look; not a part of the public API."""
        if self._server is None:
            raise RuntimeError("The daemon is stopped; start() it.")
        return self._server

    def client(self, tenant: str | None = None, **options: Any) -> Client:
        """Return a client of it; use as ``async with daemon.client() as client``."""
        return Client(self.url, tenant, **options)

    async def publish(self, topic: str, data: Any, *, tenant: str | None = None) -> Published:
        """Publish one message."""
        if tenant not in self._clients:
            client = self.client(tenant)
            self._clients[tenant] = await self._exits.enter_async_context(client)
        return await self._clients[tenant].publish(topic, data)

    async def messages(self, topic: str, *, tenant: str = DEFAULT_TENANT) -> list[Message]:
        """Return the topic's recent messages, oldest first: what was published to it."""
        found = self.server.hub.topics.find(tenant, topic)
        if found is None:
            return []
        return [read_message(text, found.epoch) for text in messages_of(found)]

    async def wait_for_subscribers(
        self, topic: str, count: int = 1, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Wait until the topic has ``count`` subscribers or more, over all tenants.

        Raises:
            TimeoutError: it has fewer.
        """
        await until(lambda: self._subscribers(topic) >= count, timeout_s)

    # --- faults ----------------------------------------------------------------------------------

    async def cut(self, topic: str | None = None) -> int:
        """Cut the connections of the topic's subscribers without a close; return how many.

        WebSockets and streams, not long-polls. None cuts those of all topics, and publish streams.
        """
        return await cut_readers(self.server, topic)

    async def gap(self, topic: str, count: int = 1, *, tenant: str = DEFAULT_TENANT) -> None:
        """Let all readers of the topic lose its next ``count`` messages.

        The messages get their offsets and are lost before anybody is given them. Readers see the
        `Gap` (reason ``retention``) in front of the next message: publish one. What the topic
        kept of its past is gone as well.
        """
        await lose(self.server, tenant, topic, count)

    @asynccontextmanager
    async def slow_reader(
        self, topic: str, *, policy: str | None = None, buffer: int = 1, tenant: str | None = None
    ) -> AsyncIterator[SlowReader]:
        """Have a subscriber that stops reading, as long as the block lasts.

        Args:
            policy: what it loses by; None: ``drop_oldest``.
            buffer: messages it may lag before it counts as slow and loses some.
        """
        async with self.client(tenant) as client:
            items = client.subscribe(topic, policy=policy, buffer=buffer, last=0)
            async with items:
                hub = self.server.hub
                found = hub.topic(Tenant(tenant or DEFAULT_TENANT), topic)
                yield SlowReader(items, hub, found)

    async def restart(self, *, planned: bool = True) -> None:
        """Stop and start again on the same port.

        Args:
            planned: True as for a new version: clients are told, and closed with 1012. False as
                after a crash: connections break. What of the positions and recent messages
                remains is what remains of a real daemon's with these settings.
        """
        await self.stop(planned=planned)
        await self.start()

    async def stop(self, *, planned: bool = True) -> None:
        """Stop, in order or as by a crash, until `start`. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        if planned:
            await server.stop()
        else:
            await server.crash()

    async def start(self) -> None:
        """Start after a `stop`."""
        if self._server is not None:
            return
        server = Server(self._config, stats=CalmMachine())
        await server.start()
        self._server = server
        self.url = server.addresses[0]
        # The same port the next time.
        address = self.url.removeprefix("http://")
        self._config = msgspec.structs.replace(self._config, address=address)

    def _subscribers(self, topic: str) -> int:
        return sum(each.subscribers for each in topics_named(self.server, topic))


def running_daemon(**settings: Any) -> RunningDaemon:
    """Return a daemon to be used as ``async with running_daemon() as daemon``.

    Args:
        settings: as in the configuration file, such as ``ring_messages=100``. Their ranges are
            not checked, so that a ring of 5 messages makes a short test.

    Raises:
        TypeError: there is no such setting.
    """
    return RunningDaemon(**settings)


def _reader_of(topic: Topic, items: Subscription) -> Subscriber:
    """Return the daemon's side of a subscription of ours."""
    socket = items._socket
    ours = socket.get_extra_info("sockname") if socket is not None else None
    for reader in readers_of(topic):
        transport = transport_of(reader)
        if transport is not None and transport.get_extra_info("peername") == ours:
            return reader
    raise RuntimeError("The slow reader has no connection; did the daemon refuse it?")
