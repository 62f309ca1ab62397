"""Families about tracing: what became of spans."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from clevrd.metrics.prometheus.kinds import counters, gauge
from clevrd.metrics.tracing import TracingFigures


def of_tracing(tracing: TracingFigures) -> Iterator[Metric]:
    """Yield the spans, by outcome."""
    yield counters(
        "clevrd_trace_spans",
        "Spans of publishes and deliveries, by outcome: sent to the collector, or dropped.",
        "outcome",
        tracing.spans,
    )
    yield gauge(
        "clevrd_trace_spans_waiting",
        "Spans that wait to be sent to the collector.",
        tracing.waiting,
    )
