"""Families about messages: how many, how large, and how fast they are."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from clevrd.metrics.prometheus.kinds import counter, counters, gauge, histogram
from clevrd.metrics.snapshot import Snapshot, Traffic


def of_messages(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what became of messages."""
    messages = snapshot.messages
    yield counter("clevrd_messages_published", "Messages that were accepted.", messages.published)
    yield counter(
        "clevrd_messages_offered",
        "Messages, each counted once for every subscription that it was meant for.",
        messages.offered,
    )
    yield counter(
        "clevrd_messages_delivered",
        "Messages handed to subscribers' connections, once for each.",
        messages.delivered,
    )
    yield counters(
        "clevrd_messages_dropped",
        "Messages that subscriptions lost to a policy or a bound, by the reason.",
        "reason",
        messages.dropped,
    )
    yield counter(
        "clevrd_messages_discarded",
        "Messages that still waited when their subscriber left, or when its circuit opened.",
        messages.discarded,
    )
    yield gauge(
        "clevrd_messages_queued", "Messages that wait for subscribers now.", messages.queued
    )
    yield gauge(
        "clevrd_publishes_waiting",
        "Publishes that wait for room or for the throttle now.",
        snapshot.waiting_publishes,
    )
    answers = snapshot.idempotency
    yield gauge("clevrd_idempotency_keys", "Keys that are remembered.", answers.keys)
    yield gauge("clevrd_idempotency_keys_limit", "Keys that may be remembered.", answers.max_keys)
    yield counter(
        "clevrd_idempotency_repeats",
        "Publishes that were answered as their first one was.",
        answers.repeats,
    )
    yield counter(
        "clevrd_idempotency_keys_pushed_out",
        "Keys that were forgotten at the limit, before their time.",
        answers.pushed_out,
    )


def of_traffic(traffic: Traffic) -> Iterator[Metric]:
    """Yield bytes, and times of what is done with messages."""
    yield counter(
        "clevrd_received",
        "Bytes that were read from connections: requests, frames, and what was ignored.",
        traffic.received_bytes,
        "bytes",
    )
    yield counter(
        "clevrd_delivered",
        "Bytes of messages handed to WebSockets and streams, with their frames or events; no heads,"
        " notices, pings, polls or answers to publishers.",
        traffic.delivered_bytes,
        "bytes",
    )
    yield histogram(
        "clevrd_publish_to_socket",
        "The time from the append of a round's oldest message until the round was written to all"
        " subscribers that are up to date.",
        traffic.to_socket_s,
        "seconds",
    )
    yield histogram(
        "clevrd_round_duration",
        "The time from the begin of a round until it was written to all subscribers that are up to"
        " date, with what others did in between.",
        traffic.round_s,
        "seconds",
    )
    yield histogram(
        "clevrd_round_messages", "Messages that a round carried.", traffic.round_messages
    )
    yield histogram(
        "clevrd_publish_wait",
        "The time that each published message waited for room or for the throttle; 0 for most.",
        traffic.publish_wait_s,
        "seconds",
    )
    yield histogram(
        "clevrd_loop_lag",
        "How late the event loop comes to a timer, looked at four times a second.",
        traffic.loop_lag_s,
        "seconds",
    )
    yield histogram(
        "clevrd_connection_duration",
        "How long WebSockets and streams that have ended were open.",
        traffic.connection_s,
        "seconds",
    )
