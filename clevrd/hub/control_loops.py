"""ControlLoops: samples the load and the readers, and applies the decisions made from them.

The decisions are made in `control`; the hub's timers say when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from clevrd.control.adaptive_buffer import (
    AdaptiveBufferManager,
    BufferDecision,
    BufferSample,
    PortionSample,
)
from clevrd.control.adaptive_throttler import (
    DURATION_S,
    SLOW_RATIO,
    AdaptiveThrottler,
    ThrottleDecision,
    ThrottleSample,
    slow_ratio_of,
)
from clevrd.control.system_stats import LoadSample
from clevrd.core.portions import Portion
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.hub.explanations import (
    note_tenant_window,
    note_throttled_daemon,
    note_throttled_topics,
    note_window,
)
from clevrd.hub.readers import Holdings, Readers
from clevrd.metrics.decisions import Decisions

log = logging.getLogger(__name__)


class Stats(Protocol):
    """The source of load figures: the machine, or a test."""

    def sample(self) -> LoadSample:
        """Return the load now."""


class ControlLoops:
    """Decides, when asked, whether publishers are throttled and how far readers may lag."""

    __slots__ = (
        "_buffers",
        "_decisions",
        "_loop",
        "_readers",
        "_stats",
        "_throttled",
        "_throttler",
        "_topics",
        "last_load",
    )

    def __init__(
        self,
        throttler: AdaptiveThrottler,
        buffers: AdaptiveBufferManager,
        stats: Stats,
        topics: TopicManager,
        readers: Readers,
        decisions: Decisions,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._throttler = throttler
        self._buffers = buffers
        self._stats = stats
        self._topics = topics
        self._readers = readers
        self._decisions = decisions
        self._loop = loop
        # Topics whose `throttled_until_s` is set: publishes to them wait until then. Empty where
        # the scope is "global". Changed by `_delay` alone.
        self._throttled: dict[Topic, None] = {}
        # The load that the throttle was last evaluated from; set by `evaluate_throttle`, None
        # before.
        self.last_load: LoadSample | None = None

    def evaluate_throttle(self) -> ThrottleDecision:
        """Sample the load and decide whether publishers are throttled; return why."""
        now_s = self._loop.time()
        load = self.last_load = self._stats.sample()
        slow, with_slow = self._readers.slow_count(now_s)
        crowds = [topic for topic in with_slow if _slow_ratio(topic) > SLOW_RATIO]
        was_throttling = self._throttler.decision.is_throttling
        decision = self._throttler.evaluate(
            ThrottleSample(
                self._readers.count,
                slow,
                load.cpu,
                load.memory,
                topic_slow_ratio=max(map(_slow_ratio, with_slow), default=0.0),
                slow_topics=len(crowds),
                slowest_topic=_name(max(crowds, key=_slow)) if crowds else "",
            ),
            now_s,
        )
        if self._throttler.scope == "topic":
            self._delay(crowds if decision.is_met else (), now_s)
            if decision.is_met:
                note_throttled_topics(self._decisions, crowds, decision)
        elif decision.is_met:
            note_throttled_daemon(self._decisions, decision)
        if decision.is_throttling != was_throttling:
            log.info(
                "throttle changed is_throttling=%s reason=%r",
                decision.is_throttling,
                decision.reason,
            )
        return decision

    def throttled_topics(self) -> list[Topic]:
        """Return the topics to which publishes wait now; none where the scope is "global"."""
        now_s = self._loop.time()
        return [topic for topic in self._throttled if now_s < topic.throttled_until_s]

    def _delay(self, topics: Sequence[Topic], now_s: float) -> None:
        """Let publishes to ``topics`` wait for a while, and no longer where that time is over."""
        for topic in topics:
            topic.throttled_until_s = now_s + DURATION_S
            self._throttled[topic] = None
        for topic in [each for each in self._throttled if each.throttled_until_s <= now_s]:
            topic.throttled_until_s = 0.0
            del self._throttled[topic]

    def evaluate_buffers(self) -> BufferDecision:
        """Decide the windows, in messages, and set them for every reader of every topic."""
        now_s = self._loop.time()
        load = self.last_load or self._stats.sample()
        before = self._buffers.window
        holdings = self._readers.holdings()
        weights = self._topics.portions.weights
        own_before = {name: self._buffers.window_of(name) for name in weights.by_tenant}
        decision = self._buffers.evaluate(
            BufferSample(
                max_memory_bytes=self._topics.limits.max_memory_bytes,
                ring_bytes=self._topics.ring_bytes,
                machine_available_bytes=load.available_bytes,
                subscribers=self._readers.count,
                mean_message_bytes=_mean_bytes(holdings.values()),
            ),
            {
                portion.name: PortionSample(
                    ratio=weights.ratio_of(portion.name),
                    ring_bytes=portion.ring_bytes,
                    subscribers=own.subscribers if (own := holdings.get(portion)) else 0,
                    mean_message_bytes=_mean_bytes([own] if own else []),
                )
                for portion in self._topics.portions
            },
        )
        self._readers.set_windows(self._buffers.window_of, now_s)
        if decision.window_messages != before:
            log.info("window changed from=%d to=%d", before, decision.window_messages)
            note_window(self._decisions, before, decision)
        for tenant, own_window in own_before.items():
            if (now := self._buffers.window_of(tenant)) != own_window:
                self._note_own_window(tenant, own_window, now, holdings)
        return decision

    def _note_own_window(
        self, tenant: str, before: int, now: int, holdings: Mapping[Portion, Holdings]
    ) -> None:
        portion = self._topics.portions.of(tenant)
        own = holdings.get(portion)
        inputs = {
            "guaranteed_bytes": portion.guaranteed_bytes,
            "ring_bytes": portion.ring_bytes,
            "subscribers": own.subscribers if own else 0,
            "mean_message_bytes": _mean_bytes([own] if own else []),
        }
        note_tenant_window(self._decisions, tenant, before, now, inputs)


def _slow(topic: Topic) -> int:
    return topic.slow


def _slow_ratio(topic: Topic) -> float:
    return slow_ratio_of(topic.subscribers, topic.slow)


def _name(topic: Topic) -> str:
    """Return the topic's name as people see it."""
    return f"{topic.tenant}:{topic.name}"


def _mean_bytes(holdings: Iterable[Holdings]) -> float:
    """Return the mean bytes of a message, 0.0 where there is none."""
    of_all = list(holdings)
    messages = sum(each.messages for each in of_all)
    return sum(each.size_bytes for each in of_all) / messages if messages else 0.0
