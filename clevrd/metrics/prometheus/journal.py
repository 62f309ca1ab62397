"""Families about the journal: its state, its records, its nodes, and its storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from clevrd.metrics.journal import JournalFigures, JournalStorage, PartitionFigures
from clevrd.metrics.prometheus.kinds import (
    counter,
    gauge,
    gauge_of_seconds,
    histogram,
    labelled,
)


def of_journal(journal: JournalFigures) -> Iterator[Metric]:
    """Yield the state of the journal, and its records."""
    yield InfoMetricFamily(
        "clevrd_journal",
        "Where journaled messages are kept, and what an answered one outlives.",
        {"engine": journal.engine, "durability": journal.durability},
    )
    yield labelled(
        GaugeMetricFamily(
            "clevrd_journal_state",
            "1 for the state that the journal is in: publishes are refused unless it is ok.",
            labels=["state"],
        ),
        {state: int(state == journal.state) for state in ("ok", "full", "unavailable")},
    )
    yield gauge(
        "clevrd_journal_topics", "Topics that have messages in the journal.", journal.topics
    )
    yield from _of_records(journal)
    yield from _of_nodes(journal)
    yield from _of_places(journal.places)
    if journal.checkpoint_age_s is not None:
        yield gauge_of_seconds(
            "clevrd_journal_checkpoint_age",
            "How long ago the last checkpoint was saved.",
            journal.checkpoint_age_s,
        )
    if journal.storage is not None:
        yield from _of_storage(journal.storage)


def _of_records(journal: JournalFigures) -> Iterator[Metric]:
    yield counter("clevrd_journal_records", "Records that this process wrote.", journal.records)
    yield counter("clevrd_journal_messages", "Messages that this process wrote.", journal.messages)
    yield gauge(
        "clevrd_journal_pending_bytes",
        "Bytes of messages that wait for their place in the journal.",
        journal.pending_bytes,
    )
    yield counter(
        "clevrd_journal_retries", "Records that were sent to the engine again.", journal.retries
    )
    yield counter(
        "clevrd_journal_failed",
        "Messages whose publishers were told that the journal does not answer, or is full.",
        journal.failed,
    )
    yield counter("clevrd_journal_foreign", "Records of foreign producers.", journal.foreign)
    yield counter(
        "clevrd_journal_unreadable",
        "Records that could not be read, and were left out.",
        journal.unreadable,
    )
    yield counter(
        "clevrd_journal_rewinds",
        "Times that the log was read again, since it had lost records.",
        journal.rewinds,
    )
    yield counter(
        "clevrd_journal_resets",
        "Times that this process began a new epoch for all nodes.",
        journal.resets,
    )


def _of_nodes(journal: JournalFigures) -> Iterator[Metric]:
    yield gauge(
        "clevrd_journal_nodes",
        "Processes that have written to the journal within the last minute, this one included.",
        journal.nodes,
    )
    yield labelled(
        GaugeMetricFamily(
            "clevrd_journal_node_versions",
            "The same, by their version of clevrd.",
            labels=["version"],
        ),
        journal.node_versions,
    )


def _of_places(places: Sequence[PartitionFigures]) -> Iterator[Metric]:
    # A position may have 128 bits, and a sample has 53: they are told apart by their times here.
    yield labelled(
        GaugeMetricFamily(
            "clevrd_journal_position_time",
            "When the newest record that was read was written, by its writer's clock, since 1970.",
            labels=["partition"],
            unit="seconds",
        ),
        {str(each.partition): each.time_s for each in places},
    )
    yield labelled(
        GaugeMetricFamily(
            "clevrd_journal_lag",
            "How far reading is behind the log's end: how long this process's record on its way has"
            " been waited for, or how long the last one took.",
            labels=["partition"],
            unit="seconds",
        ),
        {str(each.partition): each.lag_s for each in places},
    )


def _of_storage(storage: JournalStorage) -> Iterator[Metric]:
    yield gauge("clevrd_journal_files", "Files with messages.", storage.files)
    yield gauge("clevrd_journal_size_bytes", "Bytes of these files.", storage.size_bytes)
    yield gauge_of_seconds(
        "clevrd_journal_oldest_time",
        "When the oldest message that is kept was published, since 1970; 0 without one.",
        storage.oldest_at_s,
    )
    yield histogram(
        "clevrd_journal_commit_duration",
        "How long a commit took, until its messages were as durable as was asked for.",
        storage.commit_s,
        "seconds",
    )
    yield counter(
        "clevrd_journal_damaged",
        "Messages and parts of files that are not what was written; they are not served.",
        storage.damaged,
    )
    yield counter(
        "clevrd_journal_new_stamps",
        "Times that the log began anew, so that every journaled topic has another epoch.",
        storage.new_stamps,
    )
