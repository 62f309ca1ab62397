"""Presence: which peers are there, judged by what they answer and by what they take.

One wheel and one sweep for all connections, no timer for each. The nature of a
connection, and how it ends, are not decided here.

A peer that takes bytes is there, however slowly. A WebSocket's pong lies behind what was sent
before the ping, and on a stream nobody answers, so silence alone means nothing: the kernel knows
how far the peer got. TCP_USER_TIMEOUT would end such connections without us, and was tried: it
counts from the last time the peer's window was open, so a reader at 20 KB/s was cut after 27 s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import ClassVar, Final, Protocol

from clevrd.control.ping_wheel import PingWheel
from clevrd.progress import Progress, progress_of

log = logging.getLogger(__name__)

# Looks at each stalled peer in the time a peer has to answer a ping, and peers looked at in one
# turn of the loop: at 2.5 us each, and up to 16 on a busy machine (bench: neighbour), so that 1,000
# at once were a pause of 16 ms.
LOOKS_PER_TIMEOUT: Final = 2
STALLS_PER_TURN: Final = 100

# More room than before may be an error of rounding, since a window is told in multiples of up
# to 1 KiB (RFC 7323, Window Scale), or Linux's guess of what messages cost it: while 11 KB/s came
# to a process that was stopped, the edge moved on by a tenth of that. A peer that reads
# moves it by more.
ROUNDING_BYTES: Final = 4_096
GUESS_RATIO: Final = 0.2


def has_moved(before: Progress, after: Progress, *, answers_pings: bool) -> bool:
    """Return whether the peer has shown between two looks that it is there.

    Args:
        before: soon after it was pinged.
        after: when its time to answer is up.
        answers_pings: it is a WebSocket's. Its kernel takes what it has room for, whether anybody
            reads or not: that proves nothing. Offering more room than before does.
    """
    taken_bytes = after.taken_bytes - before.taken_bytes
    if not answers_pings:
        has_taken = before.is_behind and taken_bytes > 0
        return has_taken or not after.is_exact or not after.is_behind
    if not after.is_exact:
        return taken_bytes > 0
    least_bytes = ROUNDING_BYTES + max(0, taken_bytes) * GUESS_RATIO
    return after.edge_bytes - before.edge_bytes >= least_bytes


class Peer(Protocol):
    """A connection's peer, as far as it matters here: a WebSocket's, or a stream's."""

    transport: asyncio.Transport
    # Whether somebody answers a ping; on a stream only the peer's kernel acknowledges one.
    answers_pings: ClassVar[bool]
    # It was pinged, and has not shown since that it is there.
    awaits_pong: bool
    wheel_slot: int

    def ping(self) -> None:
        """Show that the connection is alive, and ask whether the peer is."""

    @property
    def is_sending(self) -> bool:
        """Whether it is in the middle of a message, which its pong can't overtake.

        A message has a time of its own.
        """

    def stall_allowed_s(self) -> float:
        """Return how long the peer was promised that it may take nothing; 0 for no promise."""


class _Stall:
    """A peer that does not take what was written for it, as far as it is known."""

    __slots__ = ("has_taken", "is_full", "is_over", "progress", "since")

    def __init__(self, since: int, progress: Progress | None, *, is_full: bool) -> None:
        # Whether its transport takes no more. If it takes more, its pong is overdue, or its stream
        # is behind in a kernel without room.
        self.is_full = is_full
        # Number of the look at which it was last seen to take anything, or of the first one.
        self.since = since
        # How far it had got then; None before the first look.
        self.progress = progress
        # It was full before, and took something then: it is slow, and was not just stopped.
        self.has_taken = False
        # Its transport takes more. It is forgotten at the next look, unless it is full again.
        self.is_over = False


