"""Where NATS is, as a URL says it. Pure; no library is imported here.

``nats://`` names one server or several of a cluster, and ``tls://`` the same over TLS.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

import msgspec

from clevrd.journal.url_parts import BadUrl, Host, parse_host, rest_of, scheme_of

SCHEMES: Final = ("nats", "tls")
_PORT: Final = 4222


class NatsAddress(msgspec.Struct, frozen=True):
    """The parts of a URL."""

    hosts: tuple[Host, ...]
    user: str = ""
    password: str = ""
    # In place of user and password.
    token: str = ""
    is_tls: bool = False


def parse_nats_url(url: str) -> NatsAddress:
    """Return what ``url`` says; a name alone before the @ is a token. Raises BadUrl."""
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        raise BadUrl(f"write a URL that begins with one of {', '.join(SCHEMES)}.")
    rest = rest_of(url)
    if "://" in rest:
        raise BadUrl("write several servers as nats://user:password@h1:4222,h2:4222.")
    place, _, tail = rest.rpartition("@")
    user, colon, password = map(unquote, place.partition(":"))
    if colon and not user:
        raise BadUrl("before the @ write user:password, or a token.")
    netloc, _, path = tail.partition("/")
    if path:
        raise BadUrl("nothing can stand behind the hosts; a journal's name is its prefix.")
    hosts = tuple(parse_host(each, _PORT) for each in netloc.split(","))
    is_tls = scheme == "tls"
    if colon:
        return NatsAddress(hosts, user=user, password=password, is_tls=is_tls)
    return NatsAddress(hosts, token=user, is_tls=is_tls)
