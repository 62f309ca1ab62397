"""The heart: publish, subscribe, rounds, control timers, drain. No HTTP and no sockets here.

Everything happens on the loop's thread, and no ``await`` stands between reading and changing
shared state; that is the only lock there is. Time comes from the loop, wall time from a function.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, Protocol

import msgspec

from clevrd.config import Config
from clevrd.control import adaptive_buffer, adaptive_throttler
from clevrd.control.adaptive_buffer import AdaptiveBufferManager, BufferDecision, BufferSample
from clevrd.control.adaptive_throttler import AdaptiveThrottler, ThrottleDecision, ThrottleSample
from clevrd.control.rate_limiter import RateLimiter
from clevrd.control.system_stats import LoadSample, SystemStats, memory_limit_bytes
from clevrd.core.circuit import CircuitBudget
from clevrd.core.control_frames import Ref, Subscribed
from clevrd.core.encoding import FrameEncoder
from clevrd.core.idempotency import KEY_COST_BYTES, RememberedAnswers, Slot
from clevrd.core.message import KeyedMessage, Message, MessageIds, PublishRequest, rfc3339
from clevrd.core.positions import Start, Wish, start_of
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.state_format import SavedTopic, StateReader
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Round, Topic
from clevrd.core.topic_manager import TopicLimits, TopicManager
from clevrd.errors import InvalidRequest, Throttled, Unavailable
from clevrd.input_budget import InputBudget
from clevrd.metrics import Counters
from clevrd.tenants import Tenant
from clevrd.timers import Tasks, Timers
from clevrd.watches import Watches

log = logging.getLogger(__name__)

# 256: a slice of about 1.5 ms at 6 us a write, between which other connections are served. With
# 1,000 readers at 1,000/s slices of 64, 256 and 1,024 give a p50 of 5.0, 4.8 and 4.5 ms: no gain.
# Starting a back-to-back round a third of a round later was tried there too: a quarter less CPU,
# but p50 from 4.8 to 6.4 ms and p99 from 11 to 15, so rounds follow each other at once.
WRITES_PER_SLICE: Final = 256

# Messages appended at once before others get a turn: about 1 ms at 3.5 us each.
MAX_RUN: Final = 256
# And their bytes, unless it is a single message.
RUN_MAX_BYTES: Final = 262_144

# Bytes a lagging reader is handed at a time; its transport stops it after one or two of them.
CATCH_UP_BYTES: Final = 65_536

# Of these in one turn of the loop: half a MiB, a fraction of a millisecond on loopback.
CATCH_UP_CHUNKS: Final = 8

# Publishes that may wait for a throttle or for room at once; each holds one decoded request.
MAX_WAITING_PUBLISHES: Final = 10_000

# A topic whose waiting messages pass this share of its ring makes publishers wait for the round,
# so that the ring never gives up what was not offered yet.
_PENDING_SHARE: Final = 4

# A bounded number of topics each time, half a millisecond for 1,000 of them.
IDLE_SWEEP_S: Final = 1.0

# Full token buckets are forgotten a few at a time: a look at 1,000 of them takes 0.3 ms.
RATE_SWEEP_S: Final = 1.0
_BUCKETS_PER_SWEEP: Final = 1_000

# Share of the memory bound for the answers to publishes with an idempotency key.
_KEYS_SHARE: Final = 0.05

# Remembered answers whose time is up are forgotten a few at a time, at 2.6 us each.
KEY_SWEEP_S: Final = 1.0
_KEYS_PER_SWEEP: Final = 1_000

# Circuits that have been open for too long are looked for this often, and so many closed between
# two turns of the loop: a close is a write.
CIRCUIT_SWEEP_S: Final = 1.0
_CIRCUITS_PER_SWEEP: Final = 256

# When a round has failed, which only a bug can do.
_ROUND_RETRY_S: Final = 1.0

# At shutdown readers that took nothing for this long are not waited for.
_DRAIN_PATIENCE_S: Final = 1.0
_DRAIN_POLL_S: Final = 0.01

_SHUTTING_DOWN: Final = "The daemon is shutting down; come back in a moment."

# Close code 41xx: come back, with backoff.
CLOSE_SLOW_CONSUMER: Final = 4101


class Stats(Protocol):
    """Where load figures come from; the machine, or a test."""

    def sample(self) -> LoadSample:
        """Return the load now."""


class Published(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the publisher is told."""

    success: bool
    message_id: str
    offset: int
    epoch: str
    # How many the topic has; those of them that are behind; and those that were slow at the last
    # evaluation, a second ago at most.
    subscribers: int
    lagging: int
    slow: int
    # This is the answer to an earlier publish with the same key; it was not published again.
    repeated: bool = False