class Presence:
    """Every open connection: pinged once in an interval, and given up when nobody is there.

    A peer that is gone is found within ``interval_s + timeout_s``. One whose transport takes no
    more is not judged by its pong but by what it takes: within ``interval_s`` it has to take
    something, unless it was promised more time. One that never took anything since it was full has
    less: its process may have been stopped some seconds before, when its kernel had room.
    """

    def __init__(
        self,
        interval_s: float,
        timeout_s: float,
        give_up: Callable[[Peer], None],
        on_error: Callable[[], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._give_up = give_up
        self._on_error = on_error
        self._loop = loop
        # How long a peer may take nothing: one that is slow, one that has just become full, and one
        # whose kernel does not acknowledge anything either.
        self.stall_s = interval_s
        self._first_stall_s = max(interval_s - timeout_s, timeout_s)
        self._repeating_s = timeout_s
        self._wheel: PingWheel[Peer] = PingWheel(interval_s, timeout_s)
        # Peers that did not answer by the next tick, and how far they had got then. A look is kept
        # until the next ping of a peer that has answered, or until the peer is removed.
        self._looks: dict[Peer, Progress] = {}
        # Peers whose transport is full, and peers of streams whose kernel offers no room.
        self._stalls: dict[Peer, _Stall] = {}
        # Looks at all stalled peers so far. They count as time: a process that was stopped for a
        # minute has not looked, so nobody is cut for it.
        self._stall_looks = 0
        self.tick_s = self._wheel.tick_s
        self.look_s = timeout_s / LOOKS_PER_TIMEOUT

    def __len__(self) -> int:
        """Return how many peers there are."""
        return len(self._wheel)

    def add(self, peer: Peer) -> None:
        """Ping ``peer`` from now on."""
        self._wheel.add(peer)

    def remove(self, peer: Peer) -> None:
        """Ask nothing more of ``peer``. Idempotent."""
        self._wheel.remove(peer)
        self._looks.pop(peer, None)
        self._stalls.pop(peer, None)

    def stalled(self, peer: Peer) -> None:
        """Note that the transport of ``peer`` takes no more."""
        stall = self._stalls.get(peer)
        if stall is None:
            self._stalls[peer] = _Stall(self._stall_looks + 1, None, is_full=True)
            return
        if stall.is_full:
            # It was full before and took something since.
            stall.has_taken = True
        stall.is_full, stall.is_over = True, False
        stall.since, stall.progress = self._stall_looks + 1, None

    def moved(self, peer: Peer) -> None:
        """Note that the transport of ``peer`` takes more: somebody reads.

        The ping may lie far behind what was sent before it.
        """
        peer.awaits_pong = False
        stall = self._stalls.get(peer)
        if stall is not None:
            stall.is_over = True

    def silent_s(self, peer: Peer) -> float:
        """Return for how long ``peer`` is known to have taken nothing."""
        stall = self._stalls.get(peer)
        if stall is None or stall.is_over:
            return 0.0
        return max(0, self._stall_looks - stall.since) * self.look_s

    # --- pings -----------------------------------------------------------------------------------

    def ping_due(self) -> None:
        """Ping the peers that are due, and give up those that are not there."""
        wheel = self._wheel
        to_ping, silent = wheel.tick()
        self._for_each(silent, self._judge)
        if wheel.patience > 1:
            self._for_each(wheel.awaiting(1), self._look_at)
        if wheel.patience > 2:
            self._for_each(wheel.awaiting(wheel.patience - 1), self._ask_again)
        self._for_each(to_ping, self._ping)

    def _for_each(self, peers: Iterable[Peer], act: Callable[[Peer], None]) -> None:
        """Do ``act`` with each; a fault of one connection must not keep the others from theirs."""
        for peer in peers:
            try:
                act(peer)
            except Exception:
                self._on_error()
                log.exception("a connection failed when it was looked at; cutting it")
                self.remove(peer)
                peer.transport.abort()

    def _ping(self, peer: Peer) -> None:
        self._looks.pop(peer, None)
        peer.ping()
        if self._wheel.patience == 1:
            self._look_at(peer)

    def _look_at(self, peer: Peer) -> None:
        """Note how far a peer has got that did not answer at once; most do, and cost nothing."""
        progress = progress_of(peer.transport)
        if peer.answers_pings or progress.is_behind:
            self._looks[peer] = progress
        else:
            # The kernel of a stream's peer has acknowledged what was sent.
            peer.awaits_pong = False

    def _ask_again(self, peer: Peer) -> None:
        """Have the peer's kernel say once more how much room it offers, just before it matters."""
        look = self._looks.get(peer)
        if look is not None and peer.answers_pings and not look.is_behind:
            peer.ping()

    def _judge(self, peer: Peer) -> None:
        """Give up a peer whose time to answer is over, unless it is there all the same."""
        if peer.is_sending or peer.stall_allowed_s():
            return
        before = self._looks.get(peer)
        stall = self._stalls.get(peer)
        if stall is not None and not stall.is_over:
            # The peer is judged by what it takes, unless its kernel had the ping before it was
            # full.
            had_ping = before is not None and not before.is_behind
            if not (had_ping and stall.is_full and peer.answers_pings) or stall.has_taken:
                return
        progress = progress_of(peer.transport)
        is_there = before is None or has_moved(before, progress, answers_pings=peer.answers_pings)
        if is_there and not peer.answers_pings:
            peer.awaits_pong = False
        elif is_there or not (peer.answers_pings or progress.is_repeating):
            # A window also grows for a while in a kernel whose process was stopped.
            self._stalls[peer] = _Stall(self._stall_looks, progress, is_full=False)
        else:
            self._end(peer)

    # --- stalls ----------------------------------------------------------------------------------

    def look_at_stalls(self) -> None:
        """Give up the peers that have taken nothing for too long."""
        self._stall_looks += 1
        self._look_at_some(iter(list(self._stalls)))

    def _look_at_some(self, peers: Iterator[Peer]) -> None:
        some = list(islice(peers, STALLS_PER_TURN))
        self._for_each(some, self._look_at_stall)
        if len(some) == STALLS_PER_TURN:
            self._loop.call_soon(self._look_at_some, peers)

    def _look_at_stall(self, peer: Peer) -> None:
        stall = self._stalls.get(peer)
        if stall is None:
            return
        if stall.is_over or peer not in self._wheel:
            # A peer that was said goodbye to is the business of `farewells`.
            del self._stalls[peer]
            return
        is_overdue = peer.answers_pings and not stall.is_full
        if is_overdue and not peer.awaits_pong:
            # The peer has answered.
            del self._stalls[peer]
            return
        progress = progress_of(peer.transport)
        before = stall.progress
        if before is None:
            stall.progress, stall.since = progress, self._stall_looks
        elif has_moved(before, progress, answers_pings=peer.answers_pings):
            stall.progress, stall.since = progress, self._stall_looks
            stall.has_taken = stall.is_full
        if not progress.is_behind:
            if not is_overdue:
                self.moved(peer)
                return
            # The ping makes the peer's kernel say again how much room it offers.
            peer.ping()
        # Without exact figures a stream is left to the kernel's own patience. Over a Unix socket
        # its peer is on this machine and can't vanish without a word.
        if not peer.answers_pings and not progress.is_exact:
            return
        if self.silent_s(peer) >= max(self._allowed_s(stall, progress), peer.stall_allowed_s()):
            self._end(peer)

    def _allowed_s(self, stall: _Stall, progress: Progress) -> float:
        if progress.is_repeating:
            return self._repeating_s
        return self.stall_s if stall.has_taken else self._first_stall_s

    def _end(self, peer: Peer) -> None:
        log.debug("peer is not there; cutting its connection")
        self.remove(peer)
        self._give_up(peer)
