"""Makes the engine that the settings name; its library is imported here only if it is used."""

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
