"""Clearing: topics that lose all their messages, because an operator or their tenant wants that.

The name begins a new epoch, so no position is used again. Readers of the old epoch go over to the
new one in turns (`new_epochs`), and are told a gap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import msgspec

from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.errors import Conflict
from clevrd.hub.delivery import Delivery
from clevrd.hub.journaling import Journaling


class Cleared(msgspec.Struct, frozen=True):
    """A topic whose messages are gone."""

    topic: str
    tenant_id: str
    # The epoch that is over, and its newest message.
    old_epoch: str
    old_offset: int
    # The position behind which the topic's messages come now.
    epoch: str
    offset: int
    # Messages that the ring of this process had, and its readers, which go over.
    messages: int
    subscribers: int


class Clearing:
    """Clears topics, and drops topics of this process alone.

    A topic in a journal is cleared on every node, by a record. It can't be dropped: its name stays,
    since its offsets go on.
    """

    __slots__ = ("_created_at", "_delivery", "_journal", "_loop", "_topics")

    def __init__(
        self,
        topics: TopicManager,
        delivery: Delivery,
        created_at: Callable[[], str],
        loop: asyncio.AbstractEventLoop,
        journal: Journaling | None = None,
    ) -> None:
        """Have topics to clear.

        Args:
            created_at: returns the time that a topic has which begins now.
            journal: None where all topics are this process's alone.
        """
        self._journal = journal
        self._topics = topics
        self._delivery = delivery
        self._created_at = created_at
        self._loop = loop

    def clear(self, topic: Topic) -> Cleared | asyncio.Future[Cleared]:
        """Give up all messages of ``topic``, on every node; its readers stay, and are told a gap.

        The answer comes later for a topic in a journal, perhaps as a ClevrdError. Messages that
        were submitted before are cleared, and later ones are not.

        Raises:
            ShuttingDown: the journal takes nothing any more.
        """
        if self._journal is None or topic.journal is None:
            return self._begin_empty(topic, lambda begun: None)
        messages, subscribers = topic.held_messages, topic.subscribers

        def answer(epoch: str, upto: int) -> Cleared:
            # Messages that were submitted before have come since.
            old_offset = max(topic.head, upto)
            return Cleared(
                *(topic.name, topic.tenant, topic.epoch, old_offset),
                *(epoch, upto, messages, subscribers),
            )

        return self._journal.node.submit_clear(topic, topic.journal, answer)

    def drop(self, topic: Topic) -> Cleared:
        """Clear ``topic``, and let go of readers that came by a pattern: they are told `forgotten`.

        Readers that named it stay. Without any the name is forgotten within seconds.

        Raises:
            Conflict: it is in a journal.
        """
        if topic.journal is not None:
            raise Conflict(
                "The topic is in the journal, where its name stays, since its offsets go on; DELETE"
                " /admin/messages clears it on every node."
            )
        return self._begin_empty(topic, self._let_patterns_go)

    def _begin_empty(self, topic: Topic, then: Callable[[Topic], None]) -> Cleared:
        messages, subscribers = topic.held_messages, topic.subscribers
        begun = self._topics.begin_empty(topic, self._created_at(), self._loop.time())
        self._delivery.new_epochs.move_readers(topic, begun, partial(then, begun))
        return Cleared(
            *(topic.name, topic.tenant, topic.epoch, topic.head),
            *(begun.epoch, 0, messages, subscribers),
        )

    def _let_patterns_go(self, begun: Topic) -> None:
        # A topic that has a message by now is matched by patterns, and stays with them.
        if not begun.head:
            self._delivery.patterns.topic_forgotten(begun)
