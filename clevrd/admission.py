"""The gate: the head of each request says who asks, and is admitted or refused before any body.

The raw path and aiohttp ask the same `Gate`, so no connection passes beside it. Credentials are
judged by the gate's authenticator (tenants/). Refusals and answers of one endpoint are in
handlers/.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

from clevrd.core.message_headers import Headers
from clevrd.errors import Forbidden, ShuttingDown, Unauthorized
from clevrd.http_values import Reply, Request, Response
from clevrd.local_requests import has_public_name, is_local
from clevrd.scheduling.due_answers import Due
from clevrd.tenants import DEFAULT, Tenant
from clevrd.tenants.tenant import DEFAULT_TENANT
from clevrd.tenants.topic_permissions import NO_TOPICS

# An answer that an endpoint gives later. A Future is cancelled when the client goes; anything else
# is awaited to its end. Requests behind a `Due` may begin at once; behind anything else they wait.
Later = Awaitable[Response | Due[Response]] | Due[Response]


# A person or program that operates the daemon, and has proved it by where it asks.
OPERATOR: Final = Tenant(DEFAULT_TENANT, is_admin=True)
# A client that is shown nothing of any tenant.
STRANGER: Final = Tenant(DEFAULT_TENANT, publish=NO_TOPICS, subscribe=NO_TOPICS, clear=NO_TOPICS)

_OVER: Final = "The credential has expired, or is valid no more; ask with another one."
# Methods that change nothing.
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_BY_NAME: Final = (
    "A page that was opened by a name with a dot may change nothing here, since anybody's page can"
    " be made to look like it; open it by the address, or ask with a program."
)
_NOT_LOCAL: Final = (
    "This is for a key with the permission admin, for the daemon's admin_address, and, where no"
    " credential is required, for this machine itself: ask localhost, over HTTP/1.1 and through no"
    " proxy."
)


class Admitted:
    """A request that may go on: its head, who asks, and within which limits.

    It says nothing of the moment, so that it can be kept for a head that comes again.
    """

    __slots__ = ("head", "headers", "max_body_bytes", "options", "tenant")

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
        # Headers that its messages are carried with; None for none. Set by an endpoint's admit.
        self.headers: Headers | None = None


class Endpoint(Protocol):
    """The answerer of one method of one path."""

    @property
    def serves_while_draining(self) -> bool:
        """Whether it answers also once the daemon drains, as health checks do."""

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
        """Return the endpoint, or raise NotFound or MethodNotAllowed."""


class Identifies(Protocol):
    """Says who asks."""

    # Whether a request without a credential is refused.
    is_required: bool

    def identify(self, head: Request, options: Mapping[str, list[str]]) -> Tenant:
        """Return whose request it is, by its head and its decoded query; raises ClevrdError."""

    def holder(self, head: Request, options: Mapping[str, list[str]]) -> Tenant | None:
        """Return whose request it is by a credential alone, None without one."""

    def renew(self, tenant: Tenant, secret: str) -> Tenant:
        """Return ``tenant`` as the bearer of another credential; raises ClevrdError."""

    def current(self, tenant: Tenant) -> Tenant | None:
        """Return ``tenant`` by the rules of now; None where it would not be let in any more."""


class Operators(Protocol):
    """Admits requests for what shows more than one tenant's share."""

    def admit_operator(self, head: Request) -> Admitted:
        """Return a request of somebody who operates the daemon; raises ClevrdError."""

    def admit_observer(self, head: Request) -> Admitted:
        """Return a request for figures: of all tenants by an admin, else of its own tenant."""

    def admit_admin(self, head: Request) -> Admitted:
        """Return a request of an operator whose option ``tenant`` says which tenant is meant."""

    def name_of(self, admitted: Admitted) -> str:
        """Return who operates, for the log."""


