"""How far a reader may lag, from the memory there is. No timer and no measuring here.

The rule: window = available memory / subscribers / mean message size, clamped to
100..1000 messages and looked at again every 5 s.
"""

from __future__ import annotations

from typing import Final

import msgspec

# Limits of the window, in messages, as the system has always documented them.
WINDOW_MIN: Final = 100
WINDOW_MAX: Final = 1000

# How often the timer's owner asks for a new decision.
INTERVAL_S: Final = 5.0


class BufferSample(msgspec.Struct, frozen=True):
    """What a window is decided from.

    `ring_bytes` is what the rings of all topics hold now, `machine_available_bytes` what the
    cgroup and the machine have left. `mean_message_bytes` is measured over what the rings hold; 0
    means that nothing was published yet, so that it is unknown.
    """

    max_memory_bytes: int
    ring_bytes: int
    machine_available_bytes: int
    subscribers: int
    mean_message_bytes: float

    @property
    def available_bytes(self) -> int:
        """What is left of our own budget, never more than what the machine has left."""
        own_bytes = self.max_memory_bytes - self.ring_bytes
        return max(0, min(own_bytes, self.machine_available_bytes))


class BufferDecision(msgspec.Struct, frozen=True):
    """A window and everything it was decided from, so that it can be shown."""

    window_messages: int
    available_bytes: int
    max_memory_bytes: int
    ring_bytes: int
    machine_available_bytes: int
    subscribers: int
    mean_message_bytes: float


def window_for(available_bytes: int, subscribers: int, mean_bytes: float) -> int:
    """Return how many messages each subscriber may lag, within WINDOW_MIN and WINDOW_MAX.

    Without subscribers there is nobody to share with: WINDOW_MAX. An unknown mean (0, or not a
    number) counts as one byte: with nothing published no ring holds anything to save, so the
    window stays at WINDOW_MAX unless memory itself is gone.
    """
    if subscribers <= 0:
        return WINDOW_MAX
    # The literal comes first: max() then leaves out a mean that is not a number.
    fair_share = available_bytes / subscribers / max(1.0, mean_bytes)
    return int(max(WINDOW_MIN, min(WINDOW_MAX, fair_share)))


class AdaptiveBufferManager:
    """Keeps the window that holds now and the decision it came from.

    Until the first evaluation nothing is measured and the window is WINDOW_MAX.
    """

    __slots__ = ("decision",)

    def __init__(self) -> None:
        # The latest decision; None before the first. evaluate() alone replaces it.
        self.decision: BufferDecision | None = None

    @property
    def window(self) -> int:
        """Messages a reader may lag now."""
        return WINDOW_MAX if self.decision is None else self.decision.window_messages

    def evaluate(self, sample: BufferSample) -> BufferDecision:
        """Decide the window from `sample`; it holds until the next evaluation."""
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
        return self.decision
