"""ConnectionCounts: the open connections of each tenant and each credential, and their bounds.

WebSockets, streams and polls that wait are counted. An HTTP connection between two requests is
nobody's, since the next request may be another tenant's; the limits of an address hold for it.
"""

from __future__ import annotations

from typing import Final

from clevrd.control.holdings import Holdings
from clevrd.errors import ConnectionLimit
from clevrd.tenants.tenant import DEFAULT_TENANT, Tenant

# Connections that stay free of tenants that anybody can make up: a quarter.
_KEPT_FREE: Final = 4


class ConnectionCounts:
    """How many connections each tenant has, by whatever transport."""

    __slots__ = ("_known", "_made_up", "_max_made_up", "_of_keys", "_of_tenants")

    def __init__(self) -> None:
        self._of_tenants: Holdings[str] = Holdings()
        # By tenant and key; only of keys and certificates that have a limit of their own.
        self._of_keys: Holdings[tuple[str, str]] = Holdings()
        # Tenants that the operator knows of; None where nobody can name another one.
        self._known: frozenset[str] | None = frozenset({DEFAULT_TENANT})
        # Connections of all other tenants, and the most that these may have; 0 for any number.
        self._made_up = 0
        self._max_made_up = 0

    def __len__(self) -> int:
        """Return how many tenants and credentials have a connection."""
        return len(self._of_tenants) + len(self._of_keys)

    def by_tenant(self) -> list[tuple[str, int]]:
        """Return each tenant that has a connection, and how many."""
        return list(self._of_tenants.items())

    def bound(self, max_connections: int) -> None:
        """Keep a part of ``max_connections``, all that there can be, for known tenants."""
        self._max_made_up = max_connections - max_connections // _KEPT_FREE

    def know(self, known: frozenset[str] | None) -> None:
        """Note which tenants the operator knows of; None where nobody can name another one."""
        self._known = known
        self._made_up = sum(
            count for name, count in self._of_tenants.items() if self._is_made_up(name)
        )

    def check(self, tenant: Tenant) -> None:
        """Raise ConnectionLimit unless ``tenant`` may have one connection more."""
        name = tenant.name
        limit = tenant.limits.max_connections
        if limit is not None and (open_now := self._of_tenants.of(name)) >= limit:
            raise ConnectionLimit(
                f"Tenant {name}", open_now, limit, "max_connections of the tenant", tenant=name
            )
        limit = tenant.key_limits.max_connections
        key = tenant.credential_id
        if limit is not None and (open_now := self._of_keys.of((name, key))) >= limit:
            raise ConnectionLimit(
                f"The key {key} of tenant {name}",
                open_now,
                limit,
                "max_connections of the key",
                tenant=name,
                credential=key,
            )
        if 0 < self._max_made_up <= self._made_up and self._is_made_up(name):
            raise ConnectionLimit(
                "The group of all tenants that are not configured",
                self._made_up,
                self._max_made_up,
                "three quarters of CLEVRD_MAX_CONNECTIONS",
                tenant=name,
            )

    def take(self, tenant: Tenant) -> None:
        """Count a connection of ``tenant``, until `give_back`."""
        self._of_tenants.take(tenant.name)
        if tenant.key_limits.max_connections is not None:
            self._of_keys.take((tenant.name, tenant.credential_id))
        self._made_up += self._is_made_up(tenant.name)

    def give_back(self, tenant: Tenant) -> None:
        """Count a connection of ``tenant`` no more."""
        self._of_tenants.give_back(tenant.name)
        if tenant.key_limits.max_connections is not None:
            self._of_keys.give_back((tenant.name, tenant.credential_id))
        self._made_up -= self._is_made_up(tenant.name)

    def move(self, before: Tenant, now: Tenant) -> None:
        """Count a connection for ``now`` that was counted for ``before``."""
        if before is not now:
            self.give_back(before)
            self.take(now)

    def _is_made_up(self, name: str) -> bool:
        return self._known is not None and name not in self._known
