"""RunningDaemon: a daemon in the caller's event loop, with faults on request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from clevrd.client import Client, Gap, Message, Published, Subscription
from clevrd.client.wire import read_message
from clevrd.config import Config
from clevrd.control.system_stats import NOTHING_HELD, HeldMemory, LoadSample
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub import Hub
from clevrd.server import Server, Setup
from clevrd.tenants import Tenant
from clevrd.tenants.settings import OPEN, read_access
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
# A short time, so that a test ends soon even if its clients don't answer the close.
SHUTDOWN_TIMEOUT_S: Final = 0.5


class CalmMachine:
    """Load figures of an idle machine, so that a busy one does not throttle publishers."""

    def sample(self) -> LoadSample:
        """Return the load of an idle machine."""
        return LoadSample(
            cpu_system=0.0,
            cpu_loop=0.0,
            memory_system=0.0,
            memory_process=0.0,
            rss_bytes=50 << 20,
            available_bytes=8 << 30,
        )

    def held_memory(self) -> HeldMemory:
        """Return that nothing is held."""
        return NOTHING_HELD


class SlowReader:
    """A subscriber that reads no message until `resume`; iterate over it after that."""

    def __init__(self, items: Subscription, hub: Hub, topic: Topic) -> None:
        self._items = items
        self._hub = hub
        self._topic = topic
        self._reader = _reader_of(topic, items)
        # The hub is told that the connection is full. No bytes fill it, so no transport resumes it.
        hub.paused(topic, self._reader)

    async def resume(self) -> None:
        """Read on: messages that the policy left come, with gaps where messages were lost."""
        self._hub.resumed(self._topic, self._reader)

    def __aiter__(self) -> Self:
        """Return this object."""
        return self

    async def __anext__(self) -> Message | Gap:
        """Return the next message or gap."""
        return await anext(self._items)


class RunningDaemon:
    """A daemon on a free port of this machine, with faults on request.

    Use `running_daemon`, or the fixture ``clevrd_daemon``.
    """

    def __init__(self, **settings: Any) -> None:
        settings = {
            "address": "127.0.0.1:0",
            "shutdown_timeout_s": SHUTDOWN_TIMEOUT_S,
            **settings,
        }
        # The tables of the configuration file that say who may ask for what.
        names = {"auth", "tenants"} & settings.keys()
        tables: dict[str, Any] = {name: settings.pop(name) for name in names}
        self._access = read_access(tables, "running_daemon") if tables else OPEN
        self._config = Config(**settings)
        # The daemon; None while it is stopped. Changed by start and stop.
        self._server: Server | None = None
        # The daemon's URL, empty before the first start; the same after a restart.
        self.url = ""
        self._clients: dict[str | None, Client] = {}
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start the daemon."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the daemon, and close its own clients and slow readers."""
        await self._exits.aclose()
        await self.stop()

    # --- what it is for --------------------------------------------------------------------------

    @property
    def ws_url(self) -> str:
        """The daemon's URL for WebSocket clients, without a path."""
        return self.url.replace("http", "ws", 1)

    @property
    def server(self) -> Server:
        """The daemon's inside, for tests that must look there; not part of the public API."""
        if self._server is None:
            raise RuntimeError("The daemon is stopped; start() it.")
        return self._server

    def client(self, tenant: str | None = None, **options: Any) -> Client:
        """Return a client of the daemon; use as ``async with daemon.client() as client``."""
        return Client(self.url, tenant, **options)

    async def publish(self, topic: str, data: Any, *, tenant: str | None = None) -> Published:
        """Publish one message."""
        if tenant not in self._clients:
            client = self.client(tenant)
            self._clients[tenant] = await self._exits.enter_async_context(client)
        return await self._clients[tenant].publish(topic, data)

    async def messages(self, topic: str, *, tenant: str = DEFAULT_TENANT) -> list[Message]:
        """Return the topic's recent messages, as they were published, oldest first."""
        found = self.server.hub.topics.find(tenant, topic)
        if found is None:
            return []
        return [read_message(text, found.epoch) for text in messages_of(found)]

    async def wait_for_subscribers(
        self, topic: str, count: int = 1, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Wait until the topic has ``count`` subscribers or more, over all tenants.

        Raises:
            TimeoutError: the topic had fewer for ``timeout_s``.
        """
        await until(lambda: self._subscribers(topic) >= count, timeout_s)

    # --- faults ----------------------------------------------------------------------------------

    async def cut(self, topic: str | None = None) -> int:
        """Cut the topic's subscribers off without a close frame; return how many.

        WebSockets and streams are cut, long-polls are not. Without a topic, the subscribers of all
        topics and all publish sockets are cut.
        """
        return await cut_readers(self.server, topic)

    async def gap(self, topic: str, count: int = 1, *, tenant: str = DEFAULT_TENANT) -> None:
        """Let all readers of the topic lose its next ``count`` messages.

        The messages get their offsets and are lost before any reader is given them. Readers see the
        `Gap` (reason ``retention``) in front of the next message, so publish one. The topic's
        recent messages are lost as well.
        """
        await lose(self.server, tenant, topic, count)

    @asynccontextmanager
    async def slow_reader(
        self, topic: str, *, policy: str | None = None, buffer: int = 1, tenant: str | None = None
    ) -> AsyncIterator[SlowReader]:
        """Give a subscriber that does not read, as long as the block lasts.

        Args:
            policy: the subscriber's policy; None for ``drop_oldest``.
            buffer: messages that it may lag before it counts as slow and loses some.
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
            planned: True for a stop in order, as for a new version: clients are told, and closed
                with 1012. False for a crash: connections break. Positions and recent messages
                remain as they would for a real daemon with these settings.
        """
        await self.stop(planned=planned)
        await self.start()

    async def stop(self, *, planned: bool = True) -> None:
        """Stop, in order or as by a crash, until `start`. A second call does nothing."""
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
        server = Server(Setup(self._config, self._access, stats=CalmMachine()))
        await server.start()
        self._server = server
        self.url = server.addresses[0]
        # The next start takes the same port.
        address = self.url.removeprefix("http://")
        self._config = msgspec.structs.replace(self._config, address=address)

    def _subscribers(self, topic: str) -> int:
        return sum(each.subscribers for each in topics_named(self.server, topic))


def running_daemon(**settings: Any) -> RunningDaemon:
    """Return a daemon to be used as ``async with running_daemon() as daemon``.

    Args:
        settings: settings by name, as in the configuration file, such as ``ring_messages=100``.
            Their ranges are not checked, so that a ring of 5 messages makes a short test. ``auth``
            and ``tenants`` are the file's tables, as dicts and lists, and are checked.

    Raises:
        TypeError: there is no such setting.
    """
    return RunningDaemon(**settings)


def _reader_of(topic: Topic, items: Subscription) -> Subscriber:
    """Return the daemon's reader for a subscription of this process."""
    socket = items._socket
    ours = socket.get_extra_info("sockname") if socket is not None else None
    for reader in readers_of(topic):
        transport = transport_of(reader)
        if transport is not None and transport.get_extra_info("peername") == ours:
            return reader
    raise RuntimeError("The slow reader has no connection; did the daemon refuse it?")
