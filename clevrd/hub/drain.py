"""Drain: at shutdown, what is under way is finished and readers are given what they still take.

Nothing is refused and nothing is closed here.
"""

from __future__ import annotations

import asyncio
from typing import Final

from clevrd.hub.readers import Readers
from clevrd.hub.rounds import Rounds
from clevrd.hub.waiting_publishes import WaitingPublishes

# Readers that took nothing for this long are not waited for.
_PATIENCE_S: Final = 1.0
_POLL_S: Final = 0.01


class Drain:
    """What there is to wait for before the daemon stops."""

    __slots__ = ("_loop", "_readers", "_rounds", "_waiting")

    def __init__(
        self,
        waiting: WaitingPublishes,
        rounds: Rounds,
        readers: Readers,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._waiting = waiting
        self._rounds = rounds
        self._readers = readers
        self._loop = loop

    async def finish(self, deadline_s: float) -> None:
        """Finish waiting publishes, and flush what readers can still take.

        Ends when every reader is up to date, when those that lag took nothing for _PATIENCE_S, or
        at ``deadline_s`` on the loop's clock.
        """
        progress = (-1, -1)
        patience_ends_s = 0.0
        while (now_s := self._loop.time()) < deadline_s:
            busy = self._is_busy()
            if not busy and not self._is_lagging():
                return
            if busy:
                patience_ends_s = 0.0
            elif now_s >= patience_ends_s:
                before, progress = progress, self._taken()
                if progress == before:
                    return
                patience_ends_s = now_s + _PATIENCE_S
            await asyncio.sleep(_POLL_S)

    def _is_busy(self) -> bool:
        """Whether publishes wait, or anything is yet to be offered or written."""
        return bool(
            self._waiting.count
            or self._rounds.running
            or any(topic.pending for topic in self._readers.topics)
        )

    def _is_lagging(self) -> bool:
        return any(topic.lagging for topic in self._readers.topics)

    def _taken(self) -> tuple[int, int]:
        """Return what changes when any lagging reader takes anything: 1 us for each of them.

        Messages handed over, and bytes that were handed over before and are not taken yet: a
        reader at some KB/s lives on what its connection holds for many seconds.
        """
        topics = self._readers.topics
        delivered = sum(topic.delivered for topic in topics)
        unsent_bytes = sum(
            reader.sink.unsent_bytes() for topic in topics for reader in topic.lagging
        )
        return delivered, unsent_bytes
