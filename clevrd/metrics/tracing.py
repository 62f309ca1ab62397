"""The figures of tracing, as a value that /metrics is made from."""

from __future__ import annotations

import msgspec


class TracingFigures(msgspec.Struct, frozen=True):
    """Spans since the start, by outcome, and those that wait to be sent."""

    spans: dict[str, int]
    waiting: int
