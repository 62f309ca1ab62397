"""Lifecycle: tells backends in a topic of their tenant who reads which of its topics.

A topic is *occupied* while it has subscribers, and *vacated* when the last one has gone; an id that
subscribers gave themselves has *joined* a topic, and has *left* it. Each change is a message in
the topic EVENTS_TOPIC, with an offset like any other. It is told SETTLE_S after it happened, if it
still holds then, so that a subscriber that comes and goes all the time costs an event now and then
and not one each time.

The events are of this process: with several nodes each tells of its own subscribers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Protocol

import msgspec

from clevrd.core.message_ids import rfc3339
from clevrd.core.names import EVENTS_TOPIC
from clevrd.core.publish_request import PublishRequest
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.hub.publish_answers import PublishAnswer
from clevrd.hub.subscriber_ids import SubscriberIds
from clevrd.scheduling.turn_queue import TurnQueue
from clevrd.tenants.topic_permissions import NO_TOPICS, TopicPermissions

log = logging.getLogger(__name__)

# How long a change has to hold before it is told.
SETTLE_S: Final = 0.5
# Changes that are looked at in one turn of the loop, at 15 us each where an event is published.
EVENTS_PER_TURN: Final = 64
# Topics and ids that are kept in mind, because they are there or have just changed: 200 bytes each.
# Changes of others are not told, and counted. Half are anybody's; above that each tenant is
# guaranteed an equal part of all, so that none has the others' changes passed over.
MAX_KNOWN: Final = 100_000

Kind = Literal["occupied", "vacated", "joined", "left"]

# Tenant, topic, and an id; without an id it is the topic itself.
_Slot = tuple[str, str, str | None]


class LifecycleEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """The data of an event's message."""

    type: Kind
    topic: str
    time: str
    # The process whose subscribers it is about; random for each start.
    node: str
    # The id that has joined or left.
    id: str | None = None


class Told(msgspec.Struct, frozen=True):
    """The topics of one tenant whose changes are told."""

    # Topics of which `occupied` and `vacated` are told, and those of which `joined` and `left` are.
    topics: TopicPermissions = NO_TOPICS
    ids: TopicPermissions = NO_TOPICS


class Publishes(Protocol):
    """The way of an event into its topic."""

    def publish_event(self, tenant: str, request: PublishRequest, /) -> PublishAnswer:
        """Publish; raises ClevrdError."""

    def find(self, tenant: str, name: str, /) -> Topic | None:
        """Return a topic that is in use."""


