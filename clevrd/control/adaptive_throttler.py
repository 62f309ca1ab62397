"""The throttle: whether publishes are delayed, and why. Decides only.

The rule: when more than half of the subscribers are slow and CPU or memory is more than 80 % used,
each publish waits 10 ms, for 5 s; evaluated every second. Slow readers alone are no reason, since
their policies handle them, and load alone is none either: only both together mean that the machine
can't carry what is published.

With the scope "global" the subscribers are those of all topics together, and so are the publishes.
With the scope "topic" each topic is judged by its own subscribers, and only publishes to it wait,
so that slow readers of one topic neither slow the publishers of another nor are hidden by its
readers. The load is the machine's in either case.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple

import msgspec

# The condition needs more than each limit; a share equal to the limit does not meet it.
SLOW_RATIO: Final = 0.5
CPU_LIMIT: Final = 0.8
MEMORY_LIMIT: Final = 0.8

# Throttling ends this long after the last evaluation that found the condition met.
DURATION_S: Final = 5.0
# Delay of each publish while throttling.
DELAY_S: Final = 0.010
# How often the timer's owner asks for a new decision.
INTERVAL_S: Final = 1.0


# The publishes that wait: only those to topics with slow readers, or all of them.
Scope = Literal["topic", "global"]


class ThrottleSample(msgspec.Struct, frozen=True):
    """Figures that throttling is decided from; `cpu` and `memory` are used shares, 0..1.

    The last three are for the scope "topic". `topic_slow_ratio` is the largest share of slow
    subscribers that any topic has; `slow_topics` have more than SLOW_RATIO, and `slowest_topic` is
    the one of them with the most slow subscribers, as people see it.
    """

    subscribers: int
    slow_subscribers: int
    cpu: float
    memory: float
    topic_slow_ratio: float = 0.0
    slow_topics: int = 0
    slowest_topic: str = ""


class ThrottleDecision(msgspec.Struct, frozen=True):
    """Whether publishes are delayed, and all figures that this was decided from, for /metrics.

    `since_s` and `until_s` are monotonic seconds, None while not throttling. `reason` is a phrase
    for people: the parts of the condition that are met, or else the parts that are not.
    """

    is_throttling: bool
    delay_s: float
    slow_ratio: float
    cpu: float
    memory: float
    since_s: float | None
    until_s: float | None
    reason: str
    subscribers: int = 0
    slow_subscribers: int = 0
    topic_slow_ratio: float = 0.0
    slow_topics: int = 0
    slowest_topic: str = ""
    # Whether this evaluation found the condition met, and did not only find throttling under way.
    is_met: bool = False


class Verdict(NamedTuple):
    """Whether a sample meets the condition, and a phrase that says why."""

    is_met: bool
    reason: str


NOT_EVALUATED: Final = ThrottleDecision(
    is_throttling=False,
    delay_s=0.0,
    slow_ratio=0.0,
    cpu=0.0,
    memory=0.0,
    since_s=None,
    until_s=None,
    reason="not evaluated yet",
)


def slow_ratio_of(subscribers: int, slow_subscribers: int) -> float:
    """Return the share of subscribers that are slow, 0..1; 0 when there are none."""
    if subscribers <= 0:
        return 0.0
    return min(1.0, max(0.0, slow_subscribers / subscribers))


def judge(sample: ThrottleSample, scope: Scope = "global") -> Verdict:
    """Return whether this sample alone meets the condition.

    A figure that is not finite is unknown, and an unknown figure is never a reason to throttle.
    """
    slow = _slow_verdict(sample) if scope == "global" else _slow_topics_verdict(sample)
    loads = (
        _more_than(CPU_LIMIT, sample.cpu, f"CPU at {_percent(sample.cpu)}"),
        _more_than(MEMORY_LIMIT, sample.memory, f"memory at {_percent(sample.memory)}"),
    )
    over = [load for load in loads if load.is_met]
    if slow.is_met and over:
        return Verdict(True, " and ".join(part.reason for part in (slow, *over)))
    missing = [slow] * (not slow.is_met) + list(loads) * (not over)
    return Verdict(False, "; ".join(part.reason for part in missing))


class AdaptiveThrottler:
    """Starts, extends and ends throttling.

    Throttling starts when an evaluation finds the condition met. Each later evaluation that finds
    it met moves the end to DURATION_S after itself, so a lasting overload is throttled without a
    break, and the end is never more than DURATION_S away. At its end throttling stops by itself,
    also between two evaluations.
    """

    __slots__ = ("_earlier_s", "_since_s", "_until_s", "decision", "scope", "started")

    def __init__(self, scope: Scope = "global") -> None:
        self.scope = scope
        # Start and end of the current period of throttling, or of the last one, in monotonic
        # seconds; changed by _hold() alone.
        self._since_s = -math.inf
        self._until_s = -math.inf
        # Seconds of throttling before that period, for throttled_s(); changed by _hold() alone.
        self._earlier_s = 0.0
        # Number of periods of throttling so far; an extension starts none.
        self.started = 0
        # The latest evaluation's decision; current() also knows whether its time has run out.
        self.decision = NOT_EVALUATED

    def delay_s(self, now_s: float) -> float:
        """Return the seconds a publish waits at `now_s`: 0.0 or DELAY_S.

        With the scope "topic" this is so for publishes to the topics that were found slow.
        """
        return DELAY_S if now_s < self._until_s else 0.0

    def evaluate(self, sample: ThrottleSample, now_s: float) -> ThrottleDecision:
        """Decide from `sample` at `now_s` (monotonic), and keep the decision."""
        verdict = judge(sample, self.scope)
        if verdict.is_met:
            self._hold(now_s)
        is_throttling = now_s < self._until_s
        reason = verdict.reason
        if is_throttling and not verdict.is_met:
            reason = f"{reason}; ends {DURATION_S:g} s after all of it was last met"
        self.decision = ThrottleDecision(
            is_throttling=is_throttling,
            delay_s=self.delay_s(now_s),
            slow_ratio=slow_ratio_of(sample.subscribers, sample.slow_subscribers),
            cpu=_finite(sample.cpu),
            memory=_finite(sample.memory),
            since_s=self._since_s if is_throttling else None,
            until_s=self._until_s if is_throttling else None,
            reason=reason,
            subscribers=sample.subscribers,
            slow_subscribers=sample.slow_subscribers,
            topic_slow_ratio=_finite(sample.topic_slow_ratio),
            slow_topics=sample.slow_topics,
            slowest_topic=sample.slowest_topic,
            is_met=verdict.is_met,
        )
        return self.decision

    def current(self, now_s: float) -> ThrottleDecision:
        """Return the latest decision, changed to "not throttling" if its time has run out."""
        if not self.decision.is_throttling or now_s < self._until_s:
            return self.decision
        return msgspec.structs.replace(
            self.decision,
            is_throttling=False,
            delay_s=0.0,
            since_s=None,
            until_s=None,
            reason=f"no evaluation of the last {DURATION_S:g} s found the condition met",
        )

    def throttled_s(self, now_s: float) -> float:
        """Return the seconds of throttling since the daemon's start, until `now_s`."""
        if self.started == 0:
            return 0.0
        return self._earlier_s + max(0.0, min(now_s, self._until_s) - self._since_s)

    def _hold(self, now_s: float) -> None:
        """Throttle until DURATION_S from now; start a new period if none is running."""
        if now_s >= self._until_s:
            self._earlier_s = self.throttled_s(now_s)
            self._since_s = now_s
            self.started += 1
        self._until_s = max(self._until_s, now_s + DURATION_S)


