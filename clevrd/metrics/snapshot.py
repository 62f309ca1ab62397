"""Snapshot: all figures of a daemon as one value, from which every form of /metrics is made.

Times are in seconds, sizes in bytes, shares 0..1. handlers/operate/figures takes it, `json` and
`prometheus` show it.
"""

from __future__ import annotations

import msgspec

from clevrd.control.adaptive_buffer import BufferDecision
from clevrd.control.system_stats import ProcessFigures
from clevrd.core.portions import Portion
from clevrd.core.topic import Topic
from clevrd.core.topic_totals import Totals
from clevrd.metrics.counters import Counters
from clevrd.metrics.histograms import HistogramView
from clevrd.metrics.journal import JournalFigures
from clevrd.metrics.sources import SourceFigures
from clevrd.metrics.tracing import TracingFigures


class Build(msgspec.Struct, frozen=True):
    """Versions of the daemon, of Python, and of the libraries below it."""

    version: str
    python: str
    aiohttp: str
    uvloop: str


class TopicView(msgspec.Struct, frozen=True, gc=False):
    """One topic in /metrics; sizes in messages and bytes, counters since its creation."""

    name: str
    tenant_id: str
    messages_published: int
    active_subscribers: int
    total_subscribers: int
    created_at: str
    messages_delivered: int
    messages_dropped: int
    messages_discarded: int
    messages_queued: int
    slow_subscribers: int
    open_circuits: int
    offset: int
    epoch: str
    buffered_messages: int
    buffered_bytes: int


class MessageTotals(msgspec.Struct, frozen=True):
    """Sums over all topics, those evicted since included."""

    published: int
    offered: int
    delivered: int
    dropped: dict[str, int]
    discarded: int
    queued: int


class IdempotencyView(msgspec.Struct, frozen=True):
    """Figures of publishes with an idempotency key."""

    keys: int
    max_keys: int
    repeats: int
    pushed_out: int


class MemoryShare(msgspec.Struct, frozen=True):
    """One tenant's guarantee of the memory for messages, and its use.

    ``tenant_id`` is None for all tenants together that have no share of their own.
    """

    tenant_id: str | None
    guaranteed_bytes: int
    used_bytes: int
    borrowed_bytes: int
    ring_bytes: int
    kept_bytes: int
    topics: int
    window_messages: int


class Throttle(msgspec.Struct, frozen=True):
    """The throttler's last decision with its inputs."""

    is_throttling: bool
    scope: str
    # Topics to which publishes wait now, where only these do: how many, and the first few by name.
    throttled_topics: int
    throttled_names: list[str]
    cpu_ratio: float
    memory_ratio: float
    slow_ratio: float
    reason: str
    delay_s: float
    # How long ago it started and until it ends; None while it does not throttle.
    since_s: float | None
    until_s: float | None
    times_started: int
    throttled_s: float


class MemoryLadder(msgspec.Struct, frozen=True):
    """The memory guard's last decision with its inputs."""

    # The rung's word: what is given up now.
    state: str
    used_bytes: int
    limit_bytes: int
    limit: str
    # Bytes that rings have given up on the ladder since the start.
    rings_shrunk_bytes: int


class Connections(msgspec.Struct, frozen=True):
    """Connections that are open, by kind, and what was counted of all there were."""

    open: dict[str, int]
    accepted: int
    # Error code -> requests and connections.
    refused: dict[str, int]
    # Close code -> WebSockets and streams.
    closed: dict[int, int]
    circuits_opened: int
    pings_unanswered: int
    background_errors: int
    reloads: int
    reloads_failed: int
    # Outcome -> events of who reads which topic.
    lifecycle: dict[str, int]
    # Outcome -> events that were posted to webhooks, once for each.
    webhooks: dict[str, int]


class Tls(msgspec.Struct, frozen=True):
    """Handshakes since the start, and the certificates' end."""

    handshakes: int
    # Why -> how many.
    handshakes_failed: dict[str, int]
    # Seconds until the first of the certificates ends.
    certificate_ends_in_s: float


