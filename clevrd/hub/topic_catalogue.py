"""TopicCatalogue: the topics that have messages, in this process or in a journal.

Asking makes no topic, and brings none into use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final

from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.hub.journaling import Journaling

# Topics of one step, at 0.1 to 0.3 us each.
TOPICS_PER_STEP: Final = 1_000


class TopicCatalogue:
    """Finds topics, without making any."""

    def __init__(
        self, topics: TopicManager, journal: Journaling | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._topics = topics
        self._journal = journal
        self._loop = loop

    def find(self, tenant: str, name: str) -> Topic | None:
        """Return a topic that somebody reads or that has messages; None where there is none.

        A topic that has messages in the journal alone is a value for this one use: nothing that
        comes later reaches it.
        """
        topic = self._topics.find(tenant, name)
        if topic is not None or self._journal is None or not self._journal.covers(name):
            return topic
        start = self._journal.node.start_of(tenant, name)
        return self._topics.detached(tenant, name, start, self._loop.time()) if start.head else None

    def names(self, tenant: str) -> Iterator[Sequence[str]]:
        """Yield the names of the tenant's topics that have messages, some at a time, each once.

        Topics whose first message comes meanwhile are among them, or not.
        """
        in_use = self._topics.of_tenant(tenant)
        for start in range(0, len(in_use), TOPICS_PER_STEP):
            yield [each.name for each in in_use[start : start + TOPICS_PER_STEP] if each.head]
        journal = self._journal
        if journal is None:
            return
        found = {each.name for each in in_use if each.head}
        for slots in journal.node.names():
            yield [
                name
                for owner, name in slots
                if owner == tenant and name not in found and journal.covers(name)
            ]
