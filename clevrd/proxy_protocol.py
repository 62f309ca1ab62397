"""The PROXY protocol: what a proxy says of its client before the client's first byte. Pure.

Rules: HAProxy's proxy-protocol.txt, version 1 (§2.1) and version 2 (§2.2). The caller decides from
which peers a header is taken.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, NamedTuple

from clevrd.client_addresses import read_address
from clevrd.errors import ClevrdError

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V1_BEGIN: Final = b"PROXY "
# The longest header of version 1, with its line end (§2.1).
_V1_MAX_BYTES: Final = 107
_V1_LINE: Final = re.compile(
    rb"PROXY (?:UNKNOWN(?: [^\r\n]*)?|TCP([46]) ([^ \r\n]+) ([^ \r\n]+)"
    rb" (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4}))\r\n"
)
_MAX_PORT: Final = 65_535
_V2_HEAD_BYTES: Final = 16
# Addresses and all that follows them (TLVs), of which nothing is read. HAProxy sends some 200 bytes
# with all that it can say of a TLS client.
V2_MAX_REST_BYTES: Final = 4_096
_LOCAL: Final = 0x20
_PROXY: Final = 0x21
# Family and transport -> bytes of its two addresses and ports (§2.2).
_UNSPECIFIED: Final = 0x00
_ADDRESS_BYTES: Final = {_UNSPECIFIED: 0, 0x11: 12, 0x21: 36, 0x31: 216}
_TCP4: Final = 0x11
_TCP6: Final = 0x21


class BadProxyHeader(ClevrdError):
    """The bytes are no PROXY header; the connection ends without a word, as its rules have it."""

    status = 400
    code = "bad_proxy_header"


class UnexpectedProxyHeader(ClevrdError):
    """A PROXY header stands where none is taken."""

    status = 403
    code = "forbidden"
    close_code = 4003

    def __init__(self) -> None:
        super().__init__(
            "A PROXY header is taken from listed proxies only, with proxy_protocol on and the"
            " proxy's address in trusted_proxies of the [auth] table."
        )


class ProxyHeader(NamedTuple):
    """A whole header."""

    # Bytes of the header itself; those behind it are the client's.
    size_bytes: int
    # The client's address; empty for a Unix socket's. None where the connection is the proxy's own,
    # as its health checks are.
    address: str | None


def begins_with_header(data: bytes) -> bool:
    """Return whether ``data``, which is no plain request, begins as a PROXY header does."""
    return data.startswith((SIGNATURE, b"PROXY TCP", b"PROXY UNKNOWN"))


def read_header(data: bytes) -> ProxyHeader | None:
    """Return the header that ``data`` begins with; None while it is not whole.

    Raises:
        BadProxyHeader: it begins with none.
    """
    if data.startswith(SIGNATURE):
        return _read_v2(data)
    if data.startswith(_V1_BEGIN):
        return _read_v1(data)
    if SIGNATURE.startswith(data) or _V1_BEGIN.startswith(data):
        return None
    raise BadProxyHeader("There is no PROXY header before the first request.")


def _read_v1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\n", 0, _V1_MAX_BYTES)
    if end < 0:
        if len(data) >= _V1_MAX_BYTES:
            raise BadProxyHeader(f"A PROXY line is over {_V1_MAX_BYTES} bytes.")
        return None
    match = _V1_LINE.fullmatch(data, 0, end + 1)
    if match is None:
        raise BadProxyHeader("A PROXY line is malformed.")
    family, source, target, *ports = match.groups()
    if family is None:
        return ProxyHeader(end + 1, None)
    kind = IPv4Address if family == b"4" else IPv6Address
    if not (_is_a(kind, source) and _is_a(kind, target) and max(map(int, ports)) <= _MAX_PORT):
        raise BadProxyHeader("A PROXY line has a wrong address or port.")
    return ProxyHeader(end + 1, read_address(source.decode("ascii")))


def _is_a(kind: type, text: bytes) -> bool:
    try:
        return b"%" not in text and isinstance(ip_address(text.decode("ascii")), kind)
    except ValueError:
        return False


def _read_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < _V2_HEAD_BYTES:
        return None
    command, family = data[12], data[13]
    rest_bytes = int.from_bytes(data[14:16], "big")
    if command not in (_LOCAL, _PROXY):
        raise BadProxyHeader("A PROXY header has another version or command.")
    if rest_bytes > V2_MAX_REST_BYTES:
        raise BadProxyHeader(f"A PROXY header has more than {V2_MAX_REST_BYTES} bytes.")
    if command == _PROXY and rest_bytes < _ADDRESS_BYTES.get(family, rest_bytes + 1):
        raise BadProxyHeader("A PROXY header has another family, or is too short for its own.")
    size_bytes = _V2_HEAD_BYTES + rest_bytes
    if len(data) < size_bytes:
        return None
    if command == _LOCAL or family == _UNSPECIFIED:
        return ProxyHeader(size_bytes, None)
    return ProxyHeader(size_bytes, _v2_source(family, data))


def _v2_source(family: int, data: bytes) -> str | None:
    if family == _TCP4:
        return str(IPv4Address(data[16:20]))
    if family == _TCP6:
        return read_address(str(IPv6Address(data[16:32])))
    return ""
