"""Publishing: stamps accepted messages, gives them their place in the order, and answers.

Encoding, rings and readers belong to the delivery. This module knows two things of the delivery: it
takes messages at their place, and it says whether a topic has room for more.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from clevrd.control.adaptive_throttler import DELAY_S, AdaptiveThrottler
from clevrd.control.rate_limiter import RateLimiter
from clevrd.core.idempotency import RememberedAnswers
from clevrd.core.journal_place import JournalPlace, TopicStart
from clevrd.core.message_ids import rfc3339
from clevrd.core.names import EVENTS_TOPIC
from clevrd.core.publish_request import PublishRequest
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.errors import Forbidden, MemoryShort, Throttled
from clevrd.hub.idempotent_publishes import IdempotentPublishes
from clevrd.hub.publish_answers import (
    PublishAnswer,
    Published,
    Run,
    RunAnswer,
    audience_of,
)
from clevrd.hub.stamping import Stamp, Stamping
from clevrd.hub.waiting_publishes import WaitingPublishes
from clevrd.metrics.counters import Counters
from clevrd.tenants.tenant import NO_LIMITS, Tenant


class Deliverer(Protocol):
    """Takes messages whose place in their topic is known for good."""

    def deliver(
        self, topic: Topic, offset: int, requests: Sequence[PublishRequest], stamps: Sequence[Stamp]
    ) -> None:
        """Append ``topic``'s messages from ``offset`` on; readers are offered them soon."""

    def makes_room(self, topic: Topic) -> bool:
        """Return whether ``topic`` takes more, after making room where that is possible at once."""


class Journal(Protocol):
    """Puts the messages of some topics in order, together with other processes, and keeps them."""

    def start_of(self, tenant: str, name: str) -> TopicStart | None:
        """Return where a topic that is not in use goes on; None if it is not journaled."""

    def note_brought_into_use(self, topic: Topic) -> None:
        """Note that a topic with messages of before is used again."""

    def has_room(self, place: JournalPlace) -> bool:
        """Return whether messages for ``place`` are taken now, and none wait for room."""

    async def room_for(self, place: JournalPlace) -> None:
        """Wait until messages for ``place`` are taken, behind all that have waited longer."""

    def submit(
        self,
        topic: Topic,
        place: JournalPlace,
        requests: Sequence[PublishRequest],
        make_answer: Callable[[Topic, int, Sequence[Stamp], bool], Any],
        key: str | None = None,
    ) -> asyncio.Future[Any]:
        """Have ``requests`` appended to ``topic``; return the answer, which is due."""


