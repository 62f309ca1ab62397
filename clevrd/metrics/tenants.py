"""The figures of tenants: values, and their JSON. As Prometheus reads them: `prometheus/tenants`.

Tenants are a label here and nowhere else, so whoever scrapes this decides to have one series for
each. Clients can't make more of them: a tenant that is not configured is in the row of all others.
"""

from __future__ import annotations

import msgspec

from clevrd.metrics.snapshot import MemoryShare


class TenantFigures(msgspec.Struct, frozen=True):
    """One tenant with a share of its own, or all others together (``tenant_id`` None)."""

    tenant_id: str | None
    connections: int
    subscribers: int
    slow_subscribers: int
    topics: int
    window_messages: int
    guaranteed_bytes: int
    used_bytes: int
    borrowed_bytes: int
    ring_bytes: int
    kept_bytes: int


class TenantsView(msgspec.Struct, frozen=True):
    """All tenants that are shown, those first that use most of the memory."""

    tenants: list[TenantFigures]


def tenant_figures(
    share: MemoryShare, connections: int, subscribers: int, slow_subscribers: int
) -> TenantFigures:
    """Return the figures of one tenant, from its share of the memory and what was counted."""
    return TenantFigures(
        tenant_id=share.tenant_id,
        connections=connections,
        subscribers=subscribers,
        slow_subscribers=slow_subscribers,
        topics=share.topics,
        window_messages=share.window_messages,
        guaranteed_bytes=share.guaranteed_bytes,
        used_bytes=share.used_bytes,
        borrowed_bytes=share.borrowed_bytes,
        ring_bytes=share.ring_bytes,
        kept_bytes=share.kept_bytes,
    )
