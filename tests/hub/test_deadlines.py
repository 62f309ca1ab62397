"""Things end when their time is up: not a sweep later, not before, and few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest
from conftest import FakeClock

from clevrd.scheduling.deadlines import ENDS_PER_TURN, GRAIN_S, Deadlines

# A grain, and what timers may be early by.
LATE_S = GRAIN_S + 0.002


class Thing:
    """Something with a deadline."""

    def __init__(self) -> None:
        self.deadline_s = 0.0


class FakeHandle:
    """A call that can be taken back."""

    def __init__(self, due_s: float, call: Callable[[], object]) -> None:
        self.due_s = due_s
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        """Take it back."""
        self.is_cancelled = True


class FakeLoop:
    """Makes calls when the test lets the time come."""

    def __init__(self, clock: FakeClock) -> None:
        self.time = clock
        self.handles: list[FakeHandle] = []
        self.calls = 0

    def call_at(self, when: float, callback: Callable[[], object]) -> FakeHandle:
        """Keep what is to be called."""
        self.handles.append(FakeHandle(when, callback))
        return self.handles[-1]

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> FakeHandle:
        """Keep what is to be called."""
        return self.call_at(self.time() + delay_s, callback)

    @property
    def waiting(self) -> list[FakeHandle]:
        """Return the calls that are to be made."""
        return [handle for handle in self.handles if not handle.is_cancelled]

    def step(self) -> None:
        """Make the next call, at its time."""
        handle = min(self.waiting, key=lambda each: each.due_s)
        self.handles = [each for each in self.waiting if each is not handle]
        self.time.now_s = max(self.time.now_s, handle.due_s)
        self.calls += 1
        handle.call()

    def run(self, until_s: float) -> None:
        """Let the time come."""
        while self.waiting and min(each.due_s for each in self.waiting) <= until_s:
            self.step()
        self.time.now_s = until_s


class World:
    """Deadlines on a fake loop, and when each thing ended."""

    def __init__(self, clock: FakeClock) -> None:
        self.loop = FakeLoop(clock)
        self.ended: dict[Thing, float] = {}
        self.errors = 0
        self.on_due: Callable[[Thing], None] = self.end
        self.deadlines: Deadlines[Thing] = Deadlines(
            cast(asyncio.AbstractEventLoop, self.loop),
            lambda thing: self.on_due(thing),
            self.count_error,
        )

    def end(self, thing: Thing) -> None:
        """Note when ``thing`` ends."""
        assert thing not in self.ended, "twice"
        self.ended[thing] = self.loop.time()

    def count_error(self) -> None:
        """Count a failure."""
        self.errors += 1


@pytest.fixture
def world(clock: FakeClock) -> World:
    """Return deadlines on a clock that stands at 1000."""
    return World(clock)


@pytest.mark.parametrize("begins_s", [1000.0, 1000.013, 1000.5, 1000.999])
@pytest.mark.parametrize("wait_s", [0.1, 1.0, 10.0, 75.0])
def test_thing_ends_at_its_deadline(world: World, begins_s: float, wait_s: float) -> None:
    """Whenever it begins: a sweep of once a second ended it up to a second later."""
    world.loop.time.now_s = begins_s
    thing = Thing()
    world.deadlines.set(thing, begins_s + wait_s)

    world.loop.run(1100.0)

    assert 0.0 <= world.ended[thing] - (begins_s + wait_s) <= LATE_S
    assert len(world.deadlines) == 0
    assert world.loop.waiting == []


def test_moved_later_it_ends_later_and_costs_nothing(world: World) -> None:
    """A connection in use moves its deadline with each request, and no timer moves."""
    thing = Thing()
    world.deadlines.set(thing, 1010.0)
    timers = len(world.loop.handles)

    for now in range(1000, 1009):
        world.loop.run(float(now))
        thing.deadline_s = now + 10.0
    moved = len(world.loop.handles) - timers
    world.loop.run(1100.0)

    assert moved == 0
    assert 1018.0 <= world.ended[thing] <= 1018.0 + LATE_S


def test_moved_sooner_it_ends_sooner(world: World) -> None:
    """An idle connection that begins a request has the request's time."""
    thing = Thing()
    world.deadlines.set(thing, 1075.0)

    world.deadlines.set(thing, 1010.0)
    world.loop.run(1100.0)

    assert 1010.0 <= world.ended[thing] <= 1010.0 + LATE_S


