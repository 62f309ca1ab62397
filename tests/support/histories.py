"""A history in memory, which tests can make slow, failing, damaged and forgetful, and topics of it.

Its contract is `History` in clevrd/journal/base.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import msgspec
from fakes import FakeSink
from stored_messages import StoredMessage

from clevrd.core.beginning import Beginning
from clevrd.core.drop_strategy import DROP_OLDEST, DropStrategy
from clevrd.core.gap_log import GapLog
from clevrd.core.journal_place import JournalPlace, TopicStart
from clevrd.core.message_ids import id_at, rfc3339
from clevrd.core.notices import Ref, Warnings
from clevrd.core.publish_request import PublishRequest
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import JournalUnavailable
from clevrd.hub import Hub
from clevrd.journal.base import Extent, StoredRun

PARTITION_EPOCH = "aa11"
EPOCH = "0123456789ab"
BEGAN_US = 1_700_000_000_000_000
# The id of a topic's message with offset 0, which there is not; each later one's is a microsecond
# more.
FIRST_US = BEGAN_US + 1_000_000
# Messages that were appended together.
MOST_IN_RUN = 7


class FakeHistory:
    """Messages by partition epoch, tenant and topic."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str], dict[int, StoredMessage]] = {}
        self._heads: dict[tuple[str, str, str], int] = {}
        self._given_up: dict[tuple[str, str, str], int] = {}
        # Calls so far, by method.
        self.pages: list[tuple[str, int]] = []
        self.look_ups = 0
        self.extents = 0
        # Pages are answered while it is set.
        self.is_open = asyncio.Event()
        self.is_open.set()
        # What the next calls raise; None for nothing.
        self.error: Exception | None = None
        # Calls under way, and the most there were at once.
        self.under_way = 0
        self.most_under_way = 0

    def add(
        self,
        tenant: str,
        topic: str,
        offsets: Iterable[int],
        *,
        epoch: str = PARTITION_EPOCH,
        size_bytes: int = 0,
        key: str = "",
    ) -> None:
        """Keep messages; each one's data is its offset, or a string that begins with it."""
        place = (epoch, tenant, topic)
        kept = self._kept.setdefault(place, {})
        for offset in offsets:
            data = data_of(offset, size_bytes)
            end = b',"key":"%b"}' % key.encode() if key else b"}"
            line = b'{"topic":"%b","data":%b%b' % (topic.encode(), data, end)
            us = FIRST_US + offset
            kept[offset] = StoredMessage(offset, us, us, line)
            self._heads[place] = max(offset, self._heads.get(place, 0))

    def put(self, tenant: str, topic: str, message: StoredMessage) -> None:
        """Keep one message as it is."""
        place = (PARTITION_EPOCH, tenant, topic)
        self._kept.setdefault(place, {})[message.offset] = message
        self._heads[place] = message.offset

    def damage(self, tenant: str, topic: str, offset: int, epoch: str = PARTITION_EPOCH) -> bool:
        """Lose one message in the middle; return whether it was there."""
        kept = self._kept.get((epoch, tenant, topic), {})
        return kept.pop(offset, None) is not None

    def spoil(self, tenant: str, topic: str, offset: int) -> None:
        """Keep something else in the place of one message."""
        kept = self._kept[PARTITION_EPOCH, tenant, topic]
        kept[offset] = msgspec.structs.replace(kept[offset], line=b"no publish")

    def forget(self, tenant: str, topic: str, upto: int, epoch: str = PARTITION_EPOCH) -> None:
        """Give up the messages up to offset ``upto``."""
        place = (epoch, tenant, topic)
        kept = self._kept.get(place, {})
        for offset in [each for each in kept if each <= upto]:
            del kept[offset]
        self._given_up[place] = max(upto, self._given_up.get(place, 0))

    async def extent(self, partition_epoch: str, tenant: str, topic: str) -> Extent | None:
        """Return what is kept."""
        self.extents += 1
        await self._answer()
        place = (partition_epoch, tenant, topic)
        if place not in self._kept:
            return None
        head = self._heads[place]
        first = min(self._kept[place], default=head + 1)
        # A damaged message is still a part of what is kept.
        return Extent(min(first, self._given_up.get(place, 0) + 1), head)

    async def page(
        self,
        partition_epoch: str,
        tenant: str,
        topic: str,
        after: int,
        max_messages: int,
        max_bytes: int,
    ) -> list[StoredRun]:
        """Return messages behind ``after``, in order; neighbours are in one run, a few in each."""
        self.pages.append((topic, after))
        await self._answer()
        kept = self._kept.get((partition_epoch, tenant, topic), {})
        found: list[StoredMessage] = []
        for offset in sorted(kept):
            if offset <= after:
                continue
            max_bytes -= len(kept[offset].line)
            if found and (max_bytes < 0 or len(found) == max_messages):
                break
            found.append(kept[offset])
        return _runs_of(found)

    async def last_before(self, partition_epoch: str, tenant: str, topic: str, id_us: int) -> int:
        """Return the newest kept message's offset whose id is below ``id_us``."""
        self.look_ups += 1
        await self._answer()
        kept = self._kept.get((partition_epoch, tenant, topic), {})
        return max((each.offset for each in kept.values() if each.id_us < id_us), default=0)

    async def _answer(self) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(0)
            await self.is_open.wait()
            if self.error is not None:
                raise self.error
        finally:
            self.under_way -= 1


