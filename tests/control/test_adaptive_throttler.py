"""Publishers are slowed when the system is the bottleneck, for as long as it is, and told why."""

from __future__ import annotations

import math

import msgspec
import pytest
from conftest import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from clevrd.control.adaptive_throttler import (
    CPU_LIMIT,
    DELAY_S,
    DURATION_S,
    MEMORY_LIMIT,
    AdaptiveThrottler,
    ThrottleDecision,
    ThrottleSample,
    judge,
)


def make_sample(
    slow_percent: int = 0, cpu: float = 0.1, memory: float = 0.1, subscribers: int = 100
) -> ThrottleSample:
    """Return a sample in which `slow_percent` of the subscribers are slow."""
    return ThrottleSample(
        subscribers=subscribers,
        slow_subscribers=subscribers * slow_percent // 100,
        cpu=cpu,
        memory=memory,
    )


OVERLOAD = make_sample(slow_percent=60, cpu=0.85)
CALM = make_sample(slow_percent=10, cpu=0.3, memory=0.4)


def evaluate_once(sample: ThrottleSample) -> ThrottleDecision:
    """Return what a fresh throttler decides."""
    return AdaptiveThrottler().evaluate(sample, 1000.0)


def test_60_percent_slow_at_30_percent_cpu_does_not_throttle() -> None:
    """Slow readers on an idle machine are their own problem."""
    decision = evaluate_once(make_sample(slow_percent=60, cpu=0.30))

    assert not decision.is_throttling
    assert decision.delay_s == 0.0
    assert decision.reason == "CPU at 30 %, not more than 80 %; memory at 10 %, not more than 80 %"


def test_60_percent_slow_at_85_percent_cpu_throttles() -> None:
    """Slow readers on a busy machine mean that it can't carry what is published."""
    decision = evaluate_once(make_sample(slow_percent=60, cpu=0.85))

    assert decision.is_throttling
    assert decision.delay_s == DELAY_S
    assert decision.reason == "60 % of subscribers slow and CPU at 85 %"


def test_30_percent_slow_at_85_percent_cpu_does_not_throttle() -> None:
    """A busy machine that most readers keep up with is doing its work."""
    decision = evaluate_once(make_sample(slow_percent=30, cpu=0.85))

    assert not decision.is_throttling
    assert decision.delay_s == 0.0
    assert decision.reason == "30 % of subscribers slow, not more than 50 %"


def test_60_percent_slow_at_85_percent_memory_throttles() -> None:
    """Memory counts as CPU does."""
    decision = evaluate_once(make_sample(slow_percent=60, memory=0.85))

    assert decision.is_throttling
    assert decision.reason == "60 % of subscribers slow and memory at 85 %"


def test_both_overloads_are_named() -> None:
    """Whoever reads the reason learns that CPU and memory are both short."""
    decision = evaluate_once(make_sample(slow_percent=60, cpu=0.85, memory=0.925))

    assert decision.reason == "60 % of subscribers slow and CPU at 85 % and memory at 92.5 %"


def test_everything_that_is_missing_is_named() -> None:
    """A calm system says that neither part of the condition is met."""
    decision = evaluate_once(CALM)

    assert decision.reason == (
        "10 % of subscribers slow, not more than 50 %;"
        " CPU at 30 %, not more than 80 %; memory at 40 %, not more than 80 %"
    )


@pytest.mark.parametrize(
    ("sample", "is_met"),
    [
        (ThrottleSample(100, 50, 1.0, 1.0), False),
        (ThrottleSample(1000, 501, 1.0, 1.0), True),
        (ThrottleSample(1, 1, CPU_LIMIT, MEMORY_LIMIT), False),
        (ThrottleSample(1, 1, math.nextafter(CPU_LIMIT, 1.0), 0.0), True),
        (ThrottleSample(1, 1, 0.0, math.nextafter(MEMORY_LIMIT, 1.0)), True),
    ],
)
def test_exactly_at_a_limit_is_not_over_it(sample: ThrottleSample, is_met: bool) -> None:
    """50 % slow, 80 % CPU and 80 % memory are still allowed; anything more is not."""
    assert judge(sample).is_met is is_met


def test_without_subscribers_nobody_is_throttled() -> None:
    """Nobody reads, so nobody is slow, however busy the machine is."""
    decision = evaluate_once(ThrottleSample(0, 0, 1.0, 1.0))

    assert not decision.is_throttling
    assert (decision.slow_ratio, decision.reason) == (0.0, "no subscribers")


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_unknown_figure_never_throttles(unknown: float) -> None:
    """What could not be measured is no reason to slow anybody, and is shown as 0."""
    decision = evaluate_once(make_sample(slow_percent=60, cpu=unknown, memory=unknown))

    assert not decision.is_throttling
    assert (decision.cpu, decision.memory) == (0.0, 0.0)
    assert decision.reason.startswith("CPU at an unknown share, not more than 80 %")


