"""ProxiedConnection: a connection until its PROXY header has been read, where that is asked for.

Listed proxies have to send the header; nobody else may. The header's own rules: `proxy_protocol`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from clevrd.proxy_protocol import BadProxyHeader, ProxyHeader, read_header
from clevrd.raw_http.server import RawServer


class ProxiedConnection(asyncio.Protocol):
    """One connection of a listed proxy; any other one goes on without a header at once.

    Args:
        make_next: makes the protocol that goes on: a RawConnection, or what shakes hands by TLS.
    """

    __slots__ = ("_buffer", "_make_next", "_server", "deadline_s", "transport")

    transport: asyncio.Transport

    def __init__(self, server: RawServer, make_next: Callable[[], asyncio.Protocol]) -> None:
        self._server = server
        self._make_next = make_next
        # Bytes received of the header, and what one read brought behind it.
        self._buffer = b""
        # Loop time by which the header must be whole.
        self.deadline_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the header of a listed proxy."""
        server = self._server
        self.transport = cast(asyncio.Transport, transport)
        if server.addresses.has_gone(transport):
            # A proxy's health check, as a rule: it would be refused as anybody else's header.
            self.transport.abort()
            return
        if not server.addresses.is_proxy(transport):
            self._go_on(b"")
            return
        server.open.add(self)
        server.deadlines.set(self, server.now_s() + server.request_timeout_s)

    def data_received(self, data: bytes) -> None:
        """Read the header, and leave what follows it to the client's connection."""
        self._server.budget.received_bytes += len(data)
        self._buffer += data
        try:
            header = read_header(self._buffer)
        except BadProxyHeader as error:
            self._end(error)
            return
        if header is not None:
            self._take(header)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, of which no other part knows yet."""
        self._forget()
        self._server.addresses.left(self.transport)

    def _take(self, header: ProxyHeader) -> None:
        self._forget()
        if header.address is not None:
            self._server.addresses.name(self.transport, header.address)
        rest = self._buffer[header.size_bytes :]
        self._buffer = b""
        # The next protocol counts these bytes as well.
        self._server.budget.received_bytes -= len(rest)
        self._go_on(rest)

    def _go_on(self, rest: bytes) -> None:
        protocol = self._make_next()
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        # It may have been handed on or refused by now.
        current = cast(asyncio.Protocol, self.transport.get_protocol())
        if rest and not self.transport.is_closing():
            current.data_received(rest)

    def _forget(self) -> None:
        self._server.open.discard(self)
        self._server.deadlines.remove(self)

    def _end(self, error: BadProxyHeader) -> None:
        """Close without a word: only a proxy would read it, and it says that nothing follows."""
        self._buffer = b""
        self._forget()
        self._server.note_bad_proxy_header(error, self.transport)
        self.transport.close()

    # --- a Connection of the server --------------------------------------------------------------

    @property
    def is_under_way(self) -> bool:
        """Whether a request has begun to arrive: none has before the header."""
        return False

    def expire(self) -> None:
        """End because the header did not come in time."""
        self._end(BadProxyHeader("There was no PROXY header within its time."))

    def refuse_entry(self) -> None:
        """Do nothing: it is no probe."""

    def close_when_idle(self) -> None:
        """Close: nothing was asked yet."""
        self.transport.close()
