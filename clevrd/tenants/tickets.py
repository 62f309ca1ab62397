"""Tickets: credentials for one request, for clients that can set no header, such as EventSource.

A page that holds a key or token asks for a ticket and puts it into a URL, where it may end up in a
log: by then it is used up, or 30 seconds old. A ticket is its holder's tenant, for reading alone.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from clevrd.errors import Unauthorized, Unavailable
from clevrd.tenants.keys import digest_of
from clevrd.tenants.tenant import Tenant
from clevrd.tenants.topic_permissions import NO_TOPICS, TopicPermissions

LIFE_S: Final = 30.0
# Unused tickets of one tenant, and of all together; each takes 0.5 KB.
MAX_PER_TENANT: Final = 10_000
MAX_TICKETS: Final = 100_000
_SECRET_BYTES: Final = 24


class _Ticket(NamedTuple):
    tenant: Tenant
    ends_s: float


class Tickets:
    """The tickets that are not used yet.

    Args:
        now_s: a clock that is never set back.
    """

    __slots__ = ("_counts", "_now_s", "_tickets")

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        # A ticket's digest -> the ticket, the oldest first; at most MAX_TICKETS.
        self._tickets: OrderedDict[str, _Ticket] = OrderedDict()
        # Tenant -> how many of them are its; at most MAX_PER_TENANT each.
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        """Return how many could still be used."""
        self._forget_old()
        return len(self._tickets)

    def issue(self, tenant: Tenant, topics: Sequence[str]) -> str:
        """Return a ticket with which its bearer may subscribe to ``topics`` once.

        Args:
            tenant: who asks, and may subscribe to each of ``topics`` (the caller checked).
            topics: names and patterns.

        Raises:
            Unavailable: the tenant, or all together, have too many that are not used yet.
        """
        self._forget_old()
        count = self._counts.get(tenant.name, 0)
        if count >= MAX_PER_TENANT or len(self._tickets) >= MAX_TICKETS:
            raise Unavailable(
                f"Tenant {tenant.name} has {count} unused tickets; it may have {MAX_PER_TENANT},"
                f" and all tenants {MAX_TICKETS}. Use them, or wait {LIFE_S:g} s.",
                LIFE_S,
                tenant=tenant.name,
                bound="tickets",
                inputs={"tickets_of_tenant": count, "tickets": len(self._tickets)},
                thresholds={"tickets_of_tenant": MAX_PER_TENANT, "tickets": MAX_TICKETS},
            )
        ticket = secrets.token_urlsafe(_SECRET_BYTES)
        bearer = msgspec.structs.replace(
            tenant,
            publish=NO_TOPICS,
            clear=NO_TOPICS,
            subscribe=TopicPermissions(topics, within=tenant.subscribe),
            is_admin=False,
            has_ticket=True,
        )
        self._tickets[digest_of(ticket)] = _Ticket(bearer, self._now_s() + LIFE_S)
        self._counts[tenant.name] = count + 1
        return ticket

    def redeem(self, ticket: str) -> Tenant:
        """Return whose ``ticket`` it is; nobody can use it again.

        Raises:
            Unauthorized: there is no such ticket, any more.
        """
        self._forget_old()
        digest = digest_of(ticket)
        found = self._tickets.get(digest)
        if found is None:
            raise Unauthorized(
                "The ticket was used, is older than 30 s, or never was; ask for another.",
                was_given=True,
            )
        self._remove(digest)
        return found.tenant

    def _forget_old(self) -> None:
        """Forget tickets whose time is up: the oldest come first, so it looks at one more."""
        now_s = self._now_s()
        while self._tickets:
            digest, oldest = next(iter(self._tickets.items()))
            if oldest.ends_s > now_s:
                return
            self._remove(digest)

    def _remove(self, digest: str) -> None:
        name = self._tickets.pop(digest).tenant.name
        self._counts[name] -= 1
        if not self._counts[name]:
            del self._counts[name]
