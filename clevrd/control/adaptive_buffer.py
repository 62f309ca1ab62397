"""The window: how many messages a reader may lag, from the memory there is. Decides only.

The rule: window = available memory / subscribers / mean message size, within 100..1000 messages,
computed again every 5 s.

Memory, subscribers and sizes are those of all tenants together. Readers of a portion get a larger
window where what the portion is guaranteed, its own subscribers and its own messages allow that: so
no tenant makes the windows of another smaller than they would be if all tenants used their parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

# Limits of the window, in messages; clients rely on them, since they are documented.
WINDOW_MIN: Final = 100
WINDOW_MAX: Final = 1000

# How often the timer's owner asks for a new decision.
INTERVAL_S: Final = 5.0


class BufferSample(msgspec.Struct, frozen=True):
    """Figures that a window is computed from.

    `ring_bytes` is held by the rings of all topics now; `machine_available_bytes` is left by the
    cgroup and the machine. `mean_message_bytes` is the mean over the messages in the rings; 0 means
    that it is unknown, since there are none.
    """

    max_memory_bytes: int
    ring_bytes: int
    machine_available_bytes: int
    subscribers: int
    mean_message_bytes: float

    @property
    def available_bytes(self) -> int:
        """Bytes left of the daemon's own bound, and never more than the machine has left."""
        own_bytes = self.max_memory_bytes - self.ring_bytes
        return max(0, min(own_bytes, self.machine_available_bytes))


class PortionSample(msgspec.Struct, frozen=True):
    """Figures of one portion: the part of the memory, 0..1, that it is guaranteed, and its own."""

    ratio: float
    ring_bytes: int
    subscribers: int
    mean_message_bytes: float


class BufferDecision(msgspec.Struct, frozen=True):
    """A window and all figures that it was computed from, for /metrics."""

    window_messages: int
    available_bytes: int
    max_memory_bytes: int
    ring_bytes: int
    machine_available_bytes: int
    subscribers: int
    mean_message_bytes: float


def window_for(available_bytes: int, subscribers: int, mean_bytes: float) -> int:
    """Return the window in messages, within WINDOW_MIN and WINDOW_MAX.

    Without subscribers the window is WINDOW_MAX. An unknown mean (0, or not a number) counts as one
    byte: without messages no ring needs memory, so the window stays at WINDOW_MAX unless the memory
    itself is used up.
    """
    if subscribers <= 0:
        return WINDOW_MAX
    # The literal comes first, because max() then ignores a mean that is not a number.
    fair_share = available_bytes / subscribers / max(1.0, mean_bytes)
    return int(max(WINDOW_MIN, min(WINDOW_MAX, fair_share)))


def portion_window(common_window: int, all_of_it: BufferSample, own: PortionSample) -> int:
    """Return the window of a portion's readers, in messages; never less than the common one."""
    own_bytes = int(all_of_it.max_memory_bytes * own.ratio) - own.ring_bytes
    machine_bytes = int(all_of_it.machine_available_bytes * own.ratio)
    available_bytes = max(0, min(own_bytes, machine_bytes))
    return max(common_window, window_for(available_bytes, own.subscribers, own.mean_message_bytes))


class AdaptiveBufferManager:
    """Keeps the current windows and the decision that they came from.

    Before the first evaluation no figure is known and the window is WINDOW_MAX.
    """

    __slots__ = ("_by_portion", "decision")

    def __init__(self) -> None:
        # Name of a portion -> the window of its readers, in messages; replaced by evaluate().
        self._by_portion: dict[str, int] = {}
        # The latest decision; None before the first. evaluate() alone replaces it.
        self.decision: BufferDecision | None = None

    @property
    def window(self) -> int:
        """Messages a reader may lag now, whatever portion it belongs to."""
        return WINDOW_MAX if self.decision is None else self.decision.window_messages

    def window_of(self, portion: str) -> int:
        """Return how many messages a reader of the portion called so may lag now."""
        return self._by_portion.get(portion, WINDOW_MAX)

    def evaluate(
        self, sample: BufferSample, portions: Mapping[str, PortionSample] | None = None
    ) -> BufferDecision:
        """Decide the windows from `sample` and the `portions` there are, by name.

        They hold until the next evaluation.
        """
        available_bytes = sample.available_bytes
        self.decision = BufferDecision(
            window_messages=window_for(
                available_bytes, sample.subscribers, sample.mean_message_bytes
            ),
            available_bytes=available_bytes,
            max_memory_bytes=sample.max_memory_bytes,
            ring_bytes=sample.ring_bytes,
            machine_available_bytes=sample.machine_available_bytes,
            subscribers=sample.subscribers,
            mean_message_bytes=sample.mean_message_bytes,
        )
        common = self.decision.window_messages
        self._by_portion = {
            name: portion_window(common, sample, own) for name, own in (portions or {}).items()
        }
        return self.decision
