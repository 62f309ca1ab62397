"""Pipeline: one connection whose commands are answered in the order in which they were sent.

A caller that gives up disturbs nobody: its answer is read and passed over. Commands of one turn of
the loop go out in one write.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from hiredis import pack_command
from redis.exceptions import RedisError, ResponseError

from clevrd.journal.redis.library import LOST, RedisFault, close, fault_of

# Ticks (see `Pipeline.tick`) that an answer may take.
PATIENCE_TICKS: Final = 8
TICK_S: Final = 0.5


class Pipeline:
    """An open connection, until it breaks."""

    def __init__(
        self,
        connection: Any,
        loop: asyncio.AbstractEventLoop,
        broken: Callable[[Pipeline], None],
    ) -> None:
        """Take over ``connection``; ``broken`` is called once, when no more can be sent."""
        self._connection = connection
        self._loop = loop
        self._broken = broken
        # Commands that are to be sent with the next write.
        self._out: list[bytes] = []
        # Answers that are due, oldest first, with the ticks that are left for each.
        self._due: deque[tuple[asyncio.Future[Any], int]] = deque()
        # Ticks that the oldest one has been due.
        self._ticks = 0
        # Done when there is something to send; None while the sender is at it.
        self._wake: asyncio.Future[None] | None = None
        self.fault: RedisFault | None = None
        self._tasks = (loop.create_task(self._send()), loop.create_task(self._receive()))

    @property
    def is_open(self) -> bool:
        """Whether commands can be sent."""
        return self.fault is None

    def call(self, *command: Any, patience_ticks: int = PATIENCE_TICKS) -> asyncio.Future[Any]:
        """Send a command, and return its answer, which is due.

        The answer is a RedisFault where the server refuses, or the connection breaks.
        """
        answer: asyncio.Future[Any] = self._loop.create_future()
        if self.fault is not None:
            answer.set_exception(self.fault)
            return answer
        if not self._due:
            self._ticks = 0
        self._due.append((answer, patience_ticks))
        # By hiredis, in a tenth of the time that redis-py's own takes.
        self._out.append(pack_command(command))
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)
        return answer

    def tick(self) -> None:
        """Note that TICK_S have passed; break a connection that has been silent for too long.

        Ticks are counted and not seconds, so that a process which was stopped for a minute does
        not find all its servers silent.
        """
        if self._due:
            self._ticks += 1
            if self._ticks > self._due[0][1]:
                self.end(RedisFault(LOST, "it does not answer"))

    def end(self, fault: RedisFault) -> None:
        """Close the connection; all answers that are due fail with ``fault``."""
        if self.fault is not None:
            return
        self.fault = fault
        for task in self._tasks:
            task.cancel()
        due, self._due = self._due, deque()
        for answer, _ in due:
            if not answer.done():
                answer.set_exception(fault)
        self._broken(self)

    async def closed(self) -> None:
        """Wait until all of it has ended, behind `end`."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await close(self._connection)

    async def _send(self) -> None:
        connection = self._connection
        try:
            while True:
                if not self._out:
                    self._wake = self._loop.create_future()
                    await self._wake
                out, self._out = self._out, []
                await connection.send_packed_command(out, check_health=False)
        except (RedisError, OSError) as error:
            self.end(fault_of(error))

    async def _receive(self) -> None:
        read = self._connection.read_response
        try:
            while True:
                try:
                    reply = await read(timeout=math.inf, disconnect_on_error=False)
                except ResponseError as error:
                    reply = fault_of(error)
                self._answer(reply)
        except (RedisError, OSError) as error:
            self.end(fault_of(error))

    def _answer(self, reply: Any) -> None:
        answer, _ = self._due.popleft()
        self._ticks = 0
        if answer.done():
            return
        if isinstance(reply, RedisFault):
            answer.set_exception(reply)
        else:
            answer.set_result(reply)
