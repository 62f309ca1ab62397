"""Circuits: readers to which nothing is offered for a while, or which are let go for good.

How often and for how long a circuit may be open: core/circuit. When one opens, its topic knows.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final

from clevrd.core.circuit import CircuitBudget
from clevrd.core.subscriber import CIRCUIT_BREAKER, Subscriber
from clevrd.core.topic import Topic
from clevrd.hub.readers import Readers
from clevrd.metrics.counters import Counters
from clevrd.scheduling.deadlines import Deadlines
from clevrd.scheduling.turn_queue import TurnQueue

log = logging.getLogger(__name__)

# Circuits that have been open for too long and are closed between two turns of the loop: a close is
# a write.
_PER_TURN: Final = 256

# Close code 41xx: come back, with backoff.
CLOSE_SLOW_CONSUMER: Final = 4101


class _First:
    """The circuit that has been open the longest."""

    def __init__(self) -> None:
        # When it has been so for too long.
        self.deadline_s = 0.0


class Circuits:
    """The circuits of all readers. Those that are suspended are those whose circuit is open."""

    __slots__ = ("_budget", "_counters", "_deadlines", "_first", "_loop", "_overdue", "_readers")

    def __init__(
        self,
        budget: CircuitBudget,
        readers: Readers,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._budget = budget
        self._readers = readers
        self._counters = counters
        self._loop = loop
        # They are suspended in the order in which they are overdue, so the first stands for all.
        self._first = _First()
        self._deadlines: Deadlines[_First] = Deadlines(
            loop, lambda _: self.break_overdue(), counters.count_background_error
        )
        # Its units are readers.
        self._overdue = TurnQueue(
            _PER_TURN, self._break_next, loop, counters.count_background_error
        )

    def stop(self) -> None:
        """Disconnect nobody any more."""
        self._deadlines.stop()

    def open(self, topic: Topic, reader: Subscriber) -> None:
        """Stop buffering for ``reader``, or disconnect it when it has done so too often."""
        if not reader.is_joined:
            # It left with another one that was on its connection.
            return
        openings = self._budget.spend(reader.openings, self._loop.time())
        if openings is None:
            self._break(topic, reader)
            return
        reader.openings = openings
        self._readers.suspend(topic, reader)
        if self._first not in self._deadlines:
            self._deadlines.set(self._first, self._budget.ends_s(openings))
        self._counters.circuits_opened += 1
        log.debug("circuit opened topic=%s openings=%d", topic.name, len(openings))
        if not reader.is_blocked:
            # It is given more than it can read in its turns, and no transport will call for it.
            self._loop.call_soon(self._retry, topic, reader)

    def break_overdue(self) -> None:
        """Disconnect the readers whose circuit has been open for too long."""
        self._overdue.work_on()

    def _break_next(self) -> int | None:
        """Disconnect the reader whose circuit has been open longest, if that is too long."""
        first = next(iter(self._readers.suspended.items()), None)
        if first is None:
            return None
        reader, topic = first
        ends_s = self._budget.ends_s(reader.openings)
        if ends_s > self._loop.time():
            self._deadlines.set(self._first, ends_s)
            return None
        self._break(topic, reader)
        return 1

    def stall_allowed_s(self, reader: Subscriber) -> float:
        """Return how long the reader was promised that it may take nothing; 0 for no promise.

        While its circuit is open that is for `break_overdue` to end, and nobody else.
        """
        if reader in self._readers.suspended:
            return math.inf
        is_promised = reader.strategy is CIRCUIT_BREAKER and reader.is_blocked
        return self._budget.open_s if is_promised else 0.0

    def _retry(self, topic: Topic, reader: Subscriber) -> None:
        if not reader.is_blocked:
            self._readers.resume(topic, reader)

    def _break(self, topic: Topic, reader: Subscriber) -> None:
        self._readers.leave(topic, reader)
        reader.sink.close(CLOSE_SLOW_CONSUMER, "circuit_open")
        log.debug("circuit broken topic=%s openings=%d", topic.name, len(reader.openings))
