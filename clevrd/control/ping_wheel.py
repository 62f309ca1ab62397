"""PingWheel: which peers to ping now and which to cut, from one timer for all of them.

Decides only; the caller sends and cuts. One turn of the wheel is one ping interval; peers are
spread over its slots, so that ten thousand of them are pinged a few hundred at a time.
"""

from __future__ import annotations

import math
from typing import Final, Generic, Protocol, TypeVar

# Slots of a turn: with the default interval of 25 s the wheel moves once a second.
SLOTS: Final = 25


class Peer(Protocol):
    """Somebody who answers pings."""

    # Set by the caller when it pings, cleared when the pong comes.
    awaits_pong: bool
    # The wheel's own: which slot the peer is in.
    wheel_slot: int


PeerT = TypeVar("PeerT", bound=Peer)


class PingWheel(Generic[PeerT]):
    """A timing wheel over peers: pings each once per interval, names those that did not answer.

    It counts ticks, not time: a process that was stopped or starved for a minute has not been
    ticking, so nobody is cut for the daemon's own pause.
    """

    __slots__ = ("_next_slot", "_now", "_slots", "patience", "tick_s")

    def __init__(self, interval_s: float, timeout_s: float) -> None:
        # Seconds between two calls of `tick`.
        self.tick_s = interval_s / SLOTS
        # Ticks from a ping to the look at its answer; within one turn, or it would be overtaken.
        self.patience = min(SLOTS - 1, max(1, math.ceil(timeout_s / self.tick_s)))
        self._slots: list[dict[PeerT, None]] = [{} for _ in range(SLOTS)]
        self._now = 0
        self._next_slot = 0

    def __len__(self) -> int:
        """Return how many peers are on the wheel."""
        return sum(map(len, self._slots))

    def __contains__(self, peer: PeerT) -> bool:
        """Return whether ``peer`` is on the wheel."""
        return peer in self._slots[peer.wheel_slot]

    def add(self, peer: PeerT) -> None:
        """Put ``peer`` on the wheel; its first ping comes within one interval."""
        self._next_slot = (self._next_slot + 1) % SLOTS
        peer.wheel_slot = self._next_slot
        self._slots[self._next_slot][peer] = None

    def remove(self, peer: PeerT) -> None:
        """Take ``peer`` off the wheel; nothing happens if it is not on it."""
        self._slots[peer.wheel_slot].pop(peer, None)

    def tick(self) -> tuple[list[PeerT], list[PeerT]]:
        """Move on by one slot; return (to ping now, to cut because they did not answer)."""
        self._now = (self._now + 1) % SLOTS
        return list(self._slots[self._now]), self.awaiting(self.patience)

    def awaiting(self, ticks: int) -> list[PeerT]:
        """Return the peers that were pinged so many ticks ago and have not answered."""
        asked = self._slots[(self._now - ticks) % SLOTS]
        return [peer for peer in asked if peer.awaits_pong]
