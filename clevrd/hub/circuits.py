"""Circuits: suspends readers that lost too much in one stall, and disconnects them in the end.

`core/circuit` decides how often and for how long a circuit may be open; the topic finds out when a
reader's circuit opens.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final

from clevrd.core.circuit import CircuitBudget
from clevrd.core.drop_strategy import CIRCUIT_BREAKER
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub.explanations import note_circuit
from clevrd.hub.readers import Readers
from clevrd.metrics.counters import Counters
from clevrd.metrics.decisions import Decisions
from clevrd.scheduling.deadlines import Deadlines
from clevrd.scheduling.turn_queue import TurnQueue

log = logging.getLogger(__name__)

# Readers disconnected in one turn of the loop because their circuit was open too long; each costs a
# write, that of the close frame.
_PER_TURN: Final = 256

# A close code from 4100 to 4199 tells a client to come back after a pause (docs/wire.md).
CLOSE_SLOW_CONSUMER: Final = 4101


class _OldestOpen:
    """The circuit that has been open longest, as an entry of `Deadlines`."""

    def __init__(self) -> None:
        # When that circuit will have been open too long, on the loop's clock; set by
        # `Deadlines.set` alone.
        self.deadline_s = 0.0


class Circuits:
    """The circuits of all readers. A reader is suspended as long as its circuit is open."""

    __slots__ = (
        *("_budget", "_counters", "_deadlines", "_decisions", "_loop"),
        *("_oldest", "_overdue", "_readers", "_threshold"),
    )

    def __init__(
        self,
        budget: CircuitBudget,
        threshold: int,
        readers: Readers,
        counters: Counters,
        decisions: Decisions,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Args: threshold: losses in one stall that open a circuit, as topics count them."""
        self._budget = budget
        self._threshold = threshold
        self._decisions = decisions
        self._readers = readers
        self._counters = counters
        self._loop = loop
        # One deadline serves all open circuits: readers are suspended in the order in which their
        # time ends, so the first of them is always the next.
        self._oldest = _OldestOpen()
        self._deadlines: Deadlines[_OldestOpen] = Deadlines(
            loop, lambda _: self.break_overdue(), counters.count_background_error
        )
        # Disconnects overdue readers; a unit is one reader.
        self._overdue = TurnQueue(
            _PER_TURN, self._break_next, loop, counters.count_background_error
        )

    def stop(self) -> None:
        """Stop the timer; no reader is disconnected after this."""
        self._deadlines.stop()

    def open(self, topic: Topic, reader: Subscriber) -> None:
        """Suspend ``reader``, or disconnect it if its circuit has opened too often."""
        if not reader.is_joined:
            # The reader has left already: another reader on the same connection was disconnected.
            return
        openings = self._budget.spend(reader.openings, self._loop.time())
        if openings is None:
            self._break(topic, reader)
            return
        reader.openings = openings
        self._note(topic, reader, is_over=False)
        self._readers.suspend(topic, reader)
        if self._oldest not in self._deadlines:
            self._deadlines.set(self._oldest, self._budget.ends_s(openings))
        self._counters.circuits_opened += 1
        log.debug("circuit opened topic=%s openings=%d", topic.name, len(openings))
        if not reader.is_blocked:
            # This reader lags because messages come faster than its turns carry them, not because
            # its transport is full, so no transport will call `resume` for it.
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
            self._deadlines.set(self._oldest, ends_s)
            return None
        self._break(topic, reader)
        return 1

    def stall_allowed_s(self, reader: Subscriber) -> float:
        """Return the seconds for which the reader was promised that it may read nothing, or 0.

        While the circuit is open the answer is infinity: only `break_overdue` disconnects then.
        """
        if reader in self._readers.suspended:
            return math.inf
        is_promised = reader.strategy is CIRCUIT_BREAKER and reader.is_blocked
        return self._budget.open_s if is_promised else 0.0

    def _retry(self, topic: Topic, reader: Subscriber) -> None:
        if not reader.is_blocked:
            self._readers.resume(topic, reader)

    def _note(self, topic: Topic, reader: Subscriber, *, is_over: bool) -> None:
        budget, threshold = self._budget, self._threshold
        note_circuit(self._decisions, topic, reader, budget, threshold, is_over=is_over)

    def _break(self, topic: Topic, reader: Subscriber) -> None:
        self._note(topic, reader, is_over=True)
        self._readers.leave(topic, reader)
        reader.sink.close(CLOSE_SLOW_CONSUMER, "circuit_open")
        log.debug("circuit broken topic=%s openings=%d", topic.name, len(reader.openings))
