"""Expiry: ends connections whose credential is over, each within a sixteenth of a second of it.

Only connections with a credential that ends are known here. How a connection ends is its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from clevrd.scheduling.deadlines import Deadlines
from clevrd.tenants import Tenant


class Holder(Protocol):
    """A connection that was opened with a credential."""

    tenant: Tenant

    def close(self, code: int, reason: str) -> None:
        """Say goodbye."""


# Close code of a connection whose credential is over; its client comes back with another one.
EXPIRED = 4102
EXPIRED_REASON = "credential_expired"


class _Ending:
    """A connection whose credential ends."""

    __slots__ = ("deadline_s", "holder")

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        # On the loop's clock; set by Deadlines.
        self.deadline_s = 0.0


class Expiry:
    """The connections whose credentials end, by when.

    Args:
        wall_s: the wall clock, seconds since 1970, by which credentials end.
    """

    __slots__ = ("_endings", "_loop", "_of", "_wall_s")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wall_s: Callable[[], float],
        on_error: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._wall_s = wall_s
        # Connection -> its entry in `_endings`.
        self._of: dict[Holder, _Ending] = {}
        self._endings: Deadlines[_Ending] = Deadlines(loop, self._end, on_error)

    def __len__(self) -> int:
        """Return how many connections there are whose credential ends."""
        return len(self._of)

    def watch(self, holder: Holder) -> None:
        """Close ``holder`` when its tenant's credential is over; called again where that changes.

        A clock that is set meanwhile is not looked at: the time left counts from here.
        """
        self.remove(holder)
        expires_at_s = holder.tenant.expires_at_s
        if expires_at_s is None:
            return
        ending = self._of[holder] = _Ending(holder)
        left_s = max(0.0, expires_at_s - self._wall_s())
        self._endings.set(ending, self._loop.time() + left_s)

    def remove(self, holder: Holder) -> None:
        """Forget ``holder``. Idempotent."""
        ending = self._of.pop(holder, None)
        if ending is not None:
            self._endings.remove(ending)

    def stop(self) -> None:
        """End nothing any more."""
        self._endings.stop()

    def _end(self, ending: _Ending) -> None:
        self._of.pop(ending.holder, None)
        ending.holder.close(EXPIRED, EXPIRED_REASON)
