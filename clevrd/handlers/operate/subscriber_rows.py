"""Subscribers as operators see them: one row for a subscription, and GET /admin/subscribers."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Final

import msgspec

from clevrd.admission import Admitted, Operators
from clevrd.connections.one_subscription import OneSubscription
from clevrd.connections.registry import Connection, Connections
from clevrd.handlers.operate.admin_options import AdminOptions
from clevrd.http_values import Request, Response, json_view
from clevrd.hub import Hub
from clevrd.metrics.top import SubscriberRow

MAX_ROWS: Final = 100
# Connections looked at in one step, at 1 us each and 1 us for each of their topics.
_WORK_PER_STEP: Final = 256

_OPTIONS: Final = AdminOptions(("tenant", "topic"), {"n": (1, MAX_ROWS)})


class SubscribersView(msgspec.Struct, frozen=True):
    """Subscriptions that match what was asked for, the longest open first."""

    # How many there are, of which the first are shown.
    total: int
    subscribers: list[SubscriberRow]


class SubscribersEndpoint:
    """The subscriptions of a tenant, or of one of its topics; without either all there are."""

    serves_while_draining = True

    def __init__(self, gate: Operators, hub: Hub, connections: Connections) -> None:
        self._gate = gate
        self._hub = hub
        self._connections = connections

    def admit(self, head: Request) -> Admitted:
        """Refuse who may not operate the daemon, and options that mean nothing here."""
        admitted = self._gate.admit_admin(head)
        _OPTIONS.check(admitted.options)
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return what makes the answer, in shares of the loop's turns."""
        options = admitted.options
        topic = _OPTIONS.topic(options) if "topic" in options else None
        tenant = _OPTIONS.tenant(options) if topic or "tenant" in options else None
        count = _OPTIONS.number(options, "n", MAX_ROWS)
        return self._hub.turns.carry_out(self._answer(tenant, topic, count))

    def _answer(
        self, tenant: str | None, topic: str | None, count: int
    ) -> Generator[None, None, Response]:
        total, work = 0, 0
        rows: list[SubscriberRow] = []
        for connection in self._connections.listed():
            work += 1
            if tenant is None or connection.tenant.name == tenant:
                for reader in connection.readers():
                    work += 1
                    if topic is None or reader.topic.name == topic:
                        total += 1
                        if len(rows) < count:
                            rows.append(row_of(self._connections, connection, reader))
            if work >= _WORK_PER_STEP:
                yield
                work = 0
        yield
        return json_view(SubscribersView(total, rows))


def row_of(
    connections: Connections, connection: Connection, reader: OneSubscription | None
) -> SubscriberRow:
    """Return a subscription of ``connection``, or the connection alone where it has none."""
    tenant = connection.tenant
    return SubscriberRow(
        id=str(connections.number_of(connection)),
        tenant_id=tenant.name,
        credential=tenant.credential_id,
        topic="" if reader is None else reader.topic.name,
        topics=len(connection.readers()),
        address=connections.address_of(connection),
        transport=connection.kind,
        policy="" if reader is None else reader.strategy.value,
        state="publishing" if reader is None else state_of(reader),
        lag_messages=0 if reader is None else lag_of(reader),
        unsent_bytes=connection.unsent_bytes(),
        delivered=0 if reader is None else reader.delivered,
        dropped=0 if reader is None else reader.dropped,
        open_s=round(connections.now_s() - connections.opened_s(connection), 3),
    )


def lag_of(reader: OneSubscription) -> int:
    """Return how many messages lie between a reader's place and its topic's newest."""
    if reader.is_live or not reader.is_joined:
        return 0
    return max(0, reader.topic.head - max(0, reader.cursor) + reader.kept_messages)


def state_of(reader: OneSubscription) -> str:
    """Return what becomes of a reader now, in a word."""
    topic = reader.topic
    if reader.is_live:
        return "live"
    if not reader.is_joined:
        return "leaving"
    if reader in topic.suspended:
        return "circuit_open"
    if topic.history is not None and reader in topic.history.readers:
        return "reading_history"
    return "stalled" if reader.is_blocked else "catching_up"