def test_moved_to_and_fro_it_is_held_once(world: World) -> None:
    """A client that begins and finishes requests for ever leaves nothing behind."""
    thing = Thing()
    for _ in range(1000):
        world.deadlines.set(thing, 1010.0)
        world.deadlines.set(thing, 1075.0)

    held = sum(map(len, world.deadlines._buckets.values()))
    world.loop.run(1074.0)

    assert (held, len(world.deadlines)) == (1, 1)
    assert len(world.loop.waiting) == 1
    assert world.ended == {}


def test_removed_thing_is_let_be(world: World) -> None:
    """It is gone already; twice is no error."""
    thing = Thing()
    world.deadlines.set(thing, 1010.0)

    world.deadlines.remove(thing)
    world.deadlines.remove(thing)
    world.loop.run(1100.0)

    assert world.ended == {}
    assert world.loop.waiting == []


def test_one_that_ends_may_end_others_and_begin_anew(world: World) -> None:
    """What is told that its time is up closes connections, and some of them go on."""
    things = [Thing() for _ in range(3)]

    def end(thing: Thing) -> None:
        world.deadlines.remove(things[1])
        world.end(thing)
        if thing is things[0]:
            del world.ended[thing]
            world.on_due = world.end
            world.deadlines.set(thing, world.loop.time() + 1.0)

    world.on_due = end
    for thing in things:
        world.deadlines.set(thing, 1010.0)
    world.loop.run(1100.0)

    assert world.ended.keys() == {things[0], things[2]}
    assert 1011.0 <= world.ended[things[0]] <= 1011.0 + 2 * LATE_S


def test_ten_thousand_that_are_due_at_once_take_turns(world: World) -> None:
    """Ending one is a write: others are served between them."""
    things = [Thing() for _ in range(10_000)]
    for thing in things:
        world.deadlines.set(thing, 1010.0)

    world.loop.step()
    first = len(world.ended)
    world.loop.run(1010.0 + LATE_S)

    assert first == ENDS_PER_TURN
    assert len(world.ended) == 10_000


def test_ten_thousand_idle_ones_are_one_timer(world: World) -> None:
    """They cost a call for each grain in which one of them was to end, and no timer each."""
    for number in range(10_000):
        world.deadlines.set(Thing(), 1075.0 + number / 10_000)

    world.loop.run(1074.9)
    calls, waiting = world.loop.calls, len(world.loop.waiting)

    assert (calls, waiting) == (0, 1)


def test_failure_is_counted_and_ends_nobody_else(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that can't be ended keeps no other one open."""
    things = [Thing(), Thing()]

    def fail(thing: Thing) -> None:
        world.end(thing)
        raise RuntimeError("no luck")

    world.on_due = fail
    for thing in things:
        world.deadlines.set(thing, 1010.0)
    world.loop.run(1020.0)

    assert (len(world.ended), world.errors) == (2, 2)
    assert caplog.messages == ["ending what is overdue failed"] * 2


def test_process_that_was_stopped_reads_before_it_ends(world: World) -> None:
    """What arrived while the whole process stood still has a turn to be read first."""
    thing = Thing()
    world.deadlines.set(thing, 1010.0)
    world.loop.time.now_s = 1070.0

    world.loop.step()
    ended_at_once = bool(world.ended)
    thing.deadline_s = 1080.0
    world.loop.run(1100.0)

    assert not ended_at_once
    assert 1080.0 <= world.ended[thing] <= 1080.0 + LATE_S


def test_stopped_it_ends_nothing(world: World) -> None:
    """The daemon has ended by then."""
    world.deadlines.set(Thing(), 1010.0)

    world.deadlines.stop()
    world.deadlines.set(Thing(), 1005.0)
    world.loop.run(1100.0)

    assert world.ended == {}
