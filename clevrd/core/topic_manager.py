"""TopicManager: (tenant, topic) -> Topic; limits, memory of all rings together, idle eviction.

Keys are tuples, never joined strings: "a:b" of tenant "x" is not "b" of tenant "x:a".
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from typing import Final

import msgspec

from clevrd.core.budgets import Pool
from clevrd.core.busy_topics import BusyTopics
from clevrd.core.journal_place import JournalPlace, TopicStart
from clevrd.core.names import check_topic
from clevrd.core.portions import ONE_PORTION, Portion, Portions, Weights
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.ring_sizes import RingSizes
from clevrd.core.saved_topic import SavedTopic
from clevrd.core.topic import Topic
from clevrd.core.topic_totals import TopicTotals, Totals
from clevrd.errors import InvalidRequest, TopicLimit, Unavailable

# Share of the memory bound for rings; a quarter of it again may be held by readers that keep the
# oldest, and the rest is connections, transport buffers and the interpreter.
_RINGS_SHARE: Final = 0.6
_KEPT_SHARE: Final = 0.15
# Share for messages spelled as events and lines; beyond it each reader's texts are its own.
_TEXTS_SHARE: Final = 0.05

# Topics looked at in one sweep, about 0.3 us each and 2 us for one that is evicted: where there are
# 100,000, one that is idle is found within as many seconds.
TOPICS_PER_SWEEP: Final = 1_000
# A sweep forgets no more topics once their rings had so many bytes: memory of three such sweeps
# takes 10 ms to give back to the machine (memory.py).
FORGOTTEN_BYTES_PER_SWEEP: Final = 16 << 20

# A topic without a message is nothing but a name that somebody reads. The topic is kept so long
# after its last reader left: longer than a reader takes from finding a topic to joining it.
UNMADE_S: Final = 5.0
# Names that one sweep forgets, at about 2 us each.
UNMADE_PER_SWEEP: Final = 2_500
# Names whose epoch is remembered, so that a reader that comes back to one has missed nothing.
MAX_REMEMBERED: Final = 10_000

# Topics that are moved to another portion in one sweep, at 3.5 us each.
MOVED_PER_SWEEP: Final = 1_000

# Room comes when idle topics go, a minute later or more: a client that asks sooner gains nothing.
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


class TopicManager:
    """All topics of all tenants."""

    def __init__(
        self,
        limits: TopicLimits,
        new_epoch: Callable[[], str],
        weights: Weights = ONE_PORTION,
    ) -> None:
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
        max_ring_bytes = int(limits.max_memory_bytes * _RINGS_SHARE)
        # Bytes that frames kept for lagging readers, and messages in other forms, may take.
        self.kept = Pool(int(limits.max_memory_bytes * _KEPT_SHARE))
        self._texts = Pool(int(limits.max_memory_bytes * _TEXTS_SHARE))
        self.portions = Portions(
            weights,
            max_ring_bytes=max_ring_bytes,
            kept=self.kept,
            texts=self._texts,
            max_topics=limits.max_topics,
            max_topics_per_tenant=limits.max_topics_per_tenant,
        )
        # The sizes of all rings; changed here alone, and watched by the hub.
        self.rings = RingSizes(max_ring_bytes, self.portions)
        # Topics whose tenant may have another portion now; share_out adds, the sweep moves them.
        self._to_move: deque[Topic] = deque()
        # Topics that tenants are guaranteed and have not made; changed by _count_in, _count_out and
        # share_out.
        self._reserved_topics = self.portions.reserved_topics()
        self._totals = TopicTotals()
        self._busy = BusyTopics()

    def __len__(self) -> int:
        """Return how many topics there are."""
        return len(self._topics)

    @property
    def published(self) -> int:
        """How many messages were published since the start."""
        return self._totals.published

    def __iter__(self) -> Iterator[Topic]:
        """Iterate over all topics; take a list first where topics may come or go meanwhile."""
        return iter(self._topics.values())

    @property
    def ring_bytes(self) -> int:
        """Bytes that the rings of all topics hold."""
        return self.rings.total_bytes

    @property
    def max_ring_bytes(self) -> int:
        """Bytes that the rings of all topics may hold."""
        return self.rings.max_bytes

    def of_tenant(self, tenant: str) -> list[Topic]:
        """Return the tenant's topics, in the order in which they were made."""
        return list(self._per_tenant.get(tenant, ()))

    def find(self, tenant: str, name: str) -> Topic | None:
        """Return the topic, None when there is none."""
        return self._topics.get((tenant, name))

    def get_or_create(
        self,
        tenant: str,
        name: str,
        created_at: str,
        now_s: float,
        max_topics: int | None = None,
        start: TopicStart | None = None,
    ) -> Topic:
        """Return the topic, which begins now if it was missing; its first message makes it.

        Args:
            max_topics: topics that the tenant may have; None for as many as each tenant may.
            start: where it goes on, for a topic whose messages a journal keeps.

        Raises:
            InvalidRequest: the name can't be a topic's.
            Unavailable: the tenant, or the daemon, has as many topics as it may have.
        """
        topic = self._topics.get((tenant, name))
        if topic is not None:
            return topic
        check_topic(name)
        self._check_limits(tenant, max_topics)
        if start is not None:
            return self._go_on(tenant, name, start, now_s)
        ring = RecentMessageCache(self.limits.ring_messages, self.limits.ring_bytes)
        if (tenant, name) in self._remembered:
            epoch, created_at = self._remembered.pop((tenant, name))
        else:
            epoch = self._new_epoch()
        return self._add(tenant, name, ring, epoch, created_at, now_s)

    def _go_on(self, tenant: str, name: str, start: TopicStart, now_s: float) -> Topic:
        """Return a topic with an empty ring behind the messages that its journal has."""
        limits = self.limits
        ring = RecentMessageCache(limits.ring_messages, limits.ring_bytes, start.head + 1)
        topic = self._add(tenant, name, ring, start.epoch, start.created_at, now_s, start.place)
        if start.head:
            self.rings.add(topic)
        return topic

    def detached(self, tenant: str, name: str, start: TopicStart, now_s: float) -> Topic:
        """Return a topic that its journal has, for one use: it is not kept among the others."""
        limits = self.limits
        return Topic(
            tenant,
            name,
            ring=RecentMessageCache(limits.ring_messages, limits.ring_bytes, start.head + 1),
            portion=self.portions.of(tenant),
            window_cap=limits.ring_messages,
            epoch=start.epoch,
            created_at=start.created_at,
            now_s=now_s,
            journal=start.place,
        )

    def ring_for(self, saved: SavedTopic) -> RecentMessageCache | None:
        """Return an empty ring for the messages of a saved topic; None once memory is spent."""
        left_bytes = self.rings.left_bytes
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
        self.rings.add(topic)
        if topic.published > self._busy.bar:
            self._busy.note(topic)
        # The newest message alone may be larger than the room that there was.
        self.rings.trim_largest(now_s)

    def begin_anew(self, topic: Topic, start: TopicStart, now_s: float, head: int = 0) -> Topic:
        """Let the name of ``topic``, which is journaled, begin a new epoch; return its new topic.

        ``topic`` has no place here any more; what is counted in it until its last reader has left
        it is summed up by `forget_outlived`.
        """
        if topic.history is None:
            raise ValueError(f"topic {topic.name!r} is in no journal")
        self._take_out(topic)
        self._unmade.pop(topic, None)
        # Messages that are counted in the new epoch already are yet to be delivered.
        begun = self._go_on(
            topic.tenant, topic.name, msgspec.structs.replace(start, head=head), now_s
        )
        topic.history.successor = begun
        return begun

    def begin_empty(self, topic: Topic, created_at: str, now_s: float) -> Topic:
        """Let the name of ``topic``, which is in no journal, begin a new epoch without a message.

        The rest is as in `begin_anew`: nothing of the old epoch is given to anybody who comes from
        now on, and no position of it is used again.
        """
        if topic.journal is not None:
            raise ValueError(f"topic {topic.name!r} is in a journal, which decides its epoch")
        self._take_out(topic)
        self._unmade.pop(topic, None)
        limits = self.limits
        ring = RecentMessageCache(limits.ring_messages, limits.ring_bytes)
        begun = self._add(topic.tenant, topic.name, ring, self._new_epoch(), created_at, now_s)
        topic.outlive(begun)
        return begun

    def forget_outlived(self, topic: Topic) -> None:
        """Sum up a topic whose next epoch has begun, and which has no readers any more."""
        self._totals.forget(topic)

    def remembered(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield tenant, name, epoch and created_at of each name that is remembered."""
        for (tenant, name), (epoch, created_at) in self._remembered.items():
            yield tenant, name, epoch, created_at

    def extend(self, topic: Topic, offset: int, frames: list[bytes], now_s: float) -> None:
        """Append ``frames`` and hold the bound on all rings together: the largest give first.

        Only what is yet to be offered to readers may exceed it, until there is more to append.
        """
        ring, sizes, portion = topic.ring, self.rings, topic.portion
        before = ring.size_bytes
        topic.extend(offset, frames, now_s)
        size = ring.size_bytes
        grown = size - before
        sizes.total_bytes = total = sizes.total_bytes + grown
        portion.ring_bytes += grown
        self._totals.published += len(frames)
        if offset == 1:
            self._unmade.pop(topic, None)
            self._to_sweep.append(topic)
        if size.bit_length() != topic.size_class:
            sizes.reclass(topic)
        if not topic.is_noted and ring.head + topic.delivered > self._busy.bar:
            self._busy.note(topic)
        if total > sizes.watched_bytes:
            sizes.grown(now_s)

    def shrink(self, wanted_bytes: int, now_s: float) -> int:
        """Have rings give up ``wanted_bytes`` that no reader waits for; return the bytes freed."""
        return self.rings.shrink(wanted_bytes, now_s)

    def share_out(self, weights: Weights) -> None:
        """Divide what all tenants have in common by other ``weights`` from now on.

        Nothing is cut here: where that is needed the next message does it. The topics of a tenant
        that gets a portion of its own, or has none any more, are moved MOVED_PER_SWEEP now, and the
        others by the next sweeps.
        """
        for tenant in self.portions.share_out(weights):
            self._to_move.extend(self._per_tenant.get(tenant, ()))
        self._reserved_topics = self.portions.reserved_topics()
        self._move_topics()

    def _move_topics(self) -> None:
        for _ in range(min(len(self._to_move), MOVED_PER_SWEEP)):
            topic = self._to_move.popleft()
            portion = self.portions.of(topic.tenant)
            is_there = self._topics.get((topic.tenant, topic.name)) is topic
            if is_there and portion is not topic.portion:
                self.rings.remove(topic)
                self._count_out(topic.portion)
                topic.move(portion)
                self._count_in(portion)
                self.rings.add(topic)
        if not self._to_move:
            self.portions.forget_unused()

    def _count_in(self, portion: Portion) -> None:
        if portion.topics < portion.guaranteed_topics:
            self._reserved_topics -= 1
        portion.topics += 1

    def _count_out(self, portion: Portion) -> None:
        portion.topics -= 1
        if portion.topics < portion.guaranteed_topics:
            self._reserved_topics += 1

    def totals(self, now_s: Callable[[], float]) -> Generator[None, None, tuple[Totals, int]]:
        """Return the sums over all topics there are and were, and how many readers are slow.

        Others may be served at each yield.
        """
        return self._totals.take(now_s, self._busy.note)

    def busiest(self, count: int) -> Generator[None, None, list[Topic]]:
        """Return the ``count`` topics with the most publishes and deliveries, busiest first.

        Others may be served at each yield.
        """
        return self._busy.busiest(count, self._totals.active, self._topics.values())

    def note_left(self, topic: Topic) -> None:
        """Note that a reader has left; a topic without a message and without readers is forgotten.

        So reading a name that nobody publishes to leaves nothing behind.
        """
        if topic.history is not None and topic.history.successor is not None:
            return
        if not (topic.head or topic.subscribers):
            self._unmade[topic] = None
            self._unmade.move_to_end(topic)

    def _forget_unmade(self, now_s: float) -> None:
        for _ in range(min(len(self._unmade), UNMADE_PER_SWEEP)):
            topic = next(iter(self._unmade))
            if topic.subscribers:
                # `note_left` adds the topic again.
                del self._unmade[topic]
                continue
            if now_s - topic.last_used_s < UNMADE_S:
                return
            del self._unmade[topic]
            self._forget(topic)
            if topic.journal is None:
                self._remember(topic.tenant, topic.name, topic.epoch, topic.created_at)

    def _remember(self, tenant: str, name: str, epoch: str, created_at: str) -> None:
        self._remembered[tenant, name] = epoch, created_at
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def evict_idle(self, now_s: float, at_most: int = TOPICS_PER_SWEEP) -> list[Topic]:
        """Forget those of the next ``at_most`` topics that nobody reads or used for ``idle_s``.

        Returns these; readers that came by a pattern are still joined. Also forgets names without
        messages that nobody reads any more, and cuts the rings, should they hold too much: see
        `extend`.
        """
        self._forget_unmade(now_s)
        self._move_topics()
        idle: list[Topic] = []
        forgotten_bytes = 0
        for _ in range(min(at_most, len(self._to_sweep))):
            if forgotten_bytes >= FORGOTTEN_BYTES_PER_SWEEP:
                break
            topic = self._to_sweep.popleft()
            if topic.history is not None and topic.history.successor is not None:
                # The next epoch has a topic of its own.
                continue
            # Nothing but the sweep forgets, so that what it leaves out is gone.
            if self._is_idle(topic, now_s):
                idle.append(topic)
                forgotten_bytes += topic.ring.size_bytes
            else:
                self._to_sweep.append(topic)
        for topic in idle:
            self._forget(topic)
        self.rings.trim_largest(now_s)
        return idle

    def _add(
        self,
        tenant: str,
        name: str,
        ring: RecentMessageCache,
        epoch: str,
        created_at: str,
        now_s: float,
        journal: JournalPlace | None = None,
    ) -> Topic:
        limits = self.limits
        portion = self.portions.of(tenant)
        topic = Topic(
            tenant,
            name,
            ring=ring,
            portion=portion,
            window_cap=limits.ring_messages,
            trip_threshold=limits.circuit_breaker_threshold,
            epoch=epoch,
            created_at=created_at,
            now_s=now_s,
            active=self._totals.active,
            journal=journal,
        )
        self._count_in(portion)
        self._topics[tenant, name] = topic
        if topic.head:
            self._to_sweep.append(topic)
        else:
            self._unmade[topic] = None
        self._per_tenant.setdefault(tenant, {})[topic] = None
        return topic

    def _check_limits(self, tenant: str, max_topics: int | None = None) -> None:
        limits = self.limits
        topics = len(self._per_tenant.get(tenant, ()))
        if max_topics is not None:
            if topics >= max_topics:
                setting = "max_topics of the tenant"
                raise TopicLimit(tenant, topics, max_topics, setting, _LIMIT_RETRY_S)
        elif topics >= limits.max_topics_per_tenant:
            setting = "CLEVRD_MAX_TOPICS_PER_TENANT"
            raise TopicLimit(tenant, topics, limits.max_topics_per_tenant, setting, _LIMIT_RETRY_S)
        portion = self.portions.of(tenant)
        reserved = 0 if portion.topics < portion.guaranteed_topics else self._reserved_topics
        if len(self._topics) + reserved >= limits.max_topics:
            kept_free = f" and keeps {reserved} for other tenants" if reserved else ""
            raise Unavailable(
                f"The daemon has {len(self._topics)} topics{kept_free} (CLEVRD_MAX_TOPICS);"
                " use an existing one, or raise the limit.",
                retry_after_s=_LIMIT_RETRY_S,
                bound="topics",
                inputs={"topics": len(self._topics), "reserved": reserved},
                thresholds={"max_topics": limits.max_topics},
            )

    def _is_idle(self, topic: Topic, now_s: float) -> bool:
        return topic.is_unused and now_s - topic.last_used_s >= self.limits.idle_s

    def _forget(self, topic: Topic) -> None:
        self._take_out(topic)
        self._totals.forget(topic)

    def _take_out(self, topic: Topic) -> None:
        del self._topics[topic.tenant, topic.name]
        self.rings.remove(topic)
        self._count_out(topic.portion)
        self._busy.forget(topic)
        others = self._per_tenant[topic.tenant]
        del others[topic]
        if not others:
            del self._per_tenant[topic.tenant]
