"""Actions of operators under /admin: end a connection, clear or drop a topic, read its messages.

Each is logged with who did it, and explained by /admin/explain. A page's form can't do any of them:
a change is a DELETE, which no form sends, and which a page of another origin may not.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from clevrd.admission import Admitted, Operators
from clevrd.connections.registry import DISCONNECTED, DISCONNECTED_REASON, Connections
from clevrd.core.server_frames import plain_payload_of
from clevrd.core.topic import Topic
from clevrd.errors import InvalidRequest, NotFound
from clevrd.handlers.operate.admin_options import AdminOptions
from clevrd.http_values import Request, Response, json_answer, json_view
from clevrd.hub import Hub
from clevrd.hub.clearing import Cleared

log = logging.getLogger(__name__)

# Messages that the tail of a topic has unless asked otherwise, and at most; and their bytes at
# most, but for one larger message.
DEFAULT_TAIL: Final = 10
MAX_TAIL: Final = 100
MAX_TAIL_BYTES: Final = 1_048_576

_SUBSCRIBER: Final = AdminOptions(numbers={"id": (1, 10**18 - 1)})
_TOPIC: Final = AdminOptions(("tenant", "topic"))
_TAIL: Final = AdminOptions(("tenant", "topic"), {"last": (1, MAX_TAIL)})


class Disconnected(msgspec.Struct, frozen=True):
    """A connection that was told to end."""

    id: str
    tenant_id: str
    address: str


class TailView(msgspec.Struct, frozen=True):
    """The newest messages of a topic, oldest first."""

    topic: str
    tenant_id: str
    epoch: str
    # The newest message's; 0 before the first.
    offset: int
    messages: list[msgspec.Raw]


class Operator:
    """Checks who acts, and writes down what was done."""

    def __init__(self, gate: Operators, hub: Hub) -> None:
        self.hub = hub
        self._gate = gate

    def admit(self, head: Request, options: AdminOptions) -> Admitted:
        """Refuse who may not operate the daemon, and options that mean nothing here."""
        admitted = self._gate.admit_admin(head)
        options.check(admitted.options)
        return admitted

    def note_change(
        self, admitted: Admitted, code: str, what: str, tenant: str, topic: str = ""
    ) -> None:
        """Log and keep in mind what an operator did."""
        who = self._gate.name_of(admitted)
        log.warning("operator %s by=%r tenant=%s topic=%r", what, who, tenant, topic)
        self._keep(code, who, what, tenant, topic)

    def note_look(self, admitted: Admitted, code: str, what: str, topic: Topic) -> None:
        """Do the same for what changes nothing: a page that looks every second is one line."""
        who = self._gate.name_of(admitted)
        if self._keep(code, who, what, topic.tenant, topic.name):
            log.info("operator %s by=%r tenant=%s topic=%r", what, who, topic.tenant, topic.name)

    def _keep(self, code: str, who: str, what: str, tenant: str, topic: str) -> bool:
        """Return whether it is new, and goes on with nothing that this operator did just now."""
        decisions = self.hub.decisions
        if decisions.repeated("operator", code, tenant, topic, who):
            return False
        decisions.begin("operator", code, f"An operator, {who}, {what}.", tenant, topic, who)
        return True

    def topic(self, admitted: Admitted, *, in_use: bool = True) -> Topic:
        """Return the topic that is meant.

        Args:
            in_use: a topic that has messages in the journal alone is not found.

        Raises:
            InvalidRequest: no topic can have the name.
            NotFound: there is no such topic.
        """
        options = admitted.options
        name, tenant = _TOPIC.topic(options), _TOPIC.tenant(options)
        find = self.hub.topics.find if in_use else self.hub.catalogue.find
        topic = find(tenant, name)
        if topic is None:
            raise NotFound(
                f"Tenant {tenant} has no topic of this name in use; /admin/top and /metrics list"
                " topics."
            )
        return topic


class DisconnectEndpoint:
    """Ends the connection of a subscriber: ``id`` as /admin/top and GET show it."""

    serves_while_draining = False

    def __init__(self, operator: Operator, connections: Connections) -> None:
        self._operator = operator
        self._connections = connections

    def admit(self, head: Request) -> Admitted:
        """Refuse who may not operate the daemon, and an id that is none."""
        admitted = self._operator.admit(head, _SUBSCRIBER)
        if "id" not in admitted.options:
            raise InvalidRequest("The option id is missing; GET /admin/subscribers shows the ids.")
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Say goodbye to the connection; its client may come back after a pause."""
        number = _SUBSCRIBER.number(admitted.options, "id", 0)
        connection = self._connections.numbered(number)
        if connection is None or connection.is_closing:
            raise NotFound("No open connection has this id; GET /admin/subscribers shows them.")
        address = self._connections.address_of(connection)
        tenant = connection.tenant.name
        connection.close(DISCONNECTED, DISCONNECTED_REASON)
        what = f"disconnected the subscriber {number} at {address or 'a Unix socket'}"
        self._operator.note_change(admitted, "disconnected", what, tenant)
        return json_answer(Disconnected(str(number), tenant, address))


