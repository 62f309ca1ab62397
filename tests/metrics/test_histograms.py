"""Histograms and the loop's lag: what is counted is where Prometheus looks for it."""

from __future__ import annotations

import pytest
from conftest import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from clevrd.metrics.histograms import Histogram
from clevrd.metrics.loop_lag import LOOK_S, LoopLag

BOUNDS = (0.001, 0.01, 0.1)


def test_a_bound_belongs_to_its_bucket() -> None:
    """`le` means less or equal."""
    histogram = Histogram(BOUNDS)

    for value in (0.0, 0.001, 0.0011, 0.1, 0.2):
        histogram.record(value)

    assert histogram.view().counts == (2, 3, 4, 5)
    assert histogram.view().sum == pytest.approx(0.3021)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), max_size=20), st.integers(0, 9))
def test_each_bucket_counts_all_that_is_no_larger(
    values: list[tuple[float, int]], zeros: int
) -> None:
    """Values recorded once or many times, and zeros that are only known by their number."""
    histogram = Histogram(BOUNDS)

    for value, count in values:
        histogram.record_many(value, count)

    view = histogram.view(zeros)
    everything = [value for value, count in values for _ in range(count)]
    below = [sum(value <= bound for value in everything) for bound in (*BOUNDS, 2.0)]
    assert view.counts == tuple(count + zeros for count in below)
    assert abs(view.sum - sum(everything)) < 1e-9
    assert histogram.count == len(everything)


def test_a_view_stands_still() -> None:
    """What is recorded later is not in it."""
    histogram = Histogram(BOUNDS)
    histogram.record(0.05)

    view = histogram.view()
    histogram.record(0.05)

    assert view.counts == (0, 0, 1, 1)


def test_lag_is_how_late_a_look_comes() -> None:
    """The first is late by nothing; being early is being on time."""
    clock = FakeClock()
    lags: list[float] = []
    lag = LoopLag(lags.append, clock)

    for seconds in (LOOK_S, LOOK_S + 0.125, LOOK_S - 0.125, LOOK_S - 0.0625, LOOK_S):
        lag.look()
        clock.advance(seconds)

    assert lags == [0.0, 0.0, 0.125, 0.0, 0.0]


def test_a_long_pause_is_late_once() -> None:
    """Looks that it has swallowed are not made up for, as the timer does not."""
    clock = FakeClock()
    lags: list[float] = []
    lag = LoopLag(lags.append, clock)

    lag.look()
    clock.advance(10 * LOOK_S)
    lag.look()
    clock.advance(LOOK_S)
    lag.look()

    assert lags == [0.0, 9 * LOOK_S, 0.0]
