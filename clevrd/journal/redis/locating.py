"""Where each partition's primary is: one server, what the Sentinels say, or a cluster's slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from redis.crc import key_slot

from clevrd.journal.redis.library import LOST, Connector, RedisFault, close, fault_of
from clevrd.journal.redis.url import RedisAddress
from clevrd.journal.url_parts import Host

# A server's address; None for a socket in the file system.
Place = Host | None

_SLOTS: Final = 16_384


class Locator(Protocol):
    """Finds primaries."""

    async def find(self, partition: int) -> Place:
        """Return where the partition's primary is; raises RedisFault."""

    def forget(self) -> None:
        """Ask again next time: what was found may be wrong by now."""

    async def has_moved(self, partition: int, place: Place) -> bool:
        """Return whether the primary is known to be elsewhere than ``place``."""


class OneServer:
    """The server that the URL names."""

    def __init__(self, address: RedisAddress) -> None:
        self._place = address.hosts[0] if address.hosts else None

    async def find(self, partition: int) -> Place:
        """Return the server."""
        return self._place

    def forget(self) -> None:
        """Do nothing."""

    async def has_moved(self, partition: int, place: Place) -> bool:
        """Return False: there is no other."""
        return False


class Sentinels:
    """The primary that the Sentinels name."""

    def __init__(self, address: RedisAddress, connector: Connector) -> None:
        self._service = address.service
        # The Sentinel that answered last comes first.
        self._hosts = list(address.hosts)
        self._connector = connector
        self._place: Place = None

    async def find(self, partition: int) -> Place:
        """Return the primary, asked of the first Sentinel that answers."""
        if self._place is None:
            self._place = await self._ask()
        return self._place

    def forget(self) -> None:
        """Ask the Sentinels next time."""
        self._place = None

    async def has_moved(self, partition: int, place: Place) -> bool:
        """Ask a Sentinel; False where none answers."""
        try:
            found = await self._ask()
        except RedisFault:
            return False
        self._place = found
        return found != place

    async def _ask(self) -> Host:
        last = RedisFault(LOST, "no Sentinel is named")
        for host in tuple(self._hosts):
            try:
                found = await self._ask_one(host)
            except RedisFault as fault:
                last = RedisFault(fault.code, f"Sentinel {host[0]}:{host[1]}: {fault.text}")
                continue
            self._hosts.remove(host)
            self._hosts.insert(0, host)
            return found
        raise last

    async def _ask_one(self, host: Host) -> Host:
        found = await _asked(
            self._connector, host, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service), True
        )
        if not found:
            raise RedisFault(
                LOST,
                f"it knows no service {self._service!r}; write the name that its configuration has"
                " (sentinel monitor NAME ...)",
            )
        return found[0].decode(), int(found[1])


class ClusterSlots:
    """The node that has a partition's slot."""

    def __init__(self, address: RedisAddress, connector: Connector, tags: Sequence[str]) -> None:
        """Args: tags: each partition's keys begin with its tag, which decides their slot."""
        self._seeds = list(address.hosts)
        self._connector = connector
        self._slots = [key_slot(tag.encode()) for tag in tags]
        # Each partition's primary; empty until it was asked for.
        self._places: list[Host] = []

    async def find(self, partition: int) -> Place:
        """Return the node that has the partition's slot."""
        if not self._places:
            self._places = await self._ask()
        return self._places[partition]

    def forget(self) -> None:
        """Ask a node next time."""
        self._places = []

    async def has_moved(self, partition: int, place: Place) -> bool:
        """Return False: a node says itself (MOVED) that a slot is elsewhere."""
        return False

    async def _ask(self) -> list[Host]:
        last = RedisFault(LOST, "no node is named")
        for host in tuple(self._seeds):
            try:
                ranges = await _asked(self._connector, host, ("CLUSTER", "SLOTS"), False)
                return self._places_of(ranges, host)
            except RedisFault as fault:
                last = fault
        raise last

    def _places_of(self, ranges: Any, asked: Host) -> list[Host]:
        """Return each partition's primary; a node that says nothing of itself is the asked one."""
        places: list[Host | None] = [None] * len(self._slots)
        known = []
        for first, end, primary, *_ in ranges:
            host = (primary[0].decode() if primary[0] else asked[0], int(primary[1]))
            known.append(host)
            for partition, slot in enumerate(self._slots):
                if first <= slot <= end:
                    places[partition] = host
        # All nodes may be asked next time: those of the URL may be gone by then.
        self._seeds = list(dict.fromkeys([*known, *self._seeds]))
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            raise RedisFault("CLUSTERDOWN", f"some of its {_SLOTS} slots have no node")
        return found


async def _asked(
    connector: Connector, host: Host, command: Sequence[str], is_sentinel: bool
) -> Any:
    """Return one answer over a connection of its own."""
    connection = await connector.connect(host, is_sentinel=is_sentinel)
    try:
        await connection.send_command(*command)
        return await connection.read_response(timeout=2.0) or ()
    except Exception as error:
        raise fault_of(error) from error
    finally:
        await close(connection)


def locator_of(address: RedisAddress, connector: Connector, tags: Sequence[str]) -> Locator:
    """Return what finds the primaries of ``address``."""
    if address.kind == "sentinel":
        return Sentinels(address, connector)
    if address.kind == "cluster":
        return ClusterSlots(address, connector, tags)
    return OneServer(address)
