"""The engines of the journal as the contract suite sees them: a log, and what can happen to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from nats_servers import NatsServer
from redis_servers import RedisServer

from clevrd.journal.base import Engine
from clevrd.journal.nats.engine import NatsEngine
from clevrd.journal.nats.settings import NatsSettings
from clevrd.journal.nats.url import parse_nats_url
from clevrd.journal.redis.engine import RedisEngine
from clevrd.journal.redis.settings import RedisSettings
from clevrd.journal.redis.url import parse_redis_url
from clevrd.journal.sqlite.engine import SqliteEngine
from clevrd.journal.sqlite.settings import SqliteSettings


class Log(Protocol):
    """One log of an engine, which outlives the engines that are opened for it."""

    def engine(self, *, keeps_little: bool = False) -> Engine:
        """Return an engine for the log, to be opened; one is open at a time.

        Args:
            keeps_little: 50 records of 1 KB are more than it keeps.
        """

    async def begin_anew(self) -> None:
        """Do to the log what makes its engine give it another stamp; no engine is open."""

    async def settle(self, engine: Engine) -> None:
        """Wait until records that are too many are removed, as far as they will be."""

    def close(self) -> None:
        """End what was started for the log."""


class SqliteLog:
    """A directory."""

    def __init__(self, folder: Path) -> None:
        self.settings = SqliteSettings(str(folder / "journal"))

    def engine(self, *, keeps_little: bool = False) -> SqliteEngine:
        """Return an engine for the directory."""
        if not keeps_little:
            return SqliteEngine(self.settings)
        return SqliteEngine(
            msgspec.structs.replace(self.settings, segment_bytes=30_000, retention_bytes=90_000)
        )

    async def begin_anew(self) -> None:
        """Lose the file that says what the journal is."""
        os.unlink(os.path.join(self.settings.directory, "meta"))

    async def settle(self, engine: Engine) -> None:
        """Wait for the thread that removes files."""
        assert isinstance(engine, SqliteEngine)
        await engine._keep(lambda: None)

    def close(self) -> None:
        """Do nothing."""


def redis_settings(server: RedisServer, **settings: Any) -> RedisSettings:
    """Return the settings of a journal in ``server``."""
    return RedisSettings(address=parse_redis_url(server.url), shown=server.url, **settings)


class RedisLog:
    """A Redis of its own, which was started for it."""

    def __init__(self, folder: Path) -> None:
        self.server = RedisServer(folder / "redis").start()

    def engine(self, *, keeps_little: bool = False) -> RedisEngine:
        """Return an engine for the server, in which `settle` leaves little."""
        return RedisEngine(redis_settings(self.server, partitions=2))

    async def begin_anew(self) -> None:
        """Restart the server, which has another replication id then."""
        self.server.kill()
        self.server.start()

    async def settle(self, engine: Engine) -> None:
        """Keep one entry of each log."""
        with self.server.client as client:
            for key in client.keys("*:log"):
                client.xtrim(key, 1, approximate=False)

    def close(self) -> None:
        """Kill the server."""
        self.server.kill()


def nats_settings(server: NatsServer, **settings: Any) -> NatsSettings:
    """Return the settings of a journal in ``server``."""
    return NatsSettings(address=parse_nats_url(server.url), shown=server.url, **settings)


class NatsLog:
    """A NATS server of its own, which was started for it."""

    def __init__(self, folder: Path) -> None:
        self.server = NatsServer(folder / "nats").start()

    def engine(self, *, keeps_little: bool = False) -> NatsEngine:
        """Return an engine for the server, in which `settle` leaves little."""
        return NatsEngine(nats_settings(self.server, partitions=2))

    async def begin_anew(self) -> None:
        """Restart the server, which may have lost records as far as an engine knows."""
        self.server.kill()
        self.server.start()

    async def settle(self, engine: Engine) -> None:
        """Keep one record of each log."""
        for name in await self.server.streams():
            if not name.endswith("checkpoints"):
                await self.server.api(f"STREAM.PURGE.{name}", {"keep": 1})

    def close(self) -> None:
        """Kill the server."""
        self.server.kill()


LOGS: dict[str, Callable[[Path], Log]] = {
    "nats": NatsLog,
    "redis": RedisLog,
    "sqlite": SqliteLog,
}
