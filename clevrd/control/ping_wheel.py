"""PingWheel: says which peers to ping now and which to cut, with one timer for all of them.

Decides only; the caller pings and cuts. The wheel turns once in each ping interval. Peers are
spread over its slots, so that ten thousand of them are pinged a few hundred at a time.
"""

from __future__ import annotations

import math
from typing import Final, Generic, Protocol, TypeVar

# Slots of the wheel: with the default interval of 25 s it moves on once a second.
SLOTS: Final = 25


class Peer(Protocol):
    """A connection whose client answers pings."""

    # True from a ping until its pong; set and cleared by the caller.
    awaits_pong: bool
    # Number of the slot that the peer is in; changed by the wheel alone.
    wheel_slot: int


PeerT = TypeVar("PeerT", bound=Peer)


class PingWheel(Generic[PeerT]):
    """A timing wheel over peers: names each peer once an interval, and those without a pong.

    The wheel counts ticks, not time: a process that was stopped or starved for a minute had no
    ticks, so no peer is cut for the daemon's own pause.
    """

    __slots__ = ("_next_slot", "_now", "_slots", "patience", "tick_s")

    def __init__(self, interval_s: float, timeout_s: float) -> None:
        # Seconds between two calls of `tick`.
        self.tick_s = interval_s / SLOTS
        # Ticks from a ping until its pong is due; less than one turn of the wheel, since the next
        # ping would come before that.
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
        """Move on by one slot; return (peers to ping now, peers to cut for want of a pong)."""
        self._now = (self._now + 1) % SLOTS
        return list(self._slots[self._now]), self.awaiting(self.patience)

    def awaiting(self, ticks: int) -> list[PeerT]:
        """Return the peers that were pinged ``ticks`` ago and have not answered."""
        asked = self._slots[(self._now - ticks) % SLOTS]
        return [peer for peer in asked if peer.awaits_pong]
