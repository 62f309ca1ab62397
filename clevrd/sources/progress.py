"""Progress: how far a source is, what was counted of it, and its state, logged when it changes."""

from __future__ import annotations

import logging
from typing import Final

from clevrd.metrics.sources import SourceFigures, SourceState
from clevrd.sources.settings import SourceEntry

log = logging.getLogger(__name__)

# States in which nothing is wrong.
_WELL: Final = ("starting", "reading", "standby", "stopped")
# Characters of an error that are shown.
_MAX_ERROR: Final = 500


class Progress:
    """One source's counters and state; its reader and its taker change them."""

    __slots__ = (
        *("_entry", "_kind", "dead", "errors", "filtered", "lag", "last_error", "lost"),
        *("position", "refused", "repeated", "state", "taken"),
    )

    def __init__(self, entry: SourceEntry) -> None:
        self._entry = entry
        self._kind = entry.place.kind
        self.state: SourceState = "starting"
        self.last_error = ""
        self.lag: int | None = None
        self.position = ""
        self.taken = self.filtered = self.dead = self.repeated = 0
        self.lost = self.refused = self.errors = 0

    def note(self, state: SourceState, why: str = "") -> None:
        """Note the state; say so in the log where it is another one, or for another reason."""
        why = why[:_MAX_ERROR]
        if (state, why) == (self.state, self.last_error):
            return
        was_well, is_new = self.state in _WELL, state != self.state
        self.state, self.last_error = state, why
        if state in _WELL:
            if not is_new:
                return
            if why:
                log.info("source %s name=%s why=%s", state, self._entry.name, why)
            else:
                log.info("source %s name=%s", state, self._entry.name)
        elif is_new or was_well:
            log.warning("source %s name=%s why=%s", state, self._entry.name, why)

    def note_lost(self, count: int | None, why: str) -> None:
        """Count and log records that the source gave up before they were read.

        Args:
            count: how many; None where that is not known, which counts as one.
        """
        self.lost += 1 if count is None else count
        log.warning(
            "records were gone before they were read source=%s count=%s why=%s",
            self._entry.name,
            "unknown" if count is None else count,
            why,
        )

    def figures(self) -> SourceFigures:
        """Return the figures as they are now."""
        return SourceFigures(
            name=self._entry.name,
            kind=self._kind,
            tenant_id=self._entry.tenant,
            state=self.state,
            lag=self.lag,
            position=self.position,
            taken=self.taken,
            filtered=self.filtered,
            dead=self.dead,
            repeated=self.repeated,
            lost=self.lost,
            refused=self.refused,
            errors=self.errors,
            last_error=self.last_error,
        )
