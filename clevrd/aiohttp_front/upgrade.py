"""Upgrades: takes a connection from aiohttp and gives it to a WebSocket or a stream.

The Upgrade (`http_values`) decides what happens on the connection afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from aiohttp import HttpVersion11, web

from clevrd.aiohttp_front.connection import FrontConnection
from clevrd.errors import UpgradeRequired
from clevrd.http_values import Upgrade, attach_upgrade


def check_upgrade(http_request: web.BaseRequest) -> None:
    """Refuse an upgrade that aiohttp's parser did not recognise: it would drop later bytes."""
    upgrade = http_request.headers.get("Upgrade", "")
    if upgrade.lower() != "websocket" or http_request.version != HttpVersion11:
        raise UpgradeRequired("Ask for WebSocket alone (Upgrade: websocket), in HTTP/1.1.")


def take_over(
    connection: FrontConnection, upgrade: Upgrade, failed: Callable[[Exception], object]
) -> web.StreamResponse:
    """Write the upgrade's head and give its ``attach`` the transport."""
    transport = connection.open_transport()
    early = _EarlyData()
    connection.set_parser(early)  # type: ignore[arg-type]  # it is only ever fed
    transport.write(upgrade.head)
    early_data = early.data + connection.take_unread()
    connection.let_go()
    # The new protocol expects a transport that is being read; aiohttp may have paused reading
    # because it had too much input, and that input is in ``early_data``.
    transport.resume_reading()
    # The next protocol counts these bytes as well.
    connection.uncount(early_data)
    attach_upgrade(upgrade, transport, early_data, failed, has_eof=connection.has_eof)
    if transport.get_protocol() is connection:
        connection.forget_client(transport)
    return _HandedOver()


class _EarlyData:
    """Collects the bytes that aiohttp read behind an upgrade, as one of its frame parsers."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """Do nothing: the transport tells its next protocol of the end."""


class _HandedOver(web.StreamResponse):
    """The response that a handler returns when aiohttp no longer has the connection.

    `prepare` raises, which ends aiohttp's connection task without a response.
    """

    async def prepare(self, request: web.BaseRequest) -> NoReturn:
        raise ConnectionResetError("handed over")
