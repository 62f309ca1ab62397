"""The Top-N view: who is slow, who is loud, what is large, who is limited. Values alone.

handlers/operate/top takes it. Meaning of the fields: docs/wire.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import msgspec

from clevrd.metrics.decisions import Decision
from clevrd.metrics.json import MetricsView


class SubscriberRow(msgspec.Struct, frozen=True):
    """One subscription of a connection."""

    # The connection's number, by which an operator can end it.
    id: str
    tenant_id: str
    # The credential's name; empty where there is none.
    credential: str
    topic: str
    # Topics that the connection has.
    topics: int
    # The client's address; empty over a Unix socket.
    address: str
    transport: str
    policy: str
    state: str
    lag_messages: int
    # Bytes written to the connection that its client has not taken.
    unsent_bytes: int
    delivered: int
    dropped: int
    open_s: float


class TopicRow(msgspec.Struct, frozen=True):
    """One topic."""

    tenant_id: str
    topic: str
    # Publishes and deliveries a second since the view before; None in the first one.
    messages_per_s: float | None
    messages_published: int
    messages_delivered: int
    subscribers: int
    slow_subscribers: int
    buffered_messages: int
    buffered_bytes: int


class LimitedRow(msgspec.Struct, frozen=True):
    """One tenant's key, or an address, that is refused by one limit."""

    tenant_id: str
    credential: str
    code: str
    refusals: int
    # The last sentence that began a series of refusals, and seconds since the last refusal.
    rule: str
    last_s: float


class TopView(msgspec.Struct, frozen=True):
    """All tables, of one moment but for changes while they were taken."""

    taken_at: str
    # Seconds since the view before, over which the rates are; None in the first one.
    interval_s: float | None
    # The snapshot that /metrics shows, without topics.
    figures: MetricsView
    slowest_by_lag: list[SubscriberRow]
    slowest_by_bytes: list[SubscriberRow]
    busiest_topics: list[TopicRow]
    largest_rings: list[TopicRow]
    most_limited: list[LimitedRow]

    def first(self, count: int) -> TopView:
        """Return the view with the first ``count`` rows of each table."""
        return msgspec.structs.replace(
            self,
            slowest_by_lag=self.slowest_by_lag[:count],
            slowest_by_bytes=self.slowest_by_bytes[:count],
            busiest_topics=self.busiest_topics[:count],
            largest_rings=self.largest_rings[:count],
            most_limited=self.most_limited[:count],
        )


def most_limited(decisions: Iterable[Decision], now_s: float, count: int) -> list[LimitedRow]:
    """Return the keys and addresses that a limit refused most often, the most refused first.

    Args:
        decisions: those that held last first.
        now_s: on the clock of the decisions.
    """
    # Tenant, credential and limit -> refusals, and the decision that held last.
    found: dict[tuple[str, str, str], tuple[int, Decision]] = {}
    for decision in decisions:
        if decision.kind != "refusal" or not decision.thresholds:
            continue
        key = (decision.tenant, decision.credential, decision.code)
        refusals, newest = found.get(key, (0, decision))
        found[key] = refusals + decision.count, newest
    most = heapq.nlargest(count, found.values(), key=lambda each: each[0])
    return [
        LimitedRow(
            tenant_id=decision.tenant,
            credential=decision.credential,
            code=decision.code,
            refusals=refusals,
            rule=decision.rule,
            last_s=round(now_s - decision.last_s, 3),
        )
        for refusals, decision in most
    ]
