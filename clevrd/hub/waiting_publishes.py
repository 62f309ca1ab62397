"""WaitingPublishes: counts publishes that wait, and orders those that wait for room in a topic.

The caller decides when a topic has room, and what else a publish waits for.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Final

from clevrd.control.holdings import Holdings
from clevrd.core.portions import Portions
from clevrd.core.topic import Topic
from clevrd.errors import Throttled

# Publishes that may wait for a throttle or for room at once; each holds one decoded request. A
# portion with fewer than its part of these, or of the bytes that they may have, may always add one,
# so in the worst case there are twice as many.
MAX_WAITING_PUBLISHES: Final = 10_000

# Publishes that wait for room in one topic, in the order of arrival; each has the future that wakes
# it.
Line = OrderedDict[object, asyncio.Future[None]]


class WaitingPublishes:
    """All publishes that wait; publishes that wait for room go on in the order of arrival."""

    __slots__ = (
        *("_by_portion", "_bytes_by_portion", "_loop", "_max_bytes", "_portions"),
        *("_size_bytes", "count", "lines"),
    )

    def __init__(self, portions: Portions, loop: asyncio.AbstractEventLoop, max_bytes: int) -> None:
        """Args: max_bytes: that all of them may have, and one alone has not."""
        self._portions = portions
        self._loop = loop
        self._max_bytes = max_bytes
        # Publishes that wait, over all portions, and of each by its name; and the bytes of what
        # they publish. Changed by begin and end alone.
        self.count = 0
        self._by_portion: Holdings[str] = Holdings()
        self._size_bytes = 0
        self._bytes_by_portion: dict[str, int] = {}
        # Topics in which a publish waits for room; changed by for_room and _wake_next alone.
        self.lines: dict[Topic, Line] = {}

    def begin(self, tenant: str, size_bytes: int) -> str:
        """Count one more waiting publish; the caller calls `end` whatever becomes of it.

        Returns the name of the portion in which it was counted, for `end`.

        Args:
            size_bytes: of what it publishes.

        Raises:
            Throttled: too many publishes wait already; it was not counted.
        """
        weights = self._portions.weights
        portion = weights.portion_of(tenant)
        own = self._by_portion.of(portion)
        if self.count >= MAX_WAITING_PUBLISHES and own >= (
            MAX_WAITING_PUBLISHES * weights.ratio_of(portion)
        ):
            raise Throttled(
                "Too many publishes are waiting for slow readers; retry later.",
                tenant=tenant,
                bound="publishes",
                inputs={"publishes": self.count, "own_publishes": own},
                thresholds={"publishes": MAX_WAITING_PUBLISHES},
            )
        own_bytes = self._bytes_by_portion.get(portion, 0)
        if self._size_bytes + size_bytes > self._max_bytes and own_bytes + size_bytes > (
            self._max_bytes * weights.ratio_of(portion)
        ):
            raise Throttled(
                "Publishes that are waiting for slow readers have too many bytes; retry later.",
                tenant=tenant,
                bound="bytes",
                inputs={"bytes": self._size_bytes, "own_bytes": own_bytes},
                thresholds={"bytes": self._max_bytes},
            )
        self.count += 1
        self._by_portion.take(portion)
        self._size_bytes += size_bytes
        self._bytes_by_portion[portion] = own_bytes + size_bytes
        return portion

    def end(self, portion: str, size_bytes: int) -> None:
        """Count one waiting publish of ``portion`` less."""
        self.count -= 1
        self._by_portion.give_back(portion)
        self._size_bytes -= size_bytes
        self._bytes_by_portion[portion] -= size_bytes
        if not self._by_portion.of(portion):
            del self._bytes_by_portion[portion]

    async def for_room(self, topic: Topic, makes_room: Callable[[Topic], bool]) -> None:
        """Wait until ``topic`` has room and no other publish has waited for it longer."""
        line = self.lines.setdefault(topic, OrderedDict())
        me = object()
        try:
            while True:
                line[me] = woken = self._loop.create_future()
                await woken
                # Publishes are woken in their order, so the first to look has waited longest.
                if makes_room(topic):
                    return
        finally:
            del line[me]
            self._wake_next(topic, line)

    def is_awaited(self, topic: Topic) -> bool:
        """Return whether any publish waits for room in ``topic``."""
        return topic in self.lines

    def room_made(self, topic: Topic, messages: int) -> None:
        """Wake as many publishes as ``topic`` has room for, in the order of arrival."""
        for woken in islice(self.lines[topic].values(), max(0, messages)):
            if not woken.done():
                woken.set_result(None)

    def _wake_next(self, topic: Topic, line: Line) -> None:
        """Wake the next publish, so that it looks whether there is room for it too."""
        if not line:
            del self.lines[topic]
            return
        woken = next(iter(line.values()))
        if not woken.done():
            woken.set_result(None)
