"""Clearing: topics that lose all their messages, because an operator wants that.

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


class Cleared(msgspec.Struct, frozen=True):
    """A topic whose messages are gone."""

    topic: str
    tenant_id: str
    # The epoch that is over, and its newest message.
    old_epoch: str
    old_offset: int
    # The epoch that has begun.
    epoch: str
    # Messages that the ring had, and readers that go over.
    messages: int
    subscribers: int


class Clearing:
    """Clears and drops topics of this process alone.

    A topic in a journal is refused: other nodes would keep what this one has cleared.
    """

    __slots__ = ("_created_at", "_delivery", "_loop", "_topics")

    def __init__(
        self,
        topics: TopicManager,
        delivery: Delivery,
        created_at: Callable[[], str],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Args: created_at: returns the time that a topic has which begins now."""
        self._topics = topics
        self._delivery = delivery
        self._created_at = created_at
        self._loop = loop

    def clear(self, topic: Topic) -> Cleared:
        """Give up all messages of ``topic``; its readers stay, and are told a gap.

        Raises:
            Conflict: it is in a journal.
        """
        return self._begin_empty(topic, lambda begun: None)

    def drop(self, topic: Topic) -> Cleared:
        """Clear ``topic``, and let go of readers that came by a pattern: they are told `forgotten`.

        Readers that named it stay. Without any the name is forgotten within seconds.

        Raises:
            Conflict: it is in a journal.
        """
        return self._begin_empty(topic, self._let_patterns_go)

    def _begin_empty(self, topic: Topic, then: Callable[[Topic], None]) -> Cleared:
        if topic.journal is not None:
            raise Conflict(
                "The topic is in the journal, which every node reads, so that its messages can't be"
                " given up on one of them; they go by retention_s and retention_bytes in [journal]."
            )
        messages, subscribers = topic.held_messages, topic.subscribers
        begun = self._topics.begin_empty(topic, self._created_at(), self._loop.time())
        self._delivery.new_epochs.move_readers(topic, begun, partial(then, begun))
        return Cleared(
            *(topic.name, topic.tenant, topic.epoch, topic.head),
            *(begun.epoch, messages, subscribers),
        )

    def _let_patterns_go(self, begun: Topic) -> None:
        # With a first message it is a topic again, which the patterns match.
        if not begun.head:
            self._delivery.patterns.topic_forgotten(begun)
