"""A connection that stops being aiohttp's: behind a head it becomes a WebSocket or a stream.

What happens on it then is its Upgrade's (`http_values`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from aiohttp import HttpVersion11, web

from clevrd.aiohttp_front.connection import FrontConnection
from clevrd.errors import UpgradeRequired
from clevrd.http_values import Upgrade, attach_upgrade


def check_upgrade(http_request: web.BaseRequest) -> None:
    """Refuse an upgrade that aiohttp's parser did not take for one: it drops what follows it."""
    upgrade = http_request.headers.get("Upgrade", "")
    if upgrade.lower() != "websocket" or http_request.version != HttpVersion11:
        raise UpgradeRequired("Ask for WebSocket alone (Upgrade: websocket), in HTTP/1.1.")


def take_over(
    connection: FrontConnection, upgrade: Upgrade, failed: Callable[[Exception], object]
) -> web.StreamResponse:
    """Write the head and give the transport to the protocol of what follows it."""
    transport = connection.open_transport()
    early = _EarlyData()
    connection.set_parser(early)  # type: ignore[arg-type]  # it is only ever fed
    transport.write(upgrade.head)
    early_data = early.data + connection.take_unread()
    # aiohttp lets go: without a transport it has nothing to close when it hears of the loss.
    connection.transport = None
    connection.connection_lost(None)
    # Whoever takes it over expects it to be read, and what aiohttp had too much of is passed on.
    transport.resume_reading()
    # Whoever takes it over counts it as well.
    connection.uncount(early_data)
    attach_upgrade(upgrade, transport, early_data, failed, has_eof=connection.has_eof)
    return _HandedOver()


class _EarlyData:
    """Takes what aiohttp has read behind an upgrade's head; the shape of its frame parsers."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """Nothing to do: the transport's end is told to its next protocol."""


class _HandedOver(web.StreamResponse):
    """What a handler returns when the connection is no longer aiohttp's.

    Raising from `prepare` is how a handler ends aiohttp's connection task without a response.
    """

    async def prepare(self, request: web.BaseRequest) -> NoReturn:
        raise ConnectionResetError("handed over")
