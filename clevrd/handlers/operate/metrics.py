"""GET /metrics: the daemon's figures as JSON."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Generator
from typing import Any, Final

import msgspec

from clevrd import logs
from clevrd.admission import Admitted, admit_anybody
from clevrd.control.adaptive_buffer import BufferDecision
from clevrd.control.system_stats import ProcessFigures, process_figures
from clevrd.core.topic_totals import Totals
from clevrd.errors import InvalidRequest
from clevrd.http_values import JSON, NOT_STORED, Request, Response
from clevrd.hub import Hub
from clevrd.metrics.counters import (
    DEFAULT_TOPICS,
    MAX_TOPICS,
    MessageTotals,
    TopicView,
    message_totals,
    topic_view,
)

# Topics whose views are made and encoded in one step: 0.3 ms at 5 us for each.
_TOPICS_PER_STEP: Final = 64
# Where the topics go in what was encoded without them. No string in JSON holds a bare quote, so
# nothing but the field looks like it.
_NO_TOPICS: Final = b'"topics":[]'

_encode = msgspec.json.Encoder().encode


class ThrottlerView(msgspec.Struct, frozen=True):
    """The throttler's last decision with its inputs; ratios are 0..1, times are ago and to come."""

    is_throttling: bool
    cpu_usage: float
    memory_usage: float
    slow_ratio: float
    reason: str
    delay_ms: float
    # Seconds since it started and until it ends, null while it does not throttle.
    since: float | None
    until: float | None
    times_started: int
    seconds_throttled: float


class IdempotencyView(msgspec.Struct, frozen=True):
    """What became of publishes with an idempotency key."""

    keys: int
    max_keys: int
    repeats: int
    pushed_out: int


class LogView(msgspec.Struct, frozen=True):
    """What became of the log's lines."""

    dropped: int


class MetricsView(msgspec.Struct, frozen=True):
    """What /metrics says."""

    total_topics: int
    total_subscribers: int
    slow_subscribers: int
    open_circuits: int
    topics: list[TopicView]
    throttler_metrics: ThrottlerView
    buffer_metrics: BufferDecision | None
    messages: MessageTotals
    idempotency: IdempotencyView
    connections: dict[str, Any]
    log: LogView
    process: ProcessFigures
    uptime_s: float


class MetricsEndpoint:
    """The JSON view; ``?topics=N`` lists the N busiest topics."""

    serves_while_draining = True

    def __init__(self, hub: Hub, started_s: float) -> None:
        self._hub = hub
        self._started_s = started_s

    def admit(self, head: Request) -> Admitted:
        """Refuse nothing."""
        return admit_anybody(head)

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns.

        Each topic's figures, and its part of the totals, are of one moment; with 10,000 topics that
        are read the last one's may be some 50 ms later than the first one's.
        """
        return self._hub.turns.carry_out(self._answer(_topic_count(admitted.head)))

    def _answer(self, count: int) -> Generator[None, None, Response]:
        hub = self._hub
        messages, slow = yield from hub.sum_up()
        topics = yield from hub.topics.busiest(count)
        rows: list[bytes] = []
        for start in range(0, len(topics), _TOPICS_PER_STEP):
            yield
            now_s = hub.settle(topics[start : start + _TOPICS_PER_STEP])
            views = [topic_view(each, now_s) for each in topics[start : start + _TOPICS_PER_STEP]]
            rows.append(_encode(views)[1:-1])
        summary = _encode(self._summary(messages, slow))
        yield
        body = summary.replace(_NO_TOPICS, b'"topics":[%b]' % b",".join(rows), 1)
        return Response(200, body, JSON, NOT_STORED)

    def _summary(self, messages: Totals, slow_subscribers: int) -> MetricsView:
        """Return everything but the topics, whose list is empty."""
        hub = self._hub
        return MetricsView(
            total_topics=len(hub.topics),
            total_subscribers=hub.subscribers,
            slow_subscribers=slow_subscribers,
            open_circuits=hub.open_circuits,
            topics=[],
            throttler_metrics=_throttler_view(hub),
            buffer_metrics=hub.buffers.decision,
            messages=message_totals(messages),
            idempotency=_idempotency_view(hub),
            connections={
                "accepted": hub.counters.connections,
                "refused": hub.counters.refused,
                "closed": {str(code): n for code, n in hub.counters.closed.items()},
                "circuits_opened": hub.counters.circuits_opened,
                "pings_unanswered": hub.counters.pings_cut,
                "background_errors": hub.counters.background_errors,
            },
            log=LogView(logs.stderr.dropped),
            process=process_figures(),
            uptime_s=round(time.monotonic() - self._started_s, 3),
        )


def _topic_count(request: Request) -> int:
    values = request.options().get("topics")
    if values is None:
        return DEFAULT_TOPICS
    if len(values) > 1 or not (values[0].isdecimal() and values[0].isascii()):
        raise InvalidRequest("The option topics must be one whole number.")
    return min(int(values[0][:9]), MAX_TOPICS)


def _idempotency_view(hub: Hub) -> IdempotencyView:
    answers = hub.answers
    return IdempotencyView(len(answers), answers.max_keys, answers.repeats, answers.pushed_out)


def _throttler_view(hub: Hub) -> ThrottlerView:
    now_s = hub.now_s()
    decision = hub.throttler.current(now_s)
    load = hub.last_load
    return ThrottlerView(
        is_throttling=decision.is_throttling,
        cpu_usage=round(load.cpu if load else 0.0, 4),
        memory_usage=round(load.memory if load else 0.0, 4),
        slow_ratio=round(decision.slow_ratio, 4),
        reason=decision.reason,
        delay_ms=decision.delay_s * 1000,
        since=None if decision.since_s is None else round(now_s - decision.since_s, 3),
        until=None if decision.until_s is None else round(decision.until_s - now_s, 3),
        times_started=hub.throttler.started,
        seconds_throttled=round(hub.throttler.throttled_s(now_s), 3),
    )