def _slow_verdict(sample: ThrottleSample) -> Verdict:
    if sample.subscribers <= 0:
        return Verdict(False, "no subscribers")
    ratio = slow_ratio_of(sample.subscribers, sample.slow_subscribers)
    return _more_than(SLOW_RATIO, ratio, f"{_percent(ratio)} of subscribers slow")


def _slow_topics_verdict(sample: ThrottleSample) -> Verdict:
    """Return whether any topic has too many slow subscribers, and which."""
    if sample.subscribers <= 0:
        return Verdict(False, "no subscribers")
    ratio = sample.topic_slow_ratio
    if sample.slow_topics > 1:
        more = (
            f"more than {_percent(SLOW_RATIO)} of subscribers slow in {sample.slow_topics} topics"
        )
        return Verdict(True, f"{more}, most in {sample.slowest_topic}")
    if sample.slow_topics:
        return Verdict(True, f"{_percent(ratio)} of subscribers slow in {sample.slowest_topic}")
    return _more_than(SLOW_RATIO, ratio, f"{_percent(ratio)} of a topic's subscribers slow at most")


def _more_than(limit: float, ratio: float, figure: str) -> Verdict:
    if _finite(ratio) > limit:
        return Verdict(True, figure)
    return Verdict(False, f"{figure}, not more than {_percent(limit)}")


def _finite(ratio: float) -> float:
    return ratio if math.isfinite(ratio) else 0.0


def _percent(ratio: float) -> str:
    """Return the ratio in at most three digits, e.g. "85 %" or "62.5 %"."""
    return f"{ratio * 100.0:.3g} %" if math.isfinite(ratio) else "an unknown share"
