"""The window follows memory, subscribers and message size, within its limits."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.control.adaptive_buffer import (
    WINDOW_MAX,
    WINDOW_MIN,
    AdaptiveBufferManager,
    BufferDecision,
    BufferSample,
    PortionSample,
    portion_window,
    window_for,
)

MIB = 1024 * 1024


def make_sample(
    max_memory_bytes: int = 100 * MIB,
    ring_bytes: int = 0,
    machine_available_bytes: int = 1000 * MIB,
    subscribers: int = 1000,
    mean_message_bytes: float = 250.0,
) -> BufferSample:
    """Return a sample of a middling daemon: 419 messages for each of 1,000 subscribers."""
    return BufferSample(
        max_memory_bytes=max_memory_bytes,
        ring_bytes=ring_bytes,
        machine_available_bytes=machine_available_bytes,
        subscribers=subscribers,
        mean_message_bytes=mean_message_bytes,
    )


@pytest.mark.parametrize(
    ("available_bytes", "subscribers", "mean_bytes", "window"),
    [
        (5_000_000, 100, 100.0, 500),
        (5_000_000, 100, 99.9, 500),
        (1_000_000, 100, 100.0, 100),
        (999_999, 100, 100.0, 100),
        (10_000_000, 100, 100.0, 1000),
        (10_000_001, 100, 100.0, 1000),
        (0, 100, 100.0, 100),
        (1 << 60, 1, 100.0, 1000),
    ],
)
def test_window_is_the_fair_share_within_its_limits(
    available_bytes: int, subscribers: int, mean_bytes: float, window: int
) -> None:
    """Available memory over subscribers over message size, never under 100 or over 1000."""
    assert window_for(available_bytes, subscribers, mean_bytes) == window


def test_nobody_subscribed_leaves_the_largest_window() -> None:
    """With nobody to share memory with there is nothing to divide."""
    assert window_for(0, 0, 250.0) == WINDOW_MAX


@pytest.mark.parametrize("unknown", [0.0, math.nan])
def test_unknown_message_size_leaves_the_largest_window(unknown: float) -> None:
    """Nothing published means nothing held: the window narrows only if memory itself is gone."""
    assert window_for(100 * MIB, 10_000, unknown) == WINDOW_MAX
    assert window_for(0, 10_000, unknown) == WINDOW_MIN


@given(
    available_bytes=st.integers(-(1 << 50), 1 << 62),
    subscribers=st.integers(-1, 1_000_000),
    mean_bytes=st.floats(),
)
def test_window_stays_within_its_limits_whatever_the_figures(
    available_bytes: int, subscribers: int, mean_bytes: float
) -> None:
    """No measurement, however odd, gets a window outside of 100 to 1000, or an exception."""
    window = window_for(available_bytes, subscribers, mean_bytes)

    assert WINDOW_MIN <= window <= WINDOW_MAX


def test_manager_allows_the_largest_window_before_any_measurement() -> None:
    """The first readers are not held short for the five seconds before anything is known."""
    manager = AdaptiveBufferManager()

    assert manager.window == WINDOW_MAX
    assert manager.decision is None


def test_what_rings_hold_is_not_available() -> None:
    """Memory already full of messages is not shared out again."""
    manager = AdaptiveBufferManager()

    empty = manager.evaluate(make_sample())
    half_full = manager.evaluate(make_sample(ring_bytes=50 * MIB))

    assert (empty.available_bytes, empty.window_messages) == (100 * MIB, 419)
    assert (half_full.available_bytes, half_full.window_messages) == (50 * MIB, 209)


def test_machine_that_has_less_left_narrows_the_window() -> None:
    """A limit that the machine or its cgroup can't honour does not count."""
    manager = AdaptiveBufferManager()

    decision = manager.evaluate(make_sample(machine_available_bytes=30 * MIB))

    assert (decision.available_bytes, decision.window_messages) == (30 * MIB, 125)


def test_rings_over_the_limit_leave_nothing_rather_than_less() -> None:
    """Available memory ends at zero, and the window at its minimum."""
    manager = AdaptiveBufferManager()

    decision = manager.evaluate(make_sample(ring_bytes=101 * MIB))

    assert (decision.available_bytes, decision.window_messages) == (0, WINDOW_MIN)


def test_window_follows_every_evaluation_in_both_directions() -> None:
    """Narrow while a crowd is there, wide again when it has left."""
    manager = AdaptiveBufferManager()

    windows = []
    for subscribers in (100, 2000, 10_000, 100):
        manager.evaluate(make_sample(subscribers=subscribers))
        windows.append(manager.window)

    assert windows == [1000, 209, 100, 1000]


def test_decision_keeps_everything_it_was_decided_from() -> None:
    """Whoever asks why the window is what it is finds the figures beside it."""
    manager = AdaptiveBufferManager()
    sample = make_sample(ring_bytes=7 * MIB)

    decision = manager.evaluate(sample)

    assert manager.decision == decision
    assert decision == BufferDecision(
        window_messages=390, available_bytes=93 * MIB, **msgspec.structs.asdict(sample)
    )


def test_window_of_a_portion_does_not_depend_on_what_others_do() -> None:
    """A thousand readers of large messages shrink their own window, and not that of the others."""
    manager = AdaptiveBufferManager()
    crowd = make_sample(subscribers=1_010, mean_message_bytes=65_536.0)

    manager.evaluate(
        crowd,
        {
            "noisy": PortionSample(0.5, 10 * MIB, 1_000, 65_536.0),
            "quiet": PortionSample(0.5, MIB, 10, 250.0),
        },
    )

    assert manager.window == manager.window_of("noisy") == WINDOW_MIN
    assert manager.window_of("quiet") == WINDOW_MAX
    # The first reader of a portion is told what there is for one.
    assert manager.window_of("new") == WINDOW_MAX


def test_window_of_a_portion_is_the_common_one_at_least() -> None:
    """A tenant that is alone has all the memory, whatever it is guaranteed."""
    sample = make_sample()
    common = AdaptiveBufferManager().evaluate(sample).window_messages
    own = PortionSample(0.1, 0, sample.subscribers, sample.mean_message_bytes)

    assert portion_window(common, sample, own) == common > portion_window(0, sample, own)


def test_machine_without_memory_narrows_the_windows_of_all_portions() -> None:
    """A guarantee is a part of what there is."""
    sample = make_sample(machine_available_bytes=0)

    assert portion_window(WINDOW_MIN, sample, PortionSample(0.5, 0, 1, 250.0)) == WINDOW_MIN
