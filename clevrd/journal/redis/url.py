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

Kind = Literal["single", "sentinel", "cluster"]

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
# The schemes, each with its kind, and whether it is encrypted.
_SCHEMES: Final[dict[str, tuple[Kind, bool]]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_SHAPE: Final = re.compile(r"([a-z+]+)://(.*)\Z", re.DOTALL)
_FINGERPRINT: Final = re.compile(r"#[0-9a-f]{8}\Z")
_MAX_DATABASE: Final = 1_000_000

Host = tuple[str, int]


class BadUrl(ValueError):
    """A URL that can't be used: its sentence says why, and holds no secret."""


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


def is_redis_url(text: str) -> bool:
    """Return whether ``text`` names a Redis, rightly or wrongly, and no directory."""
    match = _SHAPE.match(text)
    return match is not None and match[1] in _SCHEMES


def parse_redis_url(url: str) -> RedisAddress:
    """Return what ``url`` says; raises BadUrl."""
    match = _SHAPE.match(url)
    if match is None or match[1] not in _SCHEMES:
        raise BadUrl(f"write a URL that begins with one of {', '.join(sorted(_SCHEMES))}.")
    kind, is_tls = _SCHEMES[match[1]]
    # An operator may compare a URL as it was shown with that of a file.
    rest = _FINGERPRINT.sub("", match[2])
    if "?" in rest or "#" in rest:
        raise BadUrl(
            "a ? or # can't stand in it; in a user or password write %3F or %23, and options have"
            " settings of their own."
        )
    place, slash, tail = rest.rpartition("@")
    user, colon, password = place.partition(":")
    if slash and not colon:
        raise BadUrl("before the @ write user:password, or :password for the default user.")
    address = RedisAddress(kind, user=unquote(user), password=unquote(password), is_tls=is_tls)
    if match[1] == "unix":
        if not tail.startswith("/"):
            raise BadUrl("write the absolute path of the socket: unix:///run/redis/redis.sock.")
        return replace(address, path=unquote(tail))
    netloc, _, path = tail.partition("/")
    port = _SENTINEL_PORT if kind == "sentinel" else _PORT
    hosts = tuple(_host(each, port) for each in netloc.split(","))
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


def _host(text: str, default_port: int) -> Host:
    """Return a host and its port; an IPv6 address stands in brackets."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%a-z]+\]|[^:\[\]/\s]+)(?::(\d{1,5}))?", text)
    if match is None:
        raise BadUrl("a host is missing, or has no port that is a number: write host:6379.")
    port = int(match[2]) if match[2] else default_port
    if not 0 < port < 65536:
        raise BadUrl("a port is a number from 1 to 65535.")
    return match[1].strip("[]"), port


def _database(path: str) -> int:
    if not path:
        return 0
    if not re.fullmatch(r"\d{1,7}", path) or int(path) > _MAX_DATABASE:
        raise BadUrl("behind the host may stand the number of a database, and nothing else: /0.")
    return int(path)


def shown_redis_url(url: str) -> str:
    """Return ``url`` without user and password, for logs and operators."""
    match = _SHAPE.match(url)
    if match is None:
        return url
    return f"{match[1]}://{match[2].rpartition('@')[2]}"
