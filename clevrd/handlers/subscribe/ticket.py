"""POST /ticket: a credential for one subscription, for clients that can set no header."""

from __future__ import annotations

from typing import Final

import msgspec

from clevrd.admission import Admitted, Gate
from clevrd.core.json_faults import json_fault
from clevrd.core.patterns import parse_pattern
from clevrd.errors import Forbidden, InvalidRequest
from clevrd.handlers.publish.endpoint import check_body_head
from clevrd.handlers.subscribe.endpoint import MAX_URL_TOPICS
from clevrd.http_values import Request, Response, json_answer
from clevrd.tenants.tickets import LIFE_S, Tickets

# Names and patterns of as many topics as a URL may have, each of 255 bytes, escaped.
MAX_BODY_BYTES: Final = 65_536

EXPECTED: Final = 'send {"topics": ["orders"]}, or "patterns", or both'


class Wanted(msgspec.Struct, frozen=True):
    """The topics and patterns that the bearer is to subscribe to."""

    topics: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


class TicketAnswer(msgspec.Struct, frozen=True):
    """The ticket, for the query option of that name, and for how long it can be used."""

    ticket: str
    expires_in_s: float


_decoder = msgspec.json.Decoder(Wanted)


class TicketEndpoint:
    """Gives out tickets."""

    serves_while_draining = False

    def __init__(self, gate: Gate, tickets: Tickets) -> None:
        self._gate = gate
        self._tickets = tickets

    def admit(self, head: Request) -> Admitted:
        """Refuse clients that may not ask for anything, and those that came by a ticket."""
        check_body_head(head, MAX_BODY_BYTES)
        admitted = self._gate.admit_tenant(head, MAX_BODY_BYTES)
        if admitted.tenant.has_ticket:
            raise Forbidden("A ticket gets no other ticket; ask with a key or a token.")
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return a ticket for topics and patterns that its tenant may subscribe to."""
        wanted, tenant = _read(body), admitted.tenant
        for topic in wanted.topics:
            tenant.check_subscribe(topic)
        for pattern in wanted.patterns:
            tenant.check_pattern(pattern, parse_pattern(pattern))
        ticket = self._tickets.issue(tenant, (*wanted.topics, *wanted.patterns))
        return json_answer(TicketAnswer(ticket, LIFE_S))


def _read(body: bytes) -> Wanted:
    try:
        wanted = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The body is no list of topics; {EXPECTED}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body {json_fault(body, error)}; {EXPECTED}.") from error
    count = len(wanted.topics) + len(wanted.patterns)
    if not 1 <= count <= MAX_URL_TOPICS:
        raise InvalidRequest(
            f"A ticket is for 1 to {MAX_URL_TOPICS} topics and patterns, as a URL is, and not for"
            f" {count}."
        )
    return wanted
