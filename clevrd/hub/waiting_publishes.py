"""WaitingPublishes: how many wait, and who is next where a topic has no room.

What is room, and what else is waited for, is the caller's.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Final

from clevrd.core.topic import Topic
from clevrd.errors import Throttled

# Publishes that may wait for a throttle or for room at once; each holds one decoded request.
MAX_WAITING_PUBLISHES: Final = 10_000

# Those that wait for room in one topic, in the order in which they came, each with what wakes it.
Line = OrderedDict[object, asyncio.Future[None]]


class WaitingPublishes:
    """All publishes that wait, for whatever it is; those that wait for room have their order."""

    __slots__ = ("_loop", "count", "lines")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # At most MAX_WAITING_PUBLISHES; moves in begin and end alone.
        self.count = 0
        # The topics in which somebody waits for room; changes in for_room alone.
        self.lines: dict[Topic, Line] = {}

    def begin(self) -> None:
        """Count one more, which calls `end` whatever becomes of it.

        Raises:
            Throttled: too many publishes wait already; it was not counted.
        """
        if self.count >= MAX_WAITING_PUBLISHES:
            raise Throttled("Too many publishes are waiting for slow readers; retry later.")
        self.count += 1

    def end(self) -> None:
        """Count one less."""
        self.count -= 1

    async def for_room(self, topic: Topic, makes_room: Callable[[Topic], bool]) -> None:
        """Wait until ``topic`` has room and nobody else has waited for it longer."""
        line = self.lines.setdefault(topic, OrderedDict())
        me = object()
        try:
            while True:
                line[me] = woken = self._loop.create_future()
                await woken
                # They are woken in their order, so who looks first has waited longest.
                if makes_room(topic):
                    return
        finally:
            del line[me]
            self._pass_on(topic, line)

    def is_awaited(self, topic: Topic) -> bool:
        """Return whether any publish waits for room in ``topic``."""
        return topic in self.lines

    def room_made(self, topic: Topic, messages: int) -> None:
        """Let as many publishes go on as ``topic`` has room for, those that came first."""
        for woken in islice(self.lines[topic].values(), max(0, messages)):
            if not woken.done():
                woken.set_result(None)

    def _pass_on(self, topic: Topic, line: Line) -> None:
        """Let the next one look whether there is room for it too."""
        if not line:
            del self.lines[topic]
            return
        woken = next(iter(line.values()))
        if not woken.done():
            woken.set_result(None)
