"""Turns of the loop that a test holds back, for requests that wait for theirs."""

from __future__ import annotations

import asyncio


class HeldTurns:
    """Turns of the loop that come when the test says so."""

    def __init__(self) -> None:
        self.waits, self.come = asyncio.Event(), asyncio.Event()

    def begin(self) -> bool:
        """Say that the turn has no share left."""
        return False

    async def turn(self, _: int, **__: bool) -> None:
        """Wait for the next one."""
        self.waits.set()
        await self.come.wait()

    def end(self) -> None:
        """Do nothing."""
