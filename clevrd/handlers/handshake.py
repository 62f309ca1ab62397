"""The WebSocket handshake, for every endpoint that upgrades. Rules: RFC 6455 §4.2."""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Final

from clevrd.errors import InvalidRequest, UpgradeRequired
from clevrd.handlers.warnings import warning_fields
from clevrd.http_values import Request

# The subprotocol in which notices stand between the messages.
CONTROL_PROTOCOL: Final = "clevrd.v1"

# The GUID from which the answer to a handshake is made (RFC 6455 §1.3).
_WEBSOCKET_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def check_handshake(request: Request) -> str:
    """Return the handshake's key.

    Raises:
        UpgradeRequired: the request is no WebSocket handshake, or not of version 13.
        InvalidRequest: the handshake's key is malformed.
    """
    headers = request.headers
    connection = {token.strip().lower() for token in headers.get("connection", "").split(",")}
    upgrades = {token.strip().lower() for token in headers.get("upgrade", "").split(",")}
    # A HEAD request gets here as GET does, and is no handshake (RFC 6455 §4.1).
    is_upgrade = request.method == "GET" and "upgrade" in connection and "websocket" in upgrades
    if not is_upgrade:
        raise UpgradeRequired(
            f"GET {request.path} is a WebSocket; connect with a WebSocket client"
            " (a single message is published with POST /publish)."
        )
    if headers.get("sec-websocket-version") != "13":
        raise UpgradeRequired("Only version 13 of WebSocket is spoken here (RFC 6455).")
    key = headers.get("sec-websocket-key", "")
    if not _is_key(key):
        raise InvalidRequest("Sec-WebSocket-Key must be 16 bytes in base64 (RFC 6455 §4.1).")
    return key


def offers_control(request: Request) -> bool:
    """Whether the client offers the subprotocol with notices (RFC 6455 §4.2.2, /4/)."""
    offered = request.headers.get("sec-websocket-protocol", "")
    return CONTROL_PROTOCOL in {name.strip() for name in offered.split(",")}


def handshake_head(key: str, protocol: str = "", warnings: tuple[str, ...] = ()) -> bytes:
    """Return the 101 that accepts a handshake with ``key`` and ``protocol`` (RFC 6455 §4.2.2)."""
    told = "".join(f"{name}: {value}\r\n" for name, value in warning_fields(warnings))
    digest = hashlib.sha1(key.encode() + _WEBSOCKET_GUID, usedforsecurity=False).digest()
    return (
        b"HTTP/1.1 101 Switching Protocols\r\n"
        b"Upgrade: websocket\r\n"
        b"Connection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: "
        + base64.b64encode(digest)
        + b"\r\n"
        + (f"Sec-WebSocket-Protocol: {protocol}\r\n".encode() if protocol else b"")
        + told.encode()
        + b"Server: clevrd\r\n\r\n"
    )


def _is_key(key: str) -> bool:
    try:
        return len(key) == 24 and len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        return False
