"""ServerInfo: what a Redis says of itself, and what of it the journal can't work with. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from clevrd.journal.redis.url import Kind

MIN_VERSION: Final = (7, 0)


class ServerInfo(msgspec.Struct, frozen=True):
    """The parts of INFO that matter, and of the server's settings where they may be asked."""

    version: tuple[int, ...]
    is_cluster: bool
    replicas: int
    # The keys that are thrown away when memory is full; "noeviction" for none.
    eviction: str
    max_memory: int
    # Whether an answered write is on the disk: the append-only file is synced before the answer.
    is_synced: bool


def read_info(text: bytes, settings: Sequence[bytes]) -> ServerInfo | None:
    """Return what INFO says; None where it is no Redis's.

    Args:
        settings: names and values, one after the other, of CONFIG GET; empty if it is not allowed.
    """
    fields = {}
    for line in text.decode("utf-8", "replace").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields[name] = value
    version = fields.get("redis_version", "")
    numbers = [int(part) for part in version.split(".") if part.isdigit()]
    if not numbers:
        return None
    given = dict(zip(settings[::2], settings[1::2], strict=False))
    return ServerInfo(
        tuple(numbers),
        fields.get("cluster_enabled") == "1",
        int(fields.get("connected_slaves", "0") or 0),
        fields.get("maxmemory_policy", "noeviction"),
        int(fields.get("maxmemory", "0") or 0),
        given.get(b"appendonly") == b"yes" and given.get(b"appendfsync") == b"always",
    )


def refusal_of(info: ServerInfo, kind: Kind, shown: str) -> str | None:
    """Return why the journal can't be in this Redis, and what to do; None if it can."""
    if info.version < MIN_VERSION:
        version = ".".join(map(str, info.version))
        return f"Redis at {shown} is {version}, and the journal needs 7.0 or newer; update it."
    if info.is_cluster and kind != "cluster":
        return (
            f"Redis at {shown} is a node of a cluster; write the URL as"
            " redis+cluster://host:port,host:port."
        )
    if kind == "cluster" and not info.is_cluster:
        return f"Redis at {shown} is no cluster; write the URL as redis://host:port."
    return None


def warnings_of(info: ServerInfo, min_replicas: int, shown: str) -> Iterator[str]:
    """Yield what an operator should know, and what to do about it."""
    if info.max_memory and info.eviction.startswith("allkeys"):
        yield (
            f"Redis at {shown} throws away keys when its memory is full ({info.eviction}), and the"
            " journal with them; set maxmemory-policy noeviction"
        )
    if info.replicas < min_replicas:
        yield (
            f"Redis at {shown} has {info.replicas} replicas and min_replicas is {min_replicas};"
            " until there are more, publishes are refused"
        )
