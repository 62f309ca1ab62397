"""The memory ladder: which share of the limit means what, and how much rings give up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_system_stats import GIB, MIB, FakeCgroups, FakeMachine

from clevrd.control.memory_ladder import MAX_SHRINK_BYTES, Rung, decide, describe, rung_for
from clevrd.control.system_stats import HeldMemory, MemoryLevel

RUNGS = list(Rung)


def held(percent: float, limit_bytes: int = 1 * GIB) -> HeldMemory:
    """Return a use of so many percent of the limit."""
    return HeldMemory(int(limit_bytes * percent / 100), limit_bytes, "the limit")


@pytest.mark.parametrize(
    ("share", "rung"),
    [
        (0.0, Rung.WELL),
        (0.849, Rung.WELL),
        (0.85, Rung.RINGS_SHRINK),
        (0.919, Rung.RINGS_SHRINK),
        (0.92, Rung.NO_NEW_SUBSCRIBERS),
        (0.949, Rung.NO_NEW_SUBSCRIBERS),
        (0.95, Rung.NO_PUBLISHES),
        (1.3, Rung.NO_PUBLISHES),
    ],
)
def test_rungs_begin_where_they_are_documented(share: float, rung: Rung) -> None:
    """Rings first, then new subscribers, then publishers."""
    assert rung_for(share, Rung.WELL) is rung


@pytest.mark.parametrize(
    ("share", "before", "rung"),
    [
        (0.93, Rung.NO_PUBLISHES, Rung.NO_PUBLISHES),
        (0.929, Rung.NO_PUBLISHES, Rung.NO_NEW_SUBSCRIBERS),
        (0.899, Rung.NO_NEW_SUBSCRIBERS, Rung.RINGS_SHRINK),
        (0.83, Rung.RINGS_SHRINK, Rung.RINGS_SHRINK),
        (0.829, Rung.RINGS_SHRINK, Rung.WELL),
        (0.829, Rung.NO_PUBLISHES, Rung.WELL),
    ],
)
def test_rung_is_left_two_points_below_its_begin(share: float, before: Rung, rung: Rung) -> None:
    """A share that swings by a point enters and leaves nothing each time."""
    assert rung_for(share, before) is rung


@given(share=st.floats(0, 2), more=st.floats(0, 1), before=st.sampled_from(RUNGS))
def test_more_memory_held_is_never_a_lower_rung(share: float, more: float, before: Rung) -> None:
    """The order of the ladder holds wherever it was before."""
    assert rung_for(share + more, before) >= rung_for(share, before)


def test_rings_give_up_what_lies_above_the_first_rung() -> None:
    """In steps, so that giving the memory back is no pause; nothing below the rung."""
    assert decide(held(84), Rung.WELL).shrink_bytes == 0
    assert decide(held(86, 100 * MIB), Rung.WELL).shrink_bytes == pytest.approx(3 * MIB, abs=2)
    assert decide(held(99), Rung.NO_PUBLISHES).shrink_bytes == MAX_SHRINK_BYTES


def test_use_is_described_for_people() -> None:
    """Both figures and the limit's name."""
    assert describe(held(50, 256 * MIB)) == "128 of 256 MiB (the limit)"


# --- what is measured ------------------------------------------------------------------------


def test_resident_set_counts_against_the_daemons_own_limit(tmp_path: Path) -> None:
    """Without cgroups nothing else does; what others use of the machine does not."""
    machine = FakeMachine()
    stats = FakeCgroups(tmp_path, "").stats(machine)
    machine.rss_now_bytes = 900 * MIB

    found = stats.held_memory()

    assert found == HeldMemory(900 * MIB, 1 * GIB, "CLEVRD_MAX_MEMORY_MB")


def test_daemon_that_is_empty_is_well_whatever_its_limit(tmp_path: Path) -> None:
    """One that may take less than its modules need would refuse everything for ever."""
    machine = FakeMachine()
    machine.rss_now_bytes = 90 * MIB
    stats = FakeCgroups(tmp_path, "").stats(machine, 64 * MIB)

    empty = stats.held_memory()
    machine.rss_now_bytes = 115 * MIB

    assert empty == HeldMemory(90 * MIB, 120 * MIB, "CLEVRD_MAX_MEMORY_MB")
    assert rung_for(empty.share, Rung.RINGS_SHRINK) is Rung.WELL
    assert rung_for(stats.held_memory().share, Rung.WELL) is Rung.NO_PUBLISHES


def test_cgroup_counts_without_its_page_cache(tmp_path: Path) -> None:
    """Kernel memory counts there, and what the kernel frees before it ends a process does not."""
    groups = FakeCgroups(tmp_path, "0::/pod")
    groups.write(
        "pod",
        memory__max=256 * MIB,
        memory__current=250 * MIB,
        memory__stat=f"inactive_file {20 * MIB}\nactive_file {10 * MIB}",
    )

    found = groups.stats(FakeMachine(), 256 * MIB).held_memory()

    assert found == HeldMemory(220 * MIB, 256 * MIB, "the cgroup's limit")


def test_limit_on_address_space_counts_by_what_it_leaves(tmp_path: Path) -> None:
    """Address space that is mapped and not used is no memory."""
    machine = FakeMachine()
    machine.limits = [MemoryLevel(400 * MIB, 390 * MIB)]

    found = FakeCgroups(tmp_path, "").stats(machine).held_memory()

    assert found == HeldMemory(100 * MIB, 110 * MIB, "the process's limit")
