"""TopicPermissions: the topics that a credential may publish to, or subscribe to.

They are written as in docs/wire.md, "Patterns": an exact name, or a pattern with ``*`` for one word
and ``**`` for the rest. ``*`` and ``**`` alone may stand here too, since an operator writes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Final

from clevrd.core.names import check_topic
from clevrd.core.patterns import ONE, REST, Words, matches, parse_pattern

# Answers that are remembered, since a publisher asks for the same topic again and again: 0.1 us
# instead of 1.5 for each pattern. With more topics than these the memory begins anew.
_MAX_REMEMBERED: Final = 1_024


class TopicPermissions:
    """A set of topics, given by names and patterns; it does not change.

    Args:
        entries: names and patterns.
        within: what is not in that other set is not in this one either.

    Raises:
        InvalidRequest: an entry is neither a topic's name nor a pattern.
    """

    __slots__ = ("_names", "_patterns", "_remembered", "_within", "entries", "is_all")

    def __init__(self, entries: Iterable[str], *, within: TopicPermissions | None = None) -> None:
        self.entries = tuple(entries)
        self._within = within
        names: set[str] = set()
        patterns: list[Words] = []
        for entry in self.entries:
            if "*" in entry:
                patterns.append(parse_pattern(entry))
            else:
                check_topic(entry)
                names.add(entry)
        self._names = frozenset(names)
        self._patterns = tuple(patterns)
        # Every topic is in the set. Callers look at this first, which saves them a call.
        self.is_all: bool = (REST,) in patterns and (within is None or within.is_all)
        # Topic -> whether it is in the set; at most _MAX_REMEMBERED.
        self._remembered: dict[str, bool] = {}

    def __eq__(self, other: object) -> bool:
        """Return whether ``other`` was made of the same entries, within the same."""
        if not isinstance(other, TopicPermissions):
            return NotImplemented
        return (self.entries, self._within) == (other.entries, other._within)

    def __hash__(self) -> int:
        """Return the hash of the entries."""
        return hash(self.entries)

    def __bool__(self) -> bool:
        """Whether any topic can be in the set."""
        return bool(self.entries)

    def allows(self, topic: str) -> bool:
        """Return whether ``topic``, which is a possible name, is in the set."""
        if self.is_all:
            return True
        known = self._remembered.get(topic)
        if known is None:
            known = self._finds(topic)
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[topic] = known
        return known

    def _finds(self, topic: str) -> bool:
        if self._within is not None and not self._within.allows(topic):
            return False
        return topic in self._names or any(matches(words, topic) for words in self._patterns)

    def allows_some_of(self, pattern: Words) -> bool:
        """Return whether any topic that ``pattern`` matches can be in the set."""
        if self.is_all:
            return True
        if self._within is not None and not self._within.allows_some_of(pattern):
            return False
        return any(matches(pattern, name) for name in self._names) or any(
            _overlap(pattern, words) for words in self._patterns
        )


def _overlap(one: Words, other: Words) -> bool:
    """Return whether any name matches both patterns."""
    for left, right in zip_longest(one, other):
        if left is None or right is None:
            return False
        if left == REST or right == REST:
            # The one stands for one word or more, and the other has one left at least.
            return True
        if left != right and ONE not in (left, right):
            return False
    return True


# Every topic, as where nobody is asked for a credential.
ALL_TOPICS: Final = TopicPermissions([REST])
NO_TOPICS: Final = TopicPermissions([])
