"""Trackers: the positions of a subscription to several topics, a tracker for each. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from clevrd.client.position import Position, Tracker
from clevrd.core.patterns import matches

# A server's default limit of topics on one connection; a pattern with more positions is refused.
MAX_MATCHED: Final = 1_000


class Trackers:
    """The positions of all topics: of topics that were named, and of topics that patterns brought.

    The MAX_MATCHED topics of patterns that were heard of last are kept: a topic that was forgotten
    while there was no connection may never come back.
    """

    __slots__ = ("_matched", "_named")

    def __init__(
        self, topics: Iterable[str], patterns: Iterable[str], positions: Mapping[str, Position]
    ) -> None:
        self._named = {topic: Tracker(topic, positions.get(topic)) for topic in topics}
        # Trackers of topics that patterns brought; the topic heard of longest ago is first.
        self._matched: OrderedDict[str, Tracker] = OrderedDict()
        wanted = [words_of(pattern) for pattern in patterns]
        for topic, position in positions.items():
            # A stored position may be of a topic that is not wanted any more.
            if topic not in self._named and any(matches(words, topic) for words in wanted):
                self._know(topic, Tracker(topic, position))

    def heard_of(self, topic: str) -> Tracker:
        """Return the tracker of a topic from which a frame has come."""
        tracker = self._named.get(topic)
        if tracker is not None:
            return tracker
        tracker = self._matched.get(topic)
        if tracker is None:
            return self._know(topic, Tracker(topic))
        self._matched.move_to_end(topic)
        return tracker

    def forget(self, topic: str) -> None:
        """Drop a topic that a pattern brought: all its messages were had, and it is forgotten."""
        self._matched.pop(topic, None)

    def position_of(self, topic: str) -> Position | None:
        """Return the position of a named topic; None before the server has told it."""
        return self._named[topic].position

    def matching(self, pattern: str) -> dict[str, Position]:
        """Return the positions of all topics that ``pattern`` matches and patterns brought.

        A topic that another pattern brought is included: of two patterns that match, either may
        bring it next time.
        """
        words = words_of(pattern)
        return _told({name: each for name, each in self._matched.items() if matches(words, name)})

    def positions(self) -> dict[str, Position]:
        """Return topic -> position of the items handed out; the topic heard of last is last."""
        return _told({**self._named, **self._matched})

    def _know(self, topic: str, tracker: Tracker) -> Tracker:
        self._matched[topic] = tracker
        if len(self._matched) > MAX_MATCHED:
            self._matched.popitem(last=False)
        return tracker


def _told(trackers: Mapping[str, Tracker]) -> dict[str, Position]:
    """Return the positions of the trackers for which a server has told one."""
    found = ((topic, tracker.position) for topic, tracker in trackers.items())
    return {topic: position for topic, position in found if position is not None}


def words_of(pattern: str) -> tuple[str, ...]:
    """Return the words of a pattern, unchecked: the server says whether it is one."""
    return tuple(pattern.split("."))
