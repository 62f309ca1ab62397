"""The gate: the head of each request says who asks, and is admitted or refused before any body.

The raw path and aiohttp ask the same `Gate`, so no connection passes beside it. Credentials are
judged by the gate's authenticator (tenants/). Refusals and answers of one endpoint are in
handlers/.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from clevrd.errors import ShuttingDown
from clevrd.http_values import Reply, Request, Response
from clevrd.scheduling.due_answers import Due
from clevrd.tenants import DEFAULT, Tenant

# An answer that an endpoint gives later. A Future is cancelled when the client goes; anything else
# is awaited to its end. Requests behind a `Due` may begin at once; behind anything else they wait.
Later = Awaitable[Response | Due[Response]] | Due[Response]


class Admitted:
    """A request that may go on: its head, who asks, and within which limits.

    It says nothing of the moment, so that it can be kept for a head that comes again.
    """

    __slots__ = ("head", "max_body_bytes", "options", "tenant")

    def __init__(
        self,
        head: Request,
        tenant: Tenant,
        options: dict[str, list[str]],
        max_body_bytes: int,
    ) -> None:
        self.head = head
        self.tenant = tenant
        # The query, decoded: each option with all its values.
        self.options = options
        # The largest body that is read; 0 where none is taken.
        self.max_body_bytes = max_body_bytes


class Endpoint(Protocol):
    """The answerer of one method of one path."""

    # Whether it answers also once the daemon drains, as health checks do.
    serves_while_draining: bool

    def admit(self, head: Request) -> Admitted:
        """Return who asks and within which limits, by the head alone.

        Raises:
            ClevrdError: it can be refused without the body; the cheapest reason first.
        """

    def answer(self, admitted: Admitted, body: bytes) -> Reply | Later:
        """Return the reply, or something to await for it; raises ClevrdError."""


class Router(Protocol):
    """Which endpoint answers a request."""

    def find(self, request: Request) -> Endpoint:
        """Return it, or raise NotFound or MethodNotAllowed."""


class Identifies(Protocol):
    """Says who asks."""

    # Whether a request without a credential is refused.
    is_required: bool

    def identify(self, head: Request, options: Mapping[str, list[str]]) -> Tenant:
        """Return whose request it is, by its head and its decoded query; raises ClevrdError."""

    def renew(self, tenant: Tenant, secret: str) -> Tenant:
        """Return ``tenant`` as the bearer of another credential; raises ClevrdError."""


class Gate:
    """The one way to an endpoint, for every connection.

    Args:
        authenticator: decides who asks; `change` replaces it.
        is_draining: whether the daemon begins nothing new.
        wall_s: the wall clock, seconds since 1970, by which credentials expire.
    """

    __slots__ = ("_authenticator", "_is_draining", "_wall_s", "generation")

    def __init__(
        self,
        authenticator: Identifies,
        is_draining: Callable[[], bool],
        wall_s: Callable[[], float],
    ) -> None:
        self._authenticator = authenticator
        self._is_draining = is_draining
        self._wall_s = wall_s
        # The number of the meaning that heads have now; it rises in `change`. An `Admitted` that
        # was kept with another number is asked for anew.
        self.generation = 0

    def change(self, authenticator: Identifies) -> None:
        """Have ``authenticator`` decide from now on: all that is kept of heads is void."""
        self._authenticator = authenticator
        self.generation += 1

    def has_expired(self, admitted: Admitted) -> bool:
        """Return whether the credential of a request that was admitted before is over."""
        return admitted.tenant.expires_at_s is not None and self.left_s(admitted.tenant) <= 0.0

    def left_s(self, tenant: Tenant) -> float:
        """Return for how long the credential of ``tenant`` is valid, in seconds; inf for ever."""
        expires_at_s = tenant.expires_at_s
        return math.inf if expires_at_s is None else max(0.0, expires_at_s - self._wall_s())

    def refuse_if_draining(self, endpoint: Endpoint) -> None:
        """Raise ShuttingDown if the daemon drains and ``endpoint`` begins nothing new then."""
        if self._is_draining() and not endpoint.serves_while_draining:
            raise ShuttingDown

    def admit(self, endpoint: Endpoint, head: Request) -> Admitted:
        """Return the request as ``endpoint`` takes it.

        Raises:
            ClevrdError: what the endpoint refuses.
            ShuttingDown: the daemon drains, and the endpoint begins nothing new then.
        """
        admitted = endpoint.admit(head)
        self.refuse_if_draining(endpoint)
        return admitted

    def admit_tenant(self, head: Request, max_body_bytes: int = 0) -> Admitted:
        """Return a request of the tenant that asks, for endpoints that serve tenants.

        Raises:
            InvalidRequest: the query, or the tenant's name, is malformed; two credentials.
            Unauthorized: a credential is missing, or not valid.
            Forbidden: the tenant that is named is not the credential's.
        """
        options = head.options()
        tenant = self._authenticator.identify(head, options)
        return Admitted(head, tenant, options, max_body_bytes)

    def renew(self, tenant: Tenant, secret: str) -> Tenant:
        """Return ``tenant`` as the bearer of another credential.

        Raises:
            Unauthorized: it is not valid.
            Forbidden: it is another tenant's.
        """
        return self._authenticator.renew(tenant, secret)

    def admit_operator(self, head: Request) -> Admitted:
        """Return a request of somebody who operates the daemon: where it is open, of anybody.

        Raises:
            ClevrdError: as `admit_tenant`.
            Forbidden: the credential has not the permission admin.
        """
        if not self._authenticator.is_required:
            return admit_anybody(head)
        admitted = self.admit_tenant(head)
        admitted.tenant.check_admin()
        return admitted


def admit_anybody(head: Request) -> Admitted:
    """Return a request for what is the same for everybody; its query is not looked at."""
    return Admitted(head, DEFAULT, {}, 0)