def test_unknown_figure_does_not_hide_the_other() -> None:
    """Without a CPU figure memory still counts, and the other way round."""
    assert judge(make_sample(slow_percent=60, cpu=math.nan, memory=0.9)).is_met
    assert judge(make_sample(slow_percent=60, cpu=0.9, memory=math.nan)).is_met


@given(
    subscribers=st.integers(-1, 10_000),
    slow_subscribers=st.integers(-1, 20_000),
    cpu=st.floats(),
    memory=st.floats(),
    now_s=st.floats(),
)
def test_odd_figures_give_a_decision_that_can_be_shown(
    subscribers: int, slow_subscribers: int, cpu: float, memory: float, now_s: float
) -> None:
    """No measurement makes it raise, or answer with something that JSON has no number for."""
    throttler = AdaptiveThrottler()

    decision = throttler.evaluate(ThrottleSample(subscribers, slow_subscribers, cpu, memory), now_s)

    assert 0.0 <= decision.slow_ratio <= 1.0
    assert math.isfinite(decision.cpu)
    assert math.isfinite(decision.memory)
    assert decision.delay_s in (0.0, DELAY_S)
    assert decision.reason


def test_nothing_waits_before_the_first_evaluation(clock: FakeClock) -> None:
    """A daemon that has measured nothing slows nobody, and says that it has not."""
    throttler = AdaptiveThrottler()

    decision = throttler.current(clock())

    assert throttler.delay_s(clock()) == 0.0
    assert (decision.is_throttling, decision.reason) == (False, "not evaluated yet")
    assert throttler.throttled_s(clock()) == 0.0


def test_throttling_lasts_five_seconds_and_ends_by_itself(clock: FakeClock) -> None:
    """The end comes at its moment, between evaluations, and at that moment it is over."""
    throttler = AdaptiveThrottler()
    throttler.evaluate(OVERLOAD, clock())

    at_start = throttler.delay_s(clock())
    just_before_end = throttler.delay_s(clock.advance(4.999))
    at_end = throttler.delay_s(clock.advance(0.001))

    assert (at_start, just_before_end, at_end) == (0.010, 0.010, 0.0)


def test_calm_evaluation_does_not_cut_the_five_seconds_short(clock: FakeClock) -> None:
    """Once started it lasts its time, and says that the condition is no longer met."""
    throttler = AdaptiveThrottler()
    throttler.evaluate(OVERLOAD, clock())

    decision = throttler.evaluate(make_sample(slow_percent=30, cpu=0.9), clock.advance(1.0))

    assert decision.is_throttling
    assert (decision.since_s, decision.until_s) == (1000.0, 1005.0)
    assert decision.reason == (
        "30 % of subscribers slow, not more than 50 %; ends 5 s after all of it was last met"
    )


def test_lasting_overload_moves_the_end_five_seconds_on(clock: FakeClock) -> None:
    """Each evaluation that still finds the condition met counts five seconds from itself."""
    throttler = AdaptiveThrottler()
    throttler.evaluate(OVERLOAD, clock())

    extended = throttler.evaluate(OVERLOAD, clock.advance(3.0))

    assert (extended.since_s, extended.until_s) == (1000.0, 1008.0)
    assert throttler.delay_s(1007.999) == DELAY_S
    assert throttler.delay_s(1008.0) == 0.0
    assert throttler.started == 1


def test_evaluation_after_the_end_clears_the_decision(clock: FakeClock) -> None:
    """When the time has run out, a calm evaluation says no, with no since and no until."""
    throttler = AdaptiveThrottler()
    throttler.evaluate(OVERLOAD, clock())

    decision = throttler.evaluate(CALM, clock.advance(DURATION_S))

    assert not decision.is_throttling
    assert (decision.delay_s, decision.since_s, decision.until_s) == (0.0, None, None)


def test_new_overload_after_the_end_is_a_new_start(clock: FakeClock) -> None:
    """A second stretch has its own start, and both are counted."""
    throttler = AdaptiveThrottler()
    throttler.evaluate(OVERLOAD, clock())

    again = throttler.evaluate(OVERLOAD, clock.advance(60.0))

    assert (again.since_s, again.until_s) == (1060.0, 1065.0)
    assert throttler.started == 2


def test_throttled_time_adds_up_without_the_pauses(clock: FakeClock) -> None:
    """5 s, a pause, then 2 s of a stretch that still runs: 7 s."""
    throttler = AdaptiveThrottler()
    throttler.evaluate(OVERLOAD, clock())
    throttler.evaluate(OVERLOAD, clock.advance(60.0))

    throttled_s = throttler.throttled_s(clock.advance(2.0))

    assert throttled_s == pytest.approx(7.0)
    assert throttler.throttled_s(clock.advance(60.0)) == pytest.approx(10.0)


