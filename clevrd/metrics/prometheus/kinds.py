"""Families of each kind, from a name, a help sentence and values.

The spelling is prometheus_client's. No label has a value that a client chooses; tenants are one in
/metrics/tenants alone. Source: https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from clevrd.metrics.histograms import HistogramView


def gauge(name: str, help_text: str, value: float) -> Metric:
    """Return one value that goes up and down."""
    return GaugeMetricFamily(name, help_text, value)


def gauge_of_bytes(name: str, help_text: str, value: float) -> Metric:
    """Return one value in bytes that goes up and down."""
    return GaugeMetricFamily(name, help_text, value, unit="bytes")


def gauge_of_seconds(name: str, help_text: str, value: float) -> Metric:
    """Return one value in seconds that goes up and down."""
    return GaugeMetricFamily(name, help_text, value, unit="seconds")


def by_tenant(name: str, help_text: str, values: Mapping[str, int]) -> Metric:
    """Return a value for each tenant."""
    return labelled(GaugeMetricFamily(name, help_text, labels=["tenant"]), values)


def bytes_by_tenant(name: str, help_text: str, values: Mapping[str, int]) -> Metric:
    """Return a value in bytes for each tenant."""
    return labelled(GaugeMetricFamily(name, help_text, labels=["tenant"], unit="bytes"), values)


def counter(name: str, help_text: str, value: float, unit: str = "") -> Metric:
    """Return one value that only goes up."""
    return CounterMetricFamily(name, help_text, value, unit=unit)


def counters(name: str, help_text: str, label: str, values: Mapping[str, int]) -> Metric:
    """Return values that only go up, one for each value of ``label``."""
    return labelled(CounterMetricFamily(name, help_text, labels=[label]), values)


def labelled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]
) -> Metric:
    """Return ``family`` with a value for each value of its one label."""
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def histogram(name: str, help_text: str, view: HistogramView, unit: str = "") -> Metric:
    """Return the distribution in ``view``."""
    bounds = [*map(floatToGoString, view.bounds), "+Inf"]
    buckets = list(zip(bounds, view.counts, strict=True))
    return HistogramMetricFamily(name, help_text, buckets, view.sum, unit=unit)
