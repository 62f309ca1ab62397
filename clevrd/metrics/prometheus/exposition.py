"""A snapshot as Prometheus reads it: text format 0.0.4, and OpenMetrics 1.0.0.

The spelling is prometheus_client's; `metrics/prometheus/families` has all metrics that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Final

from prometheus_client import exposition as text_exposition
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.registry import Collector

from clevrd.metrics.prometheus.families import families
from clevrd.metrics.snapshot import Snapshot

TEXT_TYPE: Final = text_exposition.CONTENT_TYPE_PLAIN_0_0_4
OPENMETRICS_TYPE: Final = openmetrics_exposition.CONTENT_TYPE_LATEST

Spell = Callable[[Collector], bytes]
_spell_text: Spell = text_exposition.generate_latest
_spell_openmetrics: Spell = openmetrics_exposition.generate_latest

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
