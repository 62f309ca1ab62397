"""RingSizes: how the rings of all topics together stay within one bound.

Portions that hold more than they are guaranteed give first; in a portion the largest rings do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Final

from clevrd.core.portions import Portion, RingOwner
from clevrd.core.topic import Topic

# When all rings together are over their bound they are cut to this share of it, so that the
# search for the largest is paid once per tenth of the memory and not once per message. For the same
# reason a portion that is over its guarantee may be cut to this share of that.
_TRIM_TO: Final = 0.9

# Rings cut at a time, about 3 us each. Where more are alike, the next publish cuts the next.
_RINGS_PER_TRIM: Final = 256

# Parts of their guarantees that portions may keep, tried one after the other while memory is short:
# what is borrowed goes first.
_GUARANTEE_PARTS: Final = (1.0, 0.5, 0.25, 0.125, 0.0)


class RingSizes:
    """The sizes of all rings, and their sum."""

    __slots__ = (
        *("_portions", "_told_at_bytes", "max_bytes", "on_cut", "on_grown", "total_bytes"),
        "watched_bytes",
    )

    def __init__(self, max_bytes: int, portions: Iterable[Portion]) -> None:
        """Args: portions: yields, each time it is gone over, all portions that there are then."""
        self.max_bytes = max_bytes
        self._portions = portions
        # Bytes that all rings hold; changed here, and by TopicManager.extend in place of a call.
        self.total_bytes = 0
        # Called when rings of a portion were cut, with its name, their number and the bytes freed.
        self.on_cut: Callable[[str, int, int], None] = _tell_nobody
        # Called when all rings have grown as far as `watch` was told.
        self.on_grown: Callable[[], None] = lambda: None
        # `on_grown` is called above this sum; and `grown` is to be called above the lesser one of
        # this and the bound. Both are changed by watch() alone.
        self._told_at_bytes = max_bytes
        self.watched_bytes = max_bytes

    @property
    def left_bytes(self) -> int:
        """Bytes that the rings may still take; negative while they have too many."""
        return self.max_bytes - self.total_bytes

    def add(self, topic: Topic) -> None:
        """Count the ring of a topic that is there now."""
        size_bytes = topic.ring.size_bytes
        self.total_bytes += size_bytes
        topic.portion.ring_bytes += size_bytes
        self.reclass(topic)

    def remove(self, topic: Topic) -> None:
        """Count the ring of a topic that is forgotten no more."""
        size_bytes = topic.ring.size_bytes
        self.total_bytes -= size_bytes
        topic.portion.ring_bytes -= size_bytes
        if topic.size_class:
            _unclass(topic.portion, topic)
            topic.size_class = 0

    def reclass(self, topic: Topic) -> None:
        """Put the topic among the topics whose rings are of the same order of size."""
        _reclass(topic.portion, topic)

    def watch(self, growth_bytes: int) -> None:
        """Have `on_grown` called when all rings together have grown by ``growth_bytes``."""
        self._told_at_bytes = self.total_bytes + growth_bytes
        self.watched_bytes = min(self.max_bytes, self._told_at_bytes)

    def grown(self, now_s: float) -> None:
        """Do what is to be done now that ``total_bytes`` is above ``watched_bytes``."""
        if self.total_bytes > self._told_at_bytes:
            self.on_grown()
        self.trim_largest(now_s)

    def trim_largest(self, now_s: float) -> None:
        """Cut rings until all are small enough together, those first that hold borrowed bytes.

        Nothing is cut while the rings are within their bound, nor of a portion that is within its
        guarantee. Where very many rings are alike some are cut now, and the others the next time.
        """
        if self.total_bytes <= self.max_bytes:
            return
        portions = list(self._portions)
        uses = [(portion.ring_bytes, portion.guaranteed_ring_bytes) for portion in portions]
        excess_bytes = self.total_bytes - int(self.max_bytes * _TRIM_TO)
        rings = _RINGS_PER_TRIM
        for portion, given_bytes in zip(portions, given_back(uses, excess_bytes), strict=True):
            if given_bytes and rings:
                before_bytes = portion.ring_bytes
                cut = self._trim_portion(portion, given_bytes, rings, now_s)
                rings -= cut
                if cut:
                    self.on_cut(portion.name, cut, before_bytes - portion.ring_bytes)

    def shrink(self, wanted_bytes: int, now_s: float) -> int:
        """Have rings give up ``wanted_bytes`` that no reader waits for; return the bytes freed.

        For a machine that runs out of memory: guarantees hold only as far as what is borrowed
        suffices. The largest rings give first. At most _RINGS_PER_TRIM rings of each portion are
        looked at.
        """
        portions = list(self._portions)
        given: list[int] = []
        for part in _GUARANTEE_PARTS:
            uses = [(each.ring_bytes, int(each.guaranteed_ring_bytes * part)) for each in portions]
            given = given_back(uses, wanted_bytes)
            if sum(given) >= wanted_bytes:
                break
        return sum(
            self._shrink_portion(portion, min(given_bytes, wanted_bytes), now_s)
            for portion, given_bytes in zip(portions, given, strict=True)
        )

    def _shrink_portion(self, portion: Portion, wanted_bytes: int, now_s: float) -> int:
        """Cut rings, the largest first, until ``wanted_bytes`` are freed; return the bytes freed.

        Rings that can't give up what they should, since readers wait for it, leave it to others.
        """
        freed_bytes = 0
        left = _largest(portion, _RINGS_PER_TRIM)
        while left and freed_bytes < wanted_bytes:
            level = _level([topic.ring.size_bytes for topic in left], wanted_bytes - freed_bytes)
            yielding: list[RingOwner] = []
            for topic in left:
                if topic.ring.size_bytes <= level:
                    yielding.append(topic)
                elif freed := topic.spare(level, now_s):
                    freed_bytes += freed
                    self.total_bytes -= freed
                    portion.ring_bytes -= freed
                    _reclass(portion, topic)
            left = yielding
        return freed_bytes

    def _trim_portion(self, portion: Portion, excess: int, at_most: int, now_s: float) -> int:
        """Cut the largest rings to one size, the largest first, until ``excess`` is saved.

        Where very many are alike some are cut now, by half at most. Returns how many were.
        """
        largest = _largest(portion, at_most)
        sizes = [topic.ring.size_bytes for topic in largest]
        target = portion.ring_bytes - excess
        level = _level(sizes, excess)
        if len(largest) == at_most:
            level = max(level, sizes[-1] // 2)
        for cut, topic in enumerate(largest):
            # Rings give whole messages, so a few may have given enough for all.
            if portion.ring_bytes <= target or topic.ring.size_bytes <= level:
                return cut
            freed_bytes = topic.trim(level, now_s)
            self.total_bytes -= freed_bytes
            portion.ring_bytes -= freed_bytes
            # The ring is filed again even in the same class: others come first the next time.
            _reclass(portion, topic)
        return len(largest)


def _tell_nobody(portion: str, rings: int, freed_bytes: int) -> None:
    """Take no note of rings that were cut."""


def given_back(uses: Sequence[tuple[int, int]], excess_bytes: int) -> list[int]:
    """Return how many bytes each party gives back so that ``excess_bytes`` come free.

    Parties within their guarantee give nothing. The others give down to one multiple of their
    guarantees, but none gives so much that it has less than _TRIM_TO of its own.

    Args:
        uses: for each party the bytes that it uses and the bytes that it is guaranteed.
    """
    over = sorted(
        (used / max(guaranteed, 1), used, guaranteed)
        for used, guaranteed in uses
        if used > guaranteed
    )
    # The multiple of their guarantees down to which parties give.
    level, used_bytes, guaranteed_bytes = _TRIM_TO, 0, 0
    while over:
        _, used, guaranteed = over.pop()
        used_bytes += used
        guaranteed_bytes += max(guaranteed, 1)
        level = max(_TRIM_TO, (used_bytes - excess_bytes) / guaranteed_bytes)
        if over and level >= over[-1][0]:
            break
    return [
        max(0, used - int(level * max(guaranteed, 1))) if used > guaranteed else 0
        for used, guaranteed in uses
    ]


def _reclass(portion: Portion, topic: RingOwner) -> None:
    if topic.size_class:
        _unclass(portion, topic)
    topic.size_class = topic.ring.size_bytes.bit_length()
    if topic.size_class:
        portion.rings.setdefault(topic.size_class, {})[topic] = None


def _unclass(portion: Portion, topic: RingOwner) -> None:
    alike = portion.rings[topic.size_class]
    del alike[topic]
    if not alike:
        del portion.rings[topic.size_class]


def _largest(portion: Portion, at_most: int) -> list[RingOwner]:
    """Return up to ``at_most`` topics with the largest rings, the largest first.

    Among rings of the same order of size, twice one another at most, it picks any.
    """
    rings = portion.rings
    orders = sorted(rings, reverse=True)
    topics = islice(chain.from_iterable(rings[order] for order in orders), at_most)
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
