"""Source: reads one stream for as long as the daemon runs, whatever becomes of its server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from clevrd.scheduling.timers import pause
from clevrd.sources.progress import Progress
from clevrd.sources.reading import Reader, SourceTrouble
from clevrd.sources.taking import Taker

log = logging.getLogger(__name__)

# How long a source waits at first that can't be read, and at most.
RETRY_S: Final = 0.25
MAX_RETRY_S: Final = 10.0
# The same where nothing has failed, as while another process reads.
SOON_S: Final = 1.0


class Source:
    """One source and its task."""

    def __init__(
        self,
        reader: Reader,
        taker: Taker,
        progress: Progress,
        stopping: asyncio.Event,
        count_background_error: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._taker = taker
        self.progress = progress
        self._stopping = stopping
        self._count_background_error = count_background_error

    async def run(self) -> None:
        """Read until the stop; the position is kept at the end."""
        wait_s = RETRY_S
        try:
            while not self._stopping.is_set():
                try:
                    await self._reader.open()
                    self.progress.note("reading")
                    wait_s = RETRY_S
                    await self._read_on()
                except SourceTrouble as trouble:
                    pause_s = SOON_S if trouble.soon else wait_s
                    self.progress.errors += not trouble.soon
                    self.progress.note(trouble.state, str(trouble))
                except Exception as error:
                    # A mistake of ours in one source must not end it, nor the others.
                    self._count_background_error()
                    self.progress.errors += 1
                    self.progress.note("failed", type(error).__name__)
                    log.exception("source failed; it is opened again")
                    pause_s = wait_s
                else:
                    break
                await self._reader.close()
                await pause(pause_s, self._stopping)
                wait_s = min(2 * wait_s, MAX_RETRY_S)
        finally:
            await self._reader.close()
        self.progress.note("stopped")

    async def _read_on(self) -> None:
        while not self._stopping.is_set():
            records = await self._reader.read()
            if records:
                done = await self._taker.take(records, self._reader.hold)
                self._reader.done(records[:done])
            if not self._stopping.is_set():
                self.progress.note(*self._reader.status)
