"""Who is there: peers that answer or take something stay, however slowly; the others are found.

The kernel's figures are set by hand, but for the last tests, which read a real socket's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest
from clients import RECORD, SMALL_BUFFERS, publishing, raw_subscriber
from daemons import Daemon, running, until
from streams import open_stream

from clevrd.connections import presence
from clevrd.connections.presence import Presence
from clevrd.progress import Progress, progress_of, reset, unsent_bytes_of

# The defaults, and what is promised of them: docs/guarantees.md.
INTERVAL_S, TIMEOUT_S = 25.0, 10.0
FOUND_S = INTERVAL_S + TIMEOUT_S
MTU_SEGMENT = 1448
# Linux gathers what arrives into pieces of this size, and makes room when one is read to its end.
PIECE_BYTES = 65_536


class FakePeer:
    """A peer with its kernel, and a daemon's connection to it. It takes what it is told to."""

    answers_pings: ClassVar[bool] = True

    def __init__(self) -> None:
        self.transport = cast(asyncio.Transport, self)
        self.awaits_pong = False
        self.wheel_slot = 0
        self.pings = 0
        # Its process reads its pings at once and answers them.
        self.answers = True
        self.promised_s = 0.0
        self.is_aborted = False
        self.is_sending = False
        self.room_bytes = 65_536
        self.progress = Progress(taken_bytes=0, is_behind=False, edge_bytes=65_536, is_exact=True)

    def ping(self) -> None:
        """Take a ping, and answer it at once if there is somebody to do so."""
        self.pings += 1
        self.awaits_pong = not self.answers

    def stall_allowed_s(self) -> float:
        """Return what its circuit allows."""
        return self.promised_s

    def abort(self) -> None:
        """Note that the daemon has cut the connection."""
        self.is_aborted = True

    def now(
        self,
        *,
        taken_bytes: int | None = None,
        room_bytes: int | None = None,
        is_behind: bool | None = None,
        is_repeating: bool = False,
    ) -> None:
        """Let the kernel's figures be other ones."""
        if room_bytes is not None:
            self.room_bytes = room_bytes
        taken = self.progress.taken_bytes if taken_bytes is None else taken_bytes
        self.progress = Progress(
            taken,
            is_behind=self.progress.is_behind if is_behind is None else is_behind,
            edge_bytes=taken + self.room_bytes,
            is_exact=True,
            is_repeating=is_repeating,
        )


class FakeStream(FakePeer):
    """A peer whose kernel acknowledges, and where nobody answers."""

    answers_pings: ClassVar[bool] = False

    def ping(self) -> None:
        """Take a keep-alive."""
        self.pings += 1
        self.awaits_pong = True


class World:
    """Presence with the time moved by hand, in steps of a second."""

    def __init__(self, interval_s: float = INTERVAL_S, timeout_s: float = TIMEOUT_S) -> None:
        self.gone: list[FakePeer] = []
        # Connections that failed when they were looked at.
        self.errors = 0
        self.calls: list[Callable[[], None]] = []
        self.presence = Presence(
            interval_s,
            timeout_s,
            lambda peer: self.gone.append(cast(FakePeer, peer)),
            self.count_error,
            cast(asyncio.AbstractEventLoop, self),
        )
        self.seconds = 0

    def count_error(self) -> None:
        """Count a connection that failed."""
        self.errors += 1

    def call_soon(self, callback: Callable[..., None], *args: object) -> None:
        """Keep a call for the next turn of the loop."""
        self.calls.append(lambda: callback(*args))

    def join(self, peer: FakePeer) -> FakePeer:
        """Have ``peer`` among those that are pinged."""
        self.presence.add(peer)
        return peer

    def run(self, seconds: int, each: Callable[[int], None] = lambda second: None) -> int:
        """Let time pass until somebody is gone; return how much did."""
        for passed in range(1, seconds + 1):
            self.seconds += 1
            each(self.seconds)
            self.presence.ping_due()
            if self.seconds % self.presence.look_s == 0:
                self.presence.look_at_stalls()
            while self.calls:
                self.calls.pop(0)()
            if self.gone:
                return passed
        return seconds


