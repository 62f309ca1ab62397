"""A snapshot as Prometheus reads it: text format 0.0.4, and OpenMetrics 1.0.0.

The spelling is prometheus_client's; which metrics there are, and their names, is said here. No
label has a value that a client chooses; tenants are one in /metrics/tenants alone. Source: https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import exposition as text_exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from clevrd.control.memory_ladder import Rung
from clevrd.metrics.histograms import HistogramView
from clevrd.metrics.journal import JournalFigures, JournalStorage, PartitionFigures
from clevrd.metrics.snapshot import Build, Connections, Snapshot, Throttle, Tls, Traffic
from clevrd.metrics.sources import SOURCE_STATES, SourceFigures
from clevrd.metrics.tenants import TenantsView
from clevrd.metrics.tracing import TracingFigures

TEXT_TYPE: Final = text_exposition.CONTENT_TYPE_PLAIN_0_0_4
OPENMETRICS_TYPE: Final = openmetrics_exposition.CONTENT_TYPE_LATEST

Spell = Callable[[Collector], bytes]
_spell_text: Spell = text_exposition.generate_latest
_spell_openmetrics: Spell = openmetrics_exposition.generate_latest

# The label of all tenants together that have no share of their own; no tenant's name has a star.
OTHER_TENANTS: Final = "*"

# The last line of what OpenMetrics calls whole, which each call spells.
_EOF: Final = b"# EOF\n"


class _One(Collector):
    """A registry of one family, so that each is spelled in a step of its own: 0.2 ms at most.

    prometheus_client's own registry is one object of the whole process and holds collectors that
    we don't ask.
    """

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        """Return the family."""
        return (self._family,)


def render_text(snapshot: Snapshot) -> Generator[None, None, bytes]:
    """Return ``snapshot`` in Prometheus's text format, in steps of less than half a millisecond."""
    return text_of(families(snapshot))


def render_openmetrics(snapshot: Snapshot) -> Generator[None, None, bytes]:
    """Return ``snapshot`` as OpenMetrics, in steps of less than half a millisecond."""
    return openmetrics_of(families(snapshot))


def text_of(metrics: Iterable[Metric]) -> Generator[None, None, bytes]:
    """Return ``metrics`` in Prometheus's text format, one in each step."""
    parts: list[bytes] = []
    for family in metrics:
        parts.append(_spell_text(_One(family)))
        yield
    return b"".join(parts)


def openmetrics_of(metrics: Iterable[Metric]) -> Generator[None, None, bytes]:
    """Return ``metrics`` as OpenMetrics, one in each step."""
    parts: list[bytes] = []
    for family in metrics:
        parts.append(_spell_openmetrics(_One(family)).removesuffix(_EOF))
        yield
    return b"".join([*parts, _EOF])


