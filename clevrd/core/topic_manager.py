"""TopicManager: (tenant, topic) -> Topic; limits, memory of all rings together, idle eviction.

Keys are tuples, never joined strings: "a:b" of tenant "x" is not "b" of tenant "x:a".
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from typing import Final

import msgspec

from clevrd.core.kept_frames import KeptBudget
from clevrd.core.message import check_topic
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.saved_topic import SavedTopic
from clevrd.core.stream_forms import TextBudget
from clevrd.core.topic import Counts, Topic
from clevrd.errors import InvalidRequest, Unavailable

# When all rings together are over their bound they are cut to this share of it, so that the
# search for the largest is paid once per tenth of the memory and not once per message.
_TRIM_TO: Final = 0.9

# Share of the memory bound for rings; a quarter of it again may be held by readers that keep the
# oldest, and the rest is connections, transport buffers and the interpreter.
_RINGS_SHARE: Final = 0.6
_KEPT_SHARE: Final = 0.15
# And for messages spelled for SSE and NDJSON readers, beyond which each reader's are its own.
_TEXTS_SHARE: Final = 0.05

# Rings cut at a time, about 3 us each. Where more are alike, the next publish cuts the next.
_RINGS_PER_TRIM: Final = 256

# Topics looked at in one sweep, about 0.3 us each and 2 us for one that is evicted: where there are
# 100,000, one that is idle is found within as many seconds.
TOPICS_PER_SWEEP: Final = 1_000
# Of which no more are forgotten once these had so much in their rings: what three sweeps forget
# takes 10 ms to give back to the machine (memory.py).
FORGOTTEN_BYTES_PER_SWEEP: Final = 16 << 20

# A topic without a message is nothing but a name that somebody reads. This is how long it is kept
# after its last reader left: longer than a reader takes from finding it to joining it.
UNMADE_S: Final = 5.0
# Names that one sweep forgets, at about 2 us each.
UNMADE_PER_SWEEP: Final = 2_500
# Names whose epoch is remembered, so that a reader who comes back to one has missed nothing.
MAX_REMEMBERED: Final = 10_000

# Topics that are kept in mind as busy, so that the busiest are found among them and not among all.
_BUSY_TOPICS: Final = 1_000

# Between two looks at the time: subscribers that are summed up, at up to 1 us each, and how many of
# them a topic by itself costs as much as; topics that are compared, at 0.3 us each.
_SUBSCRIBERS_PER_STEP: Final = 512
_TOPIC_COSTS: Final = 8
_CANDIDATES_PER_STEP: Final = 1_000
# And those that are merged, at 1 us.
_MERGED_PER_STEP: Final = 250

# Idle topics go by the minute at best, so sooner is no use.
_LIMIT_RETRY_S: Final = 60.0


class TopicLimits(msgspec.Struct, frozen=True):
    """Bounds of all topics; sizes in messages and bytes."""

    max_memory_bytes: int
    ring_messages: int = 10_000
    ring_bytes: int = 64 << 20
    max_topics: int = 100_000
    max_topics_per_tenant: int = 10_000
    circuit_breaker_threshold: int = 100
    idle_s: float = 3600.0


class Totals:
    """Sums over all topics there are and were; they never fall."""

    __slots__ = ("delivered", "discarded", "lost", "offered", "published", "queued")

    def __init__(self) -> None:
        self.published = 0
        self.offered = 0
        self.delivered = 0
        self.discarded = 0
        # By reason, as Losses names them.
        self.lost = {"slow_consumer": 0, "retention": 0, "memory": 0}
        # What waits at the moment; this one does fall.
        self.queued = 0

    def copy(self) -> Totals:
        """Return sums that go on by themselves."""
        other = Totals()
        other.offered, other.delivered = self.offered, self.delivered
        other.discarded, other.lost = self.discarded, dict(self.lost)
        return other

    def add(self, now: Counts, before: Counts) -> None:
        """Add what a topic counted between two looks at it."""
        self.offered += now.offered - before.offered
        self.delivered += now.delivered - before.delivered
        self.discarded += now.discarded - before.discarded
        self.lost["slow_consumer"] += now.slow_consumer - before.slow_consumer
        self.lost["retention"] += now.retention - before.retention
        self.lost["memory"] += now.memory - before.memory


class TopicManager:
    """All topics of all tenants."""

    def __init__(self, limits: TopicLimits, new_epoch: Callable[[], str]) -> None:
        self.limits = limits
        self._new_epoch = new_epoch
        # A plain dict: going over 100,000 topics takes 50 ms in an OrderedDict, and 2 ms here.
        self._topics: dict[tuple[str, str], Topic] = {}
        # Topics with a first message, in the order in which the sweep will look at them.
        self._to_sweep: deque[Topic] = deque()
        # Topics without a message that had no reader when they were added, in that order. The
        # first message takes a topic out, the sweep those that have readers again.
        self._unmade: OrderedDict[Topic, None] = OrderedDict()
        # (tenant, name) -> the epoch and created_at that a forgotten topic without a message had.
        self._remembered: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()
        # Tenant -> its topics, in the order in which they were made; dicts as ordered sets.
        self._per_tenant: dict[str, dict[Topic, None]] = {}
        self.max_ring_bytes = int(limits.max_memory_bytes * _RINGS_SHARE)
        self.budget = KeptBudget(int(limits.max_memory_bytes * _KEPT_SHARE))
        self.text_budget = TextBudget(int(limits.max_memory_bytes * _TEXTS_SHARE))
        # Bytes all rings hold; kept current by extend and trim.
        self.ring_bytes = 0
        # Bit length of a ring's size -> the topics with rings of that order; dicts as ordered sets.
        self._by_size: dict[int, dict[Topic, None]] = {}
        # Topics that had readers since the sums were last taken: of the others only ``published``
        # can have changed, which is counted as it happens.
        self._active: dict[Topic, None] = {}
        self._totals = Totals()
        self._published = 0
        # Every topic with more publishes and deliveries than the bar, unless it is active.
        self._busy: dict[Topic, None] = {}
        self._busy_bar = 0

    def __len__(self) -> int:
        """Return how many topics there are."""
        return len(self._topics)

    @property
    def published(self) -> int:
        """How many messages were published since the start."""
        return self._published

    def __iter__(self) -> Iterator[Topic]:
        """Iterate over all topics; take a list first where topics may come or go meanwhile."""
        return iter(self._topics.values())

    def of_tenant(self, tenant: str) -> list[Topic]:
        """Return the tenant's topics, in the order in which they were made."""
        return list(self._per_tenant.get(tenant, ()))

    def find(self, tenant: str, name: str) -> Topic | None:
        """Return the topic, None when there is none."""
        return self._topics.get((tenant, name))

    def get_or_create(self, tenant: str, name: str, created_at: str, now_s: float) -> Topic:
        """Return the topic, which begins now if it was missing; its first message makes it.

        Raises:
            InvalidRequest: the name can't be a topic's.
            Unavailable: the tenant, or the daemon, has as many topics as it may have.
        """
        topic = self._topics.get((tenant, name))
        if topic is not None:
            return topic
        check_topic(name)
        self._check_limits(tenant)
        ring = RecentMessageCache(self.limits.ring_messages, self.limits.ring_bytes)
        if (tenant, name) in self._remembered:
            epoch, created_at = self._remembered.pop((tenant, name))
        else:
            epoch = self._new_epoch()
        return self._add(tenant, name, ring, epoch, created_at, now_s)

    def ring_for(self, saved: SavedTopic) -> RecentMessageCache | None:
        """Return an empty ring for what there was of a topic; None once memory is spent."""
        left_bytes = self.max_ring_bytes - self.ring_bytes
        if left_bytes <= 0:
            return None
        limits = self.limits
        return RecentMessageCache(
            limits.ring_messages, min(limits.ring_bytes, left_bytes), saved.first
        )

    def restore(self, saved: SavedTopic, ring: RecentMessageCache | None, now_s: float) -> None:
        """Go on with a topic of the process before, in its epoch and behind its newest message.

        A topic without a message is remembered, and begins again with its first reader.

        Args:
            ring: what `ring_for` returned, filled; None for a topic without its messages.

        Raises:
            InvalidRequest: it is there already, or the name can't be a topic's.
            Unavailable: the tenant, or the daemon, has as many topics as it may have.
        """
        if (saved.tenant, saved.name) in self._topics:
            raise InvalidRequest("The topic is there already.")
        check_topic(saved.name)
        if saved.head == 0:
            self._remember(saved.tenant, saved.name, saved.epoch, saved.created_at)
            return
        self._check_limits(saved.tenant)
        limits = self.limits
        if ring is None:
            ring = RecentMessageCache(limits.ring_messages, limits.ring_bytes, saved.head + 1)
        ring.max_bytes = limits.ring_bytes
        topic = self._add(saved.tenant, saved.name, ring, saved.epoch, saved.created_at, now_s)
        # As its offsets do; what readers were offered and lost is counted by each process anew.
        topic.published = ring.head
        self.ring_bytes += ring.size_bytes
        self._reclass(topic)
        if topic.published > self._busy_bar:
            self._note_busy(topic)
        if self.ring_bytes > self.max_ring_bytes:
            # Its newest message alone was more than there was room for.
            self._trim_largest(now_s)

    def remembered(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield tenant, name, epoch and created_at of each name that is remembered."""
        for (tenant, name), (epoch, created_at) in self._remembered.items():
            yield tenant, name, epoch, created_at

    def extend(self, topic: Topic, offset: int, frames: list[bytes], now_s: float) -> None:
        """Append ``frames`` and hold the bound on all rings together: the largest give first.

        Only what is yet to be offered to readers may exceed it, until there is more to append.
        """
        ring = topic.ring
        before = ring.size_bytes
        topic.extend(offset, frames, now_s)
        size = ring.size_bytes
        self.ring_bytes += size - before
        self._published += len(frames)
        if offset == 1:
            self._unmade.pop(topic, None)
            self._to_sweep.append(topic)
        if size.bit_length() != topic.size_class:
            self._reclass(topic)
        if not topic.is_noted and topic.published + topic.delivered > self._busy_bar:
            self._note_busy(topic)
        if self.ring_bytes > self.max_ring_bytes:
            self._trim_largest(now_s)

    def totals(self, now_s: Callable[[], float]) -> Generator[None, None, tuple[Totals, int]]:
        """Return the sums over all topics there are and were, and how many readers are slow.

        It goes topic by topic, and others may be served at each yield: each topic's figures are of
        one moment, so that the sums add up, though not all of the same moment. Of topics without
        readers what was summed up before is not looked at again.
        """
        sums = self._totals.copy()
        sums.published = self._published
        slow = 0
        active = [(topic, topic.reported) for topic in self._active]
        work = _SUBSCRIBERS_PER_STEP
        for topic, reported in active:
            if work >= _SUBSCRIBERS_PER_STEP:
                yield
                work = 0
            work += _TOPIC_COSTS + topic.subscribers
            slow += topic.slow_count(now_s())
            if work >= _SUBSCRIBERS_PER_STEP:
                # It is no part of what has to be of one moment.
                yield
            topic.settle(now_s())
            sums.add(topic.counts, reported)
            if topic.subscribers:
                sums.queued += topic.queued()
            elif topic in self._active:
                self._sum_up(topic)
                del self._active[topic]
                self._note_busy(topic)
        return sums, slow

    def busiest(self, count: int) -> Generator[None, None, list[Topic]]:
        """Return the ``count`` topics with the most publishes and deliveries, busiest first.

        Others may be served at each yield.
        """
        # Below the bar there may be others as busy as those in mind.
        if count <= _BUSY_TOPICS:
            known = {**self._busy, **self._active}
            if len(known) < count:
                known.update(islice(((topic, None) for topic in self._topics.values()), count))
            yield
            return heapq.nlargest(count, known, key=_messages)
        candidates = list(self._topics.values())
        # Sorted part by part, then merged: all at once 10,000 would take 4 ms.
        parts: list[list[Topic]] = []
        for start in range(0, len(candidates), _CANDIDATES_PER_STEP):
            yield
            part = candidates[start : start + _CANDIDATES_PER_STEP]
            parts.append(sorted(part, key=_messages, reverse=True))
        merged = islice(heapq.merge(*parts, key=_messages, reverse=True), count)
        busiest: list[Topic] = []
        while part := list(islice(merged, _MERGED_PER_STEP)):
            yield
            busiest += part
        return busiest

    def note_left(self, topic: Topic) -> None:
        """Note that a reader has left; a topic without a message and without readers is forgotten.

        So reading a name that nobody publishes to leaves nothing behind.
        """
        if not (topic.head or topic.subscribers):
            self._unmade[topic] = None
            self._unmade.move_to_end(topic)

    def _forget_unmade(self, now_s: float) -> None:
        for _ in range(min(len(self._unmade), UNMADE_PER_SWEEP)):
            topic = next(iter(self._unmade))
            if topic.subscribers:
                # `note_left` adds it again.
                del self._unmade[topic]
                continue
            if now_s - topic.last_used_s < UNMADE_S:
                return
            del self._unmade[topic]
            self._forget(topic)
            self._remember(topic.tenant, topic.name, topic.epoch, topic.created_at)

    def _remember(self, tenant: str, name: str, epoch: str, created_at: str) -> None:
        self._remembered[tenant, name] = epoch, created_at
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def evict_idle(self, now_s: float, at_most: int = TOPICS_PER_SWEEP) -> list[Topic]:
        """Forget those of the next ``at_most`` topics that nobody reads or used for ``idle_s``.

        Returns these; who watches them by a pattern is still joined. Also forgets names without
        messages that nobody reads any more, and cuts the rings, should they hold too much: see
        `extend`.
        """
        self._forget_unmade(now_s)
        idle: list[Topic] = []
        forgotten_bytes = 0
        for _ in range(min(at_most, len(self._to_sweep))):
            if forgotten_bytes >= FORGOTTEN_BYTES_PER_SWEEP:
                break
            topic = self._to_sweep.popleft()
            # Nothing but the sweep forgets, so that what it leaves out is gone.
            if self._is_idle(topic, now_s):
                idle.append(topic)
                forgotten_bytes += topic.ring.size_bytes
            else:
                self._to_sweep.append(topic)
        for topic in idle:
            self._forget(topic)
        if self.ring_bytes > self.max_ring_bytes:
            self._trim_largest(now_s)
        return idle

    def _add(
        self,
        tenant: str,
        name: str,
        ring: RecentMessageCache,
        epoch: str,
        created_at: str,
        now_s: float,
    ) -> Topic:
        limits = self.limits
        topic = Topic(
            tenant,
            name,
            ring=ring,
            budget=self.budget,
            window_cap=limits.ring_messages,
            trip_threshold=limits.circuit_breaker_threshold,
            epoch=epoch,
            created_at=created_at,
            now_s=now_s,
            active=self._active,
            text_budget=self.text_budget,
        )
        self._topics[tenant, name] = topic
        if topic.head:
            self._to_sweep.append(topic)
        else:
            self._unmade[topic] = None
        self._per_tenant.setdefault(tenant, {})[topic] = None
        return topic

    def _check_limits(self, tenant: str) -> None:
        limits = self.limits
        if len(self._per_tenant.get(tenant, ())) >= limits.max_topics_per_tenant:
            raise Unavailable(
                f"Tenant {tenant} has {limits.max_topics_per_tenant} topics"
                " (CLEVRD_MAX_TOPICS_PER_TENANT); use an existing one, or raise the limit.",
                retry_after_s=_LIMIT_RETRY_S,
            )
        if len(self._topics) >= limits.max_topics:
            raise Unavailable(
                f"The daemon has {limits.max_topics} topics (CLEVRD_MAX_TOPICS);"
                " use an existing one, or raise the limit.",
                retry_after_s=_LIMIT_RETRY_S,
            )

    def _is_idle(self, topic: Topic, now_s: float) -> bool:
        return topic.is_unused and now_s - topic.last_used_s >= self.limits.idle_s

    def _forget(self, topic: Topic) -> None:
        del self._topics[topic.tenant, topic.name]
        self.ring_bytes -= topic.ring.size_bytes
        self._sum_up(topic)
        self._active.pop(topic, None)
        self._busy.pop(topic, None)
        if topic.size_class:
            self._unclass(topic)
        others = self._per_tenant[topic.tenant]
        del others[topic]
        if not others:
            del self._per_tenant[topic.tenant]

    def _sum_up(self, topic: Topic) -> None:
        counts = topic.counts
        self._totals.add(counts, topic.reported)
        topic.reported = counts

    def _note_busy(self, topic: Topic) -> None:
        """Keep the topic in mind; when these are too many raise the bar, and forget the rest."""
        self._busy[topic] = None
        topic.is_noted = True
        if len(self._busy) > 2 * _BUSY_TOPICS:
            busiest = heapq.nlargest(_BUSY_TOPICS, self._busy, key=_messages)
            for other in self._busy:
                other.is_noted = False
            for other in busiest:
                other.is_noted = True
            self._busy = dict.fromkeys(busiest)
            self._busy_bar = _messages(busiest[-1])

    def _reclass(self, topic: Topic) -> None:
        """Put the topic among those whose rings are of the same order of size."""
        if topic.size_class:
            self._unclass(topic)
        topic.size_class = topic.ring.size_bytes.bit_length()
        if topic.size_class:
            self._by_size.setdefault(topic.size_class, {})[topic] = None

    def _unclass(self, topic: Topic) -> None:
        alike = self._by_size[topic.size_class]
        del alike[topic]
        if not alike:
            del self._by_size[topic.size_class]

    def _trim_largest(self, now_s: float) -> None:
        """Cut the largest rings to one size, the largest first, until the rest is small enough.

        Of very many that are alike some are cut now, by half at most: the others' turn comes.
        """
        largest = self._largest()
        sizes = [topic.ring.size_bytes for topic in largest]
        target = int(self.max_ring_bytes * _TRIM_TO)
        level = _level(sizes, self.ring_bytes - target)
        if len(largest) == _RINGS_PER_TRIM:
            level = max(level, sizes[-1] // 2)
        for topic in largest:
            # Rings give whole messages, so a few may have given enough for all.
            if self.ring_bytes <= target or topic.ring.size_bytes <= level:
                return
            self.ring_bytes -= topic.trim(level, now_s)
            # Also when it remains of its order: others come first the next time.
            self._reclass(topic)

    def _largest(self) -> list[Topic]:
        """Return up to _RINGS_PER_TRIM topics with the largest rings, the largest first.

        Among rings of the same order of size, twice one another at most, it picks any.
        """
        orders = sorted(self._by_size, reverse=True)
        topics = islice(
            chain.from_iterable(self._by_size[order] for order in orders), _RINGS_PER_TRIM
        )
        return sorted(topics, key=lambda topic: topic.ring.size_bytes, reverse=True)


def _messages(topic: Topic) -> int:
    return topic.published + topic.delivered


def _level(sizes: list[int], excess: int) -> int:
    """Return the size to which the largest must be cut so that ``excess`` is saved.

    Args:
        sizes: bytes, largest first.
        excess: bytes to save.
    """
    saved = 0
    for count, size in enumerate(sizes, start=1):
        below = sizes[count] if count < len(sizes) else 0
        if saved + (size - below) * count >= excess:
            return size - -(-(excess - saved) // count)
        saved += (size - below) * count
    return 0
