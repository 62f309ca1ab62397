"""Presence: which peers are there, judged by what they answer and by what they take.

One wheel and one sweep for all connections, no timer for each. What a connection is, and how it
ends, is not decided here. Sources: struct tcp_info in the kernel's include/uapi/linux/tcp.h;
tcp(7), SIOCOUTQ.

A peer that takes bytes is there, however slowly. A WebSocket's pong lies behind what was sent
before the ping, and on a stream nobody answers, so silence alone means nothing: the kernel knows
how far the peer got. TCP_USER_TIMEOUT would end such connections without us, and was tried: it
counts from the last time the peer's window was open, so a reader at 20 KB/s was cut after 27 s.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import struct
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import ClassVar, Final, Protocol

import msgspec

from clevrd.control.ping_wheel import PingWheel

log = logging.getLogger(__name__)

# Looks at each stalled peer in the time a peer has to answer a ping, and peers looked at in one
# turn of the loop, at 2.5 us each.
LOOKS_PER_TIMEOUT: Final = 2
STALLS_PER_TURN: Final = 1_000

_INT: Final = struct.Struct("i")

# Fields of struct tcp_info, which only ever grows at its end: repetitions of a segment that nobody
# acknowledges, segments under way, bytes that the peer's kernel has acknowledged (since 4.1), that
# were not sent yet (4.6), and that the peer's kernel last offered room for (5.4).
_RETRANSMITS: Final = struct.Struct("@2xB")
_UNACKED_SEGMENTS: Final = struct.Struct("@24xI")
_ACKED_BYTES: Final = struct.Struct("@120xQ")
_NOT_SENT_BYTES: Final = struct.Struct("@144xI")
_OFFERED_WINDOW: Final = struct.Struct("@228xI")
_TCP_INFO_BYTES: Final = 232
# Linux's own number where Python's socket module lacks it.
_TCP_INFO: Final = getattr(socket, "TCP_INFO", 11)
_HAS_TCP_INFO: Final = sys.platform == "linux"


class Progress(msgspec.Struct, frozen=True):
    """How far a peer had got at one moment."""

    # Rises when the peer's kernel takes bytes; only the difference of two means anything.
    taken_bytes: int
    # Written and not acknowledged, in this process or in its kernel; not 0 if anything is.
    is_behind: bool
    # What the peer's kernel last said it has room for; None where nobody knows.
    offered_bytes: int | None = None
    # The kernel counts acknowledgements, so that silence on a stream means something.
    is_exact: bool = False
    # What was sent is repeated, since nobody acknowledges it: not even the peer's kernel is there.
    is_repeating: bool = False


def progress_of(transport: asyncio.Transport) -> Progress:
    """Return how far the peer of ``transport`` has got; 2 us."""
    buffered_bytes = transport.get_write_buffer_size()
    # A transport that is closed has none.
    sock = transport.get_extra_info("socket")
    if _HAS_TCP_INFO and sock is not None and sock.family != socket.AF_UNIX:
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
        except (OSError, ValueError):
            # Closed in between: what is left is the process's own.
            info = b""
        if len(info) == _TCP_INFO_BYTES:
            unsent_bytes = buffered_bytes + _NOT_SENT_BYTES.unpack_from(info)[0]
            return Progress(
                taken_bytes=_ACKED_BYTES.unpack_from(info)[0],
                is_behind=bool(unsent_bytes or _UNACKED_SEGMENTS.unpack_from(info)[0]),
                offered_bytes=_OFFERED_WINDOW.unpack_from(info)[0],
                is_exact=True,
                is_repeating=_RETRANSMITS.unpack_from(info)[0] > 0,
            )
    unsent_bytes = unsent_bytes_of(transport)
    return Progress(taken_bytes=-unsent_bytes, is_behind=unsent_bytes > 0)


def unsent_bytes_of(transport: asyncio.Transport) -> int:
    """Return how much of what was written to ``transport`` is not acknowledged, as far as is known.

    What the kernel holds counts: it asks for more only when a third of its buffer is free, which a
    reader at some KB/s takes many seconds for. tcp(7), SIOCOUTQ.
    """
    unsent_bytes = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is None:
        # The transport is closed.
        return unsent_bytes
    try:
        (in_kernel,) = _INT.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    except (OSError, ValueError):
        return unsent_bytes
    return unsent_bytes + int(in_kernel)


def has_moved(before: Progress, after: Progress, *, answers_pings: bool) -> bool:
    """Return whether the peer has shown between two looks that it is there.

    Args:
        before: soon after it was pinged.
        after: when its time to answer is up.
        answers_pings: it is a WebSocket's, so that its kernel alone proves nothing.
    """
    if before.is_behind and after.taken_bytes > before.taken_bytes:
        return True
    if not answers_pings:
        return not after.is_exact or not after.is_behind
    if before.offered_bytes is None or after.offered_bytes is None:
        return False
    # Its kernel has had the ping for a while. If it offers more room than then, somebody reads
    # what lies before the ping; a process that was stopped never makes room.
    return after.offered_bytes > before.offered_bytes


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

    def stall_allowed_s(self) -> float:
        """Return how long the peer was promised that it may take nothing; 0 for no promise."""


class _Stall:
    """What is known of a peer that does not take what was written for it."""

    __slots__ = ("since", "taken_bytes")

    def __init__(self, since: int, taken_bytes: int | None) -> None:
        # Number of the look at which it was last seen to take anything, or of the first one.
        self.since = since
        # At the last look; None before the first.
        self.taken_bytes = taken_bytes


class Presence:
    """Every open connection: pinged once in an interval, and given up when nobody is there.

    A peer that is gone is found within ``interval_s + timeout_s``. One whose transport takes no
    more is not judged by its pong but by what it takes: within ``interval_s`` it has to take
    something, unless it was promised more time.
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
        self._interval_s = interval_s
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
        self._stalls[peer] = _Stall(self._stall_looks + 1, None)

    def moved(self, peer: Peer) -> None:
        """Note that the transport of ``peer`` takes more: somebody reads.

        The ping may lie far behind what was sent before it.
        """
        peer.awaits_pong = False
        self._stalls.pop(peer, None)

    def silent_s(self, peer: Peer) -> float:
        """Return for how long ``peer`` is known to have taken nothing."""
        stall = self._stalls.get(peer)
        return 0.0 if stall is None else max(0, self._stall_looks - stall.since) * self.look_s

    # --- pings -----------------------------------------------------------------------------------

    def ping_due(self) -> None:
        """Ping who is due, and give up who neither answered in time nor took anything."""
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
        # Reading a stalled peer's pong may have to wait for what it reads itself.
        if peer in self._stalls or peer.stall_allowed_s():
            return
        before = self._looks.get(peer)
        progress = progress_of(peer.transport)
        if before is None or has_moved(before, progress, answers_pings=peer.answers_pings):
            peer.awaits_pong = False
        elif peer.answers_pings or progress.is_repeating:
            self._end(peer)
        else:
            self._stalls[peer] = _Stall(self._stall_looks, progress.taken_bytes)

    # --- stalls ----------------------------------------------------------------------------------

    def look_at_stalls(self) -> None:
        """Give up who has taken nothing for too long."""
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
        if peer not in self._wheel:
            # It says goodbye, and its transport was filled by that.
            del self._stalls[peer]
            return
        progress = progress_of(peer.transport)
        before_bytes, stall.taken_bytes = stall.taken_bytes, progress.taken_bytes
        if before_bytes is None or progress.taken_bytes > before_bytes:
            stall.since = self._stall_looks
        if not progress.is_behind:
            self.moved(peer)
            return
        # Without exact figures a stream is left to the kernel's own patience. Over a Unix socket
        # its peer is on this machine and can't vanish without a word.
        if not peer.answers_pings and not progress.is_exact:
            return
        if self.silent_s(peer) >= max(self._interval_s, peer.stall_allowed_s()):
            self._end(peer)

    def _end(self, peer: Peer) -> None:
        log.debug("peer is not there; cutting its connection")
        self.remove(peer)
        self._give_up(peer)
