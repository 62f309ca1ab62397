"""AddressLimit: the connections of each client address, counted from accept to end, and bounded.

A connection of a listed proxy is its client's: by a PROXY header from its first byte on, by
X-Forwarded-For once it is a WebSocket or a stream, and while a poll waits on it. Other connections
of proxies serve many clients and are not counted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Final

from clevrd.client_addresses import AskedFor, TrustedProxies, address_of, count_as
from clevrd.control.holdings import Holdings
from clevrd.errors import ConnectionLimit

log = logging.getLogger(__name__)

_SETTING: Final = "CLEVRD_MAX_CONNECTIONS_PER_ADDRESS"
# The log says so often at most that connections are refused.
_TOLD_EVERY_S: Final = 60.0


class AddressLimit:
    """Which client each connection belongs to, and how many connections a client may have.

    Args:
        limit: connections of one address; 0 for any number.
        proxies: the listed proxies; `change_proxies` replaces them.
        now_s: a clock that is never set back.
    """

    __slots__ = (
        "_addresses",
        "_counted",
        "_holdings",
        "_now_s",
        "_told_at_s",
        "_untold",
        "limit",
        "proxies",
    )

    def __init__(self, limit: int, proxies: TrustedProxies, now_s: Callable[[], float]) -> None:
        self.limit = limit
        self.proxies = proxies
        self._now_s = now_s
        # Connections by what their address counts as.
        self._holdings: Holdings[str] = Holdings()
        # Connection -> what it was counted as; only those that are.
        self._counted: dict[asyncio.BaseTransport, str] = {}
        # Connection -> the address that a PROXY header gave it; only those that have one.
        self._addresses: dict[asyncio.BaseTransport, str] = {}
        # When the log was told of refusals last, and how many there were since.
        self._told_at_s = -_TOLD_EVERY_S
        self._untold = 0

    def __len__(self) -> int:
        """Return how many connections are counted now."""
        return len(self._counted)

    def change_proxies(self, proxies: TrustedProxies) -> None:
        """Believe other proxies from now on; connections that are open stay as they are counted."""
        self.proxies = proxies

    def is_proxy(self, transport: asyncio.BaseTransport) -> bool:
        """Return whether the peer of ``transport`` is a listed proxy."""
        return self.proxies.trusts(self.peer_of(transport))

    def has_gone(self, transport: asyncio.BaseTransport) -> bool:
        """Return whether the peer has reset its connection before it was looked at.

        The kernel then has no address any more, and the peer might pass for another one.
        """
        if transport.get_extra_info("peername") is not None:
            return False
        accepted = transport.get_extra_info("socket")
        return accepted is not None and accepted.family != socket.AF_UNIX

    def peer_of(self, transport: asyncio.BaseTransport) -> str:
        """Return the address of the peer, which a PROXY header may have named; empty for none."""
        if self._addresses:
            named = self._addresses.get(transport)
            if named is not None:
                return named
        return address_of(transport.get_extra_info("peername"))

    def counted_as(self, transport: asyncio.BaseTransport) -> str:
        """Return the address of the client, as it is counted, or that of the peer; for people."""
        counted = self._counted.get(transport)
        if counted is not None:
            return counted
        return self.peer_of(transport)

    def asked_for(
        self, headers: Mapping[str, str], transport: asyncio.BaseTransport
    ) -> AskedFor | None:
        """Return what the client asked a listed proxy for; None for a connection of another."""
        return self.proxies.asked_for(headers, self.peer_of(transport))

    def sender_of(self, transport: asyncio.BaseTransport, headers: Mapping[str, str]) -> str:
        """Return the address of a request's client, or the network that counts as one.

        Args:
            headers: the request's header fields; none where they are not known.
        """
        address = self.client_of(transport, headers)
        return count_as(address) or address

    def client_of(self, transport: asyncio.BaseTransport, headers: Mapping[str, str]) -> str:
        """Return the address of a request's client, as a listed proxy names it."""
        return self.proxies.client_of(headers, self.peer_of(transport))

    def name(self, transport: asyncio.BaseTransport, address: str) -> None:
        """Note the address that the PROXY header of a listed proxy gave a connection."""
        self._addresses[transport] = address

    def rename(self, before: asyncio.BaseTransport, now: asyncio.BaseTransport) -> None:
        """Know a connection as ``now``, of which a PROXY header came over ``before``."""
        named = self._addresses.pop(before, None)
        if named is not None:
            self._addresses[now] = named

    def accept(self, transport: asyncio.BaseTransport) -> None:
        """Count a connection that has just been accepted, until `left`.

        Raises:
            ConnectionLimit: its address has as many as it may have.
        """
        if not self.limit:
            return
        peer = self.peer_of(transport)
        if not self.proxies.trusts(peer):
            self._count(transport, peer)

    def claim(self, transport: asyncio.BaseTransport, headers: Mapping[str, str]) -> bool:
        """Count a listed proxy's connection that becomes one client's, until `left` or `release`.

        Args:
            headers: the header fields of the request that made it one.

        Returns:
            whether it is counted now and was not before.

        Raises:
            ConnectionLimit: the client's address has as many as it may have.
        """
        if not self.limit or not self.proxies or transport in self._counted:
            return False
        peer = self.peer_of(transport)
        if not self.proxies.trusts(peer):
            return False
        address = self.proxies.client_of(headers, peer)
        return address != peer and self._count(transport, address)

    def release(self, transport: asyncio.BaseTransport) -> None:
        """Count a connection no more which `claim` has counted: it is the proxy's again."""
        counted = self._counted.pop(transport, None)
        if counted is not None:
            self._holdings.give_back(counted)

    def left(self, transport: asyncio.BaseTransport | None) -> None:
        """Note that a connection has ended. Idempotent."""
        if transport is None:
            return
        self._addresses.pop(transport, None)
        self.release(transport)

    def _count(self, transport: asyncio.BaseTransport, address: str) -> bool:
        name = count_as(address)
        if name is None:
            return False
        open_now = self._holdings.of(name)
        if open_now >= self.limit:
            self._tell(name)
            raise ConnectionLimit(
                f"The address {name}", open_now, self.limit, _SETTING, credential=name
            )
        self._holdings.take(name)
        self._counted[transport] = name
        return True

    def _tell(self, name: str) -> None:
        """Log a refusal, and how many there were since the last one that was logged."""
        now_s = self._now_s()
        if now_s - self._told_at_s < _TOLD_EVERY_S:
            self._untold += 1
            return
        log.warning(
            "connections refused address=%s limit=%d others_since=%d hint=%r",
            name,
            self.limit,
            self._untold,
            "max_connections_per_address; a proxy belongs into trusted_proxies in [auth]",
        )
        self._told_at_s = now_s
        self._untold = 0
