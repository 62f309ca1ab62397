"""Families about the daemon itself: its versions, its topics and its process."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import InfoMetricFamily, Metric

from clevrd.metrics.prometheus.kinds import counter, gauge, gauge_of_bytes, gauge_of_seconds
from clevrd.metrics.snapshot import Snapshot


def of_daemon(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what runs, and how much of it."""
    build = snapshot.build
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
    yield gauge_of_seconds(
        "clevrd_start_time", "When the daemon started, since 1970.", snapshot.started_at_s
    )
    yield gauge("clevrd_topics", "Topics that there are.", snapshot.total_topics)
    yield gauge(
        "clevrd_subscribers",
        "Subscriptions that are open, one for each topic of a connection.",
        snapshot.total_subscribers,
    )
    yield gauge(
        "clevrd_slow_subscribers",
        "Subscriptions that lag beyond their window, have lost something within the last 10 s,"
        " or have an open circuit.",
        snapshot.slow_subscribers,
    )
    yield gauge(
        "clevrd_open_circuits",
        "Subscriptions that are given nothing until their connection takes more.",
        snapshot.open_circuits,
    )
    yield gauge(
        "clevrd_history_readers",
        "Subscriptions whose next message lies before the ring of their topic.",
        snapshot.reading_history,
    )


def of_process(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what the process takes of the machine."""
    process = snapshot.process
    yield counter(
        "clevrd_process_cpu",
        "CPU time that the process used, for itself and in the kernel.",
        snapshot.process_cpu_s,
        "seconds",
    )
    yield gauge_of_bytes("clevrd_process_resident_memory", "The resident set.", process.rss_bytes)
    yield gauge_of_bytes(
        "clevrd_process_peak_resident_memory",
        "The largest resident set that there was.",
        process.peak_rss_bytes,
    )
    yield gauge_of_bytes(
        "clevrd_process_virtual_memory", "The address space.", process.virtual_bytes
    )
    yield gauge("clevrd_process_open_fds", "Descriptors that are open.", process.open_fds)
    yield gauge("clevrd_process_max_fds", "Descriptors that may be open.", process.max_fds)
    yield gauge("clevrd_process_threads", "Threads.", process.threads)
    yield counter(
        "clevrd_process_gc_collections",
        "Collections that Python's garbage collector ran.",
        process.gc_collections,
    )
