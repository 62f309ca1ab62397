"""Client addresses: whose connection or request it is, behind listed proxies too. Pure.

The client is the peer of the connection, unless that is a listed proxy: then it is the nearest
address in X-Forwarded-For that is no listed proxy. Anybody can send that field, so it counts from
listed proxies only. The PROXY protocol is `proxy_protocol`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple

# How a list of proxies names those that connect over a Unix socket, which have no address.
UNIX: Final = "unix:"

# Proxies that one request came through, at most; further entries of the field are not read.
_MAX_HOPS: Final = 16
# The longest text of an address: an IPv6 address with an IPv4 tail, in brackets and with a port.
_MAX_CHARS: Final = 53
# Addresses of which it is remembered whether they are listed; a look-up costs 0.1 us, a search 2.
_MAX_REMEMBERED: Final = 4_096

# A path that may stand in a text and a link as it is.
_PREFIX: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+){1,16}", re.ASCII)

_Address = IPv4Address | IPv6Address


class AskedFor(NamedTuple):
    """The scheme and host that a proxy was asked for, each None where the proxy does not say."""

    scheme: str | None
    host: str | None
    # The path below which the proxy has the daemon, as in "/clevrd"; empty for its root.
    prefix: str = ""


class TrustedProxies:
    """The proxies whose word on their clients counts.

    Args:
        entries: addresses and networks, and UNIX for all that connect over a Unix socket.

    Raises:
        ValueError: an entry is neither; the sentence says which.
    """

    __slots__ = ("_has_unix", "_known", "_networks")

    def __init__(self, entries: Iterable[str] = ()) -> None:
        entries = list(entries)
        self._has_unix = UNIX in entries
        self._networks = [_network(entry) for entry in entries if entry != UNIX]
        # Address -> whether it is listed; at most _MAX_REMEMBERED.
        self._known: dict[str, bool] = {}

    def __bool__(self) -> bool:
        """Return whether any is listed."""
        return self._has_unix or bool(self._networks)

    def trusts(self, address: str) -> bool:
        """Return whether ``address``, as `address_of` gives it, is a listed proxy's."""
        if not address:
            return self._has_unix
        if not self._networks:
            return False
        known = self._known.get(address)
        if known is None:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            found = ip_address(address)
            known = self._known[address] = any(found in network for network in self._networks)
        return known

    def client_of(self, headers: Mapping[str, str], peer: str) -> str:
        """Return the address of a request's sender; empty for one on a Unix socket.

        Args:
            headers: the request's header fields.
            peer: the address of its connection's other side.
        """
        if not self.trusts(peer):
            return peer
        return self._forwarded_for(headers.get("x-forwarded-for", ""), peer)

    def asked_for(self, headers: Mapping[str, str], peer: str) -> AskedFor | None:
        """Return what a listed proxy's client asked for; None where ``peer`` is no listed proxy."""
        if not self.trusts(peer):
            return None
        # The last entry is the nearest proxy's; what stands before it may be the client's own word.
        scheme = _last(headers.get("x-forwarded-proto", "")).lower()
        host = _last(headers.get("x-forwarded-host", ""))
        prefix = _last(headers.get("x-forwarded-prefix", "")).rstrip("/")
        return AskedFor(
            scheme if scheme in ("http", "https") else None,
            host or None,
            prefix if _PREFIX.fullmatch(prefix) else "",
        )

    def _forwarded_for(self, value: str, peer: str) -> str:
        """Return the last address in ``value`` that is no listed proxy's.

        A proxy appends the address that it sees, so what stands before that address is the client's
        own word. Where something is no address, the nearest one known counts.
        """
        address = peer
        for hop in reversed(value.rsplit(",", _MAX_HOPS)[-_MAX_HOPS:]):
            found = read_address(hop)
            if found is None:
                break
            address = found
            if not self.trusts(address):
                break
        return address


# A machine has a few addresses, and to read one takes 4 us.
@lru_cache(64)
def is_loopback(address: str) -> bool:
    """Return whether ``address``, perhaps with a zone, is the loopback interface's; no name is."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        # An IPv4 address on a socket that takes both families.
        found = found.ipv4_mapped
    return found.is_loopback


def address_of(peer: object) -> str:
    """Return the address in a socket's ``peername``; nothing for a Unix socket's.

    An IPv4 address reads the same on a socket that takes both families.
    """
    if not isinstance(peer, tuple) or not peer:
        return ""
    host = str(peer[0])
    if ":" not in host:
        return host
    return _plain(ip_address(host.partition("%")[0]))


def read_address(text: str) -> str | None:
    """Return the address in one entry of X-Forwarded-For, which may have a port; None for none."""
    text = text.strip()
    if len(text) > _MAX_CHARS:
        return None
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not _is_port(port[:1], port[1:])):
            return None
    elif text.count(":") == 1:
        text, colon, port = text.partition(":")
        if not _is_port(colon, port):
            return None
    if "%" in text:
        return None
    try:
        return _plain(ip_address(text))
    except ValueError:
        return None


def count_as(address: str) -> str | None:
    """Return what the connections of ``address`` are counted under; None where they are not.

    A client has a whole /64 of IPv6 (RFC 6177), so all of it counts as one. This machine itself is
    not counted: proxies and load generators are there.
    """
    if not address or address.startswith("127."):
        return None
    if ":" not in address:
        return address
    found = IPv6Address(address)
    if found.is_loopback:
        return None
    return str(IPv6Network((int(found) >> 64 << 64, 64)))


def _is_port(colon: str, port: str) -> bool:
    return colon == ":" and port.isascii() and port.isdigit() and len(port) <= 5


def _plain(address: _Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(address if mapped is None else mapped)


def _last(value: str) -> str:
    return value.rpartition(",")[2].strip()


def _network(entry: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(entry)
    except ValueError as error:
        raise ValueError(
            f"{entry[:60]!a} is neither an address nor a network like 10.0.0.0/8, and not {UNIX};"
            f" {error}"
        ) from error
