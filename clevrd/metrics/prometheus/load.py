"""Families about the load: the throttle, the window, and the memory."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from clevrd.control.memory_ladder import Rung
from clevrd.metrics.prometheus.kinds import counter, gauge, gauge_of_bytes, labelled
from clevrd.metrics.snapshot import Snapshot, Throttle


def of_load(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the load, and what is done about it."""
    throttle = snapshot.throttle
    yield from _of_throttle(throttle)
    yield gauge(
        "clevrd_cpu_usage_ratio",
        "The larger of the machine's CPU use, or its quota's, and the event loop's.",
        throttle.cpu_ratio,
    )
    yield gauge(
        "clevrd_memory_usage_ratio",
        "The larger of the machine's memory use, or its cgroup's, and this process's against its"
        " own limit.",
        throttle.memory_ratio,
    )
    yield gauge(
        "clevrd_window_messages",
        "Messages that a subscriber may lag before it loses some.",
        snapshot.window_messages,
    )
    yield from _of_memory(snapshot)
    yield counter(
        "clevrd_log_lines_dropped",
        "Lines of the log that nobody read, or that could not be written.",
        snapshot.log_lines_dropped,
    )


def _of_throttle(throttle: Throttle) -> Iterator[Metric]:
    yield gauge(
        "clevrd_throttling",
        "1 while publishes are slowed down, otherwise 0.",
        throttle.is_throttling,
    )
    yield gauge(
        "clevrd_throttled_topics",
        "Topics to which publishes are slowed down, where throttle_scope is topic.",
        throttle.throttled_topics,
    )
    yield counter(
        "clevrd_throttles_started",
        "How often the daemon began to slow publishes down.",
        throttle.times_started,
    )
    yield counter(
        "clevrd_throttled", "How long publishes were slowed down.", throttle.throttled_s, "seconds"
    )


def _of_memory(snapshot: Snapshot) -> Iterator[Metric]:
    yield gauge_of_bytes(
        "clevrd_ring", "Recent messages that all topics hold.", snapshot.ring_bytes
    )
    yield gauge_of_bytes(
        "clevrd_memory_limit",
        "Memory that the daemon may use: max_memory_mb, or less where the machine has less.",
        snapshot.memory_limit_bytes,
    )
    memory = snapshot.memory
    yield gauge(
        "clevrd_memory_held_ratio",
        "What is used of the tightest limit on this process's memory: its own, or its cgroup's.",
        memory.used_bytes / memory.limit_bytes,
    )
    yield labelled(
        GaugeMetricFamily(
            "clevrd_memory_state",
            "1 for what is given up while memory runs out, from well to no_publishes.",
            labels=["state"],
        ),
        {rung.word: int(rung.word == memory.state) for rung in Rung},
    )
    yield counter(
        "clevrd_rings_shrunk",
        "Bytes of recent messages that were given up since memory ran out.",
        memory.rings_shrunk_bytes,
        "bytes",
    )
