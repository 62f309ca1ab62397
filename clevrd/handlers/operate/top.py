"""GET /admin/top: the slowest subscribers, the busiest topics, the largest rings, who is limited.

All connections and all topics are looked at, some in each turn of the loop. Requests within a
second of each other are given the same view, so that many pages that refresh cost one look.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import Final, Generic, TypeVar

from clevrd.admission import Admitted, Operators
from clevrd.connections.one_subscription import OneSubscription
from clevrd.connections.registry import Connection, Connections
from clevrd.core.message_ids import rfc3339
from clevrd.core.topic import Topic
from clevrd.handlers.operate.admin_options import AdminOptions
from clevrd.handlers.operate.figures import Figures
from clevrd.handlers.operate.subscriber_rows import lag_of, row_of
from clevrd.http_values import Request, Response, json_view
from clevrd.hub import Hub
from clevrd.metrics.json import summary_of
from clevrd.metrics.top import SubscriberRow, TopicRow, TopView, most_limited

# Rows of each table that can be asked for, and that are given unless asked otherwise.
MAX_ROWS: Final = 100
DEFAULT_ROWS: Final = 10
# For so long a view is given again.
FRESH_S: Final = 1.0
# Rates are of no use over less than this, as when the first two views follow one another.
_LEAST_INTERVAL_S: Final = 0.5
# Rates over more than this say nothing of now.
_LONGEST_INTERVAL_S: Final = 120.0

# Connections looked at in one step, at 2 us each with a look into the kernel; topics of one
# connection count as a part of one. Topics in one step, at 0.4 us each.
_CONNECTIONS_PER_STEP: Final = 128
_READERS_PER_STEP: Final = 512
_TOPICS_PER_STEP: Final = 512

_OPTIONS: Final = AdminOptions(numbers={"n": (1, MAX_ROWS)})

ItemT = TypeVar("ItemT")


class Top(Generic[ItemT]):
    """The items with the largest values of all that were offered, a bounded number of them."""

    __slots__ = ("_count", "_heap", "_room")

    def __init__(self, room: int) -> None:
        self._room = room
        # (value, number of the offer, item); the number keeps items from being compared.
        self._heap: list[tuple[float, int, ItemT]] = []
        self._count = 0

    def offer(self, value: float, item: ItemT) -> None:
        """Keep ``item`` if its value is among the largest, and more than 0."""
        if value <= 0:
            return
        heap = self._heap
        if len(heap) < self._room:
            self._count += 1
            heapq.heappush(heap, (value, -self._count, item))
        elif value > heap[0][0]:
            self._count += 1
            heapq.heapreplace(heap, (value, -self._count, item))

    def __iter__(self) -> Iterator[tuple[float, ItemT]]:
        """Yield values and items, the largest first."""
        for value, _, item in sorted(self._heap, key=lambda entry: entry[:2], reverse=True):
            yield value, item


# A reader, and its connection; None for a connection without a topic.
_Found = tuple[Connection, OneSubscription | None]


class TopEndpoint:
    """The view as JSON; ``n`` rows of each table."""

    serves_while_draining = True

    def __init__(self, gate: Operators, views: TopViews) -> None:
        self._gate = gate
        self._views = views

    def admit(self, head: Request) -> Admitted:
        """Refuse who may not operate the daemon, and options that mean nothing here."""
        admitted = self._gate.admit_admin(head)
        _OPTIONS.check(admitted.options)
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns."""
        return self._answer(_OPTIONS.number(admitted.options, "n", DEFAULT_ROWS))

    async def _answer(self, count: int) -> Response:
        view = await self._views.current()
        return json_view(view.first(count))