def families_of_tenants(view: TenantsView) -> Iterator[Metric]:
    """Yield each metric of /metrics/tenants."""
    rows = [(row.tenant_id or OTHER_TENANTS, row) for row in view.tenants]
    yield _of_tenants(
        "clevrd_tenant_connections",
        "WebSockets, streams and polls that wait, of a tenant; * is all that have no share of their"
        " own.",
        {name: row.connections for name, row in rows},
    )
    yield _of_tenants(
        "clevrd_tenant_subscribers",
        "Subscriptions to a tenant's topics.",
        {name: row.subscribers for name, row in rows},
    )
    yield _of_tenants(
        "clevrd_tenant_slow_subscribers",
        "Subscriptions to a tenant's topics that were slow a second ago.",
        {name: row.slow_subscribers for name, row in rows},
    )
    yield _of_tenants(
        "clevrd_tenant_topics",
        "Topics of a tenant.",
        {name: row.topics for name, row in rows},
    )
    yield _of_tenants(
        "clevrd_tenant_window_messages",
        "Messages that a tenant's subscribers may lag before they lose some.",
        {name: row.window_messages for name, row in rows},
    )
    yield _share_bytes(
        "clevrd_memory_share_guaranteed",
        "Memory for messages that a tenant is guaranteed.",
        {name: row.guaranteed_bytes for name, row in rows},
    )
    yield _share_bytes(
        "clevrd_memory_share_used",
        "Memory for messages that a tenant uses, of its share or borrowed.",
        {name: row.used_bytes for name, row in rows},
    )
    yield _share_bytes(
        "clevrd_memory_share_borrowed",
        "Memory for messages that a tenant uses beyond its share.",
        {name: row.borrowed_bytes for name, row in rows},
    )


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield each metric with its name, its help and its values, in the order of the documents."""
    yield from _of_daemon(snapshot, snapshot.build)
    yield from _of_messages(snapshot)
    yield from _of_connections(snapshot.connections)
    if snapshot.tls is not None:
        yield from _of_tls(snapshot.tls)
    if snapshot.journal is not None:
        yield from _of_journal(snapshot.journal)
    if snapshot.sources:
        yield from _of_sources(snapshot.sources)
    if snapshot.tracing is not None:
        yield from _of_tracing(snapshot.tracing)
    yield from _of_traffic(snapshot.traffic)
    yield from _of_load(snapshot, snapshot.throttle)
    yield from _of_process(snapshot)


def _of_daemon(snapshot: Snapshot, build: Build) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "clevrd_build",
        "The versions that run.",
        {
            "version": build.version,
            "python": build.python,
            "aiohttp": build.aiohttp,
            "uvloop": build.uvloop,
        },
    )
    yield _seconds(
        "clevrd_start_time", "When the daemon started, since 1970.", snapshot.started_at_s
    )
    yield _gauge("clevrd_topics", "Topics that there are.", snapshot.total_topics)
    yield _gauge(
        "clevrd_subscribers",
        "Subscriptions that are open, one for each topic of a connection.",
        snapshot.total_subscribers,
    )
    yield _gauge(
        "clevrd_slow_subscribers",
        "Subscriptions that lag beyond their window, have lost something within the last 10 s,"
        " or have an open circuit.",
        snapshot.slow_subscribers,
    )
    yield _gauge(
        "clevrd_open_circuits",
        "Subscriptions that are given nothing until their connection takes more.",
        snapshot.open_circuits,
    )
    yield _gauge(
        "clevrd_history_readers",
        "Subscriptions whose next message lies before the ring of their topic.",
        snapshot.reading_history,
    )


def _of_messages(snapshot: Snapshot) -> Iterator[Metric]:
    messages = snapshot.messages
    yield _counter("clevrd_messages_published", "Messages that were accepted.", messages.published)
    yield _counter(
        "clevrd_messages_offered",
        "Messages, each counted once for every subscription that it was meant for.",
        messages.offered,
    )
    yield _counter(
        "clevrd_messages_delivered",
        "Messages handed to subscribers' connections, once for each.",
        messages.delivered,
    )
    yield _counters(
        "clevrd_messages_dropped",
        "Messages that subscriptions lost to a policy or a bound, by the reason.",
        "reason",
        messages.dropped,
    )
    yield _counter(
        "clevrd_messages_discarded",
        "Messages that still waited when their subscriber left, or when its circuit opened.",
        messages.discarded,
    )
    yield _gauge(
        "clevrd_messages_queued", "Messages that wait for subscribers now.", messages.queued
    )
    yield _gauge(
        "clevrd_publishes_waiting",
        "Publishes that wait for room or for the throttle now.",
        snapshot.waiting_publishes,
    )
    answers = snapshot.idempotency
    yield _gauge("clevrd_idempotency_keys", "Keys that are remembered.", answers.keys)
    yield _gauge("clevrd_idempotency_keys_limit", "Keys that may be remembered.", answers.max_keys)
    yield _counter(
        "clevrd_idempotency_repeats",
        "Publishes that were answered as their first one was.",
        answers.repeats,
    )
    yield _counter(
        "clevrd_idempotency_keys_pushed_out",
        "Keys that were forgotten at the limit, before their time.",
        answers.pushed_out,
    )


def _of_connections(connections: Connections) -> Iterator[Metric]:
    yield _counter(
        "clevrd_connections_accepted", "Connections that were accepted.", connections.accepted
    )
    yield _labelled(
        GaugeMetricFamily(
            "clevrd_connections",
            "Connections that are open, by what they are at the moment.",
            labels=["kind"],
        ),
        connections.open,
    )
    yield _counters(
        "clevrd_connections_closed",
        "WebSockets and streams that the daemon closed, by the close code; streams by that which a"
        " WebSocket would have got.",
        "code",
        {str(code): count for code, count in connections.closed.items()},
    )
    yield _counters(
        "clevrd_refusals",
        "Requests, messages and connections that were refused, by the error code.",
        "code",
        connections.refused,
    )
    yield _counter(
        "clevrd_circuits_opened",
        "Circuits of slow subscribers that opened, without those that were closed instead.",
        connections.circuits_opened,
    )
    yield _counter(
        "clevrd_pings_unanswered",
        "Connections that were cut because nobody was there.",
        connections.pings_unanswered,
    )
    yield _counter(
        "clevrd_background_errors",
        "Timers, tasks and writes that failed, each of which is in the log.",
        connections.background_errors,
    )
    yield _counters(
        "clevrd_lifecycle_events",
        "Events of who reads which topic, by outcome: published, or dropped.",
        "outcome",
        connections.lifecycle,
    )
    yield _counters(
        "clevrd_webhook_events",
        "Events posted to webhooks, by outcome: delivered, retried, or dropped.",
        "outcome",
        connections.webhooks,
    )
    yield _counter(
        "clevrd_config_reloads",
        "Times that the configuration was read again and put into force.",
        connections.reloads,
    )
    yield _counter(
        "clevrd_config_reloads_failed",
        "Times that the configuration was read again, was wrong, and changed nothing.",
        connections.reloads_failed,
    )


def _of_tls(tls: Tls) -> Iterator[Metric]:
    yield _counter("clevrd_tls_handshakes", "TLS handshakes that ended well.", tls.handshakes)
    yield _counters(
        "clevrd_tls_handshakes_failed",
        "TLS handshakes that failed, by why.",
        "reason",
        tls.handshakes_failed,
    )
    yield _seconds(
        "clevrd_tls_certificate_ends_in",
        "The time until the first of the certificates ends.",
        tls.certificate_ends_in_s,
    )


def _of_journal(journal: JournalFigures) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "clevrd_journal",
        "Where journaled messages are kept, and what an answered one outlives.",
        {"engine": journal.engine, "durability": journal.durability},
    )
    yield _labelled(
        GaugeMetricFamily(
            "clevrd_journal_state",
            "1 for the state that the journal is in: publishes are refused unless it is ok.",
            labels=["state"],
        ),
        {state: int(state == journal.state) for state in ("ok", "full", "unavailable")},
    )
    yield _gauge(
        "clevrd_journal_topics", "Topics that have messages in the journal.", journal.topics
    )
    yield _counter("clevrd_journal_records", "Records that this process wrote.", journal.records)
    yield _counter("clevrd_journal_messages", "Messages that this process wrote.", journal.messages)
    yield _gauge(
        "clevrd_journal_pending_bytes",
        "Bytes of messages that wait for their place in the journal.",
        journal.pending_bytes,
    )
    yield _counter(
        "clevrd_journal_retries", "Records that were sent to the engine again.", journal.retries
    )
    yield _counter(
        "clevrd_journal_failed",
        "Messages whose publishers were told that the journal does not answer, or is full.",
        journal.failed,
    )
    yield _counter("clevrd_journal_foreign", "Records of foreign producers.", journal.foreign)
    yield _counter(
        "clevrd_journal_unreadable",
        "Records that could not be read, and were left out.",
        journal.unreadable,
    )
    yield _counter(
        "clevrd_journal_rewinds",
        "Times that the log was read again, since it had lost records.",
        journal.rewinds,
    )
    yield _counter(
        "clevrd_journal_resets",
        "Times that this process began a new epoch for all nodes.",
        journal.resets,
    )
    yield _gauge(
        "clevrd_journal_nodes",
        "Processes that have written to the journal within the last minute, this one included.",
        journal.nodes,
    )
    yield _labelled(
        GaugeMetricFamily(
            "clevrd_journal_node_versions",
            "The same, by their version of clevrd.",
            labels=["version"],
        ),
        journal.node_versions,
    )
    yield from _of_places(journal.places)
    if journal.checkpoint_age_s is not None:
        yield _seconds(
            "clevrd_journal_checkpoint_age",
            "How long ago the last checkpoint was saved.",
            journal.checkpoint_age_s,
        )
    if journal.storage is not None:
        yield from _of_storage(journal.storage)


def _of_places(places: Sequence[PartitionFigures]) -> Iterator[Metric]:
    # A position may have 128 bits, and a sample has 53: they are told apart by their times here.
    yield _labelled(
        GaugeMetricFamily(
            "clevrd_journal_position_time",
            "When the newest record that was read was written, by its writer's clock, since 1970.",
            labels=["partition"],
            unit="seconds",
        ),
        {str(each.partition): each.time_s for each in places},
    )
    yield _labelled(
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
    yield _gauge("clevrd_journal_files", "Files with messages.", storage.files)
    yield _gauge("clevrd_journal_size_bytes", "Bytes of these files.", storage.size_bytes)
    yield _seconds(
        "clevrd_journal_oldest_time",
        "When the oldest message that is kept was published, since 1970; 0 without one.",
        storage.oldest_at_s,
    )
    yield _histogram(
        "clevrd_journal_commit_duration",
        "How long a commit took, until its messages were as durable as was asked for.",
        storage.commit_s,
        "seconds",
    )
    yield _counter(
        "clevrd_journal_damaged",
        "Messages and parts of files that are not what was written; they are not served.",
        storage.damaged,
    )
    yield _counter(
        "clevrd_journal_new_stamps",
        "Times that the log began anew, so that every journaled topic has another epoch.",
        storage.new_stamps,
    )


def _of_tracing(tracing: TracingFigures) -> Iterator[Metric]:
    yield _counters(
        "clevrd_trace_spans",
        "Spans of publishes and deliveries, by outcome: sent to the collector, or dropped.",
        "outcome",
        tracing.spans,
    )
    yield _gauge(
        "clevrd_trace_spans_waiting",
        "Spans that wait to be sent to the collector.",
        tracing.waiting,
    )


def _of_sources(sources: Sequence[SourceFigures]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "clevrd_source_state",
        "1 for the state that a source is in: it is read while that is reading or standby.",
        labels=["source", "state"],
    )
    lag = GaugeMetricFamily(
        "clevrd_source_lag",
        "Records that are in the source and not taken yet, where that is known.",
        labels=["source"],
    )
    records = CounterMetricFamily(
        "clevrd_source_records",
        "Records that became messages (taken), had become some before (repeated), were passed over"
        " (filtered), could not be taken (dead), or were gone before they were read (lost).",
        labels=["source", "outcome"],
    )
    refused = CounterMetricFamily(
        "clevrd_source_refused",
        "Publishes of a source that were refused and tried again.",
        labels=["source"],
    )
    errors = CounterMetricFamily(
        "clevrd_source_errors", "Times that a source could not be read.", labels=["source"]
    )
    for each in sources:
        for name in SOURCE_STATES:
            state.add_metric([each.name, name], int(name == each.state))
        if each.lag is not None:
            lag.add_metric([each.name], each.lag)
        for outcome in ("taken", "repeated", "filtered", "dead", "lost"):
            records.add_metric([each.name, outcome], getattr(each, outcome))
        refused.add_metric([each.name], each.refused)
        errors.add_metric([each.name], each.errors)
    yield from (state, lag, records, refused, errors)


def _of_traffic(traffic: Traffic) -> Iterator[Metric]:
    yield _counter(
        "clevrd_received",
        "Bytes that were read from connections: requests, frames, and what was ignored.",
        traffic.received_bytes,
        "bytes",
    )
    yield _counter(
        "clevrd_delivered",
        "Bytes of messages handed to WebSockets and streams, with their frames or events; no heads,"
        " notices, pings, polls or answers to publishers.",
        traffic.delivered_bytes,
        "bytes",
    )
    yield _histogram(
        "clevrd_publish_to_socket",
        "The time from the append of a round's oldest message until the round was written to all"
        " subscribers that are up to date.",
        traffic.to_socket_s,
        "seconds",
    )
    yield _histogram(
        "clevrd_round_duration",
        "The time from the begin of a round until it was written to all subscribers that are up to"
        " date, with what others did in between.",
        traffic.round_s,
        "seconds",
    )
    yield _histogram(
        "clevrd_round_messages", "Messages that a round carried.", traffic.round_messages
    )
    yield _histogram(
        "clevrd_publish_wait",
        "The time that each published message waited for room or for the throttle; 0 for most.",
        traffic.publish_wait_s,
        "seconds",
    )
    yield _histogram(
        "clevrd_loop_lag",
        "How late the event loop comes to a timer, looked at four times a second.",
        traffic.loop_lag_s,
        "seconds",
    )
    yield _histogram(
        "clevrd_connection_duration",
        "How long WebSockets and streams that have ended were open.",
        traffic.connection_s,
        "seconds",
    )


def _of_load(snapshot: Snapshot, throttle: Throttle) -> Iterator[Metric]:
    yield _gauge(
        "clevrd_throttling",
        "1 while publishes are slowed down, otherwise 0.",
        throttle.is_throttling,
    )
    yield _gauge(
        "clevrd_throttled_topics",
        "Topics to which publishes are slowed down, where throttle_scope is topic.",
        throttle.throttled_topics,
    )
    yield _counter(
        "clevrd_throttles_started",
        "How often the daemon began to slow publishes down.",
        throttle.times_started,
    )
    yield _counter(
        "clevrd_throttled", "How long publishes were slowed down.", throttle.throttled_s, "seconds"
    )
    yield _gauge(
        "clevrd_cpu_usage_ratio",
        "The larger of the machine's CPU use, or its quota's, and the event loop's.",
        throttle.cpu_ratio,
    )
    yield _gauge(
        "clevrd_memory_usage_ratio",
        "The larger of the machine's memory use, or its cgroup's, and this process's against its"
        " own limit.",
        throttle.memory_ratio,
    )
    yield _gauge(
        "clevrd_window_messages",
        "Messages that a subscriber may lag before it loses some.",
        snapshot.window_messages,
    )
    yield _bytes("clevrd_ring", "Recent messages that all topics hold.", snapshot.ring_bytes)
    yield _bytes(
        "clevrd_memory_limit",
        "Memory that the daemon may use: max_memory_mb, or less where the machine has less.",
        snapshot.memory_limit_bytes,
    )
    memory = snapshot.memory
    yield _gauge(
        "clevrd_memory_held_ratio",
        "What is used of the tightest limit on this process's memory: its own, or its cgroup's.",
        memory.used_bytes / memory.limit_bytes,
    )
    yield _labelled(
        GaugeMetricFamily(
            "clevrd_memory_state",
            "1 for what is given up while memory runs out, from well to no_publishes.",
            labels=["state"],
        ),
        {rung.word: int(rung.word == memory.state) for rung in Rung},
    )
    yield _counter(
        "clevrd_rings_shrunk",
        "Bytes of recent messages that were given up since memory ran out.",
        memory.rings_shrunk_bytes,
        "bytes",
    )
    yield _counter(
        "clevrd_log_lines_dropped",
        "Lines of the log that nobody read, or that could not be written.",
        snapshot.log_lines_dropped,
    )


def _of_process(snapshot: Snapshot) -> Iterator[Metric]:
    process = snapshot.process
    yield _counter(
        "clevrd_process_cpu",
        "CPU time that the process used, for itself and in the kernel.",
        snapshot.process_cpu_s,
        "seconds",
    )
    yield _bytes("clevrd_process_resident_memory", "The resident set.", process.rss_bytes)
    yield _bytes(
        "clevrd_process_peak_resident_memory",
        "The largest resident set that there was.",
        process.peak_rss_bytes,
    )
    yield _bytes("clevrd_process_virtual_memory", "The address space.", process.virtual_bytes)
    yield _gauge("clevrd_process_open_fds", "Descriptors that are open.", process.open_fds)
    yield _gauge("clevrd_process_max_fds", "Descriptors that may be open.", process.max_fds)
    yield _gauge("clevrd_process_threads", "Threads.", process.threads)
    yield _counter(
        "clevrd_process_gc_collections",
        "Collections that Python's garbage collector ran.",
        process.gc_collections,
    )


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value)


def _bytes(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value, unit="bytes")


def _share_bytes(name: str, help_text: str, values: Mapping[str, int]) -> Metric:
    return _labelled(GaugeMetricFamily(name, help_text, labels=["tenant"], unit="bytes"), values)


def _of_tenants(name: str, help_text: str, values: Mapping[str, int]) -> Metric:
    return _labelled(GaugeMetricFamily(name, help_text, labels=["tenant"]), values)


def _seconds(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value, unit="seconds")


def _counter(name: str, help_text: str, value: float, unit: str = "") -> Metric:
    return CounterMetricFamily(name, help_text, value, unit=unit)


def _counters(name: str, help_text: str, label: str, values: Mapping[str, int]) -> Metric:
    return _labelled(CounterMetricFamily(name, help_text, labels=[label]), values)


def _labelled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]
) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def _histogram(name: str, help_text: str, view: HistogramView, unit: str = "") -> Metric:
    bounds = [*map(floatToGoString, view.bounds), "+Inf"]
    buckets = list(zip(bounds, view.counts, strict=True))
    return HistogramMetricFamily(name, help_text, buckets, view.sum, unit=unit)
