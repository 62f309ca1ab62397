"""ServerInfo: what a Redis says of itself, and what of it the journal can't work with. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from clevrd.journal.redis.settings import RedisSettings

MIN_VERSION: Final = (7, 0)
WAITAOF_VERSION: Final = (7, 2)


class ServerInfo(msgspec.Struct, frozen=True):
    """The parts of INFO that matter, and of the server's settings where they may be asked."""

    # The version of Redis, or the one that a Valkey is compatible with.
    version: tuple[int, ...]
    # The server's name and its own version.
    product: str
    is_cluster: bool
    replicas: int
    # The keys that are thrown away when memory is full; "noeviction" for none.
    eviction: str
    max_memory: int
    # Whether an answered write is on the disk.
    is_synced: bool


def is_synced(settings: Sequence[bytes]) -> bool:
    """Return whether a server has each write on its disk before it answers.

    Args:
        settings: names and values, one after the other, of CONFIG GET; empty if it is not allowed.
    """
    given = dict(zip(settings[::2], settings[1::2], strict=False))
    return (
        given.get(b"appendonly") == b"yes"
        and given.get(b"appendfsync") == b"always"
        # With "yes" nothing is synced while the file is written anew.
        and given.get(b"no-appendfsync-on-rewrite") != b"yes"
    )


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
    valkey = fields.get("valkey_version", "")
    return ServerInfo(
        tuple(numbers),
        f"Valkey {valkey}" if valkey else f"Redis {version}",
        fields.get("cluster_enabled") == "1",
        int(fields.get("connected_slaves", "0") or 0),
        fields.get("maxmemory_policy", "noeviction"),
        int(fields.get("maxmemory", "0") or 0),
        is_synced(settings),
    )


def refusal_of(info: ServerInfo, settings: RedisSettings) -> str | None:
    """Return why the journal can't be in this Redis, and what to do; None if it can."""
    shown, kind = settings.shown, settings.address.kind
    if info.version < MIN_VERSION:
        return f"{info.product} at {shown} is too old; the journal needs 7.0 or newer; update it."
    if info.is_cluster and kind != "cluster":
        return (
            f"Redis at {shown} is a node of a cluster; write the URL as"
            " redis+cluster://host:port,host:port."
        )
    if kind == "cluster" and not info.is_cluster:
        return f"Redis at {shown} is no cluster; write the URL as redis://host:port."
    if not settings.must_sync:
        return None
    if not info.is_synced:
        return refusal_to_sync(shown)
    if settings.min_replicas and info.version < WAITAOF_VERSION:
        return (
            f"{info.product} at {shown} can't say what is on the disks of its replicas, which"
            ' durability = "fsync" with min_replicas needs; update it to Redis 7.2 or newer, or'
            " Valkey (WAITAOF), or leave one of the two out."
        )
    return None


def refusal_to_sync(shown: str) -> str:
    """Return that the server may answer before its disk has a record, and what to do.

    To wait for a file that is synced each second (WAITAOF) is no way out: it makes each answer a
    second late, and several versions say too early that it is synced (redis/redis #13793).
    """
    return (
        f"Redis at {shown} may answer before its disk has a message, and the journal has durability"
        ' = "fsync"; set appendonly yes, appendfsync always and no-appendfsync-on-rewrite no in all'
        " its servers, and let the daemon's user see them (+config|get), or leave durability out."
    )


def warnings_of(info: ServerInfo, settings: RedisSettings) -> Iterator[str]:
    """Yield what an operator should know, and what to do about it."""
    shown, min_replicas = settings.shown, settings.min_replicas
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
    if info.replicas and not min_replicas and info.is_synced:
        yield (
            f"Redis at {shown} has replicas, and a failover to one loses what it does not have yet,"
            ' also what is on the disk of the primary; durability = "fsync" and min_replicas = 1'
            " wait until a replica has it on its disk, too"
        )