class TopViews:
    """Takes the view, at most once a second."""

    def __init__(
        self, hub: Hub, connections: Connections, figures: Figures, now_s: Callable[[], float]
    ) -> None:
        """Args: now_s: the loop's clock."""
        self._hub = hub
        self._connections = connections
        self._figures = figures
        self._now_s = now_s
        # One is taken at a time; others wait for it.
        self._lock = asyncio.Lock()
        self._view: TopView | None = None
        # When the last view was taken, on the loop's clock.
        self._taken_s = float("-inf")

    async def current(self) -> TopView:
        """Return the view of this moment, or of less than a second ago."""
        async with self._lock:
            view = self._view
            if view is None or self._now_s() - self._taken_s >= FRESH_S:
                view = self._view = await self._hub.turns.carry_out(self._take())
            return view

    def _take(self) -> Generator[None, None, TopView]:
        snapshot = yield from self._figures.snapshot(0)
        yield
        since_s = self._now_s() - self._taken_s
        has_rates = _LEAST_INTERVAL_S <= since_s <= _LONGEST_INTERVAL_S
        self._taken_s = self._now_s()
        busiest, largest = yield from self._look_at_topics()
        by_lag, by_bytes = yield from self._look_at_connections()
        interval_s = since_s if has_rates else None
        lag_rows = yield from self._rows(by_lag)
        byte_rows = yield from self._rows(by_bytes)
        busy_rows = yield from self._topic_rows(busiest, interval_s)
        ring_rows = yield from self._topic_rows(largest, None)
        decisions = self._hub.decisions.newest()
        yield
        limited = most_limited(decisions, self._now_s(), MAX_ROWS)
        yield
        return TopView(
            taken_at=rfc3339(time.time_ns() // 1000),
            interval_s=None if interval_s is None else round(interval_s, 3),
            figures=summary_of(snapshot),
            slowest_by_lag=lag_rows,
            slowest_by_bytes=byte_rows,
            busiest_topics=busy_rows,
            largest_rings=ring_rows,
            most_limited=limited,
        )

    def _look_at_topics(
        self,
    ) -> Generator[None, None, tuple[Top[tuple[Topic, int]], Top[tuple[Topic, int]]]]:
        """Return the topics with the most messages since the last view, and the largest rings."""
        busiest: Top[tuple[Topic, int]] = Top(MAX_ROWS)
        largest: Top[tuple[Topic, int]] = Top(MAX_ROWS)
        topics = list(self._hub.topics)
        for start in range(0, len(topics), _TOPICS_PER_STEP):
            yield
            for topic in topics[start : start + _TOPICS_PER_STEP]:
                ring = topic.ring
                messages = ring.head + topic.delivered
                new = messages - topic.seen_messages
                topic.seen_messages = messages
                busiest.offer(new, (topic, new))
                largest.offer(ring.size_bytes, (topic, 0))
        return busiest, largest

    def _look_at_connections(self) -> Generator[None, None, tuple[Top[_Found], Top[_Found]]]:
        """Return the subscriptions that lag most, and the connections with most unsent bytes."""
        by_lag: Top[_Found] = Top(MAX_ROWS)
        by_bytes: Top[_Found] = Top(MAX_ROWS)
        work = 1.0
        for connection in self._connections.listed():
            if work >= 1.0:
                yield
                work = 0.0
            work += 1 / _CONNECTIONS_PER_STEP
            if connection.is_closing:
                continue
            readers = connection.readers()
            work += len(readers) / _READERS_PER_STEP
            slowest, most = None, 0
            for reader in readers:
                if reader.is_live:
                    continue
                lag = lag_of(reader)
                by_lag.offer(lag, (connection, reader))
                if lag > most:
                    slowest, most = reader, lag
            if slowest is None and readers:
                slowest = readers[0]
            by_bytes.offer(connection.unsent_bytes(), (connection, slowest))
        return by_lag, by_bytes

    def _rows(self, found: Top[_Found]) -> Generator[None, None, list[SubscriberRow]]:
        rows: list[SubscriberRow] = []
        for number, (_, (connection, reader)) in enumerate(found):
            if number % 32 == 0:
                yield
            rows.append(row_of(self._connections, connection, reader))
        return rows

    def _topic_rows(
        self, found: Top[tuple[Topic, int]], interval_s: float | None
    ) -> Generator[None, None, list[TopicRow]]:
        rows: list[TopicRow] = []
        work = 1.0
        for _, (topic, new) in found:
            if work >= 1.0:
                yield
                work = 0.0
            # To count who is slow looks at those that may be.
            work += 1 / 64 + topic.subscribers / _READERS_PER_STEP
            rows.append(
                TopicRow(
                    tenant_id=topic.tenant,
                    topic=topic.name,
                    messages_per_s=None if interval_s is None else round(new / interval_s, 1),
                    messages_published=topic.published,
                    messages_delivered=topic.delivered,
                    subscribers=topic.subscribers,
                    slow_subscribers=topic.slow,
                    buffered_messages=topic.held_messages,
                    buffered_bytes=topic.held_bytes,
                )
            )
        return rows
