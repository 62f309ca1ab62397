"""Which addresses are posted to: public ones, and those that the operator has listed.

The address is judged when a connection to it is made, behind every look-up: a name that means
another address by then gains nothing by it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any, Final

from clevrd.webhooks.settings import Network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# An IPv6 address that stands for the IPv4 address in its last four bytes (RFC 6052).
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

# All that is given out for the public net (IANA IPv6 Address Space). `is_global` also holds outside
# of it, for site-local addresses and those of which a gateway in this network makes IPv4 addresses.
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
# IETF protocol assignments (RFC 6890), of which older versions of Python take most for public.
_PROTOCOLS: Final = ipaddress.IPv4Network("192.0.0.0/24")


class RefusedTarget(OSError):
    """An address that is neither public nor listed."""


def check_target(text: str, allowed: Sequence[Network]) -> None:
    """Raise RefusedTarget unless the address in ``text`` is public, or in one of ``allowed``."""
    address = ipaddress.ip_address(text.partition("%")[0])
    meant = _meant(address)
    for each in (address, meant):
        if any(each.version == network.version and each in network for network in allowed):
            return
    if not _is_public(meant):
        raise RefusedTarget(
            f"{meant} is no public address; list it in allowed_targets if it is meant"
        )


def _is_public(address: Address) -> bool:
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address not in _PROTOCOLS
    return address in _GLOBAL_UNICAST


def _meant(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for; else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


class SocketFactory:
    """Makes sockets for addresses that may be posted to, and no others."""

    __slots__ = ("_allowed",)

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = tuple(allowed)

    def __call__(self, info: tuple[Any, ...]) -> socket.socket:
        """Return a socket for an address as `getaddrinfo` has it.

        Raises:
            RefusedTarget: it may not be posted to.
        """
        family, kind, protocol, _, address = info
        check_target(str(address[0]), self._allowed)
        return socket.socket(family, kind, protocol)
