"""GET /subscribe: the options of a subscription and the WebSocket handshake.

What happens on the connection afterwards is connections.py's. Handshake: RFC 6455 §4.2.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
from typing import Final

import msgspec

from clevrd.config import Config
from clevrd.connections import Connections
from clevrd.core.subscriber import DropStrategy
from clevrd.errors import InvalidRequest, UpgradeRequired
from clevrd.exchange import Request, Upgrade
from clevrd.hub import Hub
from clevrd.tenants import identify

# RFC 6455 §1.3.
_WEBSOCKET_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_POLICIES: Final = tuple(strategy.value for strategy in DropStrategy)
# Fits every bound there is; int() is quadratic in the length.
_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)


class SubscribeOptions(msgspec.Struct, frozen=True):
    """What a subscriber asks for."""

    topic: str
    strategy: DropStrategy
    # Messages it may lag; None takes what is allowed.
    wanted_window: int | None
    # Recent messages to begin with.
    last: int


class SubscribeEndpoint:
    """Answers a subscribe with the 101 and what to do with the connection then."""

    reads_body = False

    def __init__(self, hub: Hub, connections: Connections, config: Config) -> None:
        self._hub = hub
        self._connections = connections
        self._catch_up_messages = config.catch_up_messages

    def admit(self, request: Request) -> None:
        """Refuse nothing: the whole request is its head."""

    def answer(self, request: Request, body: bytes) -> Upgrade:
        """Return the upgrade that begins the subscription."""
        self._hub.refuse_if_draining()
        query = request.options()
        tenant = identify(request, query)
        options = read_options(query, self._catch_up_messages)
        key = check_handshake(request)
        topic = self._hub.topic(tenant, options.topic)

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            self._connections.attach(
                transport,
                early_data,
                topic,
                options.strategy,
                options.wanted_window,
                options.last,
            )

        return Upgrade(handshake_head(key), attach)


def read_options(query: dict[str, list[str]], default_last: int) -> SubscribeOptions:
    """Return the subscription that ``query`` asks for.

    Raises:
        InvalidRequest: an option is missing, malformed or given twice; the sentence says which.
    """
    topic = _single(query, "topic")
    if topic is None:
        raise InvalidRequest("The topic is missing; connect to /subscribe?topic=NAME.")
    policy = _single(query, "policy")
    if policy is not None and policy not in _POLICIES:
        raise InvalidRequest(f"Unknown policy; use one of {', '.join(_POLICIES)}.")
    last = _number(query, "last", least=0)
    return SubscribeOptions(
        topic=topic,
        strategy=DropStrategy(policy) if policy else DropStrategy.DROP_OLDEST,
        wanted_window=_number(query, "buffer", least=1),
        last=default_last if last is None else last,
    )


def check_handshake(request: Request) -> str:
    """Return the handshake's key.

    Raises:
        UpgradeRequired: it is no WebSocket handshake, or not of version 13.
        InvalidRequest: it is one, and broken.
    """
    headers = request.headers
    connection = {token.strip().lower() for token in headers.get("connection", "").split(",")}
    upgrades = {token.strip().lower() for token in headers.get("upgrade", "").split(",")}
    # HEAD comes here wherever GET does, and is no handshake (RFC 6455 §4.1).
    is_upgrade = request.method == "GET" and "upgrade" in connection and "websocket" in upgrades
    if not is_upgrade:
        raise UpgradeRequired(
            "This endpoint delivers over WebSocket; connect with a WebSocket client."
        )
    if headers.get("sec-websocket-version") != "13":
        raise UpgradeRequired("Only version 13 of WebSocket is spoken here (RFC 6455).")
    key = headers.get("sec-websocket-key", "")
    if not _is_key(key):
        raise InvalidRequest("Sec-WebSocket-Key must be 16 bytes in base64 (RFC 6455 §4.1).")
    return key


def handshake_head(key: str) -> bytes:
    """Return the 101 that accepts a handshake with ``key`` (RFC 6455 §4.2.2)."""
    digest = hashlib.sha1(key.encode() + _WEBSOCKET_GUID, usedforsecurity=False).digest()
    return (
        b"HTTP/1.1 101 Switching Protocols\r\n"
        b"Upgrade: websocket\r\n"
        b"Connection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n"
        b"Server: clevrd\r\n\r\n"
    )


def _is_key(key: str) -> bool:
    try:
        return len(key) == 24 and len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


def _single(query: dict[str, list[str]], name: str) -> str | None:
    values = query.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise InvalidRequest(f"The option {name} is given {len(values)} times; give it once.")
    return values[0]


def _number(query: dict[str, list[str]], name: str, least: int) -> int | None:
    text = _single(query, name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or int(text) < least:
        raise InvalidRequest(
            f"The option {name} must be a whole number of messages, {least} or more."
        )
    return int(text)
