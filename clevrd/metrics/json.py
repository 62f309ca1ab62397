"""The JSON of /metrics, from a snapshot. Meaning of the fields: docs/wire.md."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

import msgspec

from clevrd.control.adaptive_buffer import BufferDecision
from clevrd.control.system_stats import ProcessFigures
from clevrd.metrics.journal import JournalFigures
from clevrd.metrics.snapshot import (
    Connections,
    IdempotencyView,
    MemoryLadder,
    MemoryShare,
    MessageTotals,
    Snapshot,
    TenantSnapshot,
    Throttle,
    Tls,
    TopicView,
    Traffic,
)
from clevrd.metrics.sources import SourceFigures
from clevrd.metrics.tracing import TracingFigures

# Topics that are encoded in one step: 0.1 ms.
_TOPICS_PER_STEP: Final = 64
# Where the topics go in what was encoded without them. No string in JSON holds a bare quote, so
# nothing but the field looks like it.
_NO_TOPICS: Final = b'"topics":[]'

_encode = msgspec.json.Encoder().encode


class ThrottlerView(msgspec.Struct, frozen=True):
    """The throttler's last decision with its inputs; ratios are 0..1, times are ago and to come."""

    is_throttling: bool
    cpu_usage: float
    memory_usage: float
    slow_ratio: float
    reason: str
    delay_ms: float
    # Seconds since it started and until it ends, null while it does not throttle.
    since: float | None
    until: float | None
    times_started: int
    seconds_throttled: float
    # The publishes that wait: those to topics with slow subscribers ("topic"), or all ("global").
    scope: str
    # With "topic": how many topics these are now, and some of them by name.
    throttled_topics: int
    throttled: list[str]


class LogView(msgspec.Struct, frozen=True):
    """Lines of the log that were lost."""

    dropped: int


class MetricsView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of /metrics."""

    total_topics: int
    total_subscribers: int
    slow_subscribers: int
    open_circuits: int
    reading_history: int
    topics: list[TopicView]
    throttler_metrics: ThrottlerView
    buffer_metrics: BufferDecision | None
    memory_ladder: MemoryLadder
    memory_shares: list[MemoryShare]
    messages: MessageTotals
    idempotency: IdempotencyView
    connections: dict[str, Any]
    traffic: Traffic
    publishes_waiting: int
    ring_bytes: int
    memory_limit_bytes: int
    process_cpu_s: float
    version: str
    # Left out where the daemon speaks no TLS.
    tls: Tls | msgspec.UnsetType = msgspec.UNSET
    # Left out without a journal.
    journal: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    # Left out without sources.
    sources: list[SourceFigures] | msgspec.UnsetType = msgspec.UNSET
    # Left out where nothing is traced.
    tracing: TracingFigures | msgspec.UnsetType = msgspec.UNSET
    log: LogView
    process: ProcessFigures
    uptime_s: float


def render_json(snapshot: Snapshot) -> Generator[None, None, bytes]:
    """Return ``snapshot`` as JSON; each step takes well under a millisecond."""
    return (yield from _with_topics(summary_of(snapshot), snapshot.topics))


def render_tenant_json(snapshot: TenantSnapshot) -> Generator[None, None, bytes]:
    """Return the figures of one tenant as JSON; the fields mean what they mean for all tenants."""
    summary = msgspec.structs.replace(snapshot, topics=[])
    return (yield from _with_topics(summary, snapshot.topics))


def _with_topics(
    summary: MetricsView | TenantSnapshot, topics: list[TopicView]
) -> Generator[None, None, bytes]:
    """Return ``summary``, whose list of topics is empty, as JSON with ``topics`` in it."""
    rows: list[bytes] = []
    for start in range(0, len(topics), _TOPICS_PER_STEP):
        rows.append(_encode(topics[start : start + _TOPICS_PER_STEP])[1:-1])
        yield
    before, _, after = _encode(summary).partition(_NO_TOPICS)
    yield
    # A comma behind each row but the last; joined once, since it may be 5 MB.
    parts = [part for row in rows for part in (b",", row)][1:]
    body = b"".join((before, b'"topics":[', *parts, b"]", after))
    yield
    return body


def summary_of(snapshot: Snapshot) -> MetricsView:
    """Return everything but the topics, whose list is empty."""
    return MetricsView(
        total_topics=snapshot.total_topics,
        total_subscribers=snapshot.total_subscribers,
        slow_subscribers=snapshot.slow_subscribers,
        open_circuits=snapshot.open_circuits,
        reading_history=snapshot.reading_history,
        topics=[],
        throttler_metrics=_throttler_view(snapshot.throttle),
        buffer_metrics=snapshot.window,
        memory_ladder=snapshot.memory,
        memory_shares=snapshot.memory_shares,
        messages=snapshot.messages,
        idempotency=snapshot.idempotency,
        connections=_connections_view(snapshot.connections),
        traffic=snapshot.traffic,
        publishes_waiting=snapshot.waiting_publishes,
        ring_bytes=snapshot.ring_bytes,
        memory_limit_bytes=snapshot.memory_limit_bytes,
        process_cpu_s=round(snapshot.process_cpu_s, 3),
        version=snapshot.build.version,
        tls=msgspec.UNSET if snapshot.tls is None else snapshot.tls,
        journal=msgspec.UNSET if snapshot.journal is None else _journal_view(snapshot.journal),
        sources=snapshot.sources or msgspec.UNSET,
        tracing=snapshot.tracing or msgspec.UNSET,
        log=LogView(snapshot.log_lines_dropped),
        process=snapshot.process,
        uptime_s=round(snapshot.uptime_s, 3),
    )


def _journal_view(journal: JournalFigures) -> dict[str, Any]:
    fields = msgspec.structs.asdict(journal)
    storage = journal.storage
    if storage is not None:
        commit_s = round(storage.commit_s.sum, 6)
        fields["storage"] = {**msgspec.structs.asdict(storage), "commit_s": commit_s}
    return fields


def _connections_view(connections: Connections) -> dict[str, Any]:
    return {
        "open": connections.open,
        "accepted": connections.accepted,
        "refused": connections.refused,
        "closed": {str(code): count for code, count in connections.closed.items()},
        "circuits_opened": connections.circuits_opened,
        "pings_unanswered": connections.pings_unanswered,
        "background_errors": connections.background_errors,
        "reloads": connections.reloads,
        "reloads_failed": connections.reloads_failed,
        "lifecycle": connections.lifecycle,
        "webhooks": connections.webhooks,
    }


def _throttler_view(throttle: Throttle) -> ThrottlerView:
    return ThrottlerView(
        is_throttling=throttle.is_throttling,
        cpu_usage=round(throttle.cpu_ratio, 4),
        memory_usage=round(throttle.memory_ratio, 4),
        slow_ratio=round(throttle.slow_ratio, 4),
        reason=throttle.reason,
        delay_ms=throttle.delay_s * 1000,
        since=None if throttle.since_s is None else round(throttle.since_s, 3),
        until=None if throttle.until_s is None else round(throttle.until_s, 3),
        times_started=throttle.times_started,
        seconds_throttled=round(throttle.throttled_s, 3),
        scope=throttle.scope,
        throttled_topics=throttle.throttled_topics,
        throttled=throttle.throttled_names,
    )
