"""Drain: waits at shutdown for publishes under way and for readers that still take something.

No publish is refused and no connection is closed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from clevrd.hub.delivery import Delivery
from clevrd.hub.waiting_publishes import WaitingPublishes

# The wait ends when no lagging reader has taken anything for this long.
_PATIENCE_S: Final = 1.0
_POLL_S: Final = 0.01


class Drain:
    """The wait for publishes and readers before the daemon stops."""

    __slots__ = ("_delivery", "_is_journal_busy", "_loop", "_waiting")

    def __init__(
        self,
        waiting: WaitingPublishes,
        delivery: Delivery,
        loop: asyncio.AbstractEventLoop,
        is_journal_busy: Callable[[], bool],
    ) -> None:
        """Args: is_journal_busy: whether any message waits for its place in a journal."""
        self._is_journal_busy = is_journal_busy
        self._waiting = waiting
        self._delivery = delivery
        self._loop = loop

    async def finish(self, deadline_s: float) -> None:
        """Wait until no publish waits and every reader has what it can still take.

        The wait ends when no reader lags, when no lagging reader took anything for _PATIENCE_S, or
        at ``deadline_s`` on the loop's clock.
        """
        progress = (-1, -1)
        patience_ends_s = 0.0
        while (now_s := self._loop.time()) < deadline_s:
            is_busy = (
                bool(self._waiting.count)
                or self._is_journal_busy()
                or self._delivery.is_under_way()
            )
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
