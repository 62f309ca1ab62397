"""ControlLoops: samples the load and the readers, and applies the decisions made from them.

The decisions are made in `control`; the hub's timers say when.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from clevrd.control.adaptive_buffer import AdaptiveBufferManager, BufferDecision, BufferSample
from clevrd.control.adaptive_throttler import AdaptiveThrottler, ThrottleDecision, ThrottleSample
from clevrd.control.system_stats import LoadSample
from clevrd.core.topic_manager import TopicManager
from clevrd.hub.readers import Readers

log = logging.getLogger(__name__)


class Stats(Protocol):
    """The source of load figures: the machine, or a test."""

    def sample(self) -> LoadSample:
        """Return the load now."""


class ControlLoops:
    """Decides, when asked, whether publishers are throttled and how far readers may lag."""

    __slots__ = ("_buffers", "_loop", "_readers", "_stats", "_throttler", "_topics", "last_load")

    def __init__(
        self,
        throttler: AdaptiveThrottler,
        buffers: AdaptiveBufferManager,
        stats: Stats,
        topics: TopicManager,
        readers: Readers,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._throttler = throttler
        self._buffers = buffers
        self._stats = stats
        self._topics = topics
        self._readers = readers
        self._loop = loop
        # The load that the throttle was last evaluated from; set by `evaluate_throttle`, None
        # before.
        self.last_load: LoadSample | None = None

    def evaluate_throttle(self) -> ThrottleDecision:
        """Sample the load and decide whether publishers are throttled; return why."""
        now_s = self._loop.time()
        load = self.last_load = self._stats.sample()
        slow = self._readers.slow_count(now_s)
        was_throttling = self._throttler.decision.is_throttling
        decision = self._throttler.evaluate(
            ThrottleSample(self._readers.count, slow, load.cpu, load.memory), now_s
        )
        if decision.is_throttling != was_throttling:
            log.info(
                "throttle changed is_throttling=%s reason=%r",
                decision.is_throttling,
                decision.reason,
            )
        return decision

    def evaluate_buffers(self) -> BufferDecision:
        """Decide the window, in messages, and set it for every reader of every topic."""
        now_s = self._loop.time()
        load = self.last_load or self._stats.sample()
        before = self._buffers.window
        decision = self._buffers.evaluate(
            BufferSample(
                max_memory_bytes=self._topics.limits.max_memory_bytes,
                ring_bytes=self._topics.ring_bytes,
                machine_available_bytes=load.available_bytes,
                subscribers=self._readers.count,
                mean_message_bytes=self._readers.mean_message_bytes(),
            )
        )
        self._readers.set_window(decision.window_messages, now_s)
        if decision.window_messages != before:
            log.info("window changed from=%d to=%d", before, decision.window_messages)
        return decision
