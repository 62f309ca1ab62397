"""NewEpochs: readers of topics that begin a new epoch go over to it, in turns.

A new epoch has a topic of its own, so that messages can be published in it at once. Until it is a
reader's turn the reader is in the old topic, and is handed what that still has.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol, runtime_checkable

import msgspec

from clevrd.core.beginning import After, Beginning
from clevrd.core.notices import Ref, Warnings
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic, newest_epoch_of
from clevrd.core.topic_manager import TopicManager
from clevrd.hub.history_readers import HistoryReaders
from clevrd.hub.readers import Readers
from clevrd.metrics.counters import Counters
from clevrd.scheduling.turn_queue import TurnQueue

# Readers that go over in one turn of the loop, at about 20 us each.
_PER_TURN: Final = 64


@runtime_checkable
class Follower(Protocol):
    """A reader that can go over to its topic's next epoch."""

    def follow(self, topic: Topic, beginning: Beginning, ref: Ref, warnings: Warnings, /) -> None:
        """Read ``topic``, the next epoch of the topic that it has left, from ``beginning`` on.

        The beginning says where the reader was, so that it is told of the new epoch.
        """


def _do_nothing() -> None:
    """Do nothing when all readers have gone over."""


class NewEpochs:
    """The readers that are still in a topic whose next epoch has begun."""

    def __init__(
        self,
        readers: Readers,
        topics: TopicManager,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._readers = readers
        self._topics = topics
        # None where no topic has a history.
        self.history: HistoryReaders | None = None
        # Topics, those of their readers that are yet to go over, and what follows; topics take
        # turns.
        self._outlived: deque[tuple[Topic, Iterator[Subscriber], Callable[[], None]]] = deque()
        self._queue = TurnQueue(_PER_TURN, self._move_next, loop, counters.count_background_error)

    def __len__(self) -> int:
        """Return how many topics are not empty yet."""
        return len(self._outlived)

    def move_readers(
        self, topic: Topic, begun: Topic, then: Callable[[], None] = _do_nothing
    ) -> None:
        """Have all readers of ``topic`` go over to ``begun``, its next epoch, or to a later one.

        Args:
            then: called when the last of them has gone over.
        """
        if topic.subscribers:
            self._outlived.append((topic, iter(_readers_of(topic)), then))
            self._queue.work_soon()
        else:
            self._topics.forget_outlived(topic)
            then()

    def _move_next(self) -> int | None:
        if not self._outlived:
            return None
        topic, readers, then = self._outlived.popleft()
        reader = next(readers, None)
        if reader is None:
            self._topics.forget_outlived(topic)
            then()
            return 0
        self._outlived.append((topic, readers, then))
        if _is_in(topic, reader):
            self._move(topic, reader)
        return 1

    def _move(self, topic: Topic, reader: Subscriber) -> None:
        begun = newest_epoch_of(topic)
        asked = None if self.history is None else self.history.unbegun(reader)
        # Where that epoch is over, its name is all that matters of the position.
        place = After(reader.cursor, topic.epoch)
        self._readers.let_go(topic, reader)
        try:
            if not isinstance(reader, Follower):
                raise TypeError(f"{reader!r} can't follow its topic into a new epoch")
            if asked is None:
                reader.follow(begun, place, msgspec.UNSET, msgspec.UNSET)
            else:
                reader.follow(begun, asked.beginning, asked.ref, asked.warnings)
        except Exception:
            self._readers.write_failed(begun, reader)


def _readers_of(topic: Topic) -> list[Subscriber]:
    """Return all readers of ``topic``."""
    in_history = {} if topic.history is None else topic.history.readers
    return [*topic.live, *topic.lagging, *topic.suspended, *in_history]


def _is_in(topic: Topic, reader: Subscriber) -> bool:
    """Return whether ``reader`` has not left ``topic``."""
    if reader in topic.live or reader in topic.lagging or reader in topic.suspended:
        return True
    return topic.history is not None and reader in topic.history.readers
