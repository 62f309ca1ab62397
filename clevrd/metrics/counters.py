"""Counters kept as plain numbers in one place, and the views of topics that /metrics shows.

Nothing is measured here; the hub and the connections count, handlers render.
"""

from __future__ import annotations

from typing import Final

import msgspec

from clevrd.core.topic import Topic
from clevrd.core.topic_manager import Totals

# /metrics lists this many topics unless asked otherwise: about 50 KB of JSON.
DEFAULT_TOPICS: Final = 100
# The most it lists: about 5 MB, and 10 ms of encoding.
MAX_TOPICS: Final = 10_000


class Counters:
    """What happened since the start; each number only rises."""

    __slots__ = (
        "background_errors",
        "circuits_opened",
        "closed",
        "connections",
        "pings_cut",
        "refused",
    )

    def __init__(self) -> None:
        self.connections = 0
        # Error code -> refusals, over HTTP and on connecting; bounded by the codes there are.
        self.refused: dict[str, int] = {}
        # Close code -> WebSockets the daemon closed with it.
        self.closed: dict[int, int] = {}
        # Circuits of circuit_breaker subscribers that opened, without those that disconnected.
        self.circuits_opened = 0
        # Subscribers cut because they did not answer a ping.
        self.pings_cut = 0
        # Timers and tasks that failed; each is logged as well.
        self.background_errors = 0

    def count_background_error(self) -> None:
        """Count a timer, task or callback that failed; it was logged where it happened."""
        self.background_errors += 1

    def count_refusal(self, code: str) -> None:
        """Count one refused request or connection under its machine code."""
        self.refused[code] = self.refused.get(code, 0) + 1

    def count_close(self, code: int) -> None:
        """Count one WebSocket that the daemon closed with ``code``."""
        self.closed[code] = self.closed.get(code, 0) + 1


class TopicView(msgspec.Struct, frozen=True):
    """One topic in /metrics; sizes in messages and bytes, counters since its creation."""

    name: str
    tenant_id: str
    messages_published: int
    active_subscribers: int
    total_subscribers: int
    created_at: str
    messages_delivered: int
    messages_dropped: int
    messages_discarded: int
    messages_queued: int
    slow_subscribers: int
    open_circuits: int
    offset: int
    epoch: str
    buffered_messages: int
    buffered_bytes: int


class MessageTotals(msgspec.Struct, frozen=True):
    """Sums over all topics, those evicted since included."""

    published: int
    offered: int
    delivered: int
    dropped: dict[str, int]
    discarded: int
    queued: int


def topic_view(topic: Topic, now_s: float) -> TopicView:
    """Return ``topic`` as /metrics shows it. Call ``topic.settle`` first."""
    return TopicView(
        name=f"{topic.tenant}:{topic.name}",
        tenant_id=topic.tenant,
        messages_published=topic.published,
        active_subscribers=len(topic.live),
        total_subscribers=topic.subscribers,
        created_at=topic.created_at,
        messages_delivered=topic.delivered,
        messages_dropped=topic.losses.total,
        messages_discarded=topic.discarded,
        messages_queued=topic.queued(),
        slow_subscribers=topic.slow_count(now_s),
        open_circuits=len(topic.suspended),
        offset=topic.head,
        epoch=topic.epoch,
        buffered_messages=len(topic.ring),
        buffered_bytes=topic.ring.size_bytes,
    )


def message_totals(totals: Totals) -> MessageTotals:
    """Return ``totals`` as /metrics shows them."""
    return MessageTotals(
        published=totals.published,
        offered=totals.offered,
        delivered=totals.delivered,
        dropped=dict(totals.lost),
        discarded=totals.discarded,
        queued=totals.queued,
    )
