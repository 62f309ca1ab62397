"""SubscriberIds: who reads a topic, by the ids that subscribers gave themselves.

A subscriber that gave no id costs nothing here, and is counted by its topic alone. An id is no
credential: a tenant's subscribers may call themselves what they like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic

_NOBODY: Final[Mapping[str, int]] = {}


class SubscriberIds:
    """The ids of this process's subscribers, and how many connections each has in each topic.

    It has at most one entry for each topic of each connection, as connections are bounded.
    """

    __slots__ = ("_by_topic", "given")

    def __init__(self) -> None:
        # Readers that gave an id, until they leave for good. Callers look at this first, which
        # saves readers without an id a call.
        self.given: dict[Subscriber, str] = {}
        # Tenant and topic -> id -> joined readers with it. By name, since a topic's next epoch is
        # another object.
        self._by_topic: dict[tuple[str, str], dict[str, int]] = {}

    def introduce(self, reader: Subscriber, subscriber_id: str) -> None:
        """Note the id that ``reader`` goes by, before it joins its topic."""
        self.given[reader] = subscriber_id

    def forget(self, reader: Subscriber) -> None:
        """Know no more of a reader, which has left for good. Idempotent."""
        self.given.pop(reader, None)

    def joined(self, topic: Topic, reader: Subscriber) -> bool:
        """Count a reader that has joined; return whether it is the first one with its id."""
        subscriber_id = self.given.get(reader)
        if subscriber_id is None:
            return False
        present = self._by_topic.setdefault((topic.tenant, topic.name), {})
        count = present[subscriber_id] = present.get(subscriber_id, 0) + 1
        return count == 1

    def left(self, topic: Topic, reader: Subscriber) -> bool:
        """Count a joined reader no more; return whether it was the last one with its id."""
        subscriber_id = self.given.get(reader)
        if subscriber_id is None:
            return False
        slot = topic.tenant, topic.name
        present = self._by_topic[slot]
        count = present[subscriber_id] - 1
        if count:
            present[subscriber_id] = count
            return False
        del present[subscriber_id]
        if not present:
            del self._by_topic[slot]
        return True

    def of(self, tenant: str, name: str) -> Mapping[str, int]:
        """Return how many connections each id has in a topic; not to be changed."""
        return self._by_topic.get((tenant, name), _NOBODY)
