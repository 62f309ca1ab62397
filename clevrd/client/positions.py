"""Where a subscription to several topics stands: a tracker for each. No I/O here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from clevrd.client.position import Position, Tracker
from clevrd.core.patterns import matches

# A server's default for the topics of one connection: it refuses a pattern with more positions.
MAX_MATCHED: Final = 1_000


class Trackers:
    """What was had of each topic: of those that were named, and of those that patterns brought.

    Of the latter MAX_MATCHED are known, those heard of last: one that went while there was no
    connection may never come back.
    """

    __slots__ = ("_matched", "_named")

    def __init__(
        self, topics: Iterable[str], patterns: Iterable[str], positions: Mapping[str, Position]
    ) -> None:
        self._named = {topic: Tracker(topic, positions.get(topic)) for topic in topics}
        # Trackers of topics that patterns brought; the one heard of longest ago comes first.
        self._matched: OrderedDict[str, Tracker] = OrderedDict()
        wanted = [words_of(pattern) for pattern in patterns]
        for topic, position in positions.items():
            # Stored positions may be of topics that are not wanted any more.
            if topic not in self._named and any(matches(words, topic) for words in wanted):
                self._know(topic, Tracker(topic, position))

    def heard_of(self, topic: str) -> Tracker:
        """Return the tracker of a topic that something has come from."""
        tracker = self._named.get(topic)
        if tracker is not None:
            return tracker
        tracker = self._matched.get(topic)
        if tracker is None:
            return self._know(topic, Tracker(topic))
        self._matched.move_to_end(topic)
        return tracker

    def forget(self, topic: str) -> None:
        """Know no more of a topic that a pattern brought: all of it was had, and it is gone."""
        self._matched.pop(topic, None)

    def position_of(self, topic: str) -> Position | None:
        """Return where a topic that was named stands; None before the server has told it."""
        return self._named[topic].position

    def matching(self, pattern: str) -> dict[str, Position]:
        """Return where the topics stand that came by a pattern and that this one matches.

        Not only those that this one brought: of two patterns either may bring a topic next time.
        """
        words = words_of(pattern)
        return _told({name: each for name, each in self._matched.items() if matches(words, name)})

    def positions(self) -> dict[str, Position]:
        """Return by topic up to where everything was handed out, those heard of last at the end."""
        return _told({**self._named, **self._matched})

    def _know(self, topic: str, tracker: Tracker) -> Tracker:
        self._matched[topic] = tracker
        if len(self._matched) > MAX_MATCHED:
            self._matched.popitem(last=False)
        return tracker


def _told(trackers: Mapping[str, Tracker]) -> dict[str, Position]:
    """Return the positions that a server has told."""
    found = ((topic, tracker.position) for topic, tracker in trackers.items())
    return {topic: position for topic, position in found if position is not None}


def words_of(pattern: str) -> tuple[str, ...]:
    """Return the words of a pattern; whether it is one the server says."""
    return tuple(pattern.split("."))
