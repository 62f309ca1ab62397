"""Families about sources: their state, and what became of their records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from clevrd.metrics.sources import SOURCE_STATES, SourceFigures


def of_sources(sources: Sequence[SourceFigures]) -> Iterator[Metric]:
    """Yield each family with a value for each source."""
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
