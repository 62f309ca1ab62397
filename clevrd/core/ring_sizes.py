"""RingSizes: how the rings of all topics together stay within one bound. The largest give first."""

from __future__ import annotations

from itertools import chain, islice
from typing import Final

from clevrd.core.topic import Topic

# When all rings together are over their bound they are cut to this share of it, so that the
# search for the largest is paid once per tenth of the memory and not once per message.
_TRIM_TO: Final = 0.9

# Rings cut at a time, about 3 us each. Where more are alike, the next publish cuts the next.
_RINGS_PER_TRIM: Final = 256


class RingSizes:
    """The sizes of all rings, and their sum."""

    __slots__ = ("_by_class", "max_bytes", "total_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        # Bytes that all rings hold; changed here, and by TopicManager.extend in place of a call.
        self.total_bytes = 0
        # Bit length of a ring's size -> the topics with rings of that order; dicts as ordered sets.
        # No ring that is empty is in here.
        self._by_class: dict[int, dict[Topic, None]] = {}

    @property
    def left_bytes(self) -> int:
        """Bytes that the rings may still take; negative while they have too many."""
        return self.max_bytes - self.total_bytes

    def add(self, topic: Topic) -> None:
        """Count the ring of a topic that is there now."""
        self.total_bytes += topic.ring.size_bytes
        self.reclass(topic)

    def remove(self, topic: Topic) -> None:
        """Count the ring of a topic that is forgotten no more."""
        self.total_bytes -= topic.ring.size_bytes
        if topic.size_class:
            self._unclass(topic)
            topic.size_class = 0

    def reclass(self, topic: Topic) -> None:
        """Put the topic among the topics whose rings are of the same order of size."""
        if topic.size_class:
            self._unclass(topic)
        topic.size_class = topic.ring.size_bytes.bit_length()
        if topic.size_class:
            self._by_class.setdefault(topic.size_class, {})[topic] = None

    def trim_largest(self, now_s: float) -> None:
        """Cut the largest rings to one size, the largest first, until the rest is small enough.

        Where very many are alike some are cut now, by half at most, and the others the next time.
        Nothing is cut while the rings are within their bound.
        """
        if self.total_bytes <= self.max_bytes:
            return
        largest = self._largest()
        sizes = [topic.ring.size_bytes for topic in largest]
        target = int(self.max_bytes * _TRIM_TO)
        level = _level(sizes, self.total_bytes - target)
        if len(largest) == _RINGS_PER_TRIM:
            level = max(level, sizes[-1] // 2)
        for topic in largest:
            # Rings give whole messages, so a few may have given enough for all.
            if self.total_bytes <= target or topic.ring.size_bytes <= level:
                return
            self.total_bytes -= topic.trim(level, now_s)
            # Also when it remains of its order: others come first the next time.
            self.reclass(topic)

    def _unclass(self, topic: Topic) -> None:
        alike = self._by_class[topic.size_class]
        del alike[topic]
        if not alike:
            del self._by_class[topic.size_class]

    def _largest(self) -> list[Topic]:
        """Return up to _RINGS_PER_TRIM topics with the largest rings, the largest first.

        Among rings of the same order of size, twice one another at most, it picks any.
        """
        orders = sorted(self._by_class, reverse=True)
        topics = islice(
            chain.from_iterable(self._by_class[order] for order in orders), _RINGS_PER_TRIM
        )
        return sorted(topics, key=lambda topic: topic.ring.size_bytes, reverse=True)


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
