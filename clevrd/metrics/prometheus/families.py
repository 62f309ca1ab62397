"""All families of one snapshot, in the order in which docs/operations.md has them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from clevrd.metrics.prometheus.connections import of_connections, of_tls
from clevrd.metrics.prometheus.daemon import of_daemon, of_process
from clevrd.metrics.prometheus.journal import of_journal
from clevrd.metrics.prometheus.load import of_load
from clevrd.metrics.prometheus.messages import of_messages, of_traffic
from clevrd.metrics.prometheus.sources import of_sources
from clevrd.metrics.prometheus.tracing import of_tracing
from clevrd.metrics.snapshot import Snapshot


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield each metric with its name, its help and its values, in the order of the documents."""
    yield from of_daemon(snapshot)
    yield from of_messages(snapshot)
    yield from of_connections(snapshot.connections)
    if snapshot.tls is not None:
        yield from of_tls(snapshot.tls)
    if snapshot.journal is not None:
        yield from of_journal(snapshot.journal)
    if snapshot.sources:
        yield from of_sources(snapshot.sources)
    if snapshot.tracing is not None:
        yield from of_tracing(snapshot.tracing)
    yield from of_traffic(snapshot.traffic)
    yield from of_load(snapshot)
    yield from of_process(snapshot)
