"""WaysIn: the listener for clients, and the one for operators where there is an address for it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from clevrd.addresses import parse_address
from clevrd.admin_listener import AdminListener
from clevrd.errors import CannotStart
from clevrd.listeners import Listeners
from clevrd.scheduling.timers import Tasks
from clevrd.server.client_listener import ClientListener
from clevrd.server.clients import Clients
from clevrd.server.messaging import Messaging
from clevrd.server.routes import client_routes, operator_routes
from clevrd.server.setup import Setup
from clevrd.server.views import Views
from clevrd.tls import TlsContexts

log = logging.getLogger(__name__)


class WaysIn:
    """All that listens, and the connections that were accepted."""

    __slots__ = ("_tasks", "for_clients", "for_operators")

    def __init__(
        self, for_clients: ClientListener, for_operators: AdminListener | None, tasks: Tasks
    ) -> None:
        """Store both; ``tasks`` owns the opening of a listener that has died."""
        self.for_clients = for_clients
        # None without an address for operators.
        self.for_operators = for_operators
        self._tasks = tasks

    @property
    def listeners(self) -> list[Listeners]:
        """The listeners, the one for clients first."""
        operators = [] if self.for_operators is None else [self.for_operators.listeners]
        return [self.for_clients.listeners, *operators]

    async def bind(self) -> None:
        """Take the addresses; clients that connect from here on wait until `open`.

        Raises:
            CannotStart: one of them can't be listened on.
        """
        for listeners in self.listeners:
            await listeners.bind()

    async def open(self) -> None:
        """Accept connections.

        Raises:
            CannotStart: an address can't be listened on.
        """
        for listeners in self.listeners:
            await listeners.open()

    def close(self) -> None:
        """Listen no more; connections that were accepted stay."""
        for listeners in self.listeners:
            listeners.close()

    def reopen_dead(self) -> None:
        """Open listeners again that no longer listen."""
        for listeners in self.listeners:
            if not listeners.is_listening():
                self._tasks.spawn(_reopen(listeners))

    def count_connections(self) -> int:
        """Return how many connections are open and speak HTTP."""
        operators = 0 if self.for_operators is None else self.for_operators.open_connections
        return self.for_clients.open_connections + operators

    def count_under_way(self) -> int:
        """Return how many requests are not answered yet."""
        operators = 0 if self.for_operators is None else self.for_operators.count_under_way()
        return self.for_clients.count_under_way() + operators

    def close_idle(self) -> None:
        """Close connections that are between requests, and the others after theirs."""
        self.for_clients.close_idle()
        if self.for_operators is not None:
            self.for_operators.close_idle()

    async def end_operators(self, timeout_s: float) -> None:
        """End the connections of operators, after ``timeout_s`` those that take no answer."""
        if self.for_operators is not None:
            await self.for_operators.end(timeout_s)


async def _reopen(listeners: Listeners) -> None:
    try:
        await listeners.reopen_if_dead()
    except CannotStart as error:
        # The next check is a second away; until then /health/ready says no.
        log.error("listener can't be opened again reason=%s", error)


def ways_in_of(
    setup: Setup,
    messaging: Messaging,
    clients: Clients,
    views: Views,
    contexts: TlsContexts | None,
    loop: asyncio.AbstractEventLoop,
) -> WaysIn:
    """Return the listeners of a daemon; ``contexts`` has the certificates, None for no TLS."""
    for_clients = ClientListener(
        *(messaging, clients, client_routes(setup, messaging, clients, views), views.probes()),
        *(contexts, setup.given.clients, loop),
    )
    for_operators = None
    if setup.config.admin_address:
        for_operators = _for_operators(setup, messaging, clients, views, loop)
    else:
        _close_unused(setup.given.operators)
    return WaysIn(for_clients, for_operators, messaging.hub.tasks)


def _for_operators(
    setup: Setup,
    messaging: Messaging,
    clients: Clients,
    views: Views,
    loop: asyncio.AbstractEventLoop,
) -> AdminListener:
    return AdminListener(
        parse_address(setup.config.admin_address),
        clients.gate,
        clients.pages,
        operator_routes(messaging, clients, views),
        views.probes(),
        messaging.hub,
        clients.addresses,
        messaging.config,
        loop,
        setup.given.operators,
    )


def _close_unused(given: Sequence[socket.socket]) -> None:
    if given:
        log.warning("sockets for operators not taken hint=%r", "set admin_address, too")
    for unused in given:
        unused.close()
