"""The throttle against the rule in words, over random schedules of readers, load and time.

The rule, topic by topic: a publish waits from an evaluation that finds CPU or memory over 80 % and
more than half of its topic's readers slow, until 5 s after the last that did. For all together: the
same with the readers of all topics, and for every publish.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from conftest import FakeClock
from daemons import FakeStats
from hypothesis import given
from hypothesis import strategies as st

from clevrd.control.adaptive_buffer import AdaptiveBufferManager
from clevrd.control.adaptive_throttler import AdaptiveThrottler, Scope
from clevrd.hub.control_loops import ControlLoops
from clevrd.metrics.decisions import Decisions

TOPICS = 3


class FakeTopic:
    """A topic, as far as the throttle goes."""

    def __init__(self, name: str) -> None:
        self.tenant = "acme"
        self.name = name
        self.subscribers = 0
        self.slow = 0
        self.throttled_until_s = 0.0


class FakeReaders:
    """The readers of some topics, of which so many are slow."""

    def __init__(self, topics: list[FakeTopic]) -> None:
        self.topics = topics

    @property
    def count(self) -> int:
        """Return how many there are."""
        return sum(topic.subscribers for topic in self.topics)

    def slow_count(self, _now_s: float) -> tuple[int, list[FakeTopic]]:
        """Return how many are slow, and where."""
        with_slow = [topic for topic in self.topics if topic.slow]
        return sum(topic.slow for topic in with_slow), with_slow


class FakeLoop:
    """A loop's clock."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    def time(self) -> float:
        """Return the time."""
        return self._clock()


# (seconds, readers and slow readers of each topic, CPU, memory) of one evaluation.
readers = st.integers(0, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
load = st.sampled_from([0.0, 0.5, 0.8, 0.81, 1.0])
evaluations = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1.0, 2.5, 4.9, 5.0, 5.1, 60.0]),
        st.tuples(*[readers] * TOPICS),
        load,
        load,
    ),
    max_size=12,
)


@pytest.mark.parametrize("scope", ["topic", "global"])
@given(steps=evaluations)
def test_publishes_wait_when_the_rule_says_so(
    scope: Scope, steps: list[tuple[float, tuple[tuple[int, int], ...], float, float]]
) -> None:
    """Those to each topic alone, or all; and the figures say the same."""
    clock, stats = FakeClock(), FakeStats()
    topics = [FakeTopic(f"t{number}") for number in range(TOPICS)]
    throttler = AdaptiveThrottler(scope)
    loops = ControlLoops(
        throttler,
        AdaptiveBufferManager(),
        stats,
        cast(Any, None),
        cast(Any, FakeReaders(topics)),
        Decisions(clock, lambda tenant: tenant),
        cast(asyncio.AbstractEventLoop, FakeLoop(clock)),
    )
    ends_s = [float("-inf")] * TOPICS
    for seconds, crowds, stats.cpu, stats.memory in steps:
        clock.advance(seconds)
        # Between two evaluations nothing but time ends it.
        assert waits(loops, throttler, topics, scope, clock()) == [clock() < s for s in ends_s]
        for topic, (subscribers, slow) in zip(topics, crowds, strict=True):
            topic.subscribers, topic.slow = subscribers, slow

        decision = loops.evaluate_throttle()

        is_loaded = stats.cpu > 0.8 or stats.memory > 0.8
        all_slow = sum(slow for _, slow in crowds) * 2 > sum(count for count, _ in crowds)
        for number, (subscribers, slow) in enumerate(crowds):
            is_slow = slow * 2 > subscribers if scope == "topic" else all_slow
            if is_loaded and is_slow:
                ends_s[number] = clock() + 5.0
        expected = [clock() < s for s in ends_s]
        assert waits(loops, throttler, topics, scope, clock()) == expected
        assert decision.is_throttling == any(expected)
        assert set(cast(list[Any], loops.throttled_topics())) == {
            topic
            for topic, is_waiting in zip(topics, expected, strict=True)
            if is_waiting and scope == "topic"
        }


def waits(
    loops: ControlLoops,
    throttler: AdaptiveThrottler,
    topics: list[FakeTopic],
    scope: Scope,
    now_s: float,
) -> list[bool]:
    """Return for each topic whether a publish to it waits."""
    if scope == "global":
        return [throttler.delay_s(now_s) > 0] * len(topics)
    # Publishes look at the topic alone.
    return [now_s < topic.throttled_until_s for topic in topics]
