"""Sources: all sources of a daemon, as the server starts and ends them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import msgspec

from clevrd.hub import Hub
from clevrd.metrics.sources import SourceFigures
from clevrd.sources.kinds import reader_of
from clevrd.sources.progress import Progress
from clevrd.sources.settings import SourceEntry
from clevrd.sources.source import Source
from clevrd.sources.taking import Taker
from clevrd.tenants.authenticator import limits_of
from clevrd.tenants.settings import OPEN, Access
from clevrd.tenants.tenant import NO_LIMITS, Tenant

log = logging.getLogger(__name__)

# Descriptors of one source: a connection, one that asks where its server is, and one for names.
DESCRIPTORS: Final = 4
# How long a stop waits for what is on its way.
STOP_S: Final = 8.0


class Sources:
    """The sources that the configuration names."""

    def __init__(
        self,
        entries: Sequence[SourceEntry],
        hub: Hub,
        max_message_bytes: int,
        loop: asyncio.AbstractEventLoop,
        count_background_error: Callable[[], None],
    ) -> None:
        """Make the sources; `start` begins to read.

        Raises:
            ConfigError: a library is not installed, or a file can't be used.
        """
        self.entries = tuple(entries)
        self._loop = loop
        self._stopping = asyncio.Event()
        self._tenants = {entry.tenant: Tenant(entry.tenant) for entry in entries}
        self._sources: list[Source] = []
        for entry in entries:
            progress = Progress(entry)
            taker = Taker(
                *(hub, entry.mapping, progress, partial(self._tenant, entry.tenant)),
                *(max_message_bytes, self._stopping, loop),
            )
            self._sources.append(
                Source(
                    *(reader_of(entry, progress), taker, progress),
                    *(self._stopping, count_background_error),
                )
            )
        self._tasks: list[asyncio.Task[None]] = []

    def _tenant(self, name: str) -> Tenant:
        return self._tenants[name]

    def know(self, access: Access = OPEN) -> None:
        """Let the limits that tenants have now hold; but for rates, which are for clients."""
        limits = {each.name: limits_of(each) for each in access.tenants}
        for name in self._tenants:
            own = msgspec.structs.replace(
                limits.get(name, NO_LIMITS), publish_rate_per_s=None, publish_burst=None
            )
            self._tenants[name] = Tenant(name, limits=own if own != NO_LIMITS else NO_LIMITS)

    def figures(self) -> list[SourceFigures]:
        """Return the figures of each, in the order of the configuration."""
        return [each.progress.figures() for each in self._sources]

    def start(self) -> None:
        """Begin to read."""
        self._tasks = [self._loop.create_task(each.run()) for each in self._sources]

    async def stop(self) -> None:
        """Read no more; wait for what is on its way, and keep the positions."""
        self._stopping.set()
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=STOP_S)
        if late:
            log.warning("sources cut at shutdown count=%d", len(late))
        await self.crash()

    async def crash(self) -> None:
        """End all at once."""
        self._stopping.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
