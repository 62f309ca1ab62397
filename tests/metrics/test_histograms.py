"""Histograms and the loop's lag: what is counted is where Prometheus looks for it."""

from __future__ import annotations

import pytest
from conftest import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from clevrd.metrics.histograms import Histogram, RoundHistograms
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


@given(st.lists(st.tuples(st.integers(1, 9_000), st.integers(0, 3 * 10**9)), max_size=20))
def test_rounds_are_counted_by_bounds_of_powers_of_two(rounds: list[tuple[int, int]]) -> None:
    """Each bucket has all rounds within its bound, the last one all there were."""
    histograms = RoundHistograms()

    for messages, took_ns in rounds:
        histograms.record(messages, 1_000, 2_000, 2_000 + took_ns)

    sizes, took, age = histograms.messages(), histograms.durations_s(), histograms.to_socket_s()
    assert sizes.bounds == tuple((1 << bits) - 1 for bits in range(1, 13))
    assert took.bounds == age.bounds == tuple((1 << bits) / 1e6 for bits in range(4, 21))
    assert sizes.counts == counts_of([size for size, _ in rounds], sizes.bounds)
    assert took.counts == counts_of([took_ns / 1e9 for _, took_ns in rounds], took.bounds)
    assert age.counts == counts_of([(took_ns + 1_000) / 1e9 for _, took_ns in rounds], age.bounds)
    assert sizes.sum == sum(size for size, _ in rounds)
    assert took.sum == pytest.approx(sum(took_ns for _, took_ns in rounds) / 1e9)
    assert age.sum == pytest.approx(took.sum + len(rounds) * 1e-6)


@pytest.mark.parametrize("rounds", [255, 256, 257, 1_000])
def test_rounds_are_counted_whatever_their_number(rounds: int) -> None:
    """Rounds that are noted and counted later are in every view, once; their bounds are theirs."""
    histograms = RoundHistograms()

    for number in range(1, rounds + 1):
        histograms.record(1, 0, 1_000, 16_000 * number)

    age = histograms.to_socket_s()
    assert age.counts[:4] == (1, 2, 4, 8)
    assert age.counts[-1] == histograms.messages().counts[0] == rounds
    assert age.sum == pytest.approx(16e-6 * rounds * (rounds + 1) / 2)
    assert histograms.to_socket_s() == age
    assert histograms.durations_s().counts[:4] == (1, 2, 4, 8)


def counts_of(values: list[float], bounds: tuple[float, ...]) -> tuple[int, ...]:
    """Return how many ``values`` are within each bound."""
    below = [sum(value <= bound for value in values) for bound in bounds]
    return (*below, len(values))


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
