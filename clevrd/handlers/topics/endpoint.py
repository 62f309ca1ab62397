"""GET /topics: the names of a tenant's topics, page by page. GET /topics/T: one topic."""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Generator
from typing import Final

import msgspec

from clevrd.admission import Admitted, Gate
from clevrd.core.topic import Topic
from clevrd.errors import Forbidden, InvalidRequest, NotFound
from clevrd.handlers.subscribe.options import single_option
from clevrd.handlers.topics.path import topic_in
from clevrd.http_values import Request, Response, json_view
from clevrd.hub import Hub
from clevrd.tenants import Tenant

# Topics, or ids, of one answer unless it asks otherwise, and the most it may ask for: 1,000 topics
# are 200 KB, and 3 ms of work.
DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1_000

NO_TOPIC: Final = (
    "There is no such topic: nobody reads it, and it has no message; its first message makes it."
)

# Ids that are looked at in one step, at 1 us each where all of them are to be sorted.
_IDS_PER_STEP: Final = 1_000

# Topics that are looked up and shown in one step, at 3 us each.
_SHOWN_PER_STEP: Final = 100


class ListedTopic(msgspec.Struct, frozen=True):
    """One topic in a list."""

    topic: str
    epoch: str
    offset: int
    subscribers: int


class TopicList(msgspec.Struct, frozen=True):
    """A page of topics, by name."""

    topics: list[ListedTopic]
    # The option `after` of the next page; None behind the last one.
    next: str | None


class PresentId(msgspec.Struct, frozen=True):
    """An id that subscribers gave themselves."""

    id: str
    connections: int


class PresencePage(msgspec.Struct, frozen=True):
    """A page of ids, in their order."""

    ids: list[PresentId]
    # All that are present, on this page or not.
    count: int
    next: str | None


class TopicAnswer(msgspec.Struct, frozen=True):
    """One topic; counts of readers and messages are those of this process."""

    topic: str
    tenant_id: str
    epoch: str
    # The newest message's; 0 before the first.
    offset: int
    created_at: str
    subscribers: int
    lagging: int
    slow: int
    # The oldest message in memory, how many there are, and their bytes.
    oldest_offset: int | None
    held_messages: int
    held_bytes: int
    delivered: int
    dropped: int
    presence: PresencePage


class _TopicReadEndpoint:
    """An endpoint that tells a tenant of its topics."""

    serves_while_draining = False

    def __init__(self, gate: Gate, hub: Hub) -> None:
        self._gate = gate
        self._hub = hub

    def admit(self, head: Request) -> Admitted:
        """Refuse what names no tenant."""
        return self._gate.admit_tenant(head)


class TopicsEndpoint(_TopicReadEndpoint):
    """Lists the topics with messages that the credential may subscribe to."""

    def admit(self, head: Request) -> Admitted:
        """Refuse a credential that may subscribe to nothing."""
        admitted = super().admit(head)
        if not admitted.tenant.subscribe:
            raise Forbidden("The credential may subscribe to no topic, so there is none to list.")
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns."""
        limit = limit_option(admitted.options)
        after = single_option(admitted.options, "after") or ""
        return self._hub.turns.carry_out(self._answer(admitted.tenant, after, limit))

    def _answer(self, tenant: Tenant, after: str, limit: int) -> Generator[None, None, Response]:
        allows = tenant.subscribe.allows
        page: list[str] = []
        for names in self._hub.catalogue.names(tenant.name):
            found = (name for name in names if name > after and allows(name))
            # One more than is shown tells whether there is a next page.
            page = heapq.nsmallest(limit + 1, (*page, *found))
            yield
        shown: list[ListedTopic] = []
        for number, name in enumerate(page[:limit], 1):
            topic = self._hub.catalogue.find(tenant.name, name)
            if topic is not None:
                shown.append(ListedTopic(name, topic.epoch, topic.head, topic.subscribers))
            if number % _SHOWN_PER_STEP == 0:
                yield
        following = page[limit - 1] if len(page) > limit else None
        yield
        return json_view(TopicList(shown, following))


class TopicEndpoint(_TopicReadEndpoint):
    """Shows one topic."""

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns."""
        name = topic_in(admitted.head.path)
        tenant = admitted.tenant
        tenant.check_subscribe(name)
        limit = limit_option(admitted.options)
        after = single_option(admitted.options, "after") or ""
        topic = self._hub.catalogue.find(tenant.name, name)
        if topic is None:
            raise NotFound(NO_TOPIC)
        slow = topic.slow_count(self._hub.settle([topic]))
        return self._hub.turns.carry_out(self._answer(topic, slow, after, limit))

    def _answer(
        self, topic: Topic, slow: int, after: str, limit: int
    ) -> Generator[None, None, Response]:
        """Return the topic's figures, and who of its readers gave an id."""
        # The ids are those of now: readers that come and go meanwhile are not seen.
        present = dict(self._hub.subscriber_ids.of(topic.tenant, topic.name))
        found = list(present)
        ids: list[str] = []
        for start in range(0, len(found), _IDS_PER_STEP):
            some = (each for each in found[start : start + _IDS_PER_STEP] if each > after)
            # One more than is shown tells whether there is a next page.
            ids = heapq.nsmallest(limit + 1, (*ids, *some))
            yield
        presence = PresencePage(
            [PresentId(each, present[each]) for each in ids[:limit]],
            len(present),
            ids[limit - 1] if len(ids) > limit else None,
        )
        return json_view(_shown(topic, slow, presence))


def _shown(topic: Topic, slow: int, presence: PresencePage) -> TopicAnswer:
    return TopicAnswer(
        topic=topic.name,
        tenant_id=topic.tenant,
        epoch=topic.epoch,
        offset=topic.head,
        created_at=topic.created_at,
        subscribers=topic.subscribers,
        lagging=len(topic.lagging),
        slow=slow,
        oldest_offset=topic.first if topic.held_messages else None,
        held_messages=topic.held_messages,
        held_bytes=topic.held_bytes,
        delivered=topic.delivered,
        dropped=topic.losses.total,
        presence=presence,
    )


def limit_option(options: dict[str, list[str]]) -> int:
    """Return how many entries an answer may have.

    Raises:
        InvalidRequest: it is no number from 1 to MAX_LIMIT, or given twice.
    """
    text = single_option(options, "limit")
    if text is None:
        return DEFAULT_LIMIT
    is_number = text.isascii() and text.isdecimal() and len(text) <= 9
    if not is_number or not 1 <= int(text) <= MAX_LIMIT:
        raise InvalidRequest(f"The option limit must be a whole number from 1 to {MAX_LIMIT}.")
    return int(text)
