"""Spans as small values, and which publishes are traced. No library and no thread here.

How a context is spelt: core/trace_context. A share of traces by their ids: OpenTelemetry
Specification, TraceIdRatioBased. Names of attributes: OpenTelemetry's semantic conventions for
messaging.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from clevrd.core.trace_context import TRACEPARENT, TRACESTATE, is_tracestate, parse_traceparent

SpanName = Literal["publish", "deliver"]
Attribute = str | int | float | bool

SYSTEM: Final = "clevrd"
# Characters of an error's sentence that a span has at most.
MAX_DESCRIPTION: Final = 256

_TRACE_ID_HALF: Final = 1 << 64


class TraceContext(msgspec.Struct, frozen=True, gc=False):
    """The place of a span: its trace and its own id, in hex, and whether the trace is recorded."""

    trace_id: str
    span_id: str
    is_sampled: bool
    tracestate: str = ""

    def traceparent(self) -> str:
        """Return it as the header field of that name."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


class Span(msgspec.Struct, frozen=True, gc=False):
    """A span that has ended."""

    name: SpanName
    context: TraceContext
    # None for the root of a trace.
    parent: TraceContext | None
    # Nanoseconds since 1970.
    start_ns: int
    end_ns: int
    attributes: dict[str, Attribute]
    # The sentence of an error; None where all went well.
    error: str | None = None
    # The span of the message's publish, where this one is of its delivery.
    link: TraceContext | None = None


def read_context(headers: Mapping[str, str]) -> TraceContext | None:
    """Return what ``traceparent`` and ``tracestate`` say; None without a traceparent that is one.

    Args:
        headers: by name, in lower case.
    """
    parent = parse_traceparent(headers.get(TRACEPARENT, ""))
    if parent is None:
        return None
    tracestate = headers.get(TRACESTATE, "")
    if not is_tracestate(tracestate):
        tracestate = ""
    return TraceContext(parent.trace_id, parent.parent_id, parent.is_sampled, tracestate)


class Sampler:
    """Decides which publishes are traced, and makes the ids of their spans.

    A publish with a parent goes by that, so that a trace is whole or not there.
    """

    __slots__ = ("_bits", "_bound")

    def __init__(self, ratio: float, bits: Callable[[int], int] = random.getrandbits) -> None:
        """Trace so much, from 0 to 1, of what has no parent.

        Args:
            bits: returns a random number of so many bits.
        """
        self._bits = bits
        # The lower halves of the ids of the traces that are recorded are below it.
        self._bound = round(ratio * _TRACE_ID_HALF)

    def begin(self, parent: TraceContext | None) -> TraceContext | None:
        """Return the context of a new span; None for one that is not recorded."""
        bits = self._bits
        if parent is None:
            half = bits(64)
            if half >= self._bound:
                return None
            # An id of zeros is none.
            return TraceContext(f"{bits(64) or 1:016x}{half:016x}", f"{bits(64) or 1:016x}", True)
        if not parent.is_sampled:
            return None
        return self.child(parent)

    def child(self, parent: TraceContext) -> TraceContext:
        """Return the context of a new span in the trace of ``parent``."""
        return TraceContext(parent.trace_id, f"{self._bits(64) or 1:016x}", True, parent.tracestate)
