"""W3C Trace Context, as it stands in header fields: which values are valid. No spans here.

Grammar: https://www.w3.org/TR/trace-context/ §3.2 (traceparent) and §3.3 (tracestate).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"

# A later version may add fields behind the flags; they are passed on within this bound.
MAX_TRACEPARENT_CHARS: Final = 120
# As much as every participant should pass on, and the most members that a list may have.
MAX_TRACESTATE_CHARS: Final = 512
MAX_TRACESTATE_MEMBERS: Final = 32

_TRACEPARENT: Final = re.compile(
    r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]*)?", re.ASCII
)
_NO_TRACE: Final = "0" * 32
_NO_PARENT: Final = "0" * 16
_MEMBER: Final = re.compile(
    r"[ \t]*(?:[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\x2d-<>-~]{0,255}[!-+\x2d-<>-~])?[ \t]*", re.ASCII
)


class TraceParent(NamedTuple):
    """The trace that a message belongs to, and the span in which it was published."""

    # 32 and 16 hexadecimal digits, in lower case and not all zero.
    trace_id: str
    parent_id: str
    flags: int

    @property
    def is_sampled(self) -> bool:
        """Whether the publisher may have recorded its span."""
        return bool(self.flags & 1)


def parse_traceparent(value: str) -> TraceParent | None:
    """Return what a traceparent says; None for one that is not valid."""
    if len(value) > MAX_TRACEPARENT_CHARS:
        return None
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    version, trace_id, parent_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if trace_id == _NO_TRACE or parent_id == _NO_PARENT:
        return None
    return TraceParent(trace_id, parent_id, int(flags, 16))


def traceparent_of(fields: Mapping[str, str]) -> str:
    """Return the traceparent among header fields; empty where there is none, or none is valid.

    Args:
        fields: by lower-case name.
    """
    given = fields.get(TRACEPARENT, "")
    return given if parse_traceparent(given) is not None else ""


def is_tracestate(value: str) -> bool:
    """Return whether ``value`` is a list of members within the bounds, of which some may be empty.

    A key that occurs twice is not looked for: whoever extends the list has to do that anyway.
    """
    if not value or len(value) > MAX_TRACESTATE_CHARS:
        return False
    members = value.split(",")
    return len(members) <= MAX_TRACESTATE_MEMBERS and all(map(_MEMBER.fullmatch, members))
