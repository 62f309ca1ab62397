"""AdminListener: a second listener, for the daemon's operators.

It has a few connections of its own, so that figures can be read while the daemon is full of
clients. Its router says what it answers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from functools import partial
from typing import Final

from clevrd.address_limit import AddressLimit
from clevrd.addresses import TcpAddress, UnixAddress
from clevrd.admission import Endpoint, Gate, Router
from clevrd.aiohttp_front.front import AiohttpFront
from clevrd.config import Config
from clevrd.hub import Hub
from clevrd.listeners import Listeners
from clevrd.page_check import PageCheck
from clevrd.raw_http import MAX_LINGERING, MAX_PROBES, RawConnection, RawServer

# Connections at one time; a Prometheus has one.
MAX_CONNECTIONS: Final = 32
# All connections that may be open at one time, those beyond the limit included.
MAX_DESCRIPTORS: Final = MAX_CONNECTIONS + MAX_PROBES + MAX_LINGERING


class AdminListener:
    """The listener on ``admin_address``, and the connections that it has accepted."""

    def __init__(
        self,
        address: TcpAddress | UnixAddress,
        gate: Gate,
        pages: PageCheck,
        router: Router,
        probes: dict[str, Endpoint],
        hub: Hub,
        addresses: AddressLimit,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        given: Sequence[socket.socket] = (),
    ) -> None:
        """Prepare to listen.

        Args:
            given: sockets that listen already.
            addresses: counts these connections, too, by their peers.
            probes: path -> what answers it also over the limit of connections.
        """
        self._front = AiohttpFront(
            gate, pages, router, hub.refusals, hub.turns, hub.input_budget, addresses, config
        )
        self._http = self._front.server
        self._raw = RawServer(
            gate=gate,
            pages=pages,
            # Every request is aiohttp's: none is frequent.
            grammar=None,
            probes=probes,
            refusals=hub.refusals,
            addresses=addresses,
            make_aiohttp_protocol=self._http,
            count_handed_over=lambda: self._http.open_connections,
            counters=hub.counters,
            tasks=hub.tasks,
            turns=hub.turns,
            budget=hub.input_budget,
            config=config,
            max_connections=MAX_CONNECTIONS,
            loop=loop,
        )
        self.listeners = Listeners(
            address,
            config.send_buffer_bytes,
            partial(RawConnection, self._raw),
            loop,
            named_by="--admin-address or CLEVRD_ADMIN_ADDRESS",
            given=given,
        )

    @property
    def open_connections(self) -> int:
        """Number of connections that are open."""
        return len(self._raw.open) + self._http.open_connections

    def count_under_way(self) -> int:
        """Return how many requests are not answered yet."""
        return self._front.in_flight + self._raw.count_under_way()

    def close_idle(self) -> None:
        """Close connections that are between requests, and the others after theirs."""
        self._raw.close_idle()
        self._http.pre_shutdown()

    async def end(self, timeout_s: float) -> None:
        """End all connections, those that don't read their last answer within ``timeout_s``."""
        await self._http.shutdown(timeout_s)
        self._raw.stop()
