"""GET /topics/T/messages: a topic's messages from ring and journal, without a subscription.

Conditional requests and caching: RFC 9110 §13.1.2, RFC 9111 §5.2.2, RFC 8246 (immutable).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable
from typing import Final

import msgspec

from clevrd.admission import Admitted, Gate
from clevrd.connections.poll import POLL_HEAD, POLL_MAX_BYTES, answer_of_one
from clevrd.core.beginning import Beginning, Last, check_beginning
from clevrd.core.server_frames import payload_of, plain_payload_of
from clevrd.errors import InvalidRequest, NotFound
from clevrd.handlers.site.assets import MAX_IF_NONE_MATCH_CHARS
from clevrd.handlers.subscribe.options import flag_option, number_option
from clevrd.handlers.subscribe.resume import read_resume
from clevrd.handlers.topics.endpoint import NO_TOPIC, limit_option
from clevrd.handlers.topics.path import topic_in
from clevrd.http_values import NOT_STORED, Request, Response
from clevrd.hub import Hub, ReadMessages, read_messages
from clevrd.tenants import Tenant

# A page that no message can come to any more may be kept so long by the client that asked. Not for
# ever, since a topic can be cleared.
_KEPT: Final = "private, max-age=3600, immutable"
# The answer depends on who asks, however that is said.
_VARY: Final = "Authorization, Cookie, X-API-Key, X-Tenant-ID"


class MessagesEndpoint:
    """Answers with messages from a position, a time or the last few, as a poll is answered."""

    serves_while_draining = False

    def __init__(self, gate: Gate, hub: Hub) -> None:
        self._gate = gate
        self._hub = hub

    def admit(self, head: Request) -> Admitted:
        """Refuse what names no tenant."""
        return self._gate.admit_tenant(head)

    def answer(self, admitted: Admitted, body: bytes) -> Response | Awaitable[Response]:
        """Return the messages, or what reads them from the journal."""
        head, options, tenant = admitted.head, admitted.options, admitted.tenant
        name = topic_in(head.path)
        tenant.check_subscribe(name)
        limit = limit_option(options)
        has_headers = flag_option(options, "headers")
        beginning = _beginning(options, limit, self._hub.wall_us())
        topic = self._hub.catalogue.find(tenant.name, name)
        if topic is None:
            raise NotFound(NO_TOPIC)
        check_beginning(topic, beginning)
        if head.method == "HEAD":
            return POLL_HEAD
        if self._hub.in_history(topic, beginning) is not None:
            # The request holds memory while it waits for a disk, as a poll does, and is counted as
            # one.
            self._hub.connection_counts.check(tenant)
        reading = read_messages(self._hub, topic, beginning, limit, POLL_MAX_BYTES)
        return self._answer(reading, head, tenant, beginning, limit, has_headers=has_headers)

    async def _answer(
        self,
        reading: Awaitable[ReadMessages],
        head: Request,
        tenant: Tenant,
        beginning: Beginning,
        limit: int,
        *,
        has_headers: bool,
    ) -> Response:
        counts = self._hub.connection_counts
        counts.take(tenant)
        try:
            found = await reading
        finally:
            counts.give_back(tenant)
        fields: tuple[tuple[str, str], ...] = NOT_STORED
        if found.is_fixed(beginning, limit):
            tag = _tag(tenant.name, found, has_headers=has_headers)
            fields = (("ETag", tag), ("Cache-Control", _KEPT), ("Vary", _VARY))
            if _has_tag(head.headers.get("if-none-match", ""), tag):
                return Response(304, b"", headers=fields)
        payloads = map(payload_of if has_headers else plain_payload_of, found.frames)
        answer = answer_of_one(found.topic, found.start, found.upto, payloads)
        return msgspec.structs.replace(answer, headers=fields)


def _beginning(options: dict[str, list[str]], limit: int, now_us: int) -> Beginning:
    """Return where the answer begins: with the last ``limit`` messages where nothing is said.

    Raises:
        InvalidRequest: it is said in two ways, half, or in none of the forms there are.
    """
    last = number_option(options, "last", least=0)
    resume = read_resume({}, options, now_us)
    if last is not None and resume is not None:
        raise InvalidRequest(
            "The option last says where to begin, as offset and since do; give one of them."
        )
    return resume or Last(limit if last is None else last)


def _tag(tenant: str, found: ReadMessages, *, has_headers: bool) -> str:
    """Return the name of a page: these messages of this epoch of this tenant's topic."""
    place = f"{tenant}\0{found.topic.name}\0{found.topic.epoch}"
    digest = hashlib.sha256(place.encode()).hexdigest()[:16]
    form = "-h" if has_headers else ""
    return f'"{digest}-{found.start.after}-{found.upto}{form}"'


def _has_tag(given: str, tag: str) -> bool:
    if len(given) > MAX_IF_NONE_MATCH_CHARS:
        return False
    return tag in {each.strip().removeprefix("W/") for each in given.split(",")}
