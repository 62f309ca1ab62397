"""Figures: takes a snapshot of all that the daemon counts, in bounded slices of a turn."""

from __future__ import annotations

import heapq
import platform
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Final

import aiohttp
import uvloop

from clevrd import __version__, logs
from clevrd.control.system_stats import process_figures
from clevrd.core.busy_topics import busiest_of
from clevrd.core.portions import OTHERS
from clevrd.core.topic import NO_COUNTS, Topic
from clevrd.core.topic_totals import Totals
from clevrd.hub import Hub
from clevrd.metrics.snapshot import (
    Build,
    Connections,
    IdempotencyView,
    MemoryLadder,
    MemoryShare,
    Snapshot,
    TenantSnapshot,
    Throttle,
    Tls,
    TopicView,
    memory_share,
    message_totals,
    topic_view,
    traffic_of,
)
from clevrd.metrics.sources import SourceFigures
from clevrd.metrics.tenants import TenantsView, tenant_figures
from clevrd.metrics.tracing import TracingFigures

# Shares of the memory that are shown, those with the most bytes; each is a label of Prometheus's.
MAX_SHARES: Final = 100
# Throttled topics that are shown by name.
_NAMED_TOPICS: Final = 10

# Subscribers whose figures are brought up to date in one step, at up to 1 us each. A topic by
# itself costs as much as _TOPIC_COSTS of them.
_SUBSCRIBERS_PER_STEP: Final = 512
_TOPIC_COSTS: Final = 8

# Tenants, or topics, that are counted in one step, at 0.3 us each.
_TENANTS_PER_STEP: Final = 1_024

_BUILD: Final = Build(
    __version__,
    platform.python_version(),
    aiohttp.__version__,
    uvloop.__version__,  # type: ignore[attr-defined]  # its stub leaves it out
)

# The counts of a daemon without webhooks.
_NO_WEBHOOKS: Final = MappingProxyType({"delivered": 0, "retried": 0, "dropped": 0})