class Traffic(msgspec.Struct, frozen=True):
    """Bytes and times of reads, rounds and connections, as the counters define them."""

    received_bytes: int
    delivered_bytes: int
    round_s: HistogramView
    round_messages: HistogramView
    to_socket_s: HistogramView
    publish_wait_s: HistogramView
    connection_s: HistogramView
    loop_lag_s: HistogramView


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All figures. Each topic's are of one moment, the sums of moments within one answer's making.

    ``topics`` are as many of the busiest as were asked for.
    """

    build: Build
    started_at_s: float
    uptime_s: float
    total_topics: int
    total_subscribers: int
    slow_subscribers: int
    open_circuits: int
    reading_history: int
    topics: list[TopicView]
    messages: MessageTotals
    idempotency: IdempotencyView
    waiting_publishes: int
    ring_bytes: int
    memory_limit_bytes: int
    # The tenants that use most, a bounded number of them.
    memory_shares: list[MemoryShare]
    memory: MemoryLadder
    throttle: Throttle
    window_messages: int
    # None until the first one.
    window: BufferDecision | None
    connections: Connections
    # None where the daemon speaks no TLS.
    tls: Tls | None
    # None without a journal.
    journal: JournalFigures | None
    sources: list[SourceFigures]
    # None where nothing is traced.
    tracing: TracingFigures | None
    traffic: Traffic
    log_lines_dropped: int
    process: ProcessFigures
    process_cpu_s: float


class TenantSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one tenant's topics, or of those of them that a credential may use.

    The sums are over the topics that there are, so they fall when a topic is forgotten.
    """

    tenant_id: str
    total_topics: int
    total_subscribers: int
    slow_subscribers: int
    open_circuits: int
    topics: list[TopicView]
    messages: MessageTotals


def memory_share(portion: Portion, window_messages: int) -> MemoryShare:
    """Return ``portion`` as /metrics shows it."""
    return MemoryShare(
        tenant_id=portion.name or None,
        guaranteed_bytes=portion.guaranteed_bytes,
        used_bytes=portion.used_bytes,
        borrowed_bytes=portion.borrowed_bytes,
        ring_bytes=portion.ring_bytes,
        kept_bytes=portion.kept.taken_bytes,
        topics=portion.topics,
        window_messages=window_messages,
    )


def topic_view(topic: Topic, now_s: float) -> TopicView:
    """Return ``topic`` as /metrics shows it. Call ``topic.settle`` first."""
    return TopicView(
        name=f"{topic.tenant}:{topic.name}",
        tenant_id=topic.tenant,
        messages_published=topic.published,
        active_subscribers=len(topic.live),
        total_subscribers=topic.subscribers,
        created_at=topic.created_at,
        messages_delivered=topic.delivered,
        messages_dropped=topic.losses.total,
        messages_discarded=topic.discarded,
        messages_queued=topic.queued(),
        slow_subscribers=topic.slow_count(now_s),
        open_circuits=len(topic.suspended),
        offset=topic.head,
        epoch=topic.epoch,
        buffered_messages=topic.held_messages,
        buffered_bytes=topic.held_bytes,
    )


def message_totals(totals: Totals) -> MessageTotals:
    """Return ``totals`` as /metrics shows them."""
    return MessageTotals(
        published=totals.published,
        offered=totals.offered,
        delivered=totals.delivered,
        dropped=dict(totals.lost),
        discarded=totals.discarded,
        queued=totals.queued,
    )


def traffic_of(counters: Counters, received_bytes: int, waits: HistogramView) -> Traffic:
    """Return what ``counters`` hold now, beside what was read and the publishes' ``waits``."""
    return Traffic(
        received_bytes=received_bytes,
        delivered_bytes=counters.delivered_bytes,
        round_s=counters.rounds.durations_s(),
        round_messages=counters.rounds.messages(),
        to_socket_s=counters.rounds.to_socket_s(),
        publish_wait_s=waits,
        connection_s=counters.connection_s.view(),
        loop_lag_s=counters.loop_lag_s.view(),
    )