class Lifecycle:
    """Notes who comes and goes, and tells of it."""

    __slots__ = (
        *("_by_tenant", "_ids", "_is_over", "_known", "_loop", "_node", "_pending", "_publishes"),
        *("_queue", "_timer", "_told", "_wall_us", "counts", "listener"),
    )

    def __init__(
        self,
        publishes: Publishes,
        ids: SubscriberIds,
        node: str,
        loop: asyncio.AbstractEventLoop,
        wall_us: Callable[[], int],
        on_error: Callable[[], None],
    ) -> None:
        """Tell nothing until `change`.

        Args:
            node: names this process in its events.
            wall_us: the wall clock, microseconds since 1970.
        """
        self._publishes = publishes
        self._ids = ids
        self._node = node
        self._loop = loop
        self._wall_us = wall_us
        # Tenant -> its topics. Readers look at `is_on` first.
        self._by_tenant: Mapping[str, Told] = {}
        # Slots that were told to be there.
        self._told: set[_Slot] = set()
        # Slots that have changed, and when they are looked at: in this order, as all wait as long.
        # A plain dict looks for its first entry behind all that were taken out before.
        self._pending: OrderedDict[_Slot, float] = OrderedDict()
        # Tenant -> how many slots it has in these two; none has 0.
        self._known: Counter[str] = Counter()
        self._queue = TurnQueue(EVENTS_PER_TURN, self._tell_next, loop, on_error)
        self._timer: asyncio.TimerHandle | None = None
        # No event is told any more; set by stop, for good.
        self._is_over = False
        # Outcome -> events: published; dropped, since the topic took none, or too much is known.
        self.counts = {"published": 0, "dropped": 0}
        # Called with each event that was published; None where nobody wants them.
        self.listener: Callable[[str, LifecycleEvent, str], None] | None = None

    @property
    def is_on(self) -> bool:
        """Whether any tenant wants to be told anything."""
        return bool(self._by_tenant)

    def change(self, by_tenant: Mapping[str, Told]) -> None:
        """Tell of these topics from now on; what is there already is told when it changes."""
        self._by_tenant = {
            name: each for name, each in by_tenant.items() if each.topics or each.ids
        }
        # Entries of other tenants are removed here, since no code would remove them later.
        self._told = {slot for slot in self._told if slot[0] in self._by_tenant}
        self._pending = OrderedDict(
            entry for entry in self._pending.items() if entry[0][0] in self._by_tenant
        )
        self._known = Counter(slot[0] for kept in (self._told, self._pending) for slot in kept)

    def reserves(self, tenant: str) -> bool:
        """Return whether EVENTS_TOPIC of a tenant is no topic of its publishers."""
        return tenant in self._by_tenant

    def joined(self, topic: Topic, reader: Subscriber) -> None:
        """Note that ``reader`` has joined ``topic``."""
        is_first = self._ids.joined(topic, reader) if reader in self._ids.given else False
        self._note(topic, reader, is_first, topic.subscribers == 1)

    def left(self, topic: Topic, reader: Subscriber) -> None:
        """Note that ``reader`` has left ``topic``."""
        is_last = self._ids.left(topic, reader) if reader in self._ids.given else False
        self._note(topic, reader, is_last, topic.subscribers == 0)

    def stop(self) -> None:
        """Tell nothing more: what leaves now leaves because the daemon stops."""
        self._is_over = True
        self._pending.clear()
        self._known.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _note(self, topic: Topic, reader: Subscriber, id_changed: bool, changed: bool) -> None:
        if not (id_changed or changed) or self._is_over:
            return
        told = self._by_tenant.get(topic.tenant)
        if told is None or topic.name == EVENTS_TOPIC:
            return
        if changed:
            self._look_later((topic.tenant, topic.name, None), told.topics)
        if id_changed:
            self._look_later((topic.tenant, topic.name, self._ids.given[reader]), told.ids)

    def _look_later(self, slot: _Slot, wanted: TopicPermissions) -> None:
        if slot in self._pending:
            return
        # A slot that is wanted no more, since a reload, is forgotten when it is gone.
        if slot not in self._told:
            if not wanted.allows(slot[1]):
                return
            if not self._has_room(slot[0]):
                self._drop("too many topics and ids are known")
                return
        self._pending[slot] = self._loop.time() + SETTLE_S
        self._known[slot[0]] += 1
        if self._timer is None:
            self._timer = self._loop.call_later(SETTLE_S, self._look)

    def _has_room(self, tenant: str) -> bool:
        """Return whether one more slot of ``tenant`` is kept."""
        known = len(self._pending) + len(self._told)
        return known < MAX_KNOWN // 2 or self._known[tenant] < MAX_KNOWN // len(self._by_tenant)

    def _let_go(self, tenant: str) -> None:
        """Count one slot less of ``tenant``."""
        self._known[tenant] -= 1
        if not self._known[tenant]:
            del self._known[tenant]

    def _wants(self, slot: _Slot) -> bool:
        told = self._by_tenant[slot[0]]
        return (told.topics if slot[2] is None else told.ids).allows(slot[1])

    def _look(self) -> None:
        self._timer = None
        self._queue.work_soon()

    def _tell_next(self) -> int | None:
        """Tell of the change that is due for longest, if it holds; return the cost."""
        slot, due_s = next(iter(self._pending.items()), (None, 0.0))
        if slot is None:
            return None
        wait_s = due_s - self._loop.time()
        if wait_s > 0:
            if self._timer is None:
                self._timer = self._loop.call_later(wait_s, self._look)
            return None
        del self._pending[slot]
        self._let_go(slot[0])
        is_there = self._is_there(slot)
        if is_there == (slot in self._told):
            return 1
        is_wanted = self._wants(slot)
        if not is_there:
            self._told.discard(slot)
            self._let_go(slot[0])
        elif is_wanted:
            self._told.add(slot)
            self._known[slot[0]] += 1
        if not is_wanted:
            return 1
        self._tell(slot, is_there=is_there)
        return 1

    def _is_there(self, slot: _Slot) -> bool:
        tenant, name, subscriber_id = slot
        if subscriber_id is not None:
            return subscriber_id in self._ids.of(tenant, name)
        topic = self._publishes.find(tenant, name)
        return topic is not None and topic.subscribers > 0

    def _tell(self, slot: _Slot, *, is_there: bool) -> None:
        tenant, name, subscriber_id = slot
        kind: Kind
        if subscriber_id is None:
            kind = "occupied" if is_there else "vacated"
        else:
            kind = "joined" if is_there else "left"
        event = LifecycleEvent(kind, name, rfc3339(self._wall_us()), self._node, subscriber_id)
        request = PublishRequest(EVENTS_TOPIC, msgspec.Raw(msgspec.json.encode(event)), None, name)
        try:
            answer = self._publishes.publish_event(tenant, request)
        except ClevrdError as error:
            self._drop(str(error))
            return
        if isinstance(answer, asyncio.Future):
            answer.add_done_callback(lambda done: self._published(tenant, event, done))
        else:
            self._count(tenant, event, answer.message_id)

    def _published(self, tenant: str, event: LifecycleEvent, done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            self._drop(str(error))
            return
        self._count(tenant, event, done.result().message_id)

    def _count(self, tenant: str, event: LifecycleEvent, message_id: str) -> None:
        self.counts["published"] += 1
        if self.listener is not None:
            self.listener(tenant, event, message_id)

    def _drop(self, reason: str) -> None:
        if not self.counts["dropped"]:
            log.warning("an event of a topic is not told, and others may follow reason=%r", reason)
        self.counts["dropped"] += 1
