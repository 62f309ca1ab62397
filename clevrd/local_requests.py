"""Local requests: which requests come from this machine itself, and from no proxy on it. Pure.

A proxy on the same machine makes every client look local. So a request is local only if nothing in
it says that it came from elsewhere. That is no proof: a proxy that is set to speak HTTP/1.1, to add
no field and to name this machine as the host can't be told from a program here.
"""

from __future__ import annotations

import socket
from typing import Final

from clevrd.client_addresses import is_loopback
from clevrd.http_values import Request

# Header fields that proxies add, each of which says that somebody else has asked; and how the names
# of most begin.
_SIGNS_OF_PROXY: Final = frozenset(
    {
        "cf-connecting-ip",
        "forwarded",
        "true-client-ip",
        "via",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-original-forwarded-for",
        "x-real-ip",
    }
)
_BEGINNINGS_OF_SIGNS: Final = ("x-forwarded-", "x-envoy-")


def is_local_peer(peername: object, family: int) -> bool:
    """Return whether a connection comes over loopback or a Unix socket.

    Args:
        peername: the address of the other side, as sockets give it.
        family: the socket's family.
    """
    if family == socket.AF_UNIX:
        return True
    if not isinstance(peername, tuple) or not peername:
        return False
    return is_loopback(str(peername[0]))


def is_local(request: Request) -> bool:
    """Return whether ``request`` came over loopback, and nothing in it is a proxy's or a page's.

    Its host has to be this machine's as well: a page whose own name was made to mean 127.0.0.1 (DNS
    rebinding) has its name there, and so have clients of a proxy that passes the host on. HTTP/1.0
    is what nginx speaks to the server behind it unless it is told otherwise.
    """
    headers = request.headers
    return (
        request.is_local_peer
        and not request.is_http_1_0
        and not any(map(_is_sign_of_proxy, headers))
        and _is_local_host(headers.get("host", ""))
    )


def has_public_name(request: Request) -> bool:
    """Return whether ``request`` is for a name that can be looked up on the internet."""
    name = _without_port(request.headers.get("host", "")).lower()
    return not _is_address(name) and "." in name and not name.endswith(".localhost")


def _is_sign_of_proxy(name: str) -> bool:
    return name in _SIGNS_OF_PROXY or name.startswith(_BEGINNINGS_OF_SIGNS)


def _is_local_host(host: str) -> bool:
    """Return whether ``host`` is no name that can be looked up on the internet, or is loopback."""
    name = _without_port(host).lower()
    # A name without a dot is this machine's own, or a container's.
    if not _is_address(name):
        return "." not in name or name.endswith(".localhost")
    return is_loopback(name)


def _is_address(name: str) -> bool:
    return name.replace(".", "").isdigit() or ":" in name


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
