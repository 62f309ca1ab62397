"""Journaling: the topics that a journal keeps, and the node's way to topics and readers.

The node itself, which writes and reads the log, knows neither rings nor rounds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Final

import msgspec

from clevrd.core.journal_place import TopicStart
from clevrd.core.patterns import Words, matches
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.errors import ClevrdError, Unavailable
from clevrd.hub.delivery import Delivery
from clevrd.hub.waiting_publishes import WaitingPublishes
from clevrd.journal.base import Engine
from clevrd.journal.node import Node

log = logging.getLogger(__name__)

# Idempotency keys that a partition remembers; each takes about 400 bytes.
MAX_KEYS: Final = 100_000

_LIMIT_RETRY_S: Final = 60.0

# Topics that begin a new epoch in one turn of the loop, at 30 us each.
TOPICS_PER_TURN: Final = 50


class Journaling:
    """Which topics are journaled, and their node."""

    def __init__(
        self,
        engine: Engine,
        patterns: Sequence[Words],
        topics: TopicManager,
        delivery: Delivery,
        waiting: WaitingPublishes,
        loop: asyncio.AbstractEventLoop,
        wall_us: Callable[[], int],
        count_background_error: Callable[[], None],
        *,
        max_run: int,
        keep_keys_s: float,
        max_topics: int,
    ) -> None:
        """Put the parts together.

        Args:
            patterns: a topic that matches one of them is journaled.
            max_topics: topics that may have messages in the journal.
        """
        self._max_topics = max_topics
        self._wall_us = wall_us
        self._loop = loop
        # How many messages came for topics that are not kept here, since there are too many.
        self.topics_left_out = 0
        self._patterns = patterns
        self._topics = topics
        self._delivery = delivery
        self._waiting = waiting
        self.deliver, self.makes_room = delivery.deliver, delivery.makes_room
        self.engine = engine
        self.node = Node(
            engine,
            self,
            self,
            loop,
            wall_us,
            count_background_error,
            max_run=max_run,
            keep_keys_s=keep_keys_s,
            max_keys=MAX_KEYS,
        )
        # Publishing asks the node itself.
        self.has_room, self.room_for, self.submit = (
            self.node.has_room,
            self.node.room_for,
            self.node.submit,
        )

    def start_of(self, tenant: str, name: str) -> TopicStart | None:
        """Return where a topic that is not in use goes on; None if it is not journaled.

        Raises:
            Unavailable: it would be one more than may have messages in the journal.
        """
        if not self.covers(name):
            return None
        start = self.node.start_of(tenant, name)
        if start.head == 0 and self.node.topics >= self._max_topics:
            raise Unavailable(
                f"The journal has {self.node.topics} topics (max_topics in [journal]); use an"
                " existing one, or raise the limit.",
                retry_after_s=_LIMIT_RETRY_S,
                bound="topics_of_journal",
                inputs={"topics": self.node.topics},
            )
        return start

    def bring_into_use(self, tenant: str, words: Words) -> Iterator[None]:
        """Make the tenant's topics that match a pattern topics of this process, in steps.

        Without this a pattern would not find topics that have messages in the journal alone, as all
        have after a restart. At the limits on topics the others are left out.
        """
        for names in self.node.names():
            for owner, name in names:
                if owner != tenant or not matches(words, name):
                    continue
                if self._topics.find(tenant, name) is not None or not self.covers(name):
                    continue
                start = self.node.start_of(tenant, name)
                try:
                    self._topics.get_or_create(
                        tenant, name, start.created_at, self._loop.time(), start=start
                    )
                except ClevrdError as error:
                    log.warning("topics of a pattern left out reason=%s", error)
                    return
            yield

    # --- as the node needs it --------------------------------------------------------------------

    def find(self, tenant: str, name: str) -> Topic | None:
        """Return the topic, None when it is not in use."""
        return self._topics.find(tenant, name)

    def make(self, tenant: str, name: str, head: int, time_us: int) -> Topic | None:
        """Return a topic behind offset ``head``, for messages that came from the log alone.

        A topic that would be forgotten by now, since its message is so old, is not made, and none
        is beyond the limits of the daemon and of a tenant.
        """
        if self._wall_us() - time_us > self._topics.limits.idle_s * 1e6:
            return None
        if not self.covers(name):
            return None
        start = msgspec.structs.replace(self.node.start_of(tenant, name), head=head)
        try:
            topic = self._topics.get_or_create(
                tenant, name, start.created_at, self._loop.time(), start=start
            )
        except ClevrdError as error:
            if not self.topics_left_out:
                log.warning("a topic of the journal is not kept here reason=%s", error)
            self.topics_left_out += 1
            return None
        if head:
            self._delivery.patterns.topic_made(topic)
        return topic

    def clear(self, tenant: str, name: str) -> None:
        """Let the topic begin the epoch that it has now, without the messages of before."""
        topic = self._topics.find(tenant, name)
        if topic is None or topic.journal is None:
            return
        start = self.node.start_of(tenant, name)
        if start.epoch != topic.epoch:
            self._delivery.begin_anew(topic, start, start.head)

    async def go_on(self, partition: int) -> None:
        """Let topics of ``partition`` that are in use go on at the heads that it has now."""
        async for topic in self._topics_of(partition):
            start = self.node.start_of(topic.tenant, topic.name)
            if start.epoch != topic.epoch or start.head > topic.head:
                self._delivery.begin_anew(topic, start, start.head)

    async def begin_anew(self, partition: int) -> None:
        """Let topics of ``partition`` that are in use begin the epoch that it has now."""
        async for topic in self._topics_of(partition):
            start = self.node.start_of(topic.tenant, topic.name)
            if start.epoch != topic.epoch:
                self._delivery.begin_anew(topic, start)

    async def _topics_of(self, partition: int) -> AsyncIterator[Topic]:
        """Yield the topics in use that are in ``partition``, some in each turn of the loop."""
        for count, topic in enumerate(list(self._topics), 1):
            place = topic.journal
            is_in_use = self._topics.find(topic.tenant, topic.name) is topic
            if is_in_use and place is not None and place.partition == partition:
                yield topic
            if count % TOPICS_PER_TURN == 0:
                await asyncio.sleep(0)

    def note_brought_into_use(self, topic: Topic) -> None:
        """Tell the patterns of a topic that goes on here, and has messages that are not here."""
        self._delivery.patterns.topic_made(topic)

    def covers(self, name: str) -> bool:
        """Return whether topics of this name are journaled."""
        return any(matches(pattern, name) for pattern in self._patterns)

    async def room(self, topic: Topic) -> None:
        """Wait until ``topic`` takes another run of messages."""
        await self._waiting.for_room(topic, self.makes_room)
