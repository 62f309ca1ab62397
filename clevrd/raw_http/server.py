"""RawServer: what all raw connections share: grammar, limits, deadlines, the way to aiohttp."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from operator import methodcaller
from typing import Final, Protocol

from clevrd.address_limit import AddressLimit
from clevrd.admission import Admitted, Endpoint, Gate
from clevrd.config import Config
from clevrd.http_values import Request, Response, ResponseRenderer
from clevrd.input_budget import InputBudget
from clevrd.metrics.counters import Counters
from clevrd.pace import sent_step_bytes
from clevrd.page_check import PageCheck
from clevrd.proxy_protocol import BadProxyHeader
from clevrd.raw_http.grammar import PlainGrammar, PlainHead
from clevrd.refusals import Refusals
from clevrd.scheduling.bulk_reads import BulkReads
from clevrd.scheduling.deadlines import Deadlines
from clevrd.scheduling.fair_turns import FairTurns
from clevrd.scheduling.timers import Tasks

log = logging.getLogger(__name__)

# Seconds between two log lines about wrong PROXY headers, at least.
_TOLD_EVERY_S: Final = 60.0
# Connections that linger at once, each for LINGER_S; more are closed right away.
MAX_LINGERING: Final = 32


class Connection(Protocol):
    """A raw connection as the server sees it."""

    transport: asyncio.Transport
    deadline_s: float

    @property
    def is_under_way(self) -> bool:
        """Whether a request has begun to arrive, or an answer is due."""

    def expire(self) -> None:
        """End because the time is up."""

    def refuse_entry(self) -> None:
        """Say that there is no room."""

    def close_when_idle(self) -> None:
        """Close now, or after the request that is under way."""


def _never_plain(head: bytes) -> PlainHead | None:
    """Return None: no head is for the raw path."""
    return None


class RawServer:
    """The parts that all raw connections share: grammar, limits, deadlines, the way to aiohttp."""

    def __init__(
        self,
        *,
        gate: Gate,
        pages: PageCheck,
        grammar: PlainGrammar | None,
        probes: Mapping[str, Endpoint],
        refusals: Refusals,
        addresses: AddressLimit,
        make_aiohttp_protocol: Callable[[], asyncio.Protocol],
        count_handed_over: Callable[[], int],
        counters: Counters,
        tasks: Tasks,
        turns: FairTurns,
        budget: InputBudget,
        config: Config,
        max_connections: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._gate = gate
        self.pages = pages
        # None: every connection is handed to aiohttp at once.
        self.grammar = grammar
        # Returns what a head asks; None when it is not for the raw path.
        self.read_head = _never_plain if grammar is None else grammar.read
        self._refusals = refusals
        # The client of each connection, and how many each client has.
        self.addresses = addresses
        # Loop time of the newest log line about wrong PROXY headers.
        self._told_at_s = -_TOLD_EVERY_S
        self.make_aiohttp_protocol = make_aiohttp_protocol
        self.counters = counters
        self.render = ResponseRenderer().render
        self.request_timeout_s = config.request_timeout_s
        self.sent_step_bytes = sent_step_bytes(config.request_timeout_s)
        self.keepalive_timeout_s = config.keepalive_timeout_s
        self.now_s = loop.time
        self.loop = loop
        self.open: set[Connection] = set()
        # Connections that have had a last word and are to see it; at most MAX_LINGERING.
        self.lingering: set[Connection] = set()
        # Path -> what answers it also over the limit of connections.
        self.probes = probes
        # Connections over the limit that have not said yet what they want; at most MAX_PROBES, and
        # the one that has waited longest first.
        self.probing: dict[Connection, None] = {}
        self._count_handed_over = count_handed_over
        # The limit of connections, reckoned by the server once its own descriptors are open.
        self.max_connections = max_connections
        # The deadlines of all connections above.
        self.deadlines: Deadlines[Connection] = Deadlines(
            loop, methodcaller("expire"), counters.count_background_error
        )
        # The tasks of publishes that wait.
        self.tasks = tasks
        self.turns = turns
        self.budget = budget
        self.bulk_reads = BulkReads(loop, counters.count_background_error)

    def refusal(self, error: Exception, request: Request | None) -> Response:
        """Return the answer to a request that raised ``error``; None for one that is not whole."""
        answer = self._refusals.response(error, request)
        return answer if request is None else self.pages.marked(answer, request)

    def admit(self, plain: PlainHead, *, has_begun: bool) -> Admitted:
        """Return the request as its endpoint takes it, remembered where the head is.

        Args:
            has_begun: it began before the daemon drained, and is answered as it was meant.

        Raises:
            ClevrdError: as `Gate.admit`.
        """
        gate = self._gate
        admitted = plain.admitted
        # This is `Gate.is_void` written out, since the call would cost each publish 0.1 us.
        if (
            admitted is None
            or plain.generation != gate.generation
            or (admitted.tenant.expires_at_s is not None and gate.is_over(admitted.tenant))
        ):
            admitted = plain.admitted = plain.endpoint.admit(plain.request)
            plain.generation = gate.generation
        if not has_begun and gate.is_draining():
            gate.refuse_if_draining(plain.endpoint)
        return admitted

    def is_full(self) -> bool:
        """Whether one more connection would be one too many."""
        return len(self.open) + self._count_handed_over() >= self.max_connections

    def note_bad_proxy_header(
        self, error: BadProxyHeader, transport: asyncio.BaseTransport
    ) -> None:
        """Count a connection that ends for want of a PROXY header; log some."""
        self._refusals.count(error)
        if self.now_s() - self._told_at_s >= _TOLD_EVERY_S:
            self._told_at_s = self.now_s()
            log.warning(
                "proxy header refused address=%s why=%r",
                self.addresses.peer_of(transport) or "unix",
                str(error),
            )

    def stop(self) -> None:
        """End what is still open: clients that don't take their last answer."""
        self.deadlines.stop()
        for connection in self.open | self.lingering | self.probing.keys():
            connection.transport.abort()

    def close_idle(self) -> None:
        """Close connections that are between requests, and the others after theirs."""
        for connection in list(self.open):
            connection.close_when_idle()

    def count_under_way(self) -> int:
        """Return how many connections have a request that is not answered yet."""
        return sum(connection.is_under_way for connection in self.open)
