"""DELETE /topics/T/messages: a topic loses all its messages."""

from __future__ import annotations

import logging

from clevrd.admission import Admitted, Gate
from clevrd.errors import NotFound, Unavailable
from clevrd.handlers.topics.endpoint import NO_TOPIC
from clevrd.handlers.topics.path import topic_in
from clevrd.http_values import Request, Response, json_answer
from clevrd.hub import Hub
from clevrd.hub.clearing import ClearedTopic
from clevrd.tenants import Tenant

log = logging.getLogger(__name__)

# Topics come to be cleared too often when a log's epoch ends, or never: the client is told so long.
_RETRY_S = 60.0


class ClearEndpoint:
    """Clears a topic for who has the permission to."""

    serves_while_draining = False

    def __init__(self, gate: Gate, hub: Hub) -> None:
        self._gate = gate
        self._hub = hub

    def admit(self, head: Request) -> Admitted:
        """Refuse what names no tenant."""
        return self._gate.admit_tenant(head)

    async def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Clear the topic, and answer when all that read the same log will have it cleared.

        Raises:
            Forbidden: the permission is missing.
            RateLimited: the tenant, or its key, publishes or clears too often.
            NotFound: there is no such topic.
            JournalUnavailable: the journal does not answer; the topic may be cleared.
        """
        tenant, name = admitted.tenant, topic_in(admitted.head.path)
        tenant.check_clear(name)
        # It costs each reader what a message costs, and more.
        self._hub.check_rate(tenant)
        topic = self._hub.catalogue.find(tenant.name, name)
        if topic is None:
            raise NotFound(NO_TOPIC)
        head = topic.head
        answer = self._hub.clearing.clear_for_all(topic)
        cleared = answer if isinstance(answer, ClearedTopic) else await answer
        if topic.journal is not None and cleared.offset < head:
            raise Unavailable(
                "The journal has as many cleared topics as it may have; publish to another topic.",
                _RETRY_S,
            )
        self._log(tenant, name, cleared)
        return json_answer(cleared)

    def _log(self, tenant: Tenant, name: str, cleared: ClearedTopic) -> None:
        log.info(
            "topic cleared tenant=%s topic=%r credential=%s epoch=%s offset=%d",
            *(tenant.name, name, tenant.credential_id or "-", cleared.epoch, cleared.offset),
        )