class Gate:
    """The one way to an endpoint, for every connection.

    Args:
        authenticator: decides who asks; `change` replaces it.
        is_draining: whether the daemon begins nothing new.
        wall_s: the wall clock, seconds since 1970, by which credentials expire.
        shutting_down: returns the refusal while it drains.
    """

    __slots__ = ("_authenticator", "_shutting_down", "_wall_s", "generation", "is_draining")

    def __init__(
        self,
        authenticator: Identifies,
        is_draining: Callable[[], bool],
        wall_s: Callable[[], float],
        shutting_down: Callable[[], ShuttingDown] = ShuttingDown,
    ) -> None:
        self._authenticator = authenticator
        self._shutting_down = shutting_down
        self.is_draining = is_draining
        self._wall_s = wall_s
        # The number of the meaning that heads have now; it rises in `change`. An `Admitted` that
        # was kept with another number is asked for anew.
        self.generation = 0

    def change(self, authenticator: Identifies) -> None:
        """Have ``authenticator`` decide from now on: all that is kept of heads is void."""
        self._authenticator = authenticator
        self.generation += 1

    def is_void(self, admitted: Admitted, generation: int) -> bool:
        """Return whether a request has to be admitted again.

        Args:
            generation: the gate's, when the request was admitted before.
        """
        return generation != self.generation or self.is_over(admitted.tenant)

    def is_over(self, tenant: Tenant) -> bool:
        """Return whether the credential of ``tenant`` is valid no more."""
        return tenant.expires_at_s is not None and self.left_s(tenant) <= 0.0

    def left_s(self, tenant: Tenant) -> float:
        """Return for how long the credential of ``tenant`` is valid, in seconds; inf for ever."""
        expires_at_s = tenant.expires_at_s
        return math.inf if expires_at_s is None else max(0.0, expires_at_s - self._wall_s())

    def refuse_if_draining(self, endpoint: Endpoint) -> None:
        """Raise ShuttingDown if the daemon drains and ``endpoint`` begins nothing new then."""
        if self.is_draining() and not endpoint.serves_while_draining:
            raise self._shutting_down()

    def admit(self, endpoint: Endpoint, head: Request) -> Admitted:
        """Return the request as ``endpoint`` takes it.

        Raises:
            ClevrdError: what the endpoint refuses.
            ShuttingDown: the daemon drains, and the endpoint begins nothing new then.
        """
        admitted = endpoint.admit(head)
        self.refuse_if_draining(endpoint)
        return admitted

    def admit_again(self, endpoint: Endpoint, admitted: Admitted) -> Admitted:
        """Return a request that was admitted before as ``endpoint`` takes it now.

        Raises:
            ClevrdError: as `admit`.
        """
        if not admitted.tenant.has_ticket:
            return self.admit(endpoint, admitted.head)
        # A ticket is used up by now, so the head can't be read a second time.
        tenant = self._authenticator.current(admitted.tenant)
        if tenant is None:
            raise Unauthorized(_OVER, was_given=True)
        self._refuse_if_over(tenant)
        return Admitted(admitted.head, tenant, admitted.options, admitted.max_body_bytes)

    def _refuse_if_over(self, tenant: Tenant) -> None:
        """Raise Unauthorized for a credential that is over, as a certificate may be by now."""
        if self.is_over(tenant):
            raise Unauthorized(_OVER, was_given=True)

    def admit_tenant(self, head: Request, max_body_bytes: int = 0) -> Admitted:
        """Return a request of the tenant that asks, for endpoints that serve tenants.

        Raises:
            InvalidRequest: the query, or the tenant's name, is malformed; two credentials.
            Unauthorized: a credential is missing, or not valid.
            Forbidden: the tenant that is named is not the credential's.
        """
        options = head.options()
        # A head that comes again may have been asked with by somebody before.
        head.asker = None
        tenant = self._authenticator.identify(head, options)
        head.asker = (tenant.name, tenant.credential_id)
        if tenant.expires_at_s is not None:
            self._refuse_if_over(tenant)
        return Admitted(head, tenant, options, max_body_bytes)

    def renew(self, tenant: Tenant, secret: str) -> Tenant:
        """Return ``tenant`` as the bearer of another credential.

        Raises:
            Unauthorized: it is not valid.
            Forbidden: it is another tenant's.
        """
        return self._authenticator.renew(tenant, secret)

    def admit_operator(self, head: Request) -> Admitted:
        """Return a request of somebody who operates the daemon.

        Raises:
            ClevrdError: as `admit_observer`.
            Forbidden: the credential has not the permission admin.
        """
        admitted = self.admit_observer(head)
        admitted.tenant.check_admin()
        return admitted

    def admit_observer(self, head: Request) -> Admitted:
        """Return a request for figures: of all tenants by an admin, else of its own tenant.

        Where no credential is required, a request of this machine is an admin's.

        Raises:
            ClevrdError: as `admit_tenant`.
            Forbidden: it has no credential, and comes from elsewhere.
        """
        options = head.options()
        return Admitted(head, self._observer(head, options), options, 0)

    def admit_admin(self, head: Request) -> Admitted:
        """Return a request of an operator whose option ``tenant`` says which tenant is meant.

        Raises:
            ClevrdError: as `admit_operator`.
        """
        options = head.options()
        own = {name: values for name, values in options.items() if name != "tenant"}
        tenant = self._observer(head, own)
        tenant.check_admin()
        return Admitted(head, tenant, options, 0)

    @property
    def is_required(self) -> bool:
        """Whether a credential is required of publishers and subscribers."""
        return self._authenticator.is_required

    def name_of(self, admitted: Admitted) -> str:
        """Return who operates, for the log: a credential, or this machine."""
        tenant = admitted.tenant
        if tenant is OPERATOR:
            return f"this machine ({admitted.head.peer or 'a Unix socket'})"
        return f"{tenant.name}/{tenant.credential_id} ({admitted.head.peer or 'a Unix socket'})"

    def _observer(self, head: Request, options: Mapping[str, list[str]]) -> Tenant:
        """Return who asks for figures; raises as `admit_observer`."""
        if self._authenticator.is_required:
            tenant = self._authenticator.identify(head, options)
        else:
            holder = self._authenticator.holder(head, options)
            if holder is None and not is_local(head):
                raise Forbidden(_NOT_LOCAL)
            tenant = OPERATOR if holder is None else holder
        self._refuse_if_over(tenant)
        return tenant

    def admit_visitor(self, head: Request) -> Admitted:
        """Return a request for what everybody may see, of STRANGER where nothing says whose it is.

        Raises:
            InvalidRequest: as `admit_tenant`.
        """
        options = head.options()
        try:
            tenant = self._authenticator.holder(head, options)
            if tenant is not None:
                self._refuse_if_over(tenant)
        except Unauthorized:
            tenant = STRANGER
        if tenant is None:
            is_open = not self._authenticator.is_required and is_local(head)
            tenant = DEFAULT if is_open else STRANGER
        return Admitted(head, tenant, options, 0)


