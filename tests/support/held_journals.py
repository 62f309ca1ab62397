"""SQLite journals that take nothing for a while, for sources that read on meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from daemons import Daemon

from clevrd.journal.sqlite.engine import SqliteEngine


def hold_journal(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Let no message into a SQLite journal before the event that is returned is set."""
    goes_on = asyncio.Event()
    append = SqliteEngine.append

    async def append_later(
        engine: SqliteEngine, partition: int, record: bytes, stamp: str, placed: Any
    ) -> None:
        if placed:
            await goes_on.wait()
        await append(engine, partition, record, stamp, placed)

    monkeypatch.setattr(SqliteEngine, "append", append_later)
    return goes_on


def under_way(daemon: Daemon) -> int:
    """Return how many records of the only source are under way."""
    return daemon.server.parts.messaging.sources._sources[0]._taker.under_way
