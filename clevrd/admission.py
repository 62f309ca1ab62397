"""The gate: the head of each request says who asks, and is admitted or refused before any body.

The raw path and aiohttp ask the same `Gate`, so no connection passes beside it. Refusals and
answers of one endpoint are in handlers/.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from clevrd.errors import ShuttingDown
from clevrd.http_values import Reply, Request, Response
from clevrd.scheduling.due_answers import Due
from clevrd.tenants import DEFAULT, Tenant, identify

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


class Gate:
    """The one way to an endpoint, for every connection."""

    __slots__ = ("_is_draining", "generation")

    def __init__(self, is_draining: Callable[[], bool]) -> None:
        self._is_draining = is_draining
        # The number of the meaning that heads have now; it rises in `change`. An `Admitted` that
        # was kept with another number is asked for anew.
        self.generation = 0

    def change(self) -> None:
        """Note that heads mean something else from now on: all that is kept of them is void."""
        self.generation += 1

    def refuse_if_draining(self, endpoint: Endpoint) -> None:
        """Raise Unavailable if the daemon drains and ``endpoint`` begins nothing new then."""
        if self._is_draining() and not endpoint.serves_while_draining:
            raise ShuttingDown

    def admit(self, endpoint: Endpoint, head: Request) -> Admitted:
        """Return the request as ``endpoint`` takes it.

        Raises:
            Unavailable: the daemon drains.
            ClevrdError: what the endpoint refuses.
        """
        self.refuse_if_draining(endpoint)
        return endpoint.admit(head)


def admit_tenant(head: Request, max_body_bytes: int = 0) -> Admitted:
    """Return a request of the tenant that it names.

    Raises:
        InvalidRequest: the query, or the tenant's name, is malformed.
    """
    options = head.options()
    return Admitted(head, identify(head, options), options, max_body_bytes)


def admit_anybody(head: Request) -> Admitted:
    """Return a request for what is the same for everybody; its query is not looked at."""
    return Admitted(head, DEFAULT, {}, 0)