class Hub:
    """All topics, the rounds that bring their readers up to date, and the loops that control."""

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        *,
        stats: Stats | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.config = config
        self.counters = Counters()
        self._loop = loop
        self._wall_ns = wall_ns
        # What was configured, and never more than the cgroup or the machine has at all.
        self.max_memory_bytes = min(config.max_memory_mb << 20, memory_limit_bytes())
        self.stats: Stats = stats or SystemStats(self.max_memory_bytes)
        self.topics = TopicManager(
            _limits(config, self.max_memory_bytes), new_epoch=lambda: secrets.token_hex(4)
        )
        self.rate_limiter = RateLimiter(config.publish_rate, config.publish_burst)
        self.throttler = AdaptiveThrottler()
        self.buffers = AdaptiveBufferManager()
        self.last_load: LoadSample | None = None
        self.is_draining = False
        # Nothing is appended any more: what `saved` gives is all that was acknowledged.
        self.is_sealed = False
        self.input_budget = InputBudget(_input_bytes(config, self.max_memory_bytes))
        self._ids = MessageIds()
        self._encoder = FrameEncoder()
        self._max_pending = max(1, config.ring_messages // _PENDING_SHARE)
        self._max_pending_bytes = max(1, config.ring_bytes // _PENDING_SHARE)
        # Messages that may be appended at once: a part of the ring, like what may be pending; with
        # a rate limit one by one, so that the budget is spent to its last message.
        self.max_run = 1 if config.publish_rate else min(MAX_RUN, self._max_pending)
        # Topic -> publishes waiting for room in it, in the order in which they came, each with what
        # wakes it; at most MAX_WAITING_PUBLISHES in all.
        self._room_waiters: dict[Topic, OrderedDict[object, asyncio.Future[None]]] = {}
        self._waiting_publishes = 0
        self.answers: RememberedAnswers[Published] = RememberedAnswers(
            _max_keys(config, self.max_memory_bytes), config.idempotency_s
        )
        # Publishes with a key that wait: set when it is decided what became of them.
        self._under_way: dict[Slot, asyncio.Event] = {}
        # Topics with a round under way: begun, and not yet written to all its readers.
        self._running: set[Topic] = set()
        # Topics with readers, so that the loops that control don't walk through all topics.
        self._read_topics: dict[Topic, None] = {}
        self.subscribers = 0
        self.watches = Watches(self.topics, loop, self.counters.count_background_error)
        self._circuit_budget = CircuitBudget(
            config.circuit_breaker_openings,
            config.circuit_breaker_period_s,
            config.circuit_breaker_open_s,
        )
        # Readers whose circuit is open, the one that opened first first, and their topics.
        self._open_circuits: dict[Subscriber, Topic] = {}
        self._timers = Timers(loop, self.counters.count_background_error)
        # Work beside requests and rounds: publishes that wait, above all.
        self.tasks = Tasks(loop, self.counters.count_background_error)

    def wall_us(self) -> int:
        """Return the wall clock, microseconds since 1970."""
        return self._wall_ns() // 1000

    # --- publish ---------------------------------------------------------------------------------

    def refuse_if_draining(self) -> None:
        """Raise Unavailable once shutdown has begun; what was begun before it is finished."""
        if self.is_draining:
            raise Unavailable(_SHUTTING_DOWN)

    def check_rate(self, tenant: Tenant, count: int = 1) -> None:
        """Take ``count`` messages from the tenant's budget.

        Raises:
            RateLimited: the budget is spent; nothing was taken.
            InvalidRequest: ``count`` is more than the budget ever holds.
        """
        self.rate_limiter.take(tenant.name, count, self._loop.time())

    def topic(self, tenant: Tenant, name: str) -> Topic:
        """Return the tenant's topic, made now if it is missing.

        Raises:
            InvalidRequest: the name can't be a topic's.
            Unavailable: there are as many topics as there may be.
        """
        topic = self.topics.find(tenant.name, name)
        if topic is None:
            # Never before an id that was made: `since` an id of the name's life before would
            # pass for one of this life, had the clock been set back.
            created_at = rfc3339(max(self.wall_us(), self._ids.last_us))
            topic = self.topics.get_or_create(tenant.name, name, created_at, self._loop.time())
            self.watches.topic_made(topic)
        return topic

    def must_wait(self, topic: Topic) -> bool:
        """Whether a publish to ``topic`` has to go through `publish_later` or `turn`."""
        if self.throttler.delay_s(self._loop.time()) > 0.0:
            return True
        return self._has_no_room(topic)

    def publish(self, topic: Topic, request: PublishRequest) -> Published:
        """Append one message and have it offered to all readers this turn; no await.

        Acceptance and delivery follow each other here; a broker would stand between them.
        """
        offset = topic.head + 1
        (message_id,) = self._deliver(topic, offset, (request,))
        lagging = len(topic.lagging)
        subscribers = len(topic.live) + lagging
        return Published(True, message_id, offset, topic.epoch, subscribers, lagging, topic.slow)

    def publish_run(
        self, topic: Topic, requests: Sequence[PublishRequest]
    ) -> tuple[int, list[str]]:
        """Append many messages at once; return the first one's offset and all their ids.

        A run is at most ``max_run`` messages, of RUN_MAX_BYTES in all or a single one, and comes
        after `must_wait` said no, or its `turn`: then the ring holds it beside what is pending.
        """
        offset = topic.head + 1
        return offset, self._deliver(topic, offset, requests)

    async def publish_later(self, topic: Topic, request: PublishRequest) -> Published:
        """Publish once the throttle's delay has passed and the topic has room.

        Raises:
            Throttled: too many publishes wait already.
        """
        return self.publish(await self.turn(topic), request)

    async def turn(self, topic: Topic) -> Topic:
        """Wait until what comes next may be appended to ``topic``, and return the topic.

        What is appended then has to be appended at once. Who came first is served first.

        Raises:
            Throttled: too many publishes wait already.
        """
        self._begin_to_wait()
        try:
            delay_s = self.throttler.delay_s(self._loop.time())
            if delay_s > 0.0:
                await asyncio.sleep(delay_s)
            if self._has_no_room(topic):
                await self._room_in(topic)
        finally:
            self._waiting_publishes -= 1
        # Idle topics are evicted, and this publish may have waited since it was found.
        return self.topic(Tenant(topic.tenant), topic.name)

    def _begin_to_wait(self) -> None:
        if self._waiting_publishes >= MAX_WAITING_PUBLISHES:
            raise Throttled("Too many publishes are waiting for slow readers; retry later.")
        self._waiting_publishes += 1

    # --- publish once ----------------------------------------------------------------------------

    def publish_once(self, tenant: Tenant, request: PublishRequest, key: str) -> Published | None:
        """Publish, or return the first answer if a publish with this key was taken before.

        Returns None when it has to go through `publish_once_later`.

        Raises:
            InvalidRequest: the key was used for other data.
        """
        slot = (tenant.name, request.topic, key)
        if first := self._first_answer(slot, request):
            return first
        if slot in self._under_way:
            return None
        topic = self.topic(tenant, request.topic)
        return None if self.must_wait(topic) else self._publish_first(topic, request, slot)

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
        await self._end_of(slot)
        if first := self._first_answer(slot, request):
            return first
        self._under_way[slot] = decided = asyncio.Event()
        try:
            topic = self.topic(tenant, request.topic)
            if self.must_wait(topic):
                topic = await self.turn(topic)
            return self._publish_first(topic, request, slot)
        finally:
            del self._under_way[slot]
            decided.set()

    async def _end_of(self, slot: Slot) -> None:
        """Wait until no publish with this key is under way."""
        if slot not in self._under_way:
            return
        self._begin_to_wait()
        try:
            while decided := self._under_way.get(slot):
                await decided.wait()
        finally:
            self._waiting_publishes -= 1

    def _first_answer(self, slot: Slot, request: PublishRequest) -> Published | None:
        first = self.answers.find(slot, bytes(request.data), self._loop.time())
        return msgspec.structs.replace(first, repeated=True) if first is not None else None

    def _publish_first(self, topic: Topic, request: PublishRequest, slot: Slot) -> Published:
        answer = self.publish(topic, request)
        self.answers.remember(slot, bytes(request.data), answer, self._loop.time())
        return answer

    # --- appending, and room for it --------------------------------------------------------------

    def _deliver(self, topic: Topic, offset: int, requests: Sequence[PublishRequest]) -> list[str]:
        """Give ``topic`` its messages from ``offset`` on, each encoded once; return their ids."""
        if self.is_sealed:
            raise Unavailable(_SHUTTING_DOWN)
        next_id, encode, wall_us = self._ids.next, self._encoder.frame, self._wall_ns() // 1000
        name, tenant = topic.name, topic.tenant
        ids: list[str] = []
        frames: list[bytes] = []
        for number, request in enumerate(requests, offset):
            message_id, timestamp = next_id(wall_us)
            ids.append(message_id)
            data, key = request.data, request.key
            frames.append(
                encode(
                    Message(message_id, name, tenant, data, timestamp, number)
                    if key is None
                    else KeyedMessage(message_id, name, tenant, data, timestamp, number, key)
                )
            )
        self.topics.extend(topic, offset, frames, self._loop.time())
        if not topic.flush_is_scheduled and topic.pending:
            self._schedule_round(topic)
        return ids

    def _is_full(self, topic: Topic) -> bool:
        return topic.pending >= self._max_pending or topic.pending_bytes >= self._max_pending_bytes

    def _makes_room(self, topic: Topic) -> bool:
        """Offer what is pending right now where that is short; return whether there is room."""
        if topic in self._running or len(topic.live) > WRITES_PER_SLICE:
            return False
        while self._is_full(topic):
            if not self._begin_round(topic):
                break
        return True

    def _has_no_room(self, topic: Topic) -> bool:
        """Whether a publish to ``topic`` has to wait for a round, or for others that wait."""
        if self._room_waiters and topic in self._room_waiters:
            return True
        return self._is_full(topic) and not self._makes_room(topic)

    async def _room_in(self, topic: Topic) -> None:
        """Wait until ``topic`` has room and nobody else has waited for it longer."""
        waiters = self._room_waiters.setdefault(topic, OrderedDict())
        me = object()
        try:
            while True:
                waiters[me] = woken = self._loop.create_future()
                await woken
                # They are woken in their order, so who looks first has waited longest.
                if not self._is_full(topic) or self._makes_room(topic):
                    return
        finally:
            del waiters[me]
            self._pass_on(topic, waiters)

    def _pass_on(self, topic: Topic, waiters: OrderedDict[object, asyncio.Future[None]]) -> None:
        """Let the next one look whether there is room for it too."""
        if not waiters:
            del self._room_waiters[topic]
            return
        woken = next(iter(waiters.values()))
        if not woken.done():
            woken.set_result(None)

    def _wake_waiters(self, topic: Topic) -> None:
        """Let as many waiting publishes go on as there is room for, longest waiting first."""
        waiters = self._room_waiters.get(topic)
        if waiters is None:
            return
        for woken in islice(waiters.values(), max(0, self._max_pending - topic.pending)):
            if not woken.done():
                woken.set_result(None)

    # --- rounds ----------------------------------------------------------------------------------

    def _schedule_round(self, topic: Topic) -> None:
        topic.flush_is_scheduled = True
        self._loop.call_soon(self._guarded, topic, self._begin_round, topic)

    def _guarded(self, topic: Topic, action: Callable[..., object], *arguments: object) -> None:
        """Do a step of a round; should it fail, the topic goes on a second later.

        Without this a bug would leave the topic marked as busy, and its publishers waiting.
        """
        try:
            action(*arguments)
        except Exception:
            self.counters.count_background_error()
            log.exception("round failed topic=%s", topic.name)
            self._running.discard(topic)
            self._loop.call_later(_ROUND_RETRY_S, self._end_round, topic)

    def _begin_round(self, topic: Topic) -> bool:
        """Offer what is pending to all readers of ``topic``, unless a round is under way.

        Returns whether something was offered.
        """
        if topic in self._running:
            return False
        step = topic.begin_round(self._loop.time())
        if step is None:
            self._end_round(topic)
            return False
        for reader in step.tripped:
            self._open_circuit(topic, reader)
        self._write_slice(step, 0)
        return True

    def _end_round(self, topic: Topic) -> None:
        """Let waiting publishes go on, and come back while there is anybody or anything waiting."""
        self._running.discard(topic)
        topic.flush_is_scheduled = False
        self._wake_waiters(topic)
        if topic.needs_round or topic in self._room_waiters:
            self._schedule_round(topic)

    def _write_slice(self, step: Round, first: int) -> None:
        """Write a round to its next readers, then yield to the loop or end the round."""
        left = WRITES_PER_SLICE
        topic = step.topic
        while True:
            readers = step.readers
            last = first + left
            # Whole lists, which most are, are not copied.
            is_whole = first == 0 and len(readers) <= left
            self._write_to(step, readers if is_whole else readers[first:last])
            if last < len(readers):
                first = last
                break
            left = last - len(readers)
            if step.then is None:
                self._end_round(topic)
                return
            step, first = step.then, 0
            if not left:
                break
        self._running.add(topic)
        self._loop.call_soon(self._guarded, topic, self._write_slice, step, first)

    def _write_to(self, step: Round, readers: list[Subscriber]) -> None:
        start, end, messages, payload = step.start, step.end, step.messages, step.payload
        written = 0
        for reader in readers:
            # Whoever left, lags or has read past the start since the round began is not for it.
            if reader.cursor != start or not reader.is_live:
                continue
            # Before the write, in which the transport may call `paused` for this reader.
            reader.cursor = end
            reader.delivered += messages
            written += messages
            try:
                reader.write(payload)
            except Exception:
                self._write_failed(step.topic, reader)
        step.topic.delivered += written

    def _write_failed(self, topic: Topic, reader: Subscriber) -> None:
        """One reader's transport must not stop the round for the others."""
        log.exception("write to subscriber failed topic=%s", topic.name)
        self.counters.count_background_error()
        self.unsubscribe(topic, reader)
        reader.sink.close(1011, "write_failed")

    # --- circuits --------------------------------------------------------------------------------

    @property
    def open_circuits(self) -> int:
        """How many readers are given nothing until their transport has room again."""
        return len(self._open_circuits)

    def _open_circuit(self, topic: Topic, reader: Subscriber) -> None:
        """Stop buffering for ``reader``, or disconnect it when it has done so too often."""
        if not reader.is_joined:
            # It left with another one that was on its connection.
            return
        openings = self._circuit_budget.spend(reader.openings, self._loop.time())
        if openings is None:
            self._break_circuit(topic, reader)
            return
        reader.openings = openings
        topic.suspend(reader)
        self._open_circuits[reader] = topic
        self.counters.circuits_opened += 1
        log.debug("circuit opened topic=%s openings=%d", topic.name, len(openings))
        if not reader.is_blocked:
            # It is given more than it can read in its turns, and no transport will call for it.
            self._loop.call_soon(self._retry_circuit, topic, reader)

    def _retry_circuit(self, topic: Topic, reader: Subscriber) -> None:
        if not reader.is_blocked:
            self.resumed(topic, reader)

    def _break_circuit(self, topic: Topic, reader: Subscriber) -> None:
        self.unsubscribe(topic, reader)
        reader.sink.close(CLOSE_SLOW_CONSUMER, "circuit_open")
        log.debug("circuit broken topic=%s openings=%d", topic.name, len(reader.openings))

    def break_overdue_circuits(self) -> None:
        """Disconnect the readers whose circuit has been open for too long."""
        now_s = self._loop.time()
        for reader, topic in list(islice(self._open_circuits.items(), _CIRCUITS_PER_SWEEP)):
            if not self._circuit_budget.is_overdue(reader.openings, now_s):
                return
            self._break_circuit(topic, reader)
        if self._open_circuits:
            self._loop.call_soon(self.break_overdue_circuits)

    # --- subscribe -------------------------------------------------------------------------------

    def subscribe(
        self,
        topic: Topic,
        reader: Subscriber,
        wish: Wish,
        *,
        pattern: str | msgspec.UnsetType = msgspec.UNSET,
        ref: Ref = msgspec.UNSET,
    ) -> None:
        """Join ``reader`` and hand it what it wishes of the past, then what comes.

        Its greeting says by which ``pattern`` it came, and the ``ref`` of the command that asked.
        """
        now_s = self._loop.time()
        topic.set_window(self.buffers.window, now_s)
        start = start_of(topic, wish)
        if start.after > topic.edge:
            # It has this turn's message already, from a publish answer perhaps.
            self._begin_round(topic)
        topic.join_after(reader, start.after, now_s)
        self._read_topics[topic] = None
        self.subscribers += 1
        if reader.gaps is not None:
            reader.sink.write(_greeting(topic, reader, start, pattern, ref))
        self._catch_up(topic, reader)

    def serve(self, topic: Topic, after: int, max_messages: int, max_bytes: int) -> list[bytes]:
        """Return what ``topic`` has behind offset ``after``, for a reader that does not stay."""
        return topic.serve(after, after + max_messages, max_bytes, self._loop.time())

    def unsubscribe(self, topic: Topic, reader: Subscriber) -> None:
        """Let ``reader`` go; what waited for it is discarded. Idempotent."""
        if not reader.is_joined:
            return
        self._open_circuits.pop(reader, None)
        topic.leave(reader, self._loop.time())
        self.subscribers -= 1
        if topic.subscribers == 0:
            self._read_topics.pop(topic, None)

    def paused(self, topic: Topic, reader: Subscriber) -> None:
        """Note that the reader's transport is full: nothing is done for it until it `resumed`."""
        reader.is_blocked = True
        if reader.is_joined:
            topic.mark_lagging(reader)

    def resumed(self, topic: Topic, reader: Subscriber) -> None:
        """Note that the reader's transport takes more: it reads on where its policy puts it."""
        reader.is_blocked = False
        if not reader.is_joined:
            return
        if self._open_circuits.pop(reader, None) is not None:
            topic.resume(reader, self._loop.time())
        self._catch_up(topic, reader)

    def _catch_up(self, topic: Topic, reader: Subscriber) -> None:
        """Let a lagging reader read up to the edge, and join the live ones when it is there.

        Its transport stops it sooner as a rule; a reader as fast as we are is made to take turns.
        """
        if reader in self._open_circuits:
            # Its circuit opened between two of its turns.
            return
        now_s = self._loop.time()
        for _ in range(CATCH_UP_CHUNKS):
            if reader.is_blocked or reader.is_live or not reader.is_joined:
                return
            frames = topic.read(reader, CATCH_UP_BYTES, now_s)
            if not frames:
                topic.mark_live(reader)
                return
            reader.write(reader.spelling.joined(frames))
        self._loop.call_soon(self._catch_up, topic, reader)

    # --- control loops ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the timers: throttle, buffers, idle topics."""
        self._timers.every(adaptive_throttler.INTERVAL_S, self.evaluate_throttle)
        self._timers.every(adaptive_buffer.INTERVAL_S, self.evaluate_buffers)
        self._timers.every(IDLE_SWEEP_S, self.evict_idle_topics)
        self._timers.every(RATE_SWEEP_S, self.forget_full_buckets)
        self._timers.every(KEY_SWEEP_S, self.forget_old_answers)
        self._timers.every(CIRCUIT_SWEEP_S, self.break_overdue_circuits)

    def stop(self) -> None:
        """Stop the timers."""
        self._timers.stop()

    def evaluate_throttle(self) -> ThrottleDecision:
        """Sample the load and decide whether publishers are throttled; return why."""
        now_s = self._loop.time()
        load = self.last_load = self.stats.sample()
        slow = self.slow_subscribers()
        was_throttling = self.throttler.decision.is_throttling
        decision = self.throttler.evaluate(
            ThrottleSample(self.subscribers, slow, load.cpu, load.memory), now_s
        )
        if decision.is_throttling != was_throttling:
            log.info(
                "throttle changed is_throttling=%s reason=%r",
                decision.is_throttling,
                decision.reason,
            )
        return decision

    def evaluate_buffers(self) -> BufferDecision:
        """Decide how far readers may lag, and let every reader of every topic know."""
        now_s = self._loop.time()
        load = self.last_load or self.stats.sample()
        before = self.buffers.window
        decision = self.buffers.evaluate(
            BufferSample(
                max_memory_bytes=self.max_memory_bytes,
                ring_bytes=self.topics.ring_bytes,
                machine_available_bytes=load.available_bytes,
                subscribers=self.subscribers,
                mean_message_bytes=self._mean_message_bytes(),
            )
        )
        for topic in self._read_topics:
            topic.set_window(decision.window_messages, now_s)
        if decision.window_messages != before:
            log.info("window changed from=%d to=%d", before, decision.window_messages)
        return decision

    def settle(self) -> float:
        """Bring every reader's counters up to date; return the time they are of."""
        now_s = self._loop.time()
        for topic in self._read_topics:
            topic.settle(now_s)
        return now_s

    def slow_subscribers(self) -> int:
        """Return how many subscribers are slow, over all topics."""
        now_s = self._loop.time()
        return sum(topic.slow_count(now_s) for topic in self._read_topics)

    def is_throttling(self) -> bool:
        """Whether publishers are slowed down right now."""
        return self.throttler.delay_s(self._loop.time()) > 0.0

    def evict_idle_topics(self) -> None:
        """Forget topics that nobody uses."""
        forgotten = self.topics.evict_idle(self._loop.time())
        if forgotten:
            log.info("idle topics evicted count=%d left=%d", len(forgotten), len(self.topics))
        for topic in forgotten:
            self.watches.topic_forgotten(topic)

    def forget_full_buckets(self) -> None:
        """Give back the memory of tenants that have not published for a while."""
        self.rate_limiter.sweep(self._loop.time(), at_most=_BUCKETS_PER_SWEEP)

    def forget_old_answers(self) -> None:
        """Give back the memory of idempotency keys whose time is up."""
        self.answers.sweep(self._loop.time(), at_most=_KEYS_PER_SWEEP)

    def _mean_message_bytes(self) -> float:
        """Return the mean size of the recent messages that anybody reads, 0.0 for none."""
        messages = sum(len(topic.ring) for topic in self._read_topics)
        held_bytes = sum(topic.ring.size_bytes for topic in self._read_topics)
        return held_bytes / messages if messages else 0.0

    # --- drain -----------------------------------------------------------------------------------

    async def drain(self, deadline_s: float) -> None:
        """Refuse new publishes, finish waiting ones, and flush what readers can still take.

        Ends when every reader is up to date, when those that lag took nothing for
        _DRAIN_PATIENCE_S, or at ``deadline_s`` on the loop's clock.
        """
        self.is_draining = True
        progress = (-1, -1)
        patience_ends_s = 0.0
        while (now_s := self._loop.time()) < deadline_s:
            busy = self._waiting_publishes or self._running or self._has_pending()
            lagging = any(topic.lagging for topic in self._read_topics)
            if not busy and not lagging:
                return
            if busy:
                patience_ends_s = 0.0
            elif now_s >= patience_ends_s:
                before, progress = progress, self._drained()
                if progress == before:
                    return
                patience_ends_s = now_s + _DRAIN_PATIENCE_S
            await asyncio.sleep(_DRAIN_POLL_S)

    def _drained(self) -> tuple[int, int]:
        """Return what changes when any lagging reader takes anything: 1 us for each of them.

        Messages handed over, and bytes that were handed over before and are not taken yet: a
        reader at some KB/s lives on what its connection holds for many seconds.
        """
        delivered = sum(topic.delivered for topic in self._read_topics)
        unsent_bytes = sum(
            reader.sink.unsent_bytes() for topic in self._read_topics for reader in topic.lagging
        )
        return delivered, unsent_bytes

    def _has_pending(self) -> bool:
        return any(topic.pending for topic in self._read_topics)

    # --- over a planned restart ------------------------------------------------------------------

    def seal(self) -> None:
        """Append nothing more: publishes that were cut at shutdown fail from here on."""
        self.is_sealed = True

    def saved(self) -> list[tuple[SavedTopic, RecentMessageCache]]:
        """Return where every topic stands and its ring, the last used first. `seal` first."""
        topics = sorted(self.topics, key=lambda topic: topic.last_used_s, reverse=True)
        return [(_saved(topic), topic.ring) for topic in topics]

    @property
    def last_id_us(self) -> int:
        """The last message's id, in microseconds since 1970; 0 before the first."""
        return max(0, self._ids.last_us)

    def restore(self, reader: StateReader) -> None:
        """Go on with the topics in a file, as far as the limits allow. Nothing is served yet."""
        self._ids.go_on_after(reader.last_id_us)
        now_s = self._loop.time()
        left_out, reason = 0, ""
        for saved, ring in reader.topics(self.topics.ring_for):
            try:
                self.topics.restore(saved, ring, now_s)
            except (Unavailable, InvalidRequest) as error:
                left_out += 1
                reason = str(error)
        if left_out:
            log.warning("topics not restored count=%d last_reason=%r", left_out, reason)


def _saved(topic: Topic) -> SavedTopic:
    ring = topic.ring
    return SavedTopic(
        topic.tenant, topic.name, topic.epoch, topic.created_at, ring.first, len(ring)
    )


def _max_keys(config: Config, max_memory_bytes: int) -> int:
    """Return how many idempotency keys are remembered: what is set, or what memory allows."""
    affordable = int(max_memory_bytes * _KEYS_SHARE) // KEY_COST_BYTES
    return min(config.max_idempotency_keys, affordable)


def _input_bytes(config: Config, max_memory_bytes: int) -> int:
    """Return what unfinished input may hold: a tenth of memory, or two of the largest bodies."""
    largest_bytes = max(config.max_batch_bytes, config.max_message_bytes)
    return max(max_memory_bytes // 10, 2 * largest_bytes)


def _greeting(
    topic: Topic,
    reader: Subscriber,
    start: Start,
    pattern: str | msgspec.UnsetType,
    ref: Ref,
) -> bytes:
    """Return what a reader that asked for control frames gets first."""
    gap = start.gap
    # Before what is missing, where that is known: the gap is all that lies between.
    offset = gap.first - 1 if gap is not None and gap.first is not None else reader.position()
    window = reader.granted_window(topic.window_cap)
    greeting = Subscribed(topic.name, topic.epoch, offset, start.is_recovered, window, pattern, ref)
    spelling = reader.spelling
    if gap is None:
        return spelling.control(greeting, offset)
    # Who is cut between the two comes back from where it was, and is told again.
    return spelling.control(greeting) + spelling.control(gap, reader.position())


def _limits(config: Config, max_memory_bytes: int) -> TopicLimits:
    return TopicLimits(
        max_memory_bytes=max_memory_bytes,
        ring_messages=config.ring_messages,
        ring_bytes=config.ring_bytes,
        max_topics=config.max_topics,
        max_topics_per_tenant=config.max_topics_per_tenant,
        circuit_breaker_threshold=config.circuit_breaker_threshold,
        idle_s=config.topic_idle_s,
    )
