"""How often the circuit of a CIRCUIT_BREAKER may open, and for how long. Decides only."""

from __future__ import annotations

import msgspec


class CircuitBudget(msgspec.Struct, frozen=True):
    """The openings that a reader may spend before it is disconnected."""

    # Openings within ``period_s``; 0 disconnects at the first.
    openings: int
    period_s: float
    # Seconds that a circuit may stay open at a time.
    open_s: float

    def spend(self, openings: tuple[float, ...], now_s: float) -> tuple[float, ...] | None:
        """Return the openings that count, with one more now; None when that is one too many.

        Args:
            openings: what this returned the last time, nothing at first.
        """
        recent = tuple(opened_s for opened_s in openings if now_s - opened_s < self.period_s)
        return (*recent, now_s) if len(recent) < self.openings else None

    def ends_s(self, openings: tuple[float, ...]) -> float:
        """Return when a circuit that is open has been so for too long."""
        return openings[-1] + self.open_s