def _runs_of(messages: Sequence[StoredMessage]) -> list[StoredRun]:
    runs: list[StoredRun] = []
    for each in messages:
        line = each.line + b"\n"
        before = runs[-1] if runs else None
        if (
            before is not None
            and before.count < MOST_IN_RUN
            and each.offset == before.offset + before.count
            and each.id_us == each.time_us == before.id_us + before.count
        ):
            runs[-1] = msgspec.structs.replace(
                before, count=before.count + 1, lines=before.lines + line
            )
        else:
            runs.append(StoredRun(each.offset, 1, each.id_us, 1, each.time_us, line))
    return runs


def unavailable() -> JournalUnavailable:
    """Return what an engine raises that is away."""
    return JournalUnavailable("The journal is away.")


def journaled_topic(
    hub: Hub,
    name: str,
    head: int,
    *,
    tenant: str = "default-tenant",
    epoch: str = EPOCH,
    partition_epoch: str = PARTITION_EPOCH,
) -> Topic:
    """Return a topic as it is after a restart: behind ``head``, with an empty ring."""
    start = start_of(head, epoch, partition_epoch)
    return hub.topics.get_or_create(tenant, name, "", hub.now_s(), start=start)


def start_of(
    head: int,
    epoch: str = EPOCH,
    partition_epoch: str = PARTITION_EPOCH,
    began_us: int = BEGAN_US,
) -> TopicStart:
    """Return how a topic begins behind ``head``."""
    place = JournalPlace(0, partition_epoch, is_durable=True, has_history=True)
    return TopicStart(epoch, rfc3339(began_us), head, place)


def deliver(
    hub: Hub, topic: Topic, history: FakeHistory, count: int, *, size_bytes: int = 0
) -> None:
    """Deliver messages that have come through the journal, and which the history has as well."""
    place = topic.journal
    assert place is not None
    for _ in range(count):
        offset = topic.head + 1
        history.add(
            topic.tenant,
            topic.name,
            [offset],
            epoch=place.partition_epoch,
            size_bytes=size_bytes,
        )
        us = FIRST_US + offset
        data = msgspec.Raw(data_of(offset, size_bytes))
        request = PublishRequest(topic.name, data)
        hub.delivery.deliver(topic, offset, (request,), ((id_at(us), rfc3339(us)),))


def data_of(offset: int, size_bytes: int = 0) -> bytes:
    """Return the data of a message."""
    return b"%d" % offset if not size_bytes else b'"%d%b"' % (offset, b"x" * size_bytes)


class FollowingReader(Subscriber):
    """A reader as a connection's, which goes over to a new epoch. Its sink is a FakeSink."""

    def __init__(
        self,
        hub: Hub,
        topic: Topic,
        sink: FakeSink,
        gaps: GapLog | None,
        policy: DropStrategy = DROP_OLDEST,
    ) -> None:
        super().__init__(sink, policy, gaps=gaps)
        self.hub = hub
        self.topic = topic
        sink.on_pause = lambda: hub.paused(self.topic, self)
        sink.on_resume = lambda: hub.resumed(self.topic, self)

    def follow(self, topic: Topic, beginning: Beginning, ref: Ref, warnings: Warnings, /) -> None:
        """Go over."""
        self.topic = topic
        self.hub.subscribe(topic, self, beginning, ref=ref, warnings=warnings)
