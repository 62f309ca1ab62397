"""The wheel that decides who is pinged and who is cut, the timer that turns it, and real peers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import cast

import pytest
from clients import (
    PING,
    PONG,
    RECORD,
    SMALL_BUFFERS,
    masked,
    publishing,
    raw_subscriber,
    subscriber_process,
)
from conftest import FakeClock
from daemons import running, until

from clevrd.config import Config
from clevrd.control.ping_wheel import SLOTS, PingWheel
from clevrd.scheduling.timers import Timers


class FakePeer:
    """A peer that answers pings until it vanishes."""

    def __init__(self) -> None:
        self.awaits_pong = False
        self.wheel_slot = 0
        self.has_vanished = False
        self.pings = 0

    def ping(self) -> None:
        """Take a ping, and answer it at once if there is anybody to do so."""
        self.pings += 1
        self.awaits_pong = self.has_vanished


def turn(wheel: PingWheel[FakePeer], ticks: int) -> list[FakePeer]:
    """Turn the wheel, ping who is due, and return who is to be cut."""
    cut: list[FakePeer] = []
    for _ in range(ticks):
        to_ping, silent = wheel.tick()
        cut += silent
        for peer in silent:
            wheel.remove(peer)
        for peer in to_ping:
            peer.ping()
    return cut


def default_wheel() -> PingWheel[FakePeer]:
    """Return a wheel as a daemon has that was not configured."""
    config = Config()
    return PingWheel(config.ping_interval_s, config.pong_timeout_s)


# --- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize("vanishes_after", range(SLOTS * 2))
def test_vanished_peer_is_cut_within_35_seconds(vanishes_after: int) -> None:
    """With the default settings, whenever it vanishes and whichever slot it is in."""
    wheel = default_wheel()
    peer = FakePeer()
    wheel.add(peer)
    turn(wheel, vanishes_after)

    peer.has_vanished = True
    ticks = next(tick for tick in range(1, 1000) if turn(wheel, 1))

    assert ticks * wheel.tick_s <= 35.0
    assert ticks * wheel.tick_s > Config().pong_timeout_s, "it had its time to answer"


def test_peer_that_answers_is_never_cut() -> None:
    """A thousand turns, seven hours: pinged once in each, and still there."""
    wheel = default_wheel()
    peers = [FakePeer() for _ in range(30)]
    for peer in peers:
        wheel.add(peer)

    cut = turn(wheel, SLOTS * 1000)

    assert cut == []
    assert [peer.pings for peer in peers] == [1000] * 30
    assert len(wheel) == 30


def test_pings_are_spread_over_the_interval() -> None:
    """Ten thousand peers that came at once are not pinged at once."""
    wheel = default_wheel()
    for _ in range(10_000):
        wheel.add(FakePeer())

    loads = [len(wheel.tick()[0]) for _ in range(SLOTS)]

    assert loads == [400] * SLOTS


def test_removed_peer_is_neither_pinged_nor_cut() -> None:
    """A peer leaves the wheel for good, even when it owes a pong; leaving twice is no error."""
    wheel = default_wheel()
    peer = FakePeer()
    wheel.add(peer)
    peer.has_vanished = True
    turn(wheel, SLOTS)

    wheel.remove(peer)
    wheel.remove(peer)

    assert turn(wheel, SLOTS * 2) == []
    assert (peer.pings, len(wheel)) == (1, 0)


@pytest.mark.parametrize(
    ("interval_s", "timeout_s", "ticks"),
    [(25.0, 10.0, 10), (25.0, 9.5, 10), (25.0, 0.1, 1), (0.1, 0.05, 13), (10.0, 60.0, SLOTS - 1)],
)
def test_patience_is_the_timeout_in_whole_ticks(
    interval_s: float, timeout_s: float, ticks: int
) -> None:
    """Never less than asked for, except that the next ping is not waited for."""
    wheel: PingWheel[FakePeer] = PingWheel(interval_s, timeout_s)
    peer = FakePeer()
    peer.has_vanished = True
    wheel.add(peer)
    while not peer.pings:
        turn(wheel, 1)

    waited = next(tick for tick in range(1, 1000) if turn(wheel, 1))

    assert waited == ticks


# --- the timer -----------------------------------------------------------------------------------


class FakeLoop:
    """Keeps the one call that was asked for last; its time is set by hand."""

    def __init__(self, clock: FakeClock) -> None:
        self.time = clock
        self.due_s = 0.0
        self._call: Callable[[], object] = lambda: None

    def call_at(self, when: float, callback: Callable[..., object], *args: object) -> None:
        """Keep what is to be called, and when."""
        self.due_s = when
        self._call = lambda: callback(*args)

    def fire(self, late_s: float = 0.0) -> None:
        """Let the time come, and pass by ``late_s``, and make the call."""
        self.time.now_s = self.due_s + late_s
        self._call()


def timers_on(loop: FakeLoop, on_error: Callable[[], None] = lambda: None) -> Timers:
    """Return timers of a loop that has what they need and no more."""
    return Timers(cast(asyncio.AbstractEventLoop, loop), on_error)


def test_timer_that_is_always_late_keeps_its_rate(clock: FakeClock) -> None:
    """A wheel of 35 ticks is 35 seconds, though each tick comes some milliseconds late."""
    loop = FakeLoop(clock)
    started_s = clock.now_s
    timers_on(loop).every(1.0, lambda: None)

    for _ in range(35):
        loop.fire(late_s=0.03)

    assert clock.now_s - started_s == pytest.approx(35.03)


def test_timer_that_was_stopped_does_not_catch_up(clock: FakeClock) -> None:
    """After a pause of the whole process nobody is cut for pings that could not be answered."""
    loop = FakeLoop(clock)
    timers_on(loop).every(1.0, lambda: None)

    loop.fire(late_s=60.0)

    assert loop.due_s == clock.now_s + 1.0


def test_timer_outlives_its_action(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """An action that fails is logged and counted, and comes again."""
    loop = FakeLoop(clock)
    errors: list[str] = []

    def fail() -> None:
        raise RuntimeError("no luck")

    timers_on(loop, on_error=lambda: errors.append("counted")).every(1.0, fail)
    loop.fire()
    loop.fire()

    assert errors == ["counted", "counted"]
    assert caplog.messages == ["timer failed action=fail"] * 2


# --- real peers ----------------------------------------------------------------------------------


async def test_peer_that_never_answers_is_cut() -> None:
    """An open socket with nobody behind it is no subscriber; it is counted and let go."""
    async with (
        running(ping_interval_s=0.2, pong_timeout_s=0.1) as daemon,
        await raw_subscriber(daemon.port) as silent,
    ):
        goodbye = await silent.goodbye()

        figures = await daemon.get_json("/metrics")
        explained = await daemon.get_json("/admin/explain?tenant=default-tenant")
    assert (goodbye.code, {frame.opcode for frame in goodbye.before}) == (None, {PING})
    assert figures["total_subscribers"] == 0
    assert figures["connections"]["pings_unanswered"] == 1
    (decision,) = (each for each in explained["decisions"] if each["kind"] == "disconnect")
    assert (decision["code"], decision["count"], decision["is_on"]) == (
        "pings_unanswered",
        1,
        False,
    )
    assert decision["scope"]["tenant_id"] == "default-tenant"
    assert decision["rule"].endswith("The first was of 127.0.0.1.")
    assert decision["inputs"].keys() == {"open_s", "unsent_bytes"}
    assert decision["thresholds"] == {"ping_interval_s": 0.2, "pong_timeout_s": 0.1}


async def test_peer_that_sends_pongs_unasked_is_kept() -> None:
    """RFC 6455 §5.5.3 allows them; whoever sends them is there."""
    async with running() as daemon, await raw_subscriber(daemon.port) as reader:
        connection = daemon.only_subscriber()
        connection.ping()

        reader.send(masked(PONG, b"a heartbeat of my own"))

        await until(lambda: not connection.awaits_pong)


async def test_peer_that_reads_on_is_kept_though_the_ping_is_far_behind() -> None:
    """A slow line is no dead one: what it takes shows that somebody is there."""
    async with (
        running(**SMALL_BUFFERS) as daemon,
        await raw_subscriber(daemon.port, receive_bytes=4096) as slow,
        publishing(daemon.port) as publisher,
    ):
        connection = daemon.only_subscriber()
        while not daemon.only_reader().is_blocked:
            await publisher.send("t", 10, RECORD)
        connection.ping()

        while daemon.only_reader().is_blocked:
            await slow.frame()

        assert not connection.awaits_pong


async def test_stopped_process_is_cut_and_others_stay() -> None:
    """Its kernel acknowledges everything and sends no FIN, as when a machine hangs."""
    async with (
        running(ping_interval_s=0.4, pong_timeout_s=0.38) as daemon,
        subscriber_process(daemon.ws_url) as vanishing,
        subscriber_process(daemon.ws_url),
    ):
        assert daemon.hub.subscribers == 2

        os.kill(vanishing.pid, signal.SIGSTOP)
        await until(lambda: daemon.hub.subscribers == 1)
        figures = await daemon.get_json("/metrics")
    assert figures["connections"]["pings_unanswered"] == 1
