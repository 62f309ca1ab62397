"""Figures of the SQLite engine, for whoever watches it."""

from __future__ import annotations

from typing import Final

from clevrd.metrics.histograms import times_view
from clevrd.metrics.journal import JournalStorage

# Times of commits are counted by the bits of their microseconds: 40 of them are a fortnight.
TIME_BITS: Final = 41


class SqliteFigures:
    """Counters of what the engine has done and found.

    The loop alone changes them, so that they are read without a lock. The counters only rise.
    """

    __slots__ = (
        "checkpoints",
        "commit_ns",
        "commits",
        "damaged",
        "full",
        "is_full",
        "last_error",
        "new_stamps",
        "oldest_us",
        "read_error",
        "records",
        "removed_segments",
        "segments",
        "size_bytes",
        "times",
    )

    def __init__(self) -> None:
        # Files now, and their bytes, WALs included.
        self.segments = 0
        self.size_bytes = 0
        # The oldest record's time, microseconds since 1970; 0 without a record.
        self.oldest_us = 0
        # Commits, the records in them, and how long they took together.
        self.commits = 0
        self.records = 0
        self.commit_ns = 0
        # Commits by the bits of their microseconds.
        self.times = [0] * TIME_BITS
        # Records, runs and segments that are not what was written.
        self.damaged = 0
        # Appends that found no room, and whether the last one did.
        self.full = 0
        self.is_full = False
        # How often the log began, or had to begin anew, checkpoints saved, and segments removed.
        self.new_stamps = 0
        self.checkpoints = 0
        self.removed_segments = 0
        # The last thing that went wrong, in a few words; empty while all is well.
        self.last_error = ""
        # The same for the last read; empty if it found what it looked for.
        self.read_error = ""

    def note_commit(self, records: int, took_ns: int) -> None:
        """Count a commit of ``records`` records that took ``took_ns``."""
        self.commits += 1
        self.records += records
        self.commit_ns += took_ns
        self.times[min((took_ns // 1000).bit_length(), TIME_BITS - 1)] += 1

    def storage(self) -> JournalStorage:
        """Return those of the files."""
        return JournalStorage(
            files=self.segments,
            size_bytes=self.size_bytes,
            oldest_at_s=self.oldest_us / 1e6,
            commits=self.commits,
            commit_s=times_view(self.times, self.commit_ns),
            damaged=self.damaged,
            new_stamps=self.new_stamps,
            last_error=self.last_error or self.read_error,
        )
