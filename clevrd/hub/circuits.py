"""Circuits: readers to which nothing is offered for a while, or which are let go for good.

How often and for how long a circuit may be open: core/circuit. When one opens, its topic knows.
"""

from __future__ import annotations

import asyncio
import logging
import math
from itertools import islice
from typing import Final

from clevrd.core.circuit import CircuitBudget
from clevrd.core.subscriber import CIRCUIT_BREAKER, Subscriber
from clevrd.core.topic import Topic
from clevrd.hub.readers import Readers
from clevrd.metrics import Counters

log = logging.getLogger(__name__)

# Circuits that have been open for too long are looked for this often, and so many closed between
# two turns of the loop: a close is a write.
CIRCUIT_SWEEP_S: Final = 1.0
_PER_SWEEP: Final = 256

# Close code 41xx: come back, with backoff.
CLOSE_SLOW_CONSUMER: Final = 4101


class Circuits:
    """The circuits of all readers. Those that are suspended are those whose circuit is open."""

    __slots__ = ("_budget", "_counters", "_loop", "_readers")

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
        self._counters.circuits_opened += 1
        log.debug("circuit opened topic=%s openings=%d", topic.name, len(openings))
        if not reader.is_blocked:
            # It is given more than it can read in its turns, and no transport will call for it.
            self._loop.call_soon(self._retry, topic, reader)

    def break_overdue(self) -> None:
        """Disconnect the readers whose circuit has been open for too long."""
        now_s = self._loop.time()
        suspended = self._readers.suspended
        for reader, topic in list(islice(suspended.items(), _PER_SWEEP)):
            if not self._budget.is_overdue(reader.openings, now_s):
                return
            self._break(topic, reader)
        if suspended:
            self._loop.call_soon(self.break_overdue)

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
