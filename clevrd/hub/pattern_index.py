"""PatternIndex: tells pattern subscriptions of matching topics: found, made and forgotten.

Telling one subscription costs a few microseconds, and one topic may match thousands of them, or one
pattern thousands of topics. So the work waits in two queues, and each turn of the loop does a
bounded part of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from clevrd.core.patterns import PatternTree, Words, matches
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.scheduling.turn_queue import TurnQueue

log = logging.getLogger(__name__)

# Units of work in one turn of the loop. A unit is one subscription that joins a topic: about 10 us,
# without the messages of the past, which `readers` hands over in its own turns.
_UNITS_PER_TURN: Final = 64

# Topics compared with a pattern in one step of a search, and the units that such a step costs.
_TOPICS_PER_STEP: Final = 500
_UNITS_PER_STEP: Final = 15

# Topics of a tenant that can be listed for one unit when a search begins.
_TOPICS_PER_UNIT_LISTED: Final = 1_000


class PatternSubscriber(Protocol):
    """A subscription to one pattern."""

    def topic_made(self, topic: Topic, /) -> None:
        """Join a matching topic that was just made; it may have its first messages already."""

    def topic_found(self, topic: Topic, /) -> None:
        """Join a matching topic that was there before this subscription."""

    def found_all(self) -> None:
        """Note that all matching topics which were there have been told."""

    def topic_forgotten(self, topic: Topic, /) -> None:
        """Let go of a matching topic that was forgotten; all its messages had been handed over."""


class StoredTopics(Protocol):
    """Topics that have messages elsewhere, and are not in use."""

    def bring_into_use(self, tenant: str, words: Words, /) -> Iterator[None]:
        """Make the tenant's topics that match a pattern topics of this process, in steps."""


class PatternIndex:
    """All pattern subscriptions."""

    def __init__(
        self,
        topics: TopicManager,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[], None],
    ) -> None:
        self._topics = topics
        self._on_error = on_error
        self._tree: PatternTree[PatternSubscriber] = PatternTree()
        self._subscribers: set[PatternSubscriber] = set()
        # None without a journal; set once, before anybody subscribes.
        self.stored: StoredTopics | None = None
        # Work under way and waiting, as iterators that yield the cost of each step in units: one
        # for each topic that was made or forgotten, and one for each subscription that still
        # searches the topics that were there. Announcements go before searches.
        self._announcements: deque[Iterator[int]] = deque()
        self._finds: deque[Iterator[int]] = deque()
        self.queue = TurnQueue(_UNITS_PER_TURN, self._work_step, loop, on_error)

    def __len__(self) -> int:
        """Return how many pattern subscriptions there are; two of the same pattern count twice."""
        return self._tree.size

    def add(self, tenant: str, words: Words, subscriber: PatternSubscriber) -> None:
        """Tell ``subscriber`` of each topic that matches its pattern, now and later."""
        self._tree.add(tenant, words, subscriber)
        self._subscribers.add(subscriber)
        self._finds.append(self._find(tenant, words, subscriber))
        self.queue.work_on()

    def remove(self, tenant: str, words: Words, subscriber: PatternSubscriber) -> None:
        """Tell ``subscriber`` of no topic from here on."""
        self._tree.remove(tenant, words, subscriber)
        self._subscribers.discard(subscriber)

    def topic_made(self, topic: Topic) -> None:
        """Tell the matching subscriptions that ``topic`` was made."""
        if self._tree.size:
            self._announce_soon(topic, lambda subscriber: subscriber.topic_made(topic))

    def topic_forgotten(self, topic: Topic) -> None:
        """Tell the subscriptions that joined ``topic`` that it was forgotten."""
        if topic.pattern_readers:
            self._announce_soon(topic, lambda subscriber: subscriber.topic_forgotten(topic))

    def _announce(self, topic: Topic, tell: Callable[[PatternSubscriber], None]) -> Iterator[int]:
        for subscriber in self._tree.find(topic.tenant, topic.name):
            self._tell(tell, subscriber)
            yield 1

    def _find(self, tenant: str, words: Words, subscriber: PatternSubscriber) -> Iterator[int]:
        if subscriber not in self._subscribers:
            return
        if self.stored is not None:
            # This comes before the list is made, so that topics brought into use meanwhile are in
            # it.
            for _ in self.stored.bring_into_use(tenant, words):
                yield _UNITS_PER_STEP
                if subscriber not in self._subscribers:
                    return
        topics = self._topics.of_tenant(tenant)
        # The whole list is made in this step: 10 us for 1,000 topics.
        yield len(topics) // _TOPICS_PER_UNIT_LISTED
        for start in range(0, len(topics), _TOPICS_PER_STEP):
            for topic in topics[start : start + _TOPICS_PER_STEP]:
                if subscriber not in self._subscribers:
                    return
                if topic.head and matches(words, topic.name) and self._is_there(topic):
                    self._tell(subscriber.topic_found, topic)
                    yield 1
            yield _UNITS_PER_STEP
        if subscriber in self._subscribers:
            self._tell(subscriber.found_all)

    def _is_there(self, topic: Topic) -> bool:
        return self._topics.find(topic.tenant, topic.name) is topic

    def _tell(self, tell: Callable[..., None], *what: object) -> None:
        """Tell one subscription; an error is counted and logged, and the others are still told."""
        try:
            tell(*what)
        except Exception:
            self._on_error()
            log.exception("pattern subscriber failed")

    def _announce_soon(self, topic: Topic, tell: Callable[[PatternSubscriber], None]) -> None:
        self._announcements.append(self._announce(topic, tell))
        self.queue.work_on()

    def _work_step(self) -> int | None:
        """Do the next step of an announcement, or else of a search; None when no work waits."""
        while work := self._announcements or self._finds:
            cost = next(work[0], None)
            if cost is not None:
                return cost
            work.popleft()
        return None
