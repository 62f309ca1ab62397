"""Hub: the parts put together, and what handlers and connections ask of them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Final

import msgspec

from clevrd.config import Config
from clevrd.control import adaptive_buffer, adaptive_throttler
from clevrd.control.adaptive_buffer import AdaptiveBufferManager
from clevrd.control.adaptive_throttler import AdaptiveThrottler
from clevrd.control.rate_limiter import RateLimiter
from clevrd.control.system_stats import LoadSample, SystemStats, memory_limit_bytes
from clevrd.core.beginning import Beginning, resolve
from clevrd.core.circuit import CircuitBudget
from clevrd.core.idempotency import RememberedAnswers
from clevrd.core.message import PublishRequest, rfc3339
from clevrd.core.notices import Ref, Warnings
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.saved_topic import SavedTopic
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager, Totals
from clevrd.errors import ShuttingDown
from clevrd.hub.circuits import Circuits
from clevrd.hub.control_loops import ControlLoops, Stats
from clevrd.hub.drain import Drain
from clevrd.hub.idempotent_publishes import IdempotentPublishes
from clevrd.hub.memory_shares import input_bytes, max_keys, topic_limits
from clevrd.hub.pattern_index import PatternIndex
from clevrd.hub.readers import Readers
from clevrd.hub.rounds import Rounds
from clevrd.hub.stamping import Published, Stamping, audience_of
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
from clevrd.tenants import Tenant

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
        self.patterns = PatternIndex(self.topics, loop, self.counters.count_background_error)
        self.rate_limiter = RateLimiter(config.publish_rate, config.publish_burst)
        self.throttler = AdaptiveThrottler()
        self.buffers = AdaptiveBufferManager()
        self.answers: RememberedAnswers[Published] = RememberedAnswers(
            max_keys(config, max_memory_bytes), config.idempotency_s
        )
        self.memory = Memory(find_trim())
        self.is_draining = False
        self._acceptance = Stamping(wall_ns)
        self._waiting = WaitingPublishes(loop)
        self._first_answers = IdempotentPublishes(self.answers, self._waiting, loop)
        self._readers = Readers(self.counters, self.topics.note_left, loop)
        self._circuits = Circuits(_circuit_budget(config), self._readers, self.counters, loop)
        self._rounds = Rounds(
            config.ring_messages,
            config.ring_bytes,
            self._readers,
            self._circuits,
            self._waiting,
            self.counters,
            loop,
        )
        self._drain = Drain(self._waiting, self._rounds, self._readers, loop)
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
        self.max_run = 1 if config.publish_rate else min(MAX_RUN, self._rounds.max_pending)
        # Not by the loop's clock, which counts milliseconds and stands still within a turn.
        self._loop_lag = LoopLag(self.counters.loop_lag_s.record, time.monotonic)
        self._timers = Timers(loop, self.counters.count_background_error)
        # Work beside requests and rounds: publishes that wait, above all.
        self.tasks = Tasks(loop, self.counters.count_background_error)
        # In whose shares everything is carried out that clients ask for.
        self.turns = FairTurns(loop, self.counters.count_background_error)
        # What is asked of one part alone; a call in between would cost connections 50 ns each.
        self.wall_us = self._acceptance.wall_us
        self.now_s = loop.time
        self.unsubscribe = self._readers.leave
        self.paused = self._readers.pause
        self.resumed = self._readers.resume
        self.stall_allowed_s = self._circuits.stall_allowed_s
        self.break_overdue_circuits = self._circuits.break_overdue
        self.evaluate_throttle = self._control_loops.evaluate_throttle
        self.evaluate_buffers = self._control_loops.evaluate_buffers

    # --- publish ---------------------------------------------------------------------------------

    def refuse_if_draining(self) -> None:
        """Raise Unavailable once shutdown has begun; what was begun before it is finished."""
        if self.is_draining:
            raise ShuttingDown

    def check_rate(self, tenant: Tenant, count: int = 1) -> None:
        """Take ``count`` messages from the tenant's budget.

        Raises:
            RateLimited: the budget is spent; nothing was taken.
            InvalidRequest: ``count`` is more than the budget ever holds.
        """
        self.rate_limiter.take(tenant.name, count, self._loop.time())

    def topic(self, tenant: Tenant, name: str) -> Topic:
        """Return the tenant's topic, which begins now if it is missing.

        It is made, and found by patterns, with its first message; until then it is a name that
        somebody reads, and forgotten when nobody does.

        Raises:
            InvalidRequest: the name can't be a topic's.
            Unavailable: there are as many topics as there may be.
        """
        topic = self.topics.find(tenant.name, name)
        if topic is None:
            # Never before an id that was made: `since` an id of the name's life before would
            # pass for one of this life, had the clock been set back.
            created_at = rfc3339(max(self.wall_us(), self.last_id_us))
            topic = self.topics.get_or_create(tenant.name, name, created_at, self._loop.time())
        return topic

    def must_wait(self, topic: Topic) -> bool:
        """Whether a publish to ``topic`` has to go through `publish_later` or `turn`."""
        if self.throttler.delay_s(self._loop.time()) > 0.0:
            return True
        return self._has_no_room(topic)

    def publish(self, topic: Topic, request: PublishRequest) -> Published:
        """Append one message and have it offered to all readers this turn; no await."""
        offset, (message_id,) = self.publish_run(topic, (request,))
        return Published(True, message_id, offset, *audience_of(topic))

    def publish_run(
        self, topic: Topic, requests: Sequence[PublishRequest]
    ) -> tuple[int, list[str]]:
        """Append many messages at once; return the first one's offset and all their ids.

        A run is at most ``max_run`` messages, of RUN_MAX_BYTES in all or a single one, and comes
        after `must_wait` said no, or its `turn`: then the ring holds it beside what is pending.

        Stamping and delivery follow each other here; a broker would stand between them.
        """
        # The ring's fields, since the topic's `head` and `pending` are calls, 90 ns for both.
        ring = topic.ring
        offset = ring.head + 1
        ids, frames = self._acceptance.accept(topic, offset, requests)

        self.topics.extend(topic, offset, frames, self._loop.time())
        if offset == 1:
            self.patterns.topic_made(topic)
        if ring.head != topic.edge:
            if not topic.flush_is_scheduled:
                self._rounds.schedule(topic)
            if offset == topic.edge + 1:
                self._rounds.note_oldest(topic)
        return offset, ids

    async def publish_later(self, topic: Topic, request: PublishRequest) -> Published:
        """Publish once the throttle's delay has passed and the topic has room.

        Raises:
            Throttled: too many publishes wait already.
        """
        return self.publish(await self.turn(topic), request)

    async def turn(self, topic: Topic, messages: int = 1) -> Topic:
        """Wait until what comes next may be appended to ``topic``, and return the topic.

        It is so many ``messages``, which have to be appended at once then. Who came first is served
        first.

        Raises:
            Throttled: too many publishes wait already.
        """
        self._waiting.begin()
        began_s = self._loop.time()
        try:
            delay_s = self.throttler.delay_s(self._loop.time())
            if delay_s > 0.0:
                await asyncio.sleep(delay_s)
            if self._has_no_room(topic):
                await self._waiting.for_room(topic, self._rounds.makes_room)
        finally:
            self._waiting.end()
        self.counters.wait_s.record_many(self._loop.time() - began_s, messages)
        # Idle topics are evicted, and this publish may have waited since it was found.
        return self.topic(Tenant(topic.tenant), topic.name)

    def _has_no_room(self, topic: Topic) -> bool:
        """Whether a publish to ``topic`` has to wait for a round, or for others that wait."""
        return topic in self._waiting.lines or not self._rounds.makes_room(topic)

    # --- publish once ----------------------------------------------------------------------------

    def publish_once(self, tenant: Tenant, request: PublishRequest, key: str) -> Published | None:
        """Publish, or return the first answer if a publish with this key was taken before.

        Returns None when it has to go through `publish_once_later`.

        Raises:
            InvalidRequest: the key was used for other data.
        """
        slot = (tenant.name, request.topic, key)
        if first := self._first_answers.find(slot, request):
            return first
        if slot in self._first_answers.under_way:
            return None
        topic = self.topic(tenant, request.topic)
        if self.must_wait(topic):
            return None
        return self._first_answers.remember(slot, request, self.publish(topic, request))

    async def publish_once_later(
        self, tenant: Tenant, request: PublishRequest, key: str
    ) -> Published:
        """Publish when its time has come, unless a publish with this key is taken before that.

        One that fails is not remembered: the next that waits with the same key takes its place.

        Raises:
            Throttled: too many publishes wait already.
            InvalidRequest: the key was used for other data.
        """
        slot = (tenant.name, request.topic, key)
        await self._first_answers.decided(slot)
        if first := self._first_answers.find(slot, request):
            return first
        with self._first_answers.deciding(slot):
            topic = self.topic(tenant, request.topic)
            if self.must_wait(topic):
                topic = await self.turn(topic)
            return self._first_answers.remember(slot, request, self.publish(topic, request))

    # --- subscribe -------------------------------------------------------------------------------

    def subscribe(
        self,
        topic: Topic,
        reader: Subscriber,
        beginning: Beginning,
        *,
        pattern: str | msgspec.UnsetType = msgspec.UNSET,
        ref: Ref = msgspec.UNSET,
        warnings: Warnings = msgspec.UNSET,
    ) -> None:
        """Join ``reader`` and hand it what it asks for of the past, then what comes.

        Its greeting says by which ``pattern`` it came, the ``ref`` of the command that asked, and
        what its client is to be warned of.
        """
        now_s = self._loop.time()
        topic.set_window(self.buffers.window, now_s)
        start = resolve(topic, beginning)
        if start.after > topic.edge:
            # It has this turn's message already, from a publish answer perhaps.
            self._rounds.begin(topic)
        self._readers.join(topic, reader, start, pattern, ref, warnings, now_s)

    def serve(self, topic: Topic, after: int, max_messages: int, max_bytes: int) -> list[bytes]:
        """Return what ``topic`` has behind offset ``after``, for a reader that does not stay."""
        return topic.serve(after, after + max_messages, max_bytes, self._loop.time())

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
        return self._waiting.count

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
        self._circuits.stop()

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
        self._acceptance.seal()

    def saved(self) -> list[tuple[SavedTopic, RecentMessageCache]]:
        """Return where every topic stands and its ring, the last used first. `seal` first."""
        return saved_topics(self.topics)

    @property
    def last_id_us(self) -> int:
        """The last message's id, in microseconds since 1970; 0 before the first."""
        return self._acceptance.last_id_us

    def restore(self, reader: StateReader) -> None:
        """Go on with the topics in a file, as far as the limits allow. Nothing is served yet."""
        self._acceptance.go_on_after(reader.last_id_us)
        restore_topics(self.topics, reader, self._loop.time())


def _circuit_budget(config: Config) -> CircuitBudget:
    return CircuitBudget(
        config.circuit_breaker_openings,
        config.circuit_breaker_period_s,
        config.circuit_breaker_open_s,
    )