class Figures:
    """Where every figure comes from."""

    def __init__(
        self,
        hub: Hub,
        count_connections: Callable[[], dict[str, int]],
        started_s: float,
        certificate_ends_in_s: Callable[[], float | None] = lambda: None,
        sources: Callable[[], list[SourceFigures]] = list,
        webhooks: Mapping[str, int] = _NO_WEBHOOKS,
        tracing: Callable[[], TracingFigures | None] = lambda: None,
    ) -> None:
        """Take figures of ``hub``.

        Args:
            count_connections: returns how many are open, by kind.
            started_s: when the daemon started, on the monotonic clock.
            certificate_ends_in_s: returns the seconds until the first certificate ends; None
                where the daemon speaks no TLS.
            sources: returns the figures of each source.
            webhooks: by outcome, events that were posted.
            tracing: returns the figures of the spans; None where nothing is traced.
        """
        self._tracing = tracing
        self._webhooks = webhooks
        self._hub = hub
        self._sources = sources
        self._count_connections = count_connections
        self._started_s = started_s
        self._certificate_ends_in_s = certificate_ends_in_s
        # Seconds since 1970, reckoned once, so that the figure stands still when the clock is set.
        self._started_at_s = time.time() - (time.monotonic() - started_s)

    def snapshot(self, topics: int) -> Generator[None, None, Snapshot]:
        """Return all figures, and views of the ``topics`` busiest topics, step by step.

        Each topic's figures, and its part of the sums, are of one moment; with 10,000 topics that
        are read the last one's may be some 50 ms later than the first one's.
        """
        hub = self._hub
        # The waits are read at the moment at which `sum_up` reads how many were published.
        waits = hub.publish_waits()
        messages, slow_subscribers = yield from hub.sum_up()
        busiest = (yield from hub.topics.busiest(topics)) if topics else []
        views = yield from self._views(busiest)
        yield
        process = yield from process_figures()
        return Snapshot(
            build=_BUILD,
            started_at_s=self._started_at_s,
            uptime_s=time.monotonic() - self._started_s,
            total_topics=len(hub.topics),
            total_subscribers=hub.subscribers,
            slow_subscribers=slow_subscribers,
            open_circuits=hub.open_circuits,
            reading_history=hub.reading_history,
            topics=views,
            messages=message_totals(messages),
            idempotency=_idempotency(hub),
            waiting_publishes=hub.waiting_publishes,
            ring_bytes=hub.topics.ring_bytes,
            memory_limit_bytes=hub.topics.limits.max_memory_bytes,
            memory_shares=_memory_shares(hub),
            memory=_memory_ladder(hub),
            throttle=_throttle(hub),
            window_messages=hub.buffers.window,
            window=hub.buffers.decision,
            connections=self._connections(),
            tls=self._tls(),
            journal=None if hub.journal is None else hub.journal.node.view(),
            sources=self._sources(),
            tracing=self._tracing(),
            traffic=traffic_of(hub.counters, hub.input_budget.received_bytes, waits),
            log_lines_dropped=logs.stderr.dropped,
            process=process,
            process_cpu_s=time.process_time(),
        )

    def of_tenants(self) -> Generator[None, None, TenantsView]:
        """Return the figures of the tenants with shares of the memory, step by step."""
        hub = self._hub
        portion_of = hub.topics.portions.weights.portion_of
        connections: Counter[str] = Counter()
        for count, (tenant, opened) in enumerate(hub.connection_counts.by_tenant(), 1):
            connections[portion_of(tenant)] += opened
            if count % _TENANTS_PER_STEP == 0:
                yield
        subscribers: Counter[str] = Counter()
        slow: Counter[str] = Counter()
        for count, topic in enumerate(hub.topics_read(), 1):
            subscribers[topic.portion.name] += topic.subscribers
            slow[topic.portion.name] += topic.slow
            if count % _TENANTS_PER_STEP == 0:
                yield
        yield
        return TenantsView(
            [
                tenant_figures(share, connections[name], subscribers[name], slow[name])
                for share in _memory_shares(hub)
                for name in (share.tenant_id or OTHERS,)
            ]
        )

    def of_tenant(
        self, tenant: str, may_see: Callable[[str], bool], topics: int
    ) -> Generator[None, None, TenantSnapshot]:
        """Return the figures of those of a tenant's topics that ``may_see`` is true for.

        They are taken step by step, as in `snapshot`.

        Args:
            topics: how many of the busiest are viewed.
        """
        hub = self._hub
        totals = Totals()
        seen: list[Topic] = []
        subscribers = slow = circuits = 0
        work = _SUBSCRIBERS_PER_STEP
        for topic in hub.topics.of_tenant(tenant):
            if work >= _SUBSCRIBERS_PER_STEP:
                yield
                work = 0
            work += _TOPIC_COSTS
            if not may_see(topic.name):
                continue
            work += topic.subscribers
            now_s = hub.settle((topic,))
            seen.append(topic)
            totals.add(topic.counts, NO_COUNTS)
            totals.published += topic.published
            totals.queued += topic.queued()
            subscribers += topic.subscribers
            slow += topic.slow_count(now_s)
            circuits += len(topic.suspended)
        busiest = yield from busiest_of(seen, topics)
        views = yield from self._views(busiest)
        return TenantSnapshot(
            tenant_id=tenant,
            total_topics=len(seen),
            total_subscribers=subscribers,
            slow_subscribers=slow,
            open_circuits=circuits,
            topics=views,
            messages=message_totals(totals),
        )

    def _views(self, topics: list[Topic]) -> Generator[None, None, list[TopicView]]:
        hub = self._hub
        views: list[TopicView] = []
        work = _SUBSCRIBERS_PER_STEP
        for topic in topics:
            if work >= _SUBSCRIBERS_PER_STEP:
                yield
                work = 0
            work += _TOPIC_COSTS + topic.subscribers
            views.append(topic_view(topic, hub.settle((topic,))))
        return views

    def _connections(self) -> Connections:
        counters = self._hub.counters
        return Connections(
            open=self._count_connections(),
            accepted=counters.connections,
            refused=dict(counters.refused),
            closed=dict(counters.closed),
            circuits_opened=counters.circuits_opened,
            pings_unanswered=counters.pings_cut,
            background_errors=counters.background_errors,
            reloads=counters.reloads,
            reloads_failed=counters.reloads_failed,
            lifecycle=dict(self._hub.lifecycle.counts),
            webhooks=dict(self._webhooks),
        )

    def _tls(self) -> Tls | None:
        ends_in_s = self._certificate_ends_in_s()
        if ends_in_s is None:
            return None
        counters = self._hub.counters
        return Tls(counters.tls_handshakes, dict(counters.tls_failed), ends_in_s)


def _idempotency(hub: Hub) -> IdempotencyView:
    answers = hub.answers
    return IdempotencyView(len(answers), answers.max_keys, answers.repeats, answers.pushed_out)


def _memory_shares(hub: Hub) -> list[MemoryShare]:
    largest = heapq.nlargest(MAX_SHARES, hub.topics.portions, key=attrgetter("used_bytes"))
    return [memory_share(portion, hub.buffers.window_of(portion.name)) for portion in largest]


def _memory_ladder(hub: Hub) -> MemoryLadder:
    guard = hub.memory_guard
    held = guard.decision.held
    return MemoryLadder(
        state=guard.decision.rung.word,
        used_bytes=held.used_bytes,
        limit_bytes=held.limit_bytes,
        limit=held.limit,
        rings_shrunk_bytes=guard.shrunk_bytes,
    )


def _throttle(hub: Hub) -> Throttle:
    now_s = hub.now_s()
    throttled = hub.throttled_topics()
    decision = hub.throttler.current(now_s)
    load = hub.last_load
    return Throttle(
        is_throttling=decision.is_throttling,
        scope=hub.throttler.scope,
        throttled_topics=len(throttled),
        throttled_names=[f"{each.tenant}:{each.name}" for each in throttled[:_NAMED_TOPICS]],
        cpu_ratio=load.cpu if load else 0.0,
        memory_ratio=load.memory if load else 0.0,
        slow_ratio=decision.slow_ratio,
        reason=decision.reason,
        delay_s=decision.delay_s,
        since_s=None if decision.since_s is None else now_s - decision.since_s,
        until_s=None if decision.until_s is None else decision.until_s - now_s,
        times_started=hub.throttler.started,
        throttled_s=hub.throttler.throttled_s(now_s),
    )