class MessagesEndpoint:
    """The newest messages of a topic, as they were sent; nothing counts as delivered."""

    serves_while_draining = True

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def admit(self, head: Request) -> Admitted:
        """Refuse who may not operate the daemon."""
        return self._operator.admit(head, _TAIL)

    def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Return what the ring has; raises NotFound."""
        topic = self._operator.topic(admitted)
        last = _TAIL.number(admitted.options, "last", DEFAULT_TAIL)
        view = tail_of(topic, last)
        what = "read the newest messages of a topic"
        self._operator.note_look(admitted, "tail_read", what, topic)
        return json_view(view)


class ClearEndpoint:
    """Takes a topic's messages: its readers stay, or by patterns go too where it is dropped."""

    serves_while_draining = False

    def __init__(self, operator: Operator, *, drops: bool = False) -> None:
        """Args: drops: the topic's name goes as well, once it is unused."""
        self._operator = operator
        self._drops = drops

    def admit(self, head: Request) -> Admitted:
        """Refuse who may not operate the daemon."""
        return self._operator.admit(head, _TOPIC)

    async def answer(self, admitted: Admitted, body: bytes) -> Response:
        """Clear or drop it, and answer when all nodes that read the same log will have it cleared.

        Raises:
            NotFound: there is no such topic.
            Conflict: a topic in a journal can't be dropped.
            JournalUnavailable: the journal does not answer; the topic may be cleared.
            Unavailable: the journal has as many cleared topics as it may have.
        """
        topic = self._operator.topic(admitted, in_use=False)
        clearing = self._operator.hub.clearing
        answer = clearing.drop(topic) if self._drops else clearing.clear(topic)
        code = "dropped" if self._drops else "cleared"
        if isinstance(answer, Cleared):
            of = "with" if self._drops else "of"
            what = f"{code} a topic {of} {answer.messages} messages"
        else:
            # The line is logged before the topic is cleared: the client may not wait for the
            # answer.
            what = f"had a topic of the journal cleared on every node, at offset {topic.head}"
        self._operator.note_change(admitted, code, what, topic.tenant, topic.name)
        return json_answer(answer if isinstance(answer, Cleared) else await answer)


def tail_of(topic: Topic, last: int) -> TailView:
    """Return the ``last`` messages that the ring of ``topic`` has, fewer where they are large."""
    head = topic.head
    messages: list[msgspec.Raw] = []
    left_bytes = MAX_TAIL_BYTES
    for offset in range(head, max(topic.first - 1, head - last), -1):
        (frame,) = topic.frames(offset - 1, offset)
        payload = plain_payload_of(frame)
        left_bytes -= len(payload)
        if messages and left_bytes < 0:
            break
        messages.append(msgspec.Raw(payload))
    messages.reverse()
    return TailView(topic.name, topic.tenant, topic.epoch, head, messages)