class EverybodyOperates:
    """Takes every request for an operator's: what reaches the admin listener."""

    def admit_operator(self, head: Request) -> Admitted:
        """Return the request as an operator's; raises InvalidRequest for a malformed query."""
        return Admitted(head, OPERATOR, head.options(), 0)

    def admit_observer(self, head: Request) -> Admitted:
        """Return the request as an operator's; raises InvalidRequest for a malformed query."""
        return self.admit_operator(head)

    def admit_admin(self, head: Request) -> Admitted:
        """Return the request as an operator's, unless a page asks that may be anybody's.

        No credential is asked for here, and whoever owns a name can have it mean this address (DNS
        rebinding), so that a page of that name is the listener's own, and could do more than look.

        Raises:
            InvalidRequest: a malformed query.
            Forbidden: it changes something, and comes from a page that was opened by a name.
        """
        if head.method not in _READS and "origin" in head.headers and has_public_name(head):
            raise Forbidden(_BY_NAME)
        return self.admit_operator(head)

    def name_of(self, admitted: Admitted) -> str:
        """Return who operates, for the log: whoever reaches the listener."""
        return f"admin_address ({admitted.head.peer or 'a Unix socket'})"


def admit_anybody(head: Request) -> Admitted:
    """Return a request for what is the same for everybody; its query is not looked at."""
    return Admitted(head, DEFAULT, {}, 0)
