"""CircuitAlarms: when the circuit of a lagging reader opens. Suspending the reader: hub/circuits.

An *alarm* is a lower bound of the edge at which one reader's circuit may open. A round looks only
at the alarms that it reaches, so readers that are far from opening cost it nothing.
"""

from __future__ import annotations

import heapq
from typing import Final

from clevrd.core.policies.policy import Reader, TopicView
from clevrd.core.subscriber import Subscriber

# Up to this many stale alarms wait until they are reached; more are swept out once they
# outnumber the others.
_STALE_ALARMS: Final = 16

# Alarms looked at in one round, at about 5 us for each circuit that opens; others wait for the
# next round.
_ALARMS_PER_ROUND: Final = 256


class CircuitAlarms:
    """The alarms of one topic's lagging readers whose policy has a circuit."""

    __slots__ = ("_heap", "_last", "_readers", "_threshold", "has_overdue")

    def __init__(self, threshold: int) -> None:
        # Drops in one stall that open a circuit.
        self._threshold = threshold
        # Heap of (edge at which a circuit may open, number of the alarm).
        self._heap: list[tuple[int, int]] = []
        # Number of the alarm -> its reader; an entry of the heap that is not in here is stale.
        self._readers: dict[int, Subscriber] = {}
        # Number of the alarm that was set last.
        self._last = 0
        # The last round reached more alarms than it could look at; set by tripped only.
        self.has_overdue = False

    def __len__(self) -> int:
        """Return how many entries the heap has, stale ones included."""
        return len(self._heap)

    def set_alarm(self, reader: Subscriber, window_cap: int) -> None:
        """Reckon when the circuit of a settled ``reader`` without an alarm opens."""
        self._last += 1
        reader.alarm = self._last
        self._readers[reader.alarm] = reader
        heapq.heappush(self._heap, (self._opens_at(reader, window_cap), reader.alarm))

    def forget_alarm(self, reader: Subscriber) -> None:
        """Drop the reader's alarm; its heap entry waits until it is reached or swept out."""
        if reader.alarm:
            del self._readers[reader.alarm]
            reader.alarm = 0
            if len(self._heap) > 2 * len(self._readers) + _STALE_ALARMS:
                self._heap = [entry for entry in self._heap if entry[1] in self._readers]
                heapq.heapify(self._heap)

    def hasten_alarm(self, alarmed: Reader, window_cap: int) -> None:
        """Reckon an alarm anew: its reader dropped although its window was not full."""
        reader = self._readers.get(alarmed.alarm)
        if reader is not None:
            self.forget_alarm(reader)
            self.set_alarm(reader, window_cap)

    def reckon_anew(self, window_cap: int) -> None:
        """Reckon all alarms anew: the window has shrunk."""
        readers = list(self._readers.values())
        self._readers.clear()
        self._heap.clear()
        for reader in readers:
            self.set_alarm(reader, window_cap)

    def tripped(self, view: TopicView) -> list[Subscriber]:
        """Return readers whose circuit opens at this edge; what it does not look at stays due."""
        tripped: list[Subscriber] = []
        for _ in range(_ALARMS_PER_ROUND):
            if not self._is_due(view.edge):
                break
            reader = self._readers.pop(heapq.heappop(self._heap)[1], None)
            if reader is None:
                continue
            reader.alarm = 0
            # A reader whose circuit opens is not settled: no frame is to be kept that is never
            # given.
            if reader.drops_in_stall(view) >= self._opens_after(reader):
                tripped.append(reader)
            else:
                reader.policy.settle(reader, view, view.moved_s)
                self.set_alarm(reader, view.window_cap)
        self.has_overdue = self._is_due(view.edge)
        return tripped

    def _is_due(self, edge: int) -> bool:
        return bool(self._heap) and self._heap[0][0] <= edge

    def _opens_after(self, reader: Subscriber) -> int:
        """Return how many drops in one stall open the reader's circuit; one when half-open."""
        return 1 if reader.is_half_open else self._threshold

    def _opens_at(self, reader: Subscriber, window_cap: int) -> int:
        """Return the edge at which the circuit of a settled reader opens if it reads nothing."""
        drops = self._opens_after(reader) - reader.dropped_in_stall
        if drops <= 0:
            return reader.cursor
        return reader.cursor + reader.room(window_cap) + drops
