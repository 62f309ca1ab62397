"""Work in many small steps takes a bounded part of each turn, in order, and all of it is done."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import ManualLoop

from clevrd.scheduling.turn_queue import TurnQueue


class Work:
    """Steps of given costs, and what was done of them in each turn."""

    def __init__(self, units_per_turn: int) -> None:
        self.loop = ManualLoop()
        self.waiting: deque[int] = deque()
        self.done: list[int] = []
        self.errors = 0
        self.queue = TurnQueue(
            units_per_turn,
            self.step,
            cast(asyncio.AbstractEventLoop, cast(Any, self.loop)),
            self.count_error,
        )

    def count_error(self) -> None:
        self.errors += 1

    def step(self) -> int | None:
        if not self.waiting:
            return None
        cost = self.waiting.popleft()
        self.done.append(cost)
        if cost < 0:
            raise RuntimeError("a bug")
        return cost

    def turns(self) -> list[list[int]]:
        """Run until nothing waits; return what was done in each turn."""
        turns: list[list[int]] = []
        while True:
            before = len(self.done)
            self.loop.turn()
            if len(self.done) == before and not self.loop.is_busy:
                return turns
            turns.append(self.done[before:])


def test_little_work_is_done_at_once() -> None:
    """Within the units of a turn nothing waits for the loop."""
    work = Work(units_per_turn=10)
    work.waiting.extend([3, 3, 3])

    work.queue.work_on()

    assert work.done == [3, 3, 3]


def test_work_that_comes_in_the_same_turn_shares_its_units() -> None:
    """Many callers in one turn of the loop are not given a turn's units each."""
    work = Work(units_per_turn=10)
    for _ in range(5):
        work.waiting.append(6)
        work.queue.work_on()

    assert work.done == [6, 6]
    assert [len(turn) for turn in work.turns() if turn] == [2, 1]


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 40))
def test_a_turn_ends_with_the_step_that_reaches_its_units(costs: list[int], units: int) -> None:
    """All of it is done, in order, and never more than the units and one step in a turn."""
    work = Work(units)
    work.waiting.extend(costs)

    work.queue.work_on()
    turns = [list(work.done), *work.turns()]

    assert work.done == costs
    assert all(sum(turn[:-1]) < units for turn in turns)


def test_steps_that_fail_are_counted_and_end_a_turn_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A bug in each step neither stops the others nor holds the loop."""
    work = Work(units_per_turn=3)
    work.waiting.extend([-1] * 5)

    with caplog.at_level(logging.ERROR):
        work.queue.work_on()
        first = work.errors
        work.turns()

    assert (first, work.errors, len(caplog.records)) == (3, 5, 5)


def test_work_soon_begins_with_the_next_turn_and_once() -> None:
    """What comes in this turn goes together."""
    work = Work(units_per_turn=10)
    for cost in (1, 2):
        work.waiting.append(cost)
        work.queue.work_soon()
    before = list(work.done)

    turns = work.turns()

    assert (before, turns[0]) == ([], [1, 2])


def test_step_that_brings_work_does_not_work_within_itself() -> None:
    """New work is done behind the step that brought it."""
    loop = ManualLoop()
    depth = deepest = 0
    left = 20

    def step() -> int | None:
        nonlocal depth, deepest, left
        if not left:
            return None
        depth, left = depth + 1, left - 1
        deepest = max(deepest, depth)
        queue.work_on()
        depth -= 1
        return 0

    queue = TurnQueue(5, step, cast(Any, loop), lambda: None)
    queue.work_on()

    assert (left, deepest) == (0, 1)
