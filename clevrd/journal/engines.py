"""Makes the engine that the settings name; each engine's library is imported only where it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from clevrd.journal.base import Engine
from clevrd.journal.settings import JournalSettings


def engine_of(
    settings: JournalSettings, loop: asyncio.AbstractEventLoop, wall_ns: Callable[[], int]
) -> Engine:
    """Return the engine, not opened yet."""
    from clevrd.journal.sqlite.engine import SqliteEngine

    return SqliteEngine(settings, loop, wall_ns)
