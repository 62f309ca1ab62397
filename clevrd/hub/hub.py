"""Hub: puts publishing, delivery and timers together; handlers and connections call it alone."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Final

from clevrd.config import Config
from clevrd.control import adaptive_buffer, adaptive_throttler, memory_ladder
from clevrd.control.adaptive_buffer import AdaptiveBufferManager
from clevrd.control.adaptive_throttler import AdaptiveThrottler
from clevrd.control.arrivals import Arrivals
from clevrd.control.rate_limiter import RateLimiter
from clevrd.control.system_stats import LoadSample, SystemStats, memory_limit_bytes, resident_bytes
from clevrd.core.budgets import Budget
from clevrd.core.idempotency import RememberedAnswers
from clevrd.core.patterns import Words
from clevrd.core.portions import OTHERS, Weights
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.saved_topic import SavedTopic
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.core.topic_totals import Totals
from clevrd.errors import ShuttingDown
from clevrd.hub.clearing import Clearing
from clevrd.hub.control_loops import ControlLoops, Stats
from clevrd.hub.delivery import Delivery
from clevrd.hub.drain import Drain
from clevrd.hub.explanations import (
    note_frames_given_back,
    note_frames_not_kept,
    note_idle_topics,
    note_keys_pushed_out,
    note_rings_cut,
)
from clevrd.hub.history_pages import MAX_PAGE_BYTES
from clevrd.hub.history_readers import HistoryReaders
from clevrd.hub.journaling import Journaling
from clevrd.hub.lifecycle import Lifecycle, Told
from clevrd.hub.memory_guard import MemoryGuard
from clevrd.hub.memory_shares import OPEN_WEIGHTS, input_bytes, max_keys, topic_limits
from clevrd.hub.publish_answers import Published
from clevrd.hub.publishing import Publishing
from clevrd.hub.stamping import Stamping
from clevrd.hub.topic_catalogue import TopicCatalogue
from clevrd.hub.waiting_publishes import WaitingPublishes
from clevrd.input_budget import InputBudget
from clevrd.journal.base import Engine, History
from clevrd.memory import Memory, find_trim
from clevrd.metrics.counters import Counters
from clevrd.metrics.decisions import Decisions
from clevrd.metrics.histograms import HistogramView
from clevrd.metrics.loop_lag import LOOK_S, LoopLag
from clevrd.refusals import Refusals
from clevrd.restart.format import StateReader
from clevrd.restart.topics import restore_topics, saved_topics
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.scheduling.timers import Tasks, Timers
from clevrd.tenants import DEFAULT_TENANT
from clevrd.tenants.connection_counts import ConnectionCounts

log = logging.getLogger(__name__)

# Messages that one publisher appends before others get a turn: about 1 ms at 3.5 us a message.
MAX_RUN: Final = 256
# Bytes that one publisher appends before others get a turn; a single message may be larger.
RUN_MAX_BYTES: Final = 262_144

# How often idle topics are looked for. A sweep looks at a bounded number of topics: 1,000 take half
# a millisecond.
IDLE_SWEEP_S: Final = 1.0

# How often the hub checks whether memory can be given back to the machine, and the memory that a
# reader's connection takes (bench: storm).
MEMORY_LOOK_S: Final = 1.0
READER_COST_BYTES: Final = 4_096
# Readers that are asked back in a second after a drain, by Retry-After.
_RETURNS_PER_S: Final = 2_000.0

# With at most so many readers a full garbage collection takes 2 ms at most.
QUIET_READERS: Final = 1_000

# How often full token buckets are forgotten, and how many at most: 1,000 take 0.3 ms.
RATE_SWEEP_S: Final = 1.0
_BUCKETS_PER_SWEEP: Final = 1_000

# How often answers whose time is up are forgotten, and how many at most: 2.6 us each.
KEY_SWEEP_S: Final = 1.0
_KEYS_PER_SWEEP: Final = 1_000


# Share of the memory bound for pages of histories: 16 MB where the bound is 1 GB.
_PAGES_SHARE: Final = 1 / 64


class Hub:
    """All topics, their readers, and every operation that the floors above need on them."""

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        *,
        weights: Weights = OPEN_WEIGHTS,
        stats: Stats | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
        engine: Engine | None = None,
        journaled: Sequence[Words] = (),
        max_journaled_topics: int = 1_000_000,
        make_delivery: Callable[..., Delivery] = Delivery,
    ) -> None:
        """Make the hub.

        Args:
            weights: how tenants share the memory; `share_out` changes it later.
            engine: keeps the journal; None for none.
            journaled: patterns of the topics that are journaled.
            max_journaled_topics: topics that may have messages in the journal.
            make_delivery: makes the delivery, from what `Delivery` takes.
        """
        self._loop = loop
        # The configured bound, but never more than the cgroup or the machine has.
        max_memory_bytes = min(config.max_memory_mb << 20, memory_limit_bytes())
        self.counters = Counters()
        # The latest decisions, for operators.
        self.decisions = Decisions(
            loop.time, lambda tenant: self.topics.portions.weights.portion_of(tenant)
        )
        self.refusals = Refusals(self.counters.count_refusal, self.decisions.note_refusal)
        max_input_bytes = input_bytes(config, max_memory_bytes, resident_bytes())
        self.input_budget = InputBudget(max_input_bytes, lambda: self.topics.portions.weights)
        self.topics = TopicManager(
            topic_limits(config, max_memory_bytes),
            new_epoch=lambda: secrets.token_hex(4),
            weights=weights,
        )
        self.rate_limiter = RateLimiter(
            config.publish_rate, config.publish_burst, reserved=frozenset({DEFAULT_TENANT})
        )
        # Asked before a client connects for more than a request.
        self.arrivals = Arrivals()
        # WebSockets, streams and polls that wait, by tenant.
        self.connection_counts = ConnectionCounts()
        self.throttler = AdaptiveThrottler(config.throttle_scope)
        self.buffers = AdaptiveBufferManager()
        self.answers: RememberedAnswers[Published] = RememberedAnswers(
            max_keys(config, max_memory_bytes), config.idempotency_s, weights
        )
        # Keys pushed out that operators were told of; changed by forget_old_answers alone.
        self._told_pushed_out = 0
        self.topics.rings.on_cut = self._note_rings_cut
        self.topics.kept.on_given_back = self._note_frames_given_back
        self.topics.kept.on_refused = self._note_frames_not_kept
        self.memory = Memory(find_trim())
        # The daemon stops: nothing new begins, but for publishes where the next field says so.
        self.is_draining = False
        # Publishers are served while readers are sent away: what they send outlives the daemon.
        self.serves_publishers = False
        # When readers that come meanwhile may come back, on the loop's clock, and how many there
        # are; set by `begin_drain`.
        self._drained_at_s = 0.0
        self._returning = 0
        self._stamping = Stamping(wall_ns)
        waiting = WaitingPublishes(self.topics.portions, loop, max_input_bytes)
        self.delivery = make_delivery(
            *(config, self.topics, self.buffers, waiting, self.counters, self.decisions, loop),
            wall_us=self._stamping.wall_us,
        )
        # Messages that one run may have. A run fits into the quarter of the ring that may be
        # pending.
        self.max_run = min(MAX_RUN, self.delivery.rounds.max_pending)
        # None without a journal.
        self.journal: Journaling | None = None
        if engine is not None:
            self.journal = Journaling(
                engine,
                journaled,
                self.topics,
                self.delivery,
                waiting,
                loop,
                self._stamping.wall_us,
                self.counters.count_background_error,
                max_run=self.max_run,
                keep_keys_s=config.idempotency_s,
                max_topics=max_journaled_topics,
            )
            self.delivery.patterns.stored = self.journal
        self.catalogue = TopicCatalogue(self.topics, self.journal, loop)
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
            self.journal,
        )
        # Events of who reads which topic.
        self.lifecycle = Lifecycle(
            self.publishing,
            self.delivery.readers.subscriber_ids,
            secrets.token_hex(8) if self.journal is None else self.journal.node.writer,
            loop,
            self._stamping.wall_us,
            self.counters.count_background_error,
        )
        self.subscriber_ids = self.delivery.readers.subscriber_ids
        self.publishing.reserves = self.lifecycle.reserves
        # Topics that operators or their tenants clear.
        self.clearing = Clearing(
            *(self.topics, self.delivery, self.publishing.created_at, loop, self.journal)
        )
        self._drain = Drain(waiting, self.delivery, loop, self._is_journal_busy)
        self._readers = self.delivery.readers
        if engine is not None and (history := engine.history()) is not None:
            self.keep_history(history)
        stats = stats or SystemStats(max_memory_bytes)
        self.memory_guard = MemoryGuard(
            stats,
            self.topics,
            self.publishing,
            self._give_back_now,
            self.decisions,
            loop,
            self.counters.count_background_error,
        )
        self._control_loops = ControlLoops(
            self.throttler,
            self.buffers,
            stats,
            self.topics,
            self._readers,
            self.decisions,
            loop,
        )
        # The loop's own clock is of no use here: it counts milliseconds and stands still within a
        # turn.
        self._loop_lag = LoopLag(self.counters.loop_lag_s.record, time.monotonic)
        self._timers = Timers(loop, self.counters.count_background_error)
        # Tasks that run beside requests and rounds, mostly publishes that wait.
        self.tasks = Tasks(loop, self.counters.count_background_error)
        # Shares of the loop's turns, in which all work that clients ask for is done.
        self.turns = FairTurns(loop, self.counters.count_background_error)
        # Methods of one part, offered as the hub's own attributes: a method that only passes the
        # call on would cost 50 ns each time.
        publishing, delivery = self.publishing, self.delivery
        self.wall_us = self._stamping.wall_us
        self.now_s = loop.time
        self.check_rate = publishing.check_rate
        self.most_now = publishing.most_now
        self.topic = publishing.topic
        self.topic_to_read = publishing.topic_to_read
        self.must_wait = publishing.must_wait
        self.is_throttled = publishing.is_throttled
        self.publish = publishing.publish
        self.publish_run = publishing.publish_run
        self.publish_later = publishing.publish_later
        self.turn = publishing.turn
        self.publish_once = publishing.publish_once
        self.publish_once_later = publishing.publish_once_later
        self.patterns = delivery.patterns
        self.subscribe = delivery.subscribe
        self.serve = delivery.serve
        self.in_history = delivery.in_history
        self.older = delivery.older
        self.begin_anew = delivery.begin_anew
        self.unsubscribe = delivery.readers.leave
        self.paused = delivery.readers.pause
        self.resumed = delivery.readers.resume
        self.stall_allowed_s = delivery.circuits.stall_allowed_s
        self.break_overdue_circuits = delivery.circuits.break_overdue
        self.evaluate_throttle = self._control_loops.evaluate_throttle
        self.evaluate_buffers = self._control_loops.evaluate_buffers
        self.throttled_topics = self._control_loops.throttled_topics
        self.check_memory_for_subscriber = self.memory_guard.check_subscriber

    def refuse_if_draining(self) -> None:
        """Raise ShuttingDown once the drain has begun; requests begun before it are finished."""
        if self.is_draining and not self.serves_publishers:
            raise ShuttingDown

    def refuse_readers_if_draining(self) -> None:
        """Raise ShuttingDown once the drain has begun: nobody subscribes any more."""
        if self.is_draining:
            raise self.shutting_down()

    def shutting_down(self) -> ShuttingDown:
        """Return the refusal of a reader that comes while the daemon drains.

        Each is told a time of its own, when the drain is over: the readers that have left it come
        back one after the other.
        """
        left_s = max(0.0, self._drained_at_s - self._loop.time())
        spread_s = self._returning / _RETURNS_PER_S
        return ShuttingDown(left_s + random.uniform(0.0, spread_s))  # noqa: S311  # no secret

    def keep_history(self, source: History) -> None:
        """Let subscribers reach beyond the rings, into ``source``."""
        max_bytes = max(MAX_PAGE_BYTES, int(self.topics.limits.max_memory_bytes * _PAGES_SHARE))
        count_error = self.counters.count_background_error
        self.delivery.keep_history(
            HistoryReaders(
                *(source, max_bytes, self._readers, self._loop, count_error, self._stamping.wall_us)
            )
        )

    def share_out(self, weights: Weights) -> None:
        """Let tenants share the memory by other ``weights`` from now on; nobody loses anything now.

        The next message brings all rings within the bound, where that is needed.
        """
        self.topics.share_out(weights)
        self.answers.share_out(weights)

    def tell_lifecycle(self, by_tenant: Mapping[str, Told]) -> None:
        """Tell tenants of the changes of these topics from now on."""
        self.lifecycle.change(by_tenant)
        self._readers.lifecycle = self.lifecycle if self.lifecycle.is_on else None

    # --- figures ---------------------------------------------------------------------------------

    @property
    def subscribers(self) -> int:
        """Readers that are joined, over all topics."""
        return self._readers.count

    @property
    def open_circuits(self) -> int:
        """Readers that are suspended because their circuit is open."""
        return len(self._readers.suspended)

    @property
    def reading_history(self) -> int:
        """Readers whose next message lies before their topic's ring."""
        return 0 if self.delivery.history is None else len(self.delivery.history)

    def topics_read(self) -> list[Topic]:
        """Return the topics that have readers."""
        return list(self._readers.topics)

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
        """The load that the throttle was last evaluated from; None before the first time."""
        return self._control_loops.last_load

    def settle(self, topics: Iterable[Topic]) -> float:
        """Bring the counters of these topics' readers up to date; return the loop's time."""
        now_s = self._loop.time()
        for topic in topics:
            topic.settle(now_s)
        return now_s

    def sum_up(self) -> Generator[None, None, tuple[Totals, int]]:
        """Return the sums over all topics and the number of slow subscribers, in steps."""
        return self.topics.totals(self._loop.time)

    def is_throttling(self) -> bool:
        """Whether any publishers are slowed down right now."""
        return self.throttler.delay_s(self._loop.time()) > 0.0

    # --- timers ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the timers: throttle, windows, memory, idle topics, buckets, old answers."""
        self._timers.every(adaptive_throttler.INTERVAL_S, self.evaluate_throttle)
        self._timers.every(adaptive_buffer.INTERVAL_S, self.evaluate_buffers)
        self._timers.every(memory_ladder.INTERVAL_S, self.memory_guard.look)
        self._timers.every(LOOK_S, self._look_at_lag)
        self._timers.every(IDLE_SWEEP_S, self.evict_idle_topics)
        self._timers.every(MEMORY_LOOK_S, self.give_back_memory)
        self._timers.every(RATE_SWEEP_S, self.forget_full_buckets)
        self._timers.every(KEY_SWEEP_S, self.forget_old_answers)

    def stop(self) -> None:
        """Stop the timers, and disconnect no reader for an open circuit after this."""
        self._timers.stop()
        self.delivery.circuits.stop()
        if self.delivery.history is not None:
            self.delivery.history.stop()

    def evict_idle_topics(self) -> None:
        """Forget topics that had no reader and no publish for `topic_idle_s`."""
        forgotten = self.topics.evict_idle(self._loop.time())
        if forgotten:
            # Where topics come and go this is every second; operators see it explained and counted.
            log.debug("idle topics evicted count=%d left=%d", len(forgotten), len(self.topics))
            note_idle_topics(self.decisions, forgotten, self.topics.limits.idle_s)
        for topic in forgotten:
            self.patterns.topic_forgotten(topic)

    def give_back_memory(self) -> None:
        """Give memory back to the machine that rings and closed connections have freed."""
        self.memory.look(self._held_bytes(), is_quiet=self._readers.count <= QUIET_READERS)

    def _give_back_now(self, freed_bytes: int) -> None:
        if freed_bytes:
            self.memory.give_back(self._held_bytes())
        else:
            self.memory.trim()

    def _held_bytes(self) -> int:
        """Return what rings and readers take, which is most of the memory."""
        return self.topics.ring_bytes + self._readers.count * READER_COST_BYTES

    def forget_full_buckets(self) -> None:
        """Forget the token buckets of tenants that have not published for a while."""
        self.rate_limiter.sweep(self._loop.time(), at_most=_BUCKETS_PER_SWEEP)

    def forget_old_answers(self) -> None:
        """Forget the answers to idempotency keys whose time is up."""
        self.answers.sweep(self._loop.time(), at_most=_KEYS_PER_SWEEP)
        if pushed_out := self.answers.pushed_out - self._told_pushed_out:
            self._told_pushed_out += pushed_out
            note_keys_pushed_out(self.decisions, pushed_out, self.answers.max_keys)

    def _note_rings_cut(self, portion: str, rings: int, freed_bytes: int) -> None:
        max_bytes = self.topics.max_ring_bytes
        note_rings_cut(self.decisions, portion, rings, freed_bytes, max_bytes)

    def _note_frames_given_back(self, kept: Budget, freed_bytes: int) -> None:
        note_frames_given_back(self.decisions, self._portion_that_keeps(kept), kept, freed_bytes)

    def _note_frames_not_kept(self, kept: Budget) -> None:
        note_frames_not_kept(self.decisions, self._portion_that_keeps(kept), kept)

    def _portion_that_keeps(self, kept: Budget) -> str:
        """Return the name of the portion whose kept frames are counted in ``kept``."""
        names = (each.name for each in self.topics.portions if each.kept is kept)
        return next(names, OTHERS)

    def _look_at_lag(self) -> None:
        """See how late the loop is, and bound the handshakes by that."""
        arrivals = self.arrivals
        late_s = self._loop_lag.look()
        if not arrivals.look(late_s, self._loop.time()):
            return
        if arrivals.is_limited:
            log.warning(
                "handshakes limited rate_per_s=%.0f loop_late_s=%.2f", arrivals.rate_per_s, late_s
            )
        else:
            log.info("handshakes no longer limited refused=%d", arrivals.refused)

    # --- the end, and the next beginning ---------------------------------------------------------

    def begin_drain(self, drained_at_s: float, *, serves_publishers: bool) -> None:
        """Take no new readers from here on, and no publishes unless ``serves_publishers``.

        Args:
            drained_at_s: when readers may come back, on the loop's clock.
        """
        self.is_draining = True
        self.serves_publishers = serves_publishers
        self._drained_at_s = drained_at_s
        self._returning = self.subscribers

    def refuse_publishers(self) -> None:
        """Accept no new publish from here on: the readers that had everything have left."""
        self.serves_publishers = False

    async def drain(self, deadline_s: float) -> None:
        """Refuse new publishes, finish waiting ones, and wait for readers.

        The wait ends when no lagging reader takes anything more, and at ``deadline_s`` on the
        loop's clock at the latest.
        """
        self.is_draining, self.serves_publishers = True, False
        self.lifecycle.stop()
        await self._drain.finish(deadline_s)

    def seal(self) -> None:
        """Append no message from here on: publishes that the shutdown cut off fail."""
        self._stamping.seal()
        if self.journal is not None:
            self.journal.node.seal()

    def _is_journal_busy(self) -> bool:
        return self.journal is not None and self.journal.node.is_busy

    def saved(self) -> list[tuple[SavedTopic, RecentMessageCache]]:
        """Return each topic's position and its ring, the last used first; call `seal` before."""
        return saved_topics(self.topics)

    @property
    def last_id_us(self) -> int:
        """The last message's id, in microseconds since 1970; 0 before the first."""
        return self._stamping.last_id_us

    def restore(self, reader: StateReader) -> None:
        """Take over the topics in a state file, as far as the limits allow.

        Called before anything is served.
        """
        self._stamping.go_on_after(reader.last_id_us)
        times = self._loop.time(), self.wall_us()
        if self.journal is None:
            restore_topics(self.topics, reader, *times)
        else:
            restore_topics(self.topics, reader, *times, self.journal.covers)
