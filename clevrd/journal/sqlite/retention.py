"""Which segments go. Pure: the sizes and the clock come in as arguments."""

from __future__ import annotations

from collections.abc import Sequence

from clevrd.journal.sqlite.segments import Segment
from clevrd.journal.sqlite.settings import SqliteSettings


def segments_to_remove(
    settings: SqliteSettings,
    segments: Sequence[Segment],
    sizes_bytes: Sequence[int],
    now_us: int,
    saved_position: int,
) -> list[Segment]:
    """Return the segments that are too old or too many, oldest first.

    The newest one stays, since records are appended to it, and so do those with records behind the
    checkpoint: the heads of their topics are known from these records alone.

    Args:
        segments: all, oldest first.
        sizes_bytes: of each one's files.
        now_us: the wall clock, microseconds since 1970.
        saved_position: the checkpoint's.
    """
    excess_bytes = sum(sizes_bytes) - settings.retention_bytes if settings.retention_bytes else 0
    oldest_us = now_us - int(settings.retention_s * 1e6) if settings.retention_s else 0
    going: list[Segment] = []
    for segment, size_bytes in zip(segments[:-1], sizes_bytes, strict=False):
        if segment.last_position > saved_position:
            break
        newest_us = segment.newest_us or segment.info.made_us
        if excess_bytes <= 0 and newest_us >= oldest_us:
            break
        going.append(segment)
        excess_bytes -= size_bytes
    return going
