"""Families about connections: their number, their ends, TLS, and what goes on beside them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from clevrd.metrics.prometheus.kinds import counter, counters, gauge_of_seconds, labelled
from clevrd.metrics.snapshot import Connections, Tls


def of_connections(connections: Connections) -> Iterator[Metric]:
    """Yield connections, and what is done beside them."""
    yield counter(
        "clevrd_connections_accepted", "Connections that were accepted.", connections.accepted
    )
    yield labelled(
        GaugeMetricFamily(
            "clevrd_connections",
            "Connections that are open, by what they are at the moment.",
            labels=["kind"],
        ),
        connections.open,
    )
    yield counters(
        "clevrd_connections_closed",
        "WebSockets and streams that the daemon closed, by the close code; streams by that which a"
        " WebSocket would have got.",
        "code",
        {str(code): count for code, count in connections.closed.items()},
    )
    yield counters(
        "clevrd_refusals",
        "Requests, messages and connections that were refused, by the error code.",
        "code",
        connections.refused,
    )
    yield counter(
        "clevrd_circuits_opened",
        "Circuits of slow subscribers that opened, without those that were closed instead.",
        connections.circuits_opened,
    )
    yield counter(
        "clevrd_pings_unanswered",
        "Connections that were cut because nobody was there.",
        connections.pings_unanswered,
    )
    yield from _of_upkeep(connections)


def _of_upkeep(connections: Connections) -> Iterator[Metric]:
    yield counter(
        "clevrd_background_errors",
        "Timers, tasks and writes that failed, each of which is in the log.",
        connections.background_errors,
    )
    yield counters(
        "clevrd_lifecycle_events",
        "Events of who reads which topic, by outcome: published, or dropped.",
        "outcome",
        connections.lifecycle,
    )
    yield counters(
        "clevrd_webhook_events",
        "Events posted to webhooks, by outcome: delivered, retried, or dropped.",
        "outcome",
        connections.webhooks,
    )
    yield counter(
        "clevrd_config_reloads",
        "Times that the configuration was read again and put into force.",
        connections.reloads,
    )
    yield counter(
        "clevrd_config_reloads_failed",
        "Times that the configuration was read again, was wrong, and changed nothing.",
        connections.reloads_failed,
    )


def of_tls(tls: Tls) -> Iterator[Metric]:
    """Yield handshakes and certificates."""
    yield counter("clevrd_tls_handshakes", "TLS handshakes that ended well.", tls.handshakes)
    yield counters(
        "clevrd_tls_handshakes_failed",
        "TLS handshakes that failed, by why.",
        "reason",
        tls.handshakes_failed,
    )
    yield gauge_of_seconds(
        "clevrd_tls_certificate_ends_in",
        "The time until the first of the certificates ends.",
        tls.certificate_ends_in_s,
    )
