"""GET /ws: one WebSocket for any number of subscriptions and publishes, by commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from clevrd.admission import Admitted, Gate
from clevrd.config import Config
from clevrd.connections.command_websocket import CommandWebSocket
from clevrd.connections.registry import Connections
from clevrd.core.near_names import TENANT_OPTION
from clevrd.errors import InvalidRequest
from clevrd.handlers.commands.commands import Commands
from clevrd.handlers.handshake import (
    NOTICES_PROTOCOL,
    check_handshake,
    handshake_head,
    offers_notices,
)
from clevrd.http_values import Request, WebSocketUpgrade
from clevrd.hub import Hub


class CommandEndpoint:
    """Answers the handshake of a socket for commands."""

    serves_while_draining = False

    def __init__(
        self,
        gate: Gate,
        hub: Hub,
        connections: Connections,
        config: Config,
        make_commands: Callable[..., Commands] = Commands,
    ) -> None:
        """Args: make_commands: makes what carries out a socket's commands, from the same."""
        self._gate = gate
        self._make_commands = make_commands
        self._hub = hub
        self._connections = connections
        self._config = config

    def admit(self, head: Request) -> Admitted:
        """Refuse what names no tenant."""
        return self._gate.admit_tenant(head)

    def answer(self, admitted: Admitted, body: bytes) -> WebSocketUpgrade:
        """Return the upgrade after which commands are carried out.

        Raises:
            InvalidRequest: the client does not offer the protocol that the commands are of.
        """
        request, query, tenant = admitted.head, admitted.options, admitted.tenant
        key = check_handshake(request)
        if not offers_notices(request):
            raise InvalidRequest(
                f"GET {request.path} takes commands of {NOTICES_PROTOCOL}; offer it in"
                " Sec-WebSocket-Protocol."
            )
        self._connections.check_arrival(tenant)
        config = self._config

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            connection = CommandWebSocket(
                self._connections,
                transport,
                self._hub,
                tenant,
                config.max_topics_per_connection,
                config.max_message_bytes,
                partial(
                    self._make_commands,
                    self._gate,
                    self._hub,
                    tenant,
                    default_last=config.catch_up_messages,
                    max_topics=config.max_topics_per_connection,
                    may_match_all=config.match_all_patterns,
                ),
                request,
            )
            connection.begin(early_data)
            self._connections.note_page(connection, request)

        head = handshake_head(key, NOTICES_PROTOCOL, TENANT_OPTION.warnings(query))
        return WebSocketUpgrade(head, attach)
