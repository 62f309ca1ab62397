"""Hub: the parts put together, and what handlers and connections ask of them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Generator, Iterable
from typing import Final

from clevrd.config import Config
from clevrd.control import adaptive_buffer, adaptive_throttler
from clevrd.control.adaptive_buffer import AdaptiveBufferManager
from clevrd.control.adaptive_throttler import AdaptiveThrottler
from clevrd.control.rate_limiter import RateLimiter
from clevrd.control.system_stats import LoadSample, SystemStats, memory_limit_bytes
from clevrd.core.idempotency import RememberedAnswers
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.saved_topic import SavedTopic
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager, Totals
from clevrd.errors import ShuttingDown
from clevrd.hub.control_loops import ControlLoops, Stats
from clevrd.hub.delivery import Delivery
from clevrd.hub.drain import Drain
from clevrd.hub.memory_shares import input_bytes, max_keys, topic_limits
from clevrd.hub.publish_answers import Published
from clevrd.hub.publishing import Publishing
from clevrd.hub.stamping import Stamping
from clevrd.hub.waiting_publishes import WaitingPublishes
from clevrd.input_budget import InputBudget
from clevrd.memory import Memory, find_trim
from clevrd.metrics.counters import Counters
from clevrd.metrics.histograms import HistogramView
from clevrd.metrics.loop_lag import LOOK_S, LoopLag
from clevrd.restart.format import StateReader
from clevrd.restart.topics import restore_topics, saved_topics
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.scheduling.timers import Tasks, Timers

log = logging.getLogger(__name__)

# Messages appended at once before others get a turn: about 1 ms at 3.5 us each.
MAX_RUN: Final = 256
# And their bytes, unless it is a single message.
RUN_MAX_BYTES: Final = 262_144

# A bounded number of topics each time, half a millisecond for 1,000 of them.
IDLE_SWEEP_S: Final = 1.0

# How often it is looked whether memory is to be given back, and what a reader's connection takes
# (bench: storm).
MEMORY_LOOK_S: Final = 1.0
READER_COST_BYTES: Final = 4_096
# Readers with which a full collection takes 2 ms at most.
QUIET_READERS: Final = 1_000

# Full token buckets are forgotten a few at a time: a look at 1,000 of them takes 0.3 ms.
RATE_SWEEP_S: Final = 1.0
_BUCKETS_PER_SWEEP: Final = 1_000

# Remembered answers whose time is up are forgotten a few at a time, at 2.6 us each.
KEY_SWEEP_S: Final = 1.0
_KEYS_PER_SWEEP: Final = 1_000


class Hub:
    """All topics and their readers, and what is between them."""

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        *,
        stats: Stats | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._loop = loop
        # What was configured, and never more than the cgroup or the machine has at all.
        max_memory_bytes = min(config.max_memory_mb << 20, memory_limit_bytes())
        self.counters = Counters()
        self.input_budget = InputBudget(input_bytes(config, max_memory_bytes))
        self.topics = TopicManager(
            topic_limits(config, max_memory_bytes), new_epoch=lambda: secrets.token_hex(4)
        )
        self.rate_limiter = RateLimiter(config.publish_rate, config.publish_burst)
        self.throttler = AdaptiveThrottler()
        self.buffers = AdaptiveBufferManager()
        self.answers: RememberedAnswers[Published] = RememberedAnswers(
            max_keys(config, max_memory_bytes), config.idempotency_s
        )
        self.memory = Memory(find_trim())
        self.is_draining = False
        self._stamping = Stamping(wall_ns)
        waiting = WaitingPublishes(loop)
        self.delivery = Delivery(config, self.topics, self.buffers, waiting, self.counters, loop)
        self.publishing = Publishing(
            self.topics,
            self._stamping,
            waiting,
            self.delivery,
            self.throttler,
            self.rate_limiter,
            self.answers,
            self.counters,
            loop,
        )
        self._drain = Drain(waiting, self.delivery, loop)
        self._readers = self.delivery.readers
        self._control_loops = ControlLoops(
            self.throttler,
            self.buffers,
            stats or SystemStats(max_memory_bytes),
            self.topics,
            self._readers,
            loop,
        )
        # Messages that may be appended at once: a part of the ring, like what may be pending; with
        # a rate limit one by one, so that the budget is spent to its last message.
        max_pending = self.delivery.rounds.max_pending
        self.max_run = 1 if config.publish_rate else min(MAX_RUN, max_pending)
        # Not by the loop's clock, which counts milliseconds and stands still within a turn.
        self._loop_lag = LoopLag(self.counters.loop_lag_s.record, time.monotonic)
        self._timers = Timers(loop, self.counters.count_background_error)
        # Work beside requests and rounds: publishes that wait, above all.
        self.tasks = Tasks(loop, self.counters.count_background_error)
        # In whose shares everything is carried out that clients ask for.
        self.turns = FairTurns(loop, self.counters.count_background_error)
        # Questions for one part alone; a call in between would cost connections 50 ns each.
        publishing, delivery = self.publishing, self.delivery
        self.wall_us = self._stamping.wall_us
        self.now_s = loop.time
        self.check_rate = publishing.check_rate
        self.topic = publishing.topic
        self.must_wait = publishing.must_wait
        self.publish = publishing.publish
        self.publish_run = publishing.publish_run
        self.publish_later = publishing.publish_later
        self.turn = publishing.turn
        self.publish_once = publishing.publish_once
        self.publish_once_later = publishing.publish_once_later
        self.patterns = delivery.patterns
        self.subscribe = delivery.subscribe
        self.serve = delivery.serve
        self.unsubscribe = delivery.readers.leave
        self.paused = delivery.readers.pause
        self.resumed = delivery.readers.resume
        self.stall_allowed_s = delivery.circuits.stall_allowed_s
        self.break_overdue_circuits = delivery.circuits.break_overdue
        self.evaluate_throttle = self._control_loops.evaluate_throttle
        self.evaluate_buffers = self._control_loops.evaluate_buffers

    def refuse_if_draining(self) -> None:
        """Raise Unavailable once shutdown has begun; what was begun before it is finished."""
        if self.is_draining:
            raise ShuttingDown

    # --- figures ---------------------------------------------------------------------------------

    @property
    def subscribers(self) -> int:
        """How many readers are joined, over all topics."""
        return self._readers.count

    @property
    def open_circuits(self) -> int:
        """How many readers are given nothing until their transport has room again."""
        return len(self._readers.suspended)

    @property
    def waiting_publishes(self) -> int:
        """How many publishes wait for room or for the throttle."""
        return self.publishing.waiting.count

    def publish_waits(self) -> HistogramView:
        """Return how long each message that was published had to wait; most did not."""
        waits = self.counters.wait_s
        return waits.view(zeros=max(0, self.topics.published - waits.count))

    @property
    def last_load(self) -> LoadSample | None:
        """What the throttle was evaluated from the last time."""
        return self._control_loops.last_load

    def settle(self, topics: Iterable[Topic]) -> float:
        """Bring the counters of these topics' readers up to date; return the time they are of."""
        now_s = self._loop.time()
        for topic in topics:
            topic.settle(now_s)
        return now_s

    def sum_up(self) -> Generator[None, None, tuple[Totals, int]]:
        """Return the sums over all topics, and how many subscribers are slow, step by step."""
        return self.topics.totals(self._loop.time)

    def is_throttling(self) -> bool:
        """Whether publishers are slowed down right now."""
        return self.throttler.delay_s(self._loop.time()) > 0.0

    # --- timers ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the timers: throttle, buffers, and what is forgotten or let go in time."""
        self._timers.every(adaptive_throttler.INTERVAL_S, self.evaluate_throttle)
        self._timers.every(adaptive_buffer.INTERVAL_S, self.evaluate_buffers)
        self._timers.every(LOOK_S, self._loop_lag.look)
        self._timers.every(IDLE_SWEEP_S, self.evict_idle_topics)
        self._timers.every(MEMORY_LOOK_S, self.give_back_memory)
        self._timers.every(RATE_SWEEP_S, self.forget_full_buckets)
        self._timers.every(KEY_SWEEP_S, self.forget_old_answers)

    def stop(self) -> None:
        """Stop the timers."""
        self._timers.stop()
        self.delivery.circuits.stop()

    def evict_idle_topics(self) -> None:
        """Forget topics that nobody uses."""
        forgotten = self.topics.evict_idle(self._loop.time())
        if forgotten:
            log.info("idle topics evicted count=%d left=%d", len(forgotten), len(self.topics))
        for topic in forgotten:
            self.patterns.topic_forgotten(topic)

    def give_back_memory(self) -> None:
        """Give back to the machine what rings, and readers that left, don't need any more."""
        readers = self._readers.count
        held_bytes = self.topics.ring_bytes + readers * READER_COST_BYTES
        self.memory.look(held_bytes, is_quiet=readers <= QUIET_READERS)

    def forget_full_buckets(self) -> None:
        """Give back the memory of tenants that have not published for a while."""
        self.rate_limiter.sweep(self._loop.time(), at_most=_BUCKETS_PER_SWEEP)

    def forget_old_answers(self) -> None:
        """Give back the memory of idempotency keys whose time is up."""
        self.answers.sweep(self._loop.time(), at_most=_KEYS_PER_SWEEP)

    # --- the end, and the next beginning ---------------------------------------------------------

    async def drain(self, deadline_s: float) -> None:
        """Refuse new publishes, finish waiting ones, and flush what readers can still take.

        Ends at ``deadline_s`` on the loop's clock at the latest.
        """
        self.is_draining = True
        await self._drain.finish(deadline_s)

    def seal(self) -> None:
        """Append nothing more: publishes that were cut at shutdown fail from here on."""
        self._stamping.seal()

    def saved(self) -> list[tuple[SavedTopic, RecentMessageCache]]:
        """Return where every topic stands and its ring, the last used first. `seal` first."""
        return saved_topics(self.topics)

    @property
    def last_id_us(self) -> int:
        """The last message's id, in microseconds since 1970; 0 before the first."""
        return self._stamping.last_id_us

    def restore(self, reader: StateReader) -> None:
        """Go on with the topics in a file, as far as the limits allow. Nothing is served yet."""
        self._stamping.go_on_after(reader.last_id_us)
        restore_topics(self.topics, reader, self._loop.time())
