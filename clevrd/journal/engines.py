"""Makes the engine that the settings name; its library is imported here only if it is used."""

from __future__ import annotations

from collections.abc import Callable

from clevrd.journal.base import Engine
from clevrd.journal.settings import JournalSettings


def engine_of(settings: JournalSettings, wall_us: Callable[[], int]) -> Engine:
    """Return the engine, not opened yet."""
    from clevrd.journal.sqlite.engine import SqliteEngine
    from clevrd.journal.sqlite.settings import SqliteSettings

    return SqliteEngine(
        SqliteSettings(
            directory=settings.directory,
            durability=settings.durability,
            segment_s=settings.segment_s,
            segment_bytes=settings.segment_bytes,
            retention_s=settings.retention_s,
            retention_bytes=settings.retention_bytes,
            retention_messages=settings.retention_messages,
        ),
        wall_us=wall_us,
    )
