"""The figures of a journal, as a value that /metrics is made from."""

from __future__ import annotations

import msgspec

from clevrd.metrics.histograms import HistogramView


class JournalStorage(msgspec.Struct, frozen=True):
    """The files of an engine that keeps its log in files of its own."""

    files: int
    size_bytes: int
    # Seconds since 1970 of the oldest message that is kept; 0 without one.
    oldest_at_s: float
    # Commits so far, and how long they took.
    commits: int
    commit_s: HistogramView
    # Messages, or parts of files, that are not what was written, and are never served.
    damaged: int
    # Times that the log had to begin anew, after which every journaled topic has another epoch.
    new_stamps: int
    # In a few words; empty while all is well.
    last_error: str


class PartitionFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A partition of the log, as this process has read it."""

    partition: int
    # The newest record that was read, in decimal digits: it may exceed 64 bits.
    position: str
    # When that was written, by its writer's clock; seconds since 1970, 0 before the first.
    time_s: float
    # How far behind the log's end reading is: see `Partition.lag_s`.
    lag_s: float
    # The state, as in JournalFigures.
    state: str


class JournalFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The journal, as this process sees it."""

    engine: str
    durability: str
    # "ok"; "full" or "unavailable" while publishes to journaled topics are refused.
    state: str
    partitions: int
    # One for each partition, in their order.
    places: tuple[PartitionFigures, ...]
    # The largest of theirs.
    lag_s: float
    # Topics that have messages in it.
    topics: int
    # Records that this process wrote, and the messages in them.
    records: int
    messages: int
    # Bytes of messages that wait for their place.
    pending_bytes: int
    # Records that were sent again, and messages that were given up.
    retries: int
    failed: int
    # Records of foreign producers, and records that could not be read.
    foreign: int
    unreadable: int
    # Times that the log was read again since it had lost records, and epochs begun for all.
    rewinds: int
    resets: int
    # Nodes that have appended something within the last minute, this one included.
    nodes: int
    # How many of them have each version of clevrd; "unknown" where one has not said it.
    node_versions: dict[str, int]
    # How long ago the last checkpoint was saved; None before the first.
    checkpoint_age_s: float | None
    # None for an engine that keeps its log elsewhere.
    storage: JournalStorage | None
