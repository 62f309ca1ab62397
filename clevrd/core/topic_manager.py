"""TopicManager: (tenant, topic) -> Topic; limits, memory of all rings together, idle eviction.

Keys are tuples, never joined strings: "a:b" of tenant "x" is not "b" of tenant "x:a".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from clevrd.core.message import check_topic
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.subscriber import KeptBudget
from clevrd.core.topic import Topic
from clevrd.errors import Unavailable

# When all rings together are over their bound they are cut to this share of it, so that the
# search for the largest is paid once per tenth of the memory and not once per message.
_TRIM_TO: Final = 0.9

# Share of the memory bound for rings; a quarter of it again may be held by readers that keep the
# oldest, and the rest is connections, transport buffers and the interpreter.
_RINGS_SHARE: Final = 0.6
_KEPT_SHARE: Final = 0.15

# Idle topics are evicted by the minute at best, so sooner is no use.
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
    """Counters of topics that are gone, so that sums over all topics never fall."""

    __slots__ = ("delivered", "discarded", "lost", "offered", "published")

    def __init__(self) -> None:
        self.published = 0
        self.offered = 0
        self.delivered = 0
        self.discarded = 0
        # By reason, as Losses names them.
        self.lost = {"slow_consumer": 0, "retention": 0, "memory": 0}

    def add(self, topic: Topic) -> None:
        """Take over the counters of ``topic``."""
        self.published += topic.published
        self.offered += topic.offered
        self.delivered += topic.delivered
        self.discarded += topic.discarded
        for reason in self.lost:
            self.lost[reason] += getattr(topic.losses, reason)


class TopicManager:
    """All topics of all tenants."""

    def __init__(self, limits: TopicLimits, new_epoch: Callable[[], str]) -> None:
        self.limits = limits
        self._new_epoch = new_epoch
        self._topics: dict[tuple[str, str], Topic] = {}
        self._per_tenant: dict[str, int] = {}
        self._window = limits.ring_messages
        self.max_ring_bytes = int(limits.max_memory_bytes * _RINGS_SHARE)
        self.budget = KeptBudget(int(limits.max_memory_bytes * _KEPT_SHARE))
        # Bytes all rings hold; kept current by append and trim.
        self.ring_bytes = 0
        self.evicted = Totals()

    def __len__(self) -> int:
        """Return how many topics there are."""
        return len(self._topics)

    def __iter__(self) -> Iterator[Topic]:
        """Iterate over all topics; take a list first where topics may come or go meanwhile."""
        return iter(self._topics.values())

    def find(self, tenant: str, name: str) -> Topic | None:
        """Return the topic, None when there is none."""
        return self._topics.get((tenant, name))

    def get_or_create(self, tenant: str, name: str, created_at: str, now_s: float) -> Topic:
        """Return the topic, made now if it was missing.

        Raises:
            InvalidRequest: the name can't be a topic's.
            Unavailable: the tenant, or the daemon, has as many topics as it may have.
        """
        topic = self._topics.get((tenant, name))
        if topic is not None:
            return topic
        check_topic(name)
        self._check_limits(tenant)
        topic = self._new_topic(tenant, name, created_at, now_s)
        self._topics[tenant, name] = topic
        self._per_tenant[tenant] = self._per_tenant.get(tenant, 0) + 1
        return topic

    def append(self, topic: Topic, offset: int, frame: bytes, now_s: float) -> None:
        """Append to ``topic`` and hold the bound on all rings together: the largest gives first.

        Only what is yet to be offered to readers may exceed it, until there is more to append.
        """
        self.extend(topic, offset, [frame], now_s)

    def extend(self, topic: Topic, offset: int, frames: list[bytes], now_s: float) -> None:
        """Append ``frames`` from ``offset`` on, under the same bound."""
        before = topic.ring.size_bytes
        topic.extend(offset, frames, now_s)
        self.ring_bytes += topic.ring.size_bytes - before
        if self.ring_bytes > self.max_ring_bytes:
            self._trim_largest(now_s)

    def set_window(self, window: int, now_s: float) -> None:
        """Set the window of every reader of every topic, and of those to come."""
        if window == self._window:
            return
        self._window = window
        for topic in self._topics.values():
            topic.set_window(window, now_s)

    def evict_idle(self, now_s: float) -> int:
        """Forget topics without readers that were not used for ``idle_s``; return how many.

        Also cuts the rings, should they hold too much: see `append`.
        """
        idle = [topic for topic in self._topics.values() if self._is_idle(topic, now_s)]
        for topic in idle:
            self._forget(topic)
        if self.ring_bytes > self.max_ring_bytes:
            self._trim_largest(now_s)
        return len(idle)

    def mean_message_bytes(self) -> float:
        """Return the mean size of the messages in all rings, 0.0 when they are empty."""
        messages = sum(len(topic.ring) for topic in self._topics.values())
        return self.ring_bytes / messages if messages else 0.0

    def _new_topic(self, tenant: str, name: str, created_at: str, now_s: float) -> Topic:
        limits = self.limits
        return Topic(
            tenant,
            name,
            ring=RecentMessageCache(limits.ring_messages, limits.ring_bytes),
            budget=self.budget,
            window_cap=self._window,
            trip_threshold=limits.circuit_breaker_threshold,
            epoch=self._new_epoch(),
            created_at=created_at,
            now_s=now_s,
        )

    def _check_limits(self, tenant: str) -> None:
        limits = self.limits
        if self._per_tenant.get(tenant, 0) >= limits.max_topics_per_tenant:
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
        return topic.subscribers == 0 and now_s - topic.last_used_s >= self.limits.idle_s

    def _forget(self, topic: Topic) -> None:
        del self._topics[topic.tenant, topic.name]
        self.ring_bytes -= topic.ring.size_bytes
        self.evicted.add(topic)
        left = self._per_tenant[topic.tenant] - 1
        if left:
            self._per_tenant[topic.tenant] = left
        else:
            del self._per_tenant[topic.tenant]

    def _trim_largest(self, now_s: float) -> None:
        """Cut the largest rings to one size, the largest first, until the rest is small enough."""
        target = int(self.max_ring_bytes * _TRIM_TO)
        sizes = sorted((topic.ring.size_bytes for topic in self._topics.values()), reverse=True)
        level = _level(sizes, self.ring_bytes - target)
        largest = [topic for topic in self._topics.values() if topic.ring.size_bytes > level]
        for topic in sorted(largest, key=lambda topic: topic.ring.size_bytes, reverse=True):
            # Rings give whole messages, so a few may have given enough for all.
            if self.ring_bytes <= target:
                return
            self.ring_bytes -= topic.trim(level, now_s)


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