class Publishing:
    """Every step between a decoded publish request and its answer."""

    def __init__(
        self,
        topics: TopicManager,
        stamping: Stamping,
        waiting: WaitingPublishes,
        deliverer: Deliverer,
        throttler: AdaptiveThrottler,
        rate_limiter: RateLimiter,
        answers: RememberedAnswers[Published],
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        journal: Journal | None = None,
    ) -> None:
        """Make the steps.

        Args:
            answers: remembered answers to publishes with an idempotency key.
            journal: None where all topics are this process's alone.
        """
        self._counters = counters
        self._topics = topics
        self._stamping = stamping
        self._throttler = throttler
        # Whether the throttle, when it is on, is for every topic.
        self._throttles_all = throttler.scope == "global"
        self._rate_limiter = rate_limiter
        # Makes the refusal of every publish while memory is short; None otherwise. Set by shed.
        self._shed_refusal: Callable[[], MemoryShort] | None = None
        # Only tenants with a rate of their own are limited, and nothing is shed. Changed by shed.
        self._is_unlimited = rate_limiter.rate_per_s == 0.0
        self._loop = loop
        self._journal = journal
        self.waiting = waiting
        # Whether the topic EVENTS_TOPIC of a tenant is kept for events; set by the hub alone.
        self.reserves: Callable[[str], bool] = lambda tenant: False
        self.idempotent = IdempotentPublishes(answers, waiting, loop)
        # The deliverer's two methods, kept here because a call through their owner costs 50 ns
        # more.
        self._deliver = deliverer.deliver
        self._makes_room = deliverer.makes_room

    def check_rate(self, tenant: Tenant, count: int = 1) -> None:
        """Take ``count`` messages from the budget of the tenant, and of its key.

        Raises:
            MemoryShort: memory is short, so that every publish is refused.
            RateLimited: a budget is spent; no message was taken from any.
            InvalidRequest: ``count`` is more than a budget ever holds.
        """
        # Every publish comes here, so nothing is called where nothing is limited.
        if self._is_unlimited and tenant.limits is NO_LIMITS and tenant.key_limits is NO_LIMITS:
            return
        if self._shed_refusal is not None:
            raise self._shed_refusal()
        self._rate_limiter.take(
            tenant.name,
            count,
            self._loop.time(),
            tenant.limits,
            tenant.credential_id,
            tenant.key_limits,
        )

    def shed(self, refusal: Callable[[], MemoryShort] | None) -> None:
        """Refuse every publish with what ``refusal`` returns; None: take them again."""
        self._shed_refusal = refusal
        self._is_unlimited = refusal is None and self._rate_limiter.rate_per_s == 0.0

    def most_now(self, tenant: Tenant) -> float:
        """Return how many messages `check_rate` would let pass now; `math.inf` without a limit."""
        if self._is_unlimited and tenant.limits is NO_LIMITS and tenant.key_limits is NO_LIMITS:
            return math.inf
        return self._rate_limiter.left(
            tenant.name,
            self._loop.time(),
            tenant.limits,
            tenant.credential_id,
            tenant.key_limits,
        )

    def topic(self, tenant: Tenant, name: str) -> Topic:
        """Return the topic ``name`` to publish to; make it if it is missing, as `_topic` does.

        Raises:
            Forbidden: the tenant may not publish to it.
            InvalidRequest: the name can't be a topic's.
            Unavailable: there are as many topics as there may be.
        """
        if not tenant.publish.is_all:
            tenant.check_publish(name)
        if name == EVENTS_TOPIC and self.reserves(tenant.name):
            raise Forbidden(
                f"The topic {EVENTS_TOPIC} has the daemon's own events; subscribe to it, and"
                " publish to another one."
            )
        # This is `_topic` written out for a topic that is there, since the call would cost each
        # publish 50 ns.
        topic = self._topics.find(tenant.name, name)
        return topic if topic is not None else self._topic(tenant, name)

    def publish_event(self, tenant: str, request: PublishRequest) -> PublishAnswer:
        """Publish an event of the daemon's own, without waiting.

        Raises:
            Throttled: the topic takes nothing now.
            Unavailable: there are as many topics as there may be.
            ShuttingDown: nothing is taken any more.
        """
        topic = self._topic(Tenant(tenant), request.topic)
        if self._has_no_room(topic):
            raise Throttled(f"The topic {request.topic} takes no more now.", bound="room")
        return self.publish(topic, request)

    def find(self, tenant: str, name: str) -> Topic | None:
        """Return a topic that is in use; None where there is none."""
        return self._topics.find(tenant, name)

    def topic_to_read(self, tenant: Tenant, name: str) -> Topic:
        """Return the topic ``name`` to subscribe to; make it if it is missing, as `_topic` does.

        Raises:
            Forbidden: the tenant may not subscribe to it.
            InvalidRequest: the name can't be a topic's.
            Unavailable: there are as many topics as there may be.
        """
        if not tenant.subscribe.is_all:
            tenant.check_subscribe(name)
        return self._topic(tenant, name)

    def _topic(self, tenant: Tenant, name: str) -> Topic:
        """Return a topic, made if it is missing.

        A new topic counts as made, and matches patterns, from its first message on. Before that
        message it is only a name that somebody reads, and it is forgotten when nobody reads it.
        """
        topic = self._topics.find(tenant.name, name)
        if topic is None:
            created_at = self.created_at()
            journal = self._journal
            start = None if journal is None else journal.start_of(tenant.name, name)
            topic = self._topics.get_or_create(
                tenant.name, name, created_at, self._loop.time(), tenant.limits.max_topics, start
            )
            if journal is not None and start is not None and start.head:
                journal.note_brought_into_use(topic)
        return topic

    def created_at(self) -> str:
        """Return the time that a topic has which begins now."""
        # The time is never before an id that was already made. If the clock was set back, an id
        # from an earlier life of a name would otherwise pass for one of this life in `since`.
        return rfc3339(max(self._stamping.wall_us(), self._stamping.last_id_us))

    def must_wait(self, topic: Topic) -> bool:
        """Whether a publish to ``topic`` has to wait, by `publish_later` or `turn`."""
        if (topic.throttled_until_s or self._throttles_all) and self._delay_s(topic) > 0.0:
            return True
        return self._has_no_room(topic)

    def is_throttled(self, tenant: Tenant, name: str) -> bool:
        """Return whether publishes to the tenant's topic called ``name`` are slowed down now."""
        topic = self._topics.find(tenant.name, name)
        if topic is None:
            # A topic that is not there yet has no slow readers.
            return self._throttles_all and self._throttler.delay_s(self._loop.time()) > 0.0
        return self._delay_s(topic) > 0.0

    def publish(self, topic: Topic, request: PublishRequest) -> PublishAnswer:
        """Append one message and have it offered to all readers in this turn; no await.

        `publish_run` says what a Future in the answer's place means.
        """
        if topic.journal is not None:
            return self._submit(topic, topic.journal, request)
        # These lines are `publish_run` for one message, without its calls and its list: 5.5 us
        # instead of 6.2.
        stamps = self._stamping.stamp(1)
        offset = topic.ring.head + 1
        self._deliver(topic, offset, (request,), stamps)
        return Published(True, stamps[0][0], offset, *audience_of(topic))

    def publish_run(self, topic: Topic, requests: Sequence[PublishRequest]) -> RunAnswer:
        """Append many messages at once; return the first one's offset and all their ids.

        A Future as the answer means that the messages have their place in the order, and that only
        the answer comes later, perhaps as a ClevrdError; more may be published behind them at once.

        A run is at most ``max_run`` messages of RUN_MAX_BYTES together, or one message of any size.
        The caller has asked `must_wait` or waited for `turn`, so the ring holds the run beside the
        messages that are pending.
        """
        if topic.journal is not None:
            return self._journal_of(topic).submit(topic, topic.journal, requests, _run)
        stamps = self._stamping.stamp(len(requests))
        # This process decides the order: a message gets the topic's next offset. The ring's field
        # is read because a call of the topic's `head` costs 45 ns.
        offset = topic.ring.head + 1
        self._deliver(topic, offset, requests, stamps)
        return offset, [message_id for message_id, _ in stamps]

    async def publish_later(
        self, tenant: Tenant, topic: Topic, request: PublishRequest
    ) -> PublishAnswer:
        """Publish once the throttle's delay has passed and the topic has room.

        Raises:
            Throttled: too many publishes wait already.
        """
        return self.publish(await self.turn(tenant, topic, size_bytes=len(request.data)), request)

    async def turn(
        self, tenant: Tenant, topic: Topic, messages: int = 1, size_bytes: int = 0
    ) -> Topic:
        """Wait until ``tenant`` may append the next publish to ``topic``, and return the topic.

        The caller appends its ``messages``, so many and of so many bytes, without an await in
        between. Publishers go on in the order in which they came.

        Raises:
            Throttled: too many publishes wait already.
        """
        portion = self.waiting.begin(topic.tenant, size_bytes)
        began_s = self._loop.time()
        try:
            delay_s = self._delay_s(topic)
            if delay_s > 0.0:
                await asyncio.sleep(delay_s)
            if topic.journal is not None:
                if self._has_no_room(topic):
                    await self._journal_of(topic).room_for(topic.journal)
            elif self._has_no_room(topic):
                await self.waiting.for_room(topic, self._makes_room)
        finally:
            self.waiting.end(portion, size_bytes)
        self._counters.wait_s.record_many(self._loop.time() - began_s, messages)
        # Idle topics are forgotten, so the topic may have gone while this publish waited.
        return self._topic(tenant, topic.name)

    def publish_once(
        self, tenant: Tenant, request: PublishRequest, key: str
    ) -> PublishAnswer | None:
        """Publish, or return the first answer if a publish with this key was taken before.

        Return None when the publish has to wait, by `publish_once_later`.

        Raises:
            Forbidden: the tenant may not publish to the topic, and hears of no answer there.
            InvalidRequest: the key was used for other data.
        """
        tenant.check_publish(request.topic)
        slot = (tenant.name, request.topic, key)
        if first := self.idempotent.find(slot, request):
            return first
        if slot in self.idempotent.under_way:
            return None
        topic = self.topic(tenant, request.topic)
        if self.must_wait(topic):
            return None
        return self.idempotent.remember(slot, request, self._publish_keyed(topic, request, key))

    async def publish_once_later(
        self, tenant: Tenant, request: PublishRequest, key: str
    ) -> PublishAnswer:
        """Publish after waiting, unless a publish with this key is taken before that.

        A publish that fails is not remembered: the next publish that waits with the same key is
        tried instead.

        Raises:
            Forbidden: the tenant may not publish to the topic.
            Throttled: too many publishes wait already.
            InvalidRequest: the key was used for other data.
        """
        tenant.check_publish(request.topic)
        slot = (tenant.name, request.topic, key)
        await self.idempotent.decided(slot, len(request.data))
        if first := self.idempotent.find(slot, request):
            return first
        with self.idempotent.deciding(slot):
            topic = self.topic(tenant, request.topic)
            if self.must_wait(topic):
                topic = await self.turn(tenant, topic, size_bytes=len(request.data))
            return self.idempotent.remember(slot, request, self._publish_keyed(topic, request, key))

    def _publish_keyed(self, topic: Topic, request: PublishRequest, key: str) -> PublishAnswer:
        """Publish; a journal remembers the key too, over restarts and for other processes."""
        if topic.journal is not None:
            return self._submit(topic, topic.journal, request, key)
        return self.publish(topic, request)

    def _submit(
        self, topic: Topic, place: JournalPlace, request: PublishRequest, key: str | None = None
    ) -> asyncio.Future[Published]:
        return self._journal_of(topic).submit(topic, place, (request,), _published, key)

    def _journal_of(self, topic: Topic) -> Journal:
        if self._journal is None:
            raise RuntimeError(f"{topic.name!r} is journaled, and there is no journal")
        return self._journal

    def _delay_s(self, topic: Topic) -> float:
        """Return how long the throttle makes a publish to ``topic`` wait now, in seconds."""
        now_s = self._loop.time()
        if self._throttles_all:
            return self._throttler.delay_s(now_s)
        return DELAY_S if now_s < topic.throttled_until_s else 0.0

    def _has_no_room(self, topic: Topic) -> bool:
        """Whether a publish to ``topic`` has to wait for a round, or behind publishes that wait."""
        if topic.journal is not None:
            return not self._journal_of(topic).has_room(topic.journal)
        return topic in self.waiting.lines or not self._makes_room(topic)


def _published(topic: Topic, offset: int, stamps: Sequence[Stamp], is_repeated: bool) -> Published:
    """Return the answer to a journaled message that has its place."""
    answer = Published(True, stamps[0][0], offset, *audience_of(topic))
    return msgspec.structs.replace(answer, repeated=True) if is_repeated else answer


def _run(_topic: Topic, offset: int, stamps: Sequence[Stamp], _is_repeated: bool) -> Run:
    """Return the answer to a run of journaled messages; none of them has a key."""
    return offset, [message_id for message_id, _ in stamps]
