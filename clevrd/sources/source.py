"""Source: reads one stream for as long as the daemon runs, whatever becomes of its server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from clevrd.scheduling.timers import pause
from clevrd.sources.progress import Progress
from clevrd.sources.reading import READING, STANDBY, Reader, SourceTrouble
from clevrd.sources.taking import Taker

log = logging.getLogger(__name__)

# Seconds that a source which can't be read waits at first, and at most.
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
        # How long it waits when it can't be read the next time.
        self._wait_s = RETRY_S

    async def run(self) -> None:
        """Read until the stop; the position is kept at the end."""
        try:
            while not self._stopping.is_set():
                try:
                    await self._reader.open()
                    self._note_status()
                    await self._read_on()
                except SourceTrouble as trouble:
                    pause_s = SOON_S if trouble.soon else self._wait_s
                    self.progress.errors += not trouble.soon
                    self.progress.note(trouble.state, str(trouble))
                except Exception as error:
                    # A mistake of ours in one source must not end it, nor the others.
                    self._count_background_error()
                    self.progress.errors += 1
                    self.progress.note("failed", type(error).__name__)
                    log.exception("source failed; it is opened again")
                    pause_s = self._wait_s
                else:
                    break
                self._taker.forget()
                await self._reader.close()
                await pause(pause_s, self._stopping)
                self._wait_s = min(2 * self._wait_s, MAX_RETRY_S)
        finally:
            self._taker.forget()
            await self._reader.close()
        self.progress.note("stopped")

    async def _read_on(self) -> None:
        reader, taker = self._reader, self._taker
        try:
            while not self._stopping.is_set():
                records = await reader.read()
                if records or taker.under_way:
                    reader.done(await taker.take(records, reader.hold))
                if not self._stopping.is_set():
                    self._note_status()
        except SourceTrouble as trouble:
            # Records that were read are published, whatever becomes of their server; but not beside
            # another process.
            if trouble.state != "standby":
                await self._finish()
            raise
        await self._finish()

    def _note_status(self) -> None:
        """Show what the reader says of itself; if it reads, the next fault is a first one again."""
        status = self._reader.status
        if status is None:
            return
        self.progress.note(*status)
        if status in (READING, STANDBY):
            self._wait_s = RETRY_S

    async def _finish(self) -> None:
        """Wait for records under way, but at a stop not for refused ones."""
        while self._taker.under_way:
            done = await self._taker.take((), self._reader.hold)
            self._reader.done(done)
            if not done and self._stopping.is_set():
                return
