"""Connections: the pipelines to the primaries, made when they are needed and made again.

Each server has one for appends and one for all other questions; each partition has one that waits
for records, since a connection that waits can't be asked anything else. For the same reason each
partition has one of its own for appends where these wait for disks or replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from clevrd.journal.redis.library import LOST, MOVED_CODES, Connector, RedisFault
from clevrd.journal.redis.locating import Locator, Place
from clevrd.journal.redis.pipeline import PATIENCE_TICKS, Pipeline

# Appends, of all partitions, and what those of one partition's own begin with.
APPENDS: Final = "appends"
QUESTIONS: Final = "questions"

_Slot = tuple[Place, str]


class Connections:
    """The pipelines of one engine."""

    def __init__(
        self,
        locator: Locator,
        connector: Connector,
        loop: asyncio.AbstractEventLoop,
        lost: Callable[[Place], None],
    ) -> None:
        """Args: lost: called when the connection for appends to a server has broken."""
        self._locator = locator
        self._connector = connector
        self._loop = loop
        self._lost = lost
        self._pipelines: dict[_Slot, Pipeline] = {}
        self._locks: dict[_Slot, asyncio.Lock] = {}
        # Pipelines that have ended, and are being closed.
        self._closing: set[asyncio.Task[None]] = set()
        self.is_closed = False

    async def place_of(self, partition: int) -> Place:
        """Return where the partition's primary is; raises RedisFault."""
        return await self._locator.find(partition)

    async def call(
        self,
        partition: int,
        role: str,
        *command: Any,
        patience_ticks: int = PATIENCE_TICKS,
    ) -> Any:
        """Send a command to the partition's primary, and return the answer.

        Args:
            role: APPENDS or QUESTIONS, or one of a partition's own.

        Raises:
            RedisFault: the server refuses, or can't be reached.
        """
        pipeline = await self.pipeline(partition, role)
        return await self.call_over(pipeline, *command, patience_ticks=patience_ticks)

    async def call_over(
        self, pipeline: Pipeline, *command: Any, patience_ticks: int = PATIENCE_TICKS
    ) -> Any:
        """Send a command over this very connection, and return the answer; raises RedisFault."""
        try:
            return await pipeline.call(*command, patience_ticks=patience_ticks)
        except RedisFault as fault:
            self.note_fault(fault)
            if fault.code in MOVED_CODES:
                pipeline.end(fault)
            # Each caller raises its own: a traceback must not grow with each of them.
            raise RedisFault(fault.code, fault.text) from None

    async def pipeline(self, partition: int, role: str) -> Pipeline:
        """Return an open pipeline to the partition's primary; raises RedisFault."""
        place = await self._locator.find(partition)
        slot = place, role
        pipeline = self._pipelines.get(slot)
        if pipeline is not None:
            return pipeline
        async with self._locks.setdefault(slot, asyncio.Lock()):
            pipeline = self._pipelines.get(slot)
            if pipeline is None:
                pipeline = await self._open(place, slot)
            return pipeline

    def note_fault(self, fault: RedisFault) -> None:
        """Look for the primaries again where ``fault`` says that they may be elsewhere."""
        if fault.code == LOST or fault.code in MOVED_CODES:
            self._locator.forget()

    def tick(self) -> None:
        """Break connections that have been silent for too long; called each TICK_S."""
        for pipeline in tuple(self._pipelines.values()):
            pipeline.tick()

    def drop(self, fault: RedisFault, role: str | None = None) -> None:
        """End all connections, or those with ``role``; they are made again when needed."""
        for (_, each), pipeline in tuple(self._pipelines.items()):
            if role is None or role == each:
                pipeline.end(fault)

    async def leave_old_primary(self) -> None:
        """End connections to a server that is the primary no more, if Sentinels say so."""
        for place in {place for place, role in self._pipelines if role.startswith(APPENDS)}:
            if await self._locator.has_moved(0, place):
                self.drop(RedisFault(LOST, "another server is the primary now"))
                return

    async def close(self) -> None:
        """End all connections for good."""
        self.is_closed = True
        self.drop(RedisFault(LOST, "the journal is closed"))
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _open(self, place: Place, slot: _Slot) -> Pipeline:
        if self.is_closed:
            raise RedisFault(LOST, "the journal is closed")
        try:
            connection = await self._connector.connect(place)
        except RedisFault as fault:
            self.note_fault(fault)
            raise
        pipeline = Pipeline(connection, self._loop, lambda ended: self._ended(slot, ended))
        self._pipelines[slot] = pipeline
        if self.is_closed:
            pipeline.end(RedisFault(LOST, "the journal is closed"))
        elif b"role:master" not in await self._role(pipeline):
            replica = RedisFault("READONLY", "it is a replica")
            pipeline.end(replica)
            self.note_fault(replica)
            raise replica
        return pipeline

    async def _role(self, pipeline: Pipeline) -> bytes:
        try:
            text = await pipeline.call("INFO", "replication")
        except RedisFault as fault:
            pipeline.end(fault)
            raise RedisFault(fault.code, fault.text) from None
        return text if isinstance(text, bytes) else b""

    def _ended(self, slot: _Slot, pipeline: Pipeline) -> None:
        if self._pipelines.get(slot) is pipeline:
            del self._pipelines[slot]
        if pipeline.fault is not None:
            self.note_fault(pipeline.fault)
        if slot[1].startswith(APPENDS):
            self._lost(slot[0])
        task = self._loop.create_task(pipeline.closed())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
