"""Drain: at shutdown, what is under way is finished and readers are given what they still take.

Nothing is refused and nothing is closed here.
"""

from __future__ import annotations

import asyncio
from typing import Final

from clevrd.hub.delivery import Delivery
from clevrd.hub.waiting_publishes import WaitingPublishes

# Readers that took nothing for this long are not waited for.
_PATIENCE_S: Final = 1.0
_POLL_S: Final = 0.01


class Drain:
    """What there is to wait for before the daemon stops."""

    __slots__ = ("_delivery", "_loop", "_waiting")

    def __init__(
        self,
        waiting: WaitingPublishes,
        delivery: Delivery,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._waiting = waiting
        self._delivery = delivery
        self._loop = loop

    async def finish(self, deadline_s: float) -> None:
        """Finish waiting publishes, and flush what readers can still take.

        Ends when every reader is up to date, when those that lag took nothing for _PATIENCE_S, or
        at ``deadline_s`` on the loop's clock.
        """
        progress = (-1, -1)
        patience_ends_s = 0.0
        while (now_s := self._loop.time()) < deadline_s:
            is_busy = bool(self._waiting.count) or self._delivery.is_under_way()
            if not is_busy and not self._delivery.is_lagging():
                return
            if is_busy:
                patience_ends_s = 0.0
            elif now_s >= patience_ends_s:
                before, progress = progress, self._delivery.progress()
                if progress == before:
                    return
                patience_ends_s = now_s + _PATIENCE_S
            await asyncio.sleep(_POLL_S)