@pytest.fixture(autouse=True)
def fake_kernel(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Have the fakes' figures read, and real sockets' for real connections."""

    def fake_or_real(transport: asyncio.Transport) -> Progress:
        known = cast(Any, transport)
        return known.progress if isinstance(known, FakePeer) else progress_of(transport)

    monkeypatch.setattr(presence, "progress_of", fake_or_real)


@pytest.fixture
def world() -> World:
    """Return a world with the default settings."""
    return World()


class BrokenPeer(FakePeer):
    """A connection that fails when it is pinged, as one whose transport is gone might."""

    def ping(self) -> None:
        """Fail."""
        raise AttributeError("'NoneType' object has no attribute 'fileno'")


def test_connection_that_fails_keeps_no_other_from_its_ping(world: World) -> None:
    """It is cut and counted; all others are pinged as ever."""
    others = [world.join(FakePeer()) for _ in range(60)]
    broken = world.join(BrokenPeer())
    others += [world.join(FakePeer()) for _ in range(60)]

    world.run(2 * int(INTERVAL_S))

    assert {peer.pings for peer in others} == {2}
    assert broken.is_aborted
    assert world.errors == 1
    assert len(world.presence) == 120


class ClosedTransport(asyncio.Transport):
    """A transport after its close: uvloop has no socket for it then."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return None: there is no socket."""
        return default

    def get_write_buffer_size(self) -> int:
        """Return 0."""
        return 0

    def abort(self) -> None:
        """Do nothing: it is closed."""


def test_closed_transport_has_nothing_unsent() -> None:
    """Whoever asks about a connection that has just ended gets an answer, not an error."""
    assert unsent_bytes_of(ClosedTransport()) == 0
    assert not progress_of(ClosedTransport()).is_behind
    reset(ClosedTransport())


def reads_at(peer: FakePeer, bytes_per_s: int, piece_bytes: int) -> Callable[[int], None]:
    """Return what makes ``peer`` read so fast; its kernel makes room a piece at a time."""

    def each(second: int) -> None:
        peer.now(taken_bytes=second * bytes_per_s // piece_bytes * piece_bytes)

    return each


# --- slow peers stay -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FakePeer, FakeStream])
@pytest.mark.parametrize("piece_bytes", [MTU_SEGMENT, PIECE_BYTES])
@pytest.mark.parametrize("bytes_per_s", [5_000, 20_000])
def test_slow_reader_is_never_cut(
    world: World, kind: type[FakePeer], bytes_per_s: int, piece_bytes: int
) -> None:
    """An hour with a full transport, no pong, and silence of 13 s between two signs of life."""
    peer = world.join(kind())
    peer.answers = False
    peer.now(is_behind=True, room_bytes=0)
    world.presence.stalled(peer)

    world.run(3600, reads_at(peer, bytes_per_s, piece_bytes))

    assert world.gone == []
    assert peer.pings >= 3600 // INTERVAL_S


def test_reader_whose_ping_lies_in_its_own_kernel_stays(world: World) -> None:
    """All is acknowledged and the pong is late: its kernel offers more room, so somebody reads."""
    peer = world.join(FakePeer())
    peer.answers = False

    world.run(600, lambda second: peer.now(room_bytes=second * 1000))

    assert world.gone == []


def test_slow_line_that_was_never_full_is_no_dead_one(world: World) -> None:
    """What is under way moves, so it is not judged by the pong that is far behind it."""
    peer = world.join(FakePeer())
    peer.answers = False
    peer.now(is_behind=True)

    world.run(600, reads_at(peer, 2_000, MTU_SEGMENT))

    assert world.gone == []


def test_stream_that_its_kernel_offers_no_room_for_has_the_time_of_a_stall(world: World) -> None:
    """It is behind, and not full: what its kernel takes decides, and silence of 13 s is none."""
    stream = world.join(FakeStream())
    stream.now(is_behind=True, room_bytes=0)

    world.run(600, reads_at(stream, 5_000, PIECE_BYTES))

    assert world.gone == []


def test_peer_in_the_middle_of_a_message_is_not_cut_for_its_pong(world: World) -> None:
    """A large publish takes a slow uplink longer than a pong may; its own time ends it."""
    peer = world.join(FakePeer())
    peer.answers = False
    peer.is_sending = True
    world.run(600)
    kept = not world.gone

    peer.is_sending = False
    found_s = world.run(100)

    assert kept
    assert found_s <= FOUND_S


# --- who is gone is found ------------------------------------------------------------------------


@pytest.mark.parametrize("vanishes_after", range(0, 50, 7))
@pytest.mark.parametrize("kind", [FakePeer, FakeStream])
def test_idle_peer_that_vanishes_is_found_in_time(
    world: World, kind: type[FakePeer], vanishes_after: int
) -> None:
    """Nobody acknowledges what it is sent from here on."""
    peer = world.join(kind())
    world.run(vanishes_after)

    peer.answers = False
    peer.now(is_behind=True, is_repeating=True)
    found_s = world.run(100)

    assert world.gone == [peer]
    assert TIMEOUT_S < found_s <= FOUND_S


@pytest.mark.parametrize("fills_after", [0, 5, 12])
@pytest.mark.parametrize("kind", [FakePeer, FakeStream])
@pytest.mark.parametrize("vanishes_after", range(0, 50, 7))
def test_busy_peer_that_vanishes_is_found_in_time(
    world: World, kind: type[FakePeer], vanishes_after: int, fills_after: int
) -> None:
    """A process that is stopped: its kernel takes some more, then the transport is full."""
    peer = world.join(kind())
    world.run(vanishes_after, lambda second: peer.now(taken_bytes=second * 1000))
    peer.answers = False
    edge = peer.progress.edge_bytes
    for _ in range(fills_after):
        taken_bytes = peer.progress.taken_bytes + 1000
        peer.now(taken_bytes=taken_bytes, room_bytes=edge - taken_bytes)
        world.run(1)
    peer.now(taken_bytes=edge, is_behind=True, room_bytes=0)
    world.presence.stalled(peer)

    found_s = fills_after + world.run(100)

    assert world.gone == [peer]
    assert TIMEOUT_S < found_s <= FOUND_S


def test_very_slow_reader_that_goes_on_is_not_cut(world: World) -> None:
    """Once it has shown that it reads, silence of 21 s is none: at 3 KB/s."""
    peer = world.join(FakePeer())
    peer.answers = False
    peer.now(is_behind=True, room_bytes=0)
    world.presence.stalled(peer)
    world.run(20, reads_at(peer, 20_000, MTU_SEGMENT))
    began = peer.progress.taken_bytes

    world.run(
        600, lambda second: peer.now(taken_bytes=began + second * 3000 // PIECE_BYTES * PIECE_BYTES)
    )

    assert world.gone == []


def test_full_and_free_again_and_again_it_is_held_once(world: World) -> None:
    """A reader at its limit pauses and resumes many times a second."""
    peer = world.join(FakePeer())
    for _ in range(100):
        world.presence.stalled(peer)
        world.presence.moved(peer)
    held = len(world.presence._stalls)

    world.run(100)

    assert (held, world.presence._stalls, world.gone) == (1, {}, [])


@pytest.mark.parametrize("vanishes_after", range(100, 150, 7))
def test_slow_reader_that_vanishes_is_found_in_time(world: World, vanishes_after: int) -> None:
    """Its transport has been full all the time."""
    peer = world.join(FakePeer())
    peer.answers = False
    peer.now(is_behind=True, room_bytes=0)
    world.presence.stalled(peer)
    world.run(vanishes_after, reads_at(peer, 20_000, MTU_SEGMENT))

    found_s = world.run(100)

    assert world.gone == [peer]
    assert INTERVAL_S <= found_s <= FOUND_S


def test_stopped_process_is_found_though_its_kernel_takes_all(world: World) -> None:
    """A few messages a second fit its kernel for minutes: they prove nothing."""
    peer = world.join(FakePeer())
    peer.answers = False

    def each(second: int) -> None:
        peer.now(taken_bytes=second * 300, room_bytes=65_536 - second * 300)

    found_s = world.run(100, each)

    assert world.gone == [peer]
    assert found_s <= FOUND_S


@pytest.mark.parametrize("vanishes_after", range(0, 50, 7))
def test_stopped_process_is_found_though_its_window_still_grows(
    world: World, vanishes_after: int
) -> None:
    """A young connection's kernel offers more and more for some seconds, whoever reads."""
    peer = world.join(FakePeer())
    world.run(vanishes_after)
    peer.answers = False
    ends = vanishes_after + 12

    def each(second: int) -> None:
        edge = 65_536 + 10_000 * min(second, ends)
        # And a tenth of what comes, for ever: as Linux has it.
        taken_bytes = 11_000 * second
        peer.now(taken_bytes=taken_bytes, room_bytes=edge - taken_bytes * 9 // 10)

    found_s = world.run(100, each)

    assert world.gone == [peer]
    assert found_s <= FOUND_S


def test_late_pong_ends_the_doubt(world: World) -> None:
    """It was overdue, and its kernel's room grew meanwhile; then it comes."""
    peer = world.join(FakePeer())
    peer.answers = False
    world.run(40, lambda second: peer.now(room_bytes=65_536 + second * 1000))
    peer.answers = True
    peer.awaits_pong = False

    world.run(200)

    assert (world.gone, world.presence._stalls) == ([], {})


# --- promised time -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FakePeer, FakeStream])
def test_stalled_reader_has_the_time_it_was_promised(world: World, kind: type[FakePeer]) -> None:
    """A circuit that may be open for a minute keeps its reader that long, and no longer."""
    peer = world.join(kind())
    peer.answers = False
    peer.promised_s = 60.0
    peer.now(is_behind=True, room_bytes=0)
    world.presence.stalled(peer)

    found_s = world.run(200)

    assert world.gone == [peer]
    assert 60 <= found_s <= 60 + 2 * TIMEOUT_S


def test_open_circuit_is_not_for_pings_to_end(world: World) -> None:
    """It has its own end."""
    peer = world.join(FakePeer())
    peer.answers = False
    peer.promised_s = float("inf")
    peer.now(is_behind=True, room_bytes=0)
    world.presence.stalled(peer)

    world.run(600)

    assert world.gone == []


# --- bookkeeping ---------------------------------------------------------------------------------


def test_answering_peers_leave_nothing_behind(world: World) -> None:
    """Who answers is never looked at, and who leaves is forgotten."""
    peers = [world.join(FakePeer()) for _ in range(100)]
    late = world.join(FakePeer())
    late.answers = False
    world.presence.stalled(late)
    world.run(30)

    for peer in [*peers, late]:
        world.presence.remove(peer)
        world.presence.remove(peer)

    assert (world.presence._looks, world.presence._stalls) == ({}, {})
    assert len(world.presence) == 0


def test_thousands_of_stalled_peers_are_looked_at_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten thousand looks are 25 ms; each is found all the same."""
    monkeypatch.setattr(presence, "STALLS_PER_TURN", 10)
    world = World()
    peers = [world.join(FakePeer()) for _ in range(35)]
    for peer in peers:
        peer.answers = False
        peer.now(is_behind=True, room_bytes=0)
        world.presence.stalled(peer)

    world.presence.look_at_stalls()
    turns = 1
    while world.calls:
        world.calls.pop(0)()
        turns += 1
    world.run(100)

    assert turns == 4
    assert sorted(map(id, world.gone)) == sorted(map(id, peers))


def test_connection_that_says_goodbye_is_not_looked_at(world: World) -> None:
    """Its transport may fill with its last word; its end has a time of its own."""
    peer = world.join(FakePeer())
    peer.now(is_behind=True)
    world.presence.remove(peer)
    world.presence.stalled(peer)

    world.run(100)

    assert world.gone == []
    assert world.presence._stalls == {}


# --- the kernel's figures ------------------------------------------------------------------------


def transport_of(daemon: Daemon) -> asyncio.Transport:
    """Return the transport of the one connection there is."""
    (transport,) = daemon.server.connections.transports()
    return transport


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="figures of Linux's")
async def test_kernel_says_what_a_peer_has_taken() -> None:
    """Bytes count when the peer's kernel acknowledges them; what is full is behind."""
    async with (
        running(**SMALL_BUFFERS) as daemon,
        await raw_subscriber(daemon.port, receive_bytes=4096) as slow,
        publishing(daemon.port) as publisher,
    ):
        transport = transport_of(daemon)
        idle = progress_of(transport)
        reader = daemon.only_reader()
        while not reader.is_blocked:
            await publisher.send("t", 10, RECORD)
        full = progress_of(transport)
        while reader.is_blocked:
            await slow.frame()
        read = progress_of(transport)

    assert (idle.is_behind, full.is_behind) == (False, True)
    assert idle.taken_bytes < full.taken_bytes < read.taken_bytes
    assert idle.is_exact
    assert idle.edge_bytes > idle.taken_bytes


async def test_closed_connection_has_figures_too() -> None:
    """It may be closed between a sweep's look and its turn."""
    async with running() as daemon, await open_stream(daemon.port):
        transport = transport_of(daemon)

        transport.abort()
        await until(lambda: len(daemon.server.connections) == 0)

        assert not progress_of(transport).is_exact
