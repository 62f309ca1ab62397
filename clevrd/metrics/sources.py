"""The figures of sources, as values that /metrics is made from."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

# The states of a source: it was not connected yet; it reads; its publishes are refused, and it
# waits; another process reads it; its server can't be reached; its server refuses it; there is no
# such stream; a mistake of ours, which is logged; it was ended.
SourceState = Literal[
    "starting", "reading", "waiting", "standby", "away", "refused", "missing", "failed", "stopped"
]
SOURCE_STATES: Final[tuple[SourceState, ...]] = (
    *("starting", "reading", "waiting", "standby", "away", "refused", "missing", "failed"),
    "stopped",
)


class SourceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One source, as this process sees it; counters since the start."""

    name: str
    kind: str
    tenant_id: str
    state: SourceState
    # Records that are in the source and not taken yet; None where that is not known.
    lag: int | None
    # The last record that is done with; empty before the first.
    position: str
    # Records that became messages, that the filter passed over, and that could not be taken.
    taken: int
    filtered: int
    dead: int
    # Records that became messages before, and were read again.
    repeated: int
    # Records that the source gave up before they were read.
    lost: int
    # Publishes that were refused and tried again, and times that the source was not there.
    refused: int
    errors: int
    # In a few words; empty while all is well.
    last_error: str
