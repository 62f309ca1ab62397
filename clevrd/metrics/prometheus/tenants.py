"""Families about tenants, each with a value for each tenant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import Metric

from clevrd.metrics.prometheus.kinds import by_tenant, bytes_by_tenant
from clevrd.metrics.tenants import TenantsView

# The label of all tenants together that have no share of their own; no tenant's name has a star.
OTHER_TENANTS: Final = "*"


def families_of_tenants(view: TenantsView) -> Iterator[Metric]:
    """Yield each metric of /metrics/tenants."""
    rows = [(row.tenant_id or OTHER_TENANTS, row) for row in view.tenants]
    yield by_tenant(
        "clevrd_tenant_connections",
        "WebSockets, streams and polls that wait, of a tenant; * is all that have no share of their"
        " own.",
        {name: row.connections for name, row in rows},
    )
    yield by_tenant(
        "clevrd_tenant_subscribers",
        "Subscriptions to a tenant's topics.",
        {name: row.subscribers for name, row in rows},
    )
    yield by_tenant(
        "clevrd_tenant_slow_subscribers",
        "Subscriptions to a tenant's topics that were slow a second ago.",
        {name: row.slow_subscribers for name, row in rows},
    )
    yield by_tenant(
        "clevrd_tenant_topics",
        "Topics of a tenant.",
        {name: row.topics for name, row in rows},
    )
    yield by_tenant(
        "clevrd_tenant_window_messages",
        "Messages that a tenant's subscribers may lag before they lose some.",
        {name: row.window_messages for name, row in rows},
    )
    yield bytes_by_tenant(
        "clevrd_memory_share_guaranteed",
        "Memory for messages that a tenant is guaranteed.",
        {name: row.guaranteed_bytes for name, row in rows},
    )
    yield bytes_by_tenant(
        "clevrd_memory_share_used",
        "Memory for messages that a tenant uses, of its share or borrowed.",
        {name: row.used_bytes for name, row in rows},
    )
    yield bytes_by_tenant(
        "clevrd_memory_share_borrowed",
        "Memory for messages that a tenant uses beyond its share.",
        {name: row.borrowed_bytes for name, row in rows},
    )