def test_current_decision_knows_that_its_time_has_run_out(clock: FakeClock) -> None:
    """What is shown between two evaluations agrees with what publishers get."""
    throttler = AdaptiveThrottler()
    started = throttler.evaluate(OVERLOAD, clock())

    during = throttler.current(clock.advance(4.9))
    after = throttler.current(clock.advance(0.1))

    assert during == started
    assert (after.is_throttling, after.delay_s, after.until_s) == (False, 0.0, None)
    assert (after.slow_ratio, after.cpu) == (0.6, 0.85)
    assert after.reason == "no evaluation of the last 5 s found the condition met"


def test_decision_keeps_everything_it_was_decided_from(clock: FakeClock) -> None:
    """Every input is in the decision, so that it can be shown and checked."""
    throttler = AdaptiveThrottler()

    decision = throttler.evaluate(OVERLOAD, clock())

    assert throttler.decision == decision
    shown = msgspec.structs.asdict(decision)
    assert shown.items() >= msgspec.structs.asdict(OVERLOAD).items()
    assert decision.slow_ratio == 0.6


def test_clock_going_backwards_does_not_shorten_or_repeat(clock: FakeClock) -> None:
    """Should a moment come twice, the end stays where it was and nothing starts anew."""
    throttler = AdaptiveThrottler()
    throttler.evaluate(OVERLOAD, clock())

    decision = throttler.evaluate(OVERLOAD, clock.advance(-2.0))

    assert decision.until_s == 1005.0
    assert throttler.started == 1
    assert throttler.throttled_s(clock()) == 0.0


# --- topic by topic ------------------------------------------------------------------------------


def of_topics(
    ratio: float, slow_topics: int = 0, cpu: float = 0.1, subscribers: int = 100
) -> ThrottleSample:
    """Return a sample in which `slow_topics` have too many slow readers, the worst `ratio`."""
    return ThrottleSample(subscribers, 0, cpu, 0.1, ratio, slow_topics, "acme:orders")


@pytest.mark.parametrize(
    ("sample", "is_met", "reason"),
    [
        (of_topics(0.6, 1, 0.85), True, "60 % of subscribers slow in acme:orders and CPU at 85 %"),
        (
            of_topics(1.0, 3, 0.85),
            True,
            "more than 50 % of subscribers slow in 3 topics, most in acme:orders and CPU at 85 %",
        ),
        (of_topics(0.6, 1), False, "CPU at 10 %, not more than 80 %; memory at 10 %,"),
        (of_topics(0.5, 0, 0.85), False, "50 % of a topic's subscribers slow at most, not more"),
        (of_topics(0.0, 0, 0.85, 0), False, "no subscribers"),
    ],
)
def test_each_topic_is_judged_by_its_own_readers(
    sample: ThrottleSample, is_met: bool, reason: str
) -> None:
    """Load and a topic with too many slow readers are met together, whatever the others are."""
    verdict = judge(sample, "topic")

    assert verdict.is_met is is_met
    assert verdict.reason.startswith(reason)


def test_crowd_that_is_well_hides_no_topic_that_is_slow() -> None:
    """The whole has few slow readers; one topic has nothing else."""
    sample = ThrottleSample(10_000, 10, 0.9, 0.1, 1.0, 1, "acme:orders")

    assert judge(sample, "topic").is_met
    assert not judge(sample, "global").is_met


def test_slow_crowd_of_others_is_no_reason_where_no_topic_is_slow() -> None:
    """Of 600 in 1,000 slow readers no topic has more than half: no publisher is slowed."""
    sample = ThrottleSample(1_000, 600, 0.9, 0.1, 0.5, 0)

    assert not judge(sample, "topic").is_met
    assert judge(sample, "global").is_met


@given(
    subscribers=st.integers(-1, 10_000),
    slow_topics=st.integers(-1, 10),
    ratio=st.floats(),
    cpu=st.floats(),
    now_s=st.floats(),
)
def test_odd_figures_of_topics_give_a_decision_that_can_be_shown(
    subscribers: int, slow_topics: int, ratio: float, cpu: float, now_s: float
) -> None:
    """No measurement makes it raise, or answer with something that JSON has no number for."""
    sample = ThrottleSample(subscribers, 0, cpu, 0.0, ratio, max(0, slow_topics), "a:b")

    decision = AdaptiveThrottler("topic").evaluate(sample, now_s)

    shown = {**msgspec.structs.asdict(decision), "since_s": None, "until_s": None}
    assert msgspec.json.decode(msgspec.json.encode(shown))["reason"] == decision.reason
    assert math.isfinite(decision.topic_slow_ratio)
