"""Where a Redis is, as a URL says it. Pure; no library is imported here.

``redis://``, ``rediss://`` (TLS) and ``unix://`` name one server, ``redis+sentinel://`` the
Sentinels that know the primary of a service, and ``redis+cluster://`` some nodes of a cluster.
"""

from __future__ import annotations

import re
from typing import Final, Literal
from urllib.parse import unquote

import msgspec
from msgspec.structs import replace

from clevrd.journal.url_parts import BadUrl, Host, parse_host, rest_of, scheme_of

Kind = Literal["single", "sentinel", "cluster"]

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
# The schemes, each with its kind, and whether it is encrypted.
SCHEMES: Final[dict[str, tuple[Kind, bool]]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_MAX_DATABASE: Final = 1_000_000


class RedisAddress(msgspec.Struct, frozen=True):
    """The parts of a URL."""

    kind: Kind
    # Servers, or Sentinels; empty for a socket in the file system.
    hosts: tuple[Host, ...] = ()
    # The socket's path.
    path: str = ""
    # The name that the Sentinels know the servers by.
    service: str = ""
    user: str = ""
    password: str = ""
    database: int = 0
    is_tls: bool = False


def parse_redis_url(url: str) -> RedisAddress:
    """Return what ``url`` says; raises BadUrl."""
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        raise BadUrl(f"write a URL that begins with one of {', '.join(sorted(SCHEMES))}.")
    kind, is_tls = SCHEMES[scheme]
    rest = rest_of(url)
    place, slash, tail = rest.rpartition("@")
    user, colon, password = place.partition(":")
    if slash and not colon:
        raise BadUrl("before the @ write user:password, or :password for the default user.")
    address = RedisAddress(kind, user=unquote(user), password=unquote(password), is_tls=is_tls)
    if scheme == "unix":
        if not tail.startswith("/"):
            raise BadUrl("write the absolute path of the socket: unix:///run/redis/redis.sock.")
        return replace(address, path=unquote(tail))
    netloc, _, path = tail.partition("/")
    port = _SENTINEL_PORT if kind == "sentinel" else _PORT
    hosts = tuple(parse_host(each, port, _PORT) for each in netloc.split(","))
    if kind == "single" and len(hosts) > 1:
        raise BadUrl("name one server; for several write redis+sentinel:// or redis+cluster://.")
    service = ""
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise BadUrl(
                "behind the Sentinels write the name that they know the primary by:"
                " redis+sentinel://h1:26379,h2:26379/mymaster."
            )
    database = _database(path)
    if kind == "cluster" and database:
        raise BadUrl("a cluster has no databases but 0; leave the number out.")
    return replace(address, hosts=hosts, service=unquote(service), database=database)


def _database(path: str) -> int:
    if not path:
        return 0
    if not re.fullmatch(r"\d{1,7}", path) or int(path) > _MAX_DATABASE:
        raise BadUrl("behind the host may stand the number of a database, and nothing else: /0.")
    return int(path)
