"""Who watches which patterns, and the telling of topics that are found, made and forgotten.

Each watcher costs a few microseconds to tell, and there may be thousands of them for one topic, or
thousands of topics for one: what is to be told waits in one queue, and the loop gets its turns.
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

# Of work in one turn of the loop; a unit is a watcher that joins, about 10 us without its past,
# which the hub gives it by turns.
_UNITS_PER_TURN: Final = 64

# Topics compared with a pattern before the next look at the time, and what they cost.
_TOPICS_PER_STEP: Final = 500
_UNITS_PER_STEP: Final = 15

# Topics of a tenant that are listed, when a search begins, for one unit.
_TOPICS_PER_UNIT_LISTED: Final = 1_000


class PatternSubscriber(Protocol):
    """Who watches a pattern."""

    def topic_made(self, topic: Topic, /) -> None:
        """A topic that matches has been made; it may have its first messages already."""

    def topic_found(self, topic: Topic, /) -> None:
        """A topic that matches was there before the watch."""

    def found_all(self) -> None:
        """All topics that were there have been told."""

    def topic_forgotten(self, topic: Topic, /) -> None:
        """A topic that matches is gone; nothing of it waits for this watcher."""


class PatternIndex:
    """All patterns that are watched."""

    def __init__(
        self,
        topics: TopicManager,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[], None],
    ) -> None:
        self._topics = topics
        self._on_error = on_error
        self._tree: PatternTree[PatternSubscriber] = PatternTree()
        self._watching: set[PatternSubscriber] = set()
        # Work under way and to come, each yielding what it has cost: one for each topic that was
        # made or forgotten, which comes first, and one for each watcher that has not found all.
        self._announcements: deque[Iterator[int]] = deque()
        self._finds: deque[Iterator[int]] = deque()
        self.queue = TurnQueue(_UNITS_PER_TURN, self._work_step, loop, on_error)

    def __len__(self) -> int:
        """Return how many patterns are watched; one that two watch counts twice."""
        return self._tree.size

    def add(self, tenant: str, words: Words, watcher: PatternSubscriber) -> None:
        """Tell ``watcher``, which has this one pattern, of each topic that is and that comes."""
        self._tree.add(tenant, words, watcher)
        self._watching.add(watcher)
        self._finds.append(self._find(tenant, words, watcher))
        self.queue.work_on()

    def remove(self, tenant: str, words: Words, watcher: PatternSubscriber) -> None:
        """Tell ``watcher`` no more."""
        self._tree.remove(tenant, words, watcher)
        self._watching.discard(watcher)

    def topic_made(self, topic: Topic) -> None:
        """Tell who watches that ``topic`` is there."""
        if self._tree.size:
            self._announce_soon(topic, lambda watcher: watcher.topic_made(topic))

    def topic_forgotten(self, topic: Topic) -> None:
        """Tell who watches that ``topic`` is gone."""
        if topic.watchers:
            self._announce_soon(topic, lambda watcher: watcher.topic_forgotten(topic))

    def _announce(self, topic: Topic, tell: Callable[[PatternSubscriber], None]) -> Iterator[int]:
        for watcher in self._tree.find(topic.tenant, topic.name):
            self._tell(tell, watcher)
            yield 1

    def _find(self, tenant: str, words: Words, watcher: PatternSubscriber) -> Iterator[int]:
        if watcher not in self._watching:
            return
        topics = self._topics.of_tenant(tenant)
        # The list is made at once: 10 us for 1,000 topics.
        yield len(topics) // _TOPICS_PER_UNIT_LISTED
        for start in range(0, len(topics), _TOPICS_PER_STEP):
            for topic in topics[start : start + _TOPICS_PER_STEP]:
                if watcher not in self._watching:
                    return
                if topic.head and matches(words, topic.name) and self._is_there(topic):
                    self._tell(watcher.topic_found, topic)
                    yield 1
            yield _UNITS_PER_STEP
        if watcher in self._watching:
            self._tell(watcher.found_all)

    def _is_there(self, topic: Topic) -> bool:
        return self._topics.find(topic.tenant, topic.name) is topic

    def _tell(self, tell: Callable[..., None], *what: object) -> None:
        """Tell one; what fails is counted and logged, and does not keep the others from it."""
        try:
            tell(*what)
        except Exception:
            self._on_error()
            log.exception("watcher failed")

    def _announce_soon(self, topic: Topic, tell: Callable[[PatternSubscriber], None]) -> None:
        self._announcements.append(self._announce(topic, tell))
        self.queue.work_on()

    def _work_step(self) -> int | None:
        """Do the next step of what was announced, or else of a search; None when nothing waits."""
        while work := self._announcements or self._finds:
            cost = next(work[0], None)
            if cost is not None:
                return cost
            work.popleft()
        return None
