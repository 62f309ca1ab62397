"""What is kept beyond the ring: held once for all, paid for once, let go with the last holder."""

from __future__ import annotations

from itertools import permutations

import pytest
from fakes import frame_of
from hypothesis import given
from hypothesis import strategies as st

from clevrd.core.budgets import Budget
from clevrd.core.kept_frames import BLOCK_MESSAGES, KeptFrames
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES, RecentMessageCache

HELD = 64 + FRAME_OVERHEAD_BYTES
MESSAGES = 5 * BLOCK_MESSAGES
Run = tuple[int, int]


def full_ring() -> RecentMessageCache:
    """Return a ring with the messages 1 to MESSAGES."""
    ring = RecentMessageCache(MESSAGES, 1 << 30)
    ring.extend([frame_of(offset, 64) for offset in range(1, MESSAGES + 1)])
    return ring


def frames_of(after: int, upto: int) -> list[bytes]:
    """Return the frames of a run."""
    return [frame_of(offset, 64) for offset in range(after + 1, upto + 1)]


def test_frames_of_many_holders_are_paid_for_once() -> None:
    """A thousand readers that keep the same messages cost what one does."""
    budget = Budget(1 << 20)
    kept = KeptFrames(budget)

    kept.hold(full_ring(), 10, 300, holders=999)
    kept.hold(full_ring(), 10, 300)

    assert kept.size_bytes == (1 << 20) - budget.left_bytes == 290 * HELD


def test_budget_is_whole_again_when_the_last_holder_lets_go() -> None:
    """Not before, since what the others hold is still there; and then nothing is left."""
    budget = Budget(1 << 20)
    kept = KeptFrames(budget)
    kept.hold(full_ring(), 10, 300, holders=3)

    kept.release(10, 300, holders=2)
    while_held = kept.take(10, 300, 1 << 20)
    kept.release(10, 300)

    assert while_held == frames_of(10, 300)
    assert (kept.size_bytes, budget.left_bytes) == (0, 1 << 20)


def test_budget_ends_a_run_where_it_is_spent() -> None:
    """To the message; and what nothing could be paid for is not held at all."""
    kept = KeptFrames(Budget(200 * HELD + 1))
    ring = full_ring()

    reached = [kept.hold(ring, 50, 400), kept.hold(ring, 400, 500), kept.hold(ring, 60, 260)]

    assert reached == [250, 400, 250]
    assert kept.take(50, 250, 1 << 20) == frames_of(50, 250)
    kept.release(50, 250)
    kept.release(60, 250)
    assert (kept.size_bytes, kept.budget.left_bytes) == (0, 200 * HELD + 1)


def test_take_stops_where_bytes_are_spent() -> None:
    """Across blocks too; at least one frame is given however large it is."""
    kept = KeptFrames(Budget(1 << 20))
    kept.hold(full_ring(), 120, 140)

    assert kept.take(120, 140, 64 * 10) == frames_of(120, 130)
    assert kept.take(120, 140, 64 * 10 - 1) == frames_of(120, 129)
    assert kept.take(120, 140, 0) == frames_of(120, 121)


def test_rest_of_a_run_that_was_read_is_there() -> None:
    """Wherever a holder stops reading, on the edge of a block too."""
    ring = full_ring()

    for to in range(101, 300):
        kept = KeptFrames(Budget(1 << 20))
        kept.hold(ring, 100, 300)
        kept.advance(100, to)
        assert kept.take(to, 300, 1 << 20) == frames_of(to, 300)
        kept.release(to, 300)
        assert kept.size_bytes == 0


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("order", list(permutations([(16, 48), (48, 80), (80, 112)])))
def test_run_that_was_kept_in_parts_is_read_whole(order: tuple[Run, ...], parts: int) -> None:
    """Whichever part of it others kept first, with a hole between or not, and let go meanwhile."""
    ring = full_ring()
    budget = Budget(1 << 20)
    kept = KeptFrames(budget)

    for run in order[:parts]:
        assert kept.hold(ring, *run) == run[1]
        assert kept.take(*run, 1 << 20) == frames_of(*run)
    reached = kept.hold(ring, 16, 112)
    for run in order[:parts]:
        kept.release(*run)

    assert reached == 112
    assert kept.take(16, 112, 1 << 20) == frames_of(16, 112)
    assert kept.size_bytes == (1 << 20) - budget.left_bytes == 96 * HELD
    kept.release(16, 112)
    assert (kept.size_bytes, budget.left_bytes) == (0, 1 << 20)


RUNS = st.tuples(st.integers(0, MESSAGES - 1), st.integers(1, 300)).map(
    lambda run: (run[0], min(MESSAGES, run[0] + run[1]))
)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), RUNS),
        st.tuples(
            st.sampled_from(["advance", "cut", "release"]),
            st.tuples(st.integers(0, 99), st.integers(1, 299)),
        ),
    ),
    max_size=40,
)


@given(changes=CHANGES, budget_bytes=st.sampled_from([1 << 30, 1 << 30, 300 * HELD]))
def test_what_is_held_can_be_read(changes: list[tuple[str, Run]], budget_bytes: int) -> None:
    """Whatever others hold and let go, each run is there until its holder lets go of it."""
    ring = full_ring()
    kept = KeptFrames(Budget(budget_bytes))
    runs: list[Run] = []

    for change, (first, second) in changes:
        if change == "hold":
            reached = kept.hold(ring, first, second)
            if reached > first:
                runs.append((first, reached))
        elif runs:
            after, upto = runs.pop(first % len(runs))
            middle = after + second % (upto - after)
            if change == "release" or middle == after:
                kept.release(after, upto)
            elif change == "advance":
                kept.advance(after, middle)
                runs.append((middle, upto))
            else:
                kept.cut(middle, upto)
                runs.append((after, middle))

        assert [kept.take(*run, 1 << 30) for run in runs] == [frames_of(*run) for run in runs]
        assert kept.budget.left_bytes == budget_bytes - kept.size_bytes >= 0
        held = {offset for after, upto in runs for offset in range(after + 1, upto + 1)}
        near = {offset // BLOCK_MESSAGES for offset in held}
        assert len(held) * HELD <= kept.size_bytes <= len(near) * BLOCK_MESSAGES * HELD
