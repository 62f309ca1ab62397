"""BusyTopics: which topics have the most messages, found without looking at all of them."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Generator, Iterable
from itertools import islice
from typing import Final

from clevrd.core.topic import Topic

# Topics that are kept in mind as busy, so that the busiest are found among them and not among all.
_BUSY_TOPICS: Final = 1_000

# Topics that are compared between two looks at the time, at 0.3 us each.
_CANDIDATES_PER_STEP: Final = 1_000
# Topics that are merged between two looks, at 1 us each.
_MERGED_PER_STEP: Final = 250


class BusyTopics:
    """Every topic with more publishes and deliveries than the bar, unless it is active.

    A topic is active while its deliveries go on: it is noted when they are summed up.
    """

    __slots__ = ("bar", "topics")

    def __init__(self) -> None:
        # Publishes and deliveries; only rises, in note.
        self.bar = 0
        # A dict as an ordered set; changes in note and forget only.
        self.topics: dict[Topic, None] = {}

    def note(self, topic: Topic) -> None:
        """Keep the topic in mind; when these are too many raise the bar, and forget the rest."""
        self.topics[topic] = None
        topic.is_noted = True
        if len(self.topics) > 2 * _BUSY_TOPICS:
            busiest = heapq.nlargest(_BUSY_TOPICS, self.topics, key=_messages)
            for other in self.topics:
                other.is_noted = False
            for other in busiest:
                other.is_noted = True
            self.topics = dict.fromkeys(busiest)
            self.bar = _messages(busiest[-1])

    def forget(self, topic: Topic) -> None:
        """Keep a topic that is gone in mind no more."""
        self.topics.pop(topic, None)

    def busiest(
        self, count: int, active: Iterable[Topic], everything: Collection[Topic]
    ) -> Generator[None, None, list[Topic]]:
        """Return the ``count`` topics with the most publishes and deliveries, busiest first.

        Others may be served at each yield.

        Args:
            active: topics whose deliveries may have gone on since they were last noted.
            everything: all topics.
        """
        # Below the bar there may be others as busy as the topics in mind.
        if count <= _BUSY_TOPICS:
            known = {**self.topics, **dict.fromkeys(active)}
            if len(known) < count:
                known.update(islice(((topic, None) for topic in everything), count))
            yield
            # The active topics may be as many as those that are read: 10,000 at once held the loop
            # for 4 ms.
            return (yield from busiest_of(list(known), count))
        return (yield from busiest_of(list(everything), count))


def busiest_of(candidates: list[Topic], count: int) -> Generator[None, None, list[Topic]]:
    """Return the ``count`` topics of ``candidates`` with the most messages, busiest first.

    Others may be served at each yield.
    """
    # Topics are sorted part by part, and the parts merged: 10,000 at once would take 4 ms.
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


def _messages(topic: Topic) -> int:
    return topic.published + topic.delivered
