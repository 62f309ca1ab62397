"""Settings of the SQLite engine."""

from __future__ import annotations

from typing import Final

import msgspec

GIB: Final = 1 << 30


class SqliteSettings(msgspec.Struct, frozen=True):
    """Where the journal is, how durable, and how much of it is kept. 0 stands for no bound."""

    directory: str
    # "fsync": an acknowledged message survives a power cut. "os": it survives the end of this
    # process, not of the machine.
    durability: str = "fsync"
    # A segment is closed when it is so old, or so large.
    segment_s: float = 3600.0
    segment_bytes: int = GIB
    # Segments whose newest record is older are removed.
    retention_s: float = 0.0
    # The oldest segments are removed until all files together have no more.
    retention_bytes: int = 0
    # How far back a history is read, in messages of its topic. It removes nothing.
    retention_messages: int = 0
