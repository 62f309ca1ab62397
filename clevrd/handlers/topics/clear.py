"""DELETE /topics/T/messages: a topic loses all its messages."""

from __future__ import annotations

import logging

import msgspec

from clevrd.admission import Admitted, Gate
from clevrd.errors import NotFound
from clevrd.handlers.topics.endpoint import NO_TOPIC
from clevrd.handlers.topics.path import topic_in
from clevrd.http_values import Request, Response, json_answer
from clevrd.hub import Hub
from clevrd.hub.clearing import Cleared
from clevrd.tenants import Tenant

log = logging.getLogger(__name__)


class ClearedTopic(msgspec.Struct, frozen=True):
    """The answer to a client that has cleared a topic."""

    success: bool
    topic: str
    # The position behind which its messages come now.
    epoch: str
    offset: int


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
            Unavailable: the journal has as many cleared topics as it may have.
        """
        tenant, name = admitted.tenant, topic_in(admitted.head.path)
        tenant.check_clear(name)
        # A clear counts as a publish: it costs each reader what a message costs, and more.
        self._hub.check_rate(tenant)
        topic = self._hub.catalogue.find(tenant.name, name)
        if topic is None:
            raise NotFound(NO_TOPIC)
        answer = self._hub.clearing.clear(topic)
        cleared = answer if isinstance(answer, Cleared) else await answer
        self._log(tenant, name, cleared)
        return json_answer(ClearedTopic(True, name, cleared.epoch, cleared.offset))

    def _log(self, tenant: Tenant, name: str, cleared: Cleared) -> None:
        log.info(
            "topic cleared tenant=%s topic=%r credential=%s epoch=%s offset=%d",
            *(tenant.name, name, tenant.credential_id or "-", cleared.epoch, cleared.offset),
        )
