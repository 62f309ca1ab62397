"""ClientListener: the listener on the daemon's own address, and what its connections go through.

A connection is first a header of a proxy, then a handshake, where the settings ask for these; then
it is a raw connection, which hands to aiohttp what is not plain.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from clevrd.addresses import parse_address
from clevrd.admission import Endpoint
from clevrd.aiohttp_front.front import AiohttpFront
from clevrd.errors import ClevrdError, InvalidRequest
from clevrd.handlers.subscribe.endpoint import refusal_as_events
from clevrd.listeners import Listeners
from clevrd.proxy_protocol import UnexpectedProxyHeader, begins_with_header
from clevrd.raw_http import ProxiedConnection, RawConnection, RawServer
from clevrd.server.clients import Clients
from clevrd.server.messaging import Messaging
from clevrd.server.routes import ClientRoutes
from clevrd.tls import TlsConnection, TlsContexts, TlsServer


class ClientListener:
    """The listener on ``address``, and the connections that it has accepted."""

    def __init__(
        self,
        messaging: Messaging,
        clients: Clients,
        routes: ClientRoutes,
        probes: Mapping[str, Endpoint],
        contexts: TlsContexts | None,
        given: Sequence[socket.socket],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Prepare to listen.

        Args:
            probes: path -> what answers it also over the limit of connections.
            contexts: the certificates; None for connections without TLS.
            given: sockets that listen already.
        """
        hub, config = messaging.hub, messaging.config
        self._hub = hub
        self._config = config
        self._clients = clients
        self._loop = loop
        self._refusals = hub.refusals.with_events(refusal_as_events)
        self.front = AiohttpFront(
            *(clients.gate, clients.pages, routes.router, self._refusals),
            *(hub.turns, hub.input_budget, clients.addresses, config),
        )
        self.aiohttp = self.front.server
        self.raw = self._raw_server(routes, probes)
        make_protocol: Callable[[], asyncio.Protocol] = partial(RawConnection, self.raw)
        # None where the daemon speaks no TLS.
        self.tls: TlsServer | None = None
        if contexts is not None:
            self.tls = self._tls_server(contexts, make_protocol)
            make_protocol = partial(TlsConnection, self.tls)
        if config.proxy_protocol:
            # The header comes first, and in the clear, also where a handshake follows it.
            make_protocol = partial(ProxiedConnection, self.raw, make_protocol)
        self.listeners = Listeners(
            *(parse_address(config.address), config.send_buffer_bytes, make_protocol, loop),
            is_secure=contexts is not None,
            given=given,
        )

    def _raw_server(self, routes: ClientRoutes, probes: Mapping[str, Endpoint]) -> RawServer:
        hub, clients = self._hub, self._clients
        return RawServer(
            gate=clients.gate,
            pages=clients.pages,
            grammar=routes.grammar,
            probes=probes,
            refusals=self._refusals,
            addresses=clients.addresses,
            make_aiohttp_protocol=self.aiohttp,
            count_handed_over=self._count_handed_over,
            counters=hub.counters,
            tasks=hub.tasks,
            turns=hub.turns,
            budget=hub.input_budget,
            config=self._config,
            max_connections=self._config.max_connections or 1,
            loop=self._loop,
        )

    def _tls_server(
        self, contexts: TlsContexts, make_protocol: Callable[[], asyncio.Protocol]
    ) -> TlsServer:
        return TlsServer(
            contexts,
            make_protocol,
            self.raw.is_full,
            self._answer_plain,
            self._clients.addresses,
            self._hub.counters,
            self._hub.turns,
            self._hub.input_budget,
            self._config,
            self._loop,
        )

    def _answer_plain(self, data: bytes) -> bytes:
        """Return the answer to ``data``, with which a connection began in the place of TLS."""
        error: ClevrdError = InvalidRequest(
            "This port speaks TLS; ask for https:// or wss:// instead."
        )
        if begins_with_header(data):
            error = UnexpectedProxyHeader()
        return self.raw.render(self._refusals.response(error, None), must_close=True)

    @property
    def handshakes(self) -> int:
        """Number of connections that shake hands."""
        return 0 if self.tls is None else self.tls.handshakes

    @property
    def open_connections(self) -> int:
        """Number of connections that are open and speak HTTP."""
        return len(self.raw.open) + self.aiohttp.open_connections

    def _count_handed_over(self) -> int:
        """Return how many connections there are beside those of the raw server."""
        return self.aiohttp.open_connections + len(self._clients.connections) + self.handshakes

    def count_under_way(self) -> int:
        """Return how many requests are not answered yet."""
        return self.front.in_flight + self.raw.count_under_way()

    def close_idle(self) -> None:
        """Close connections that are between requests, and the others after theirs."""
        self.raw.close_idle()
        self.aiohttp.pre_shutdown()

    def end_handshakes(self) -> None:
        """End what shakes hands, and log how many have failed to."""
        if self.tls is not None:
            self.tls.report_failures()
            self.tls.stop()
