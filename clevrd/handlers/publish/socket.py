"""GET /publish as a WebSocket: each text frame is a publish.

The answers to frames are made in `outcomes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from clevrd.admission import Admitted, Gate
from clevrd.config import Config
from clevrd.connections.publish_websocket import PublishConnection
from clevrd.connections.registry import Connections
from clevrd.core.near_names import TENANT_OPTION
from clevrd.core.publish_request import (
    SocketPublish,
    decode_plain_socket,
    decode_socket_publish,
)
from clevrd.errors import Unavailable
from clevrd.handlers.handshake import check_handshake, handshake_head
from clevrd.handlers.publish.outcomes import SocketOutcomes
from clevrd.handlers.publish.run import RunPublisher
from clevrd.http_values import Request, WebSocketUpgrade
from clevrd.hub import Hub
from clevrd.tenants import Tenant


class PublishSocketEndpoint:
    """Answers the handshake of a publish socket."""

    serves_while_draining = False

    def __init__(
        self,
        gate: Gate,
        hub: Hub,
        connections: Connections,
        config: Config,
        make_publisher: Callable[[Hub, Tenant], FramePublisher] | None = None,
    ) -> None:
        """Args: make_publisher: makes what publishes a socket's frames; None: FramePublisher."""
        self._gate = gate
        self._make_publisher = make_publisher or FramePublisher
        self._hub = hub
        self._connections = connections
        self._max_message_bytes = config.max_message_bytes

    def admit(self, head: Request) -> Admitted:
        """Refuse what names no tenant."""
        return self._gate.admit_tenant(head)

    def answer(self, admitted: Admitted, body: bytes) -> WebSocketUpgrade:
        """Return the upgrade after which frames are published."""
        query, tenant = admitted.options, admitted.tenant
        key = check_handshake(admitted.head)
        self._connections.check_arrival(tenant)

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            connection = PublishConnection(
                self._connections,
                transport,
                tenant,
                self._make_publisher(self._hub, tenant),
                self._max_message_bytes,
                admitted.head,
            )
            connection.begin(early_data)
            self._connections.note_page(connection, admitted.head)

        return WebSocketUpgrade(handshake_head(key, warnings=TENANT_OPTION.warnings(query)), attach)


class FramePublisher(SocketOutcomes):
    """Publishes one socket's frames as one tenant, and collects the answers to them."""

    __slots__ = ("_runs", "take_tenant", "wait_for")

    def __init__(
        self,
        hub: Hub,
        tenant: Tenant,
        decode: Callable[[bytes], SocketPublish] = decode_socket_publish,
    ) -> None:
        super().__init__(hub)
        several = decode_plain_socket if decode is decode_socket_publish else None
        self._runs = RunPublisher(hub, tenant, decode, self, several)
        self.wait_for = self._runs.wait_for
        self.take_tenant = self._runs.take_tenant

    def take(self, payloads: Sequence[bytes]) -> tuple[int, bool]:
        """Publish ``payloads`` as `RunPublisher.take` does.

        While the daemon drains all are refused; a publisher that never pauses must not delay it.
        """
        try:
            self._hub.refuse_if_draining()
        except Unavailable as error:
            for payload in payloads:
                self.refused(error, payload)
            return len(payloads), False
        return self._runs.take(payloads)
