"""Command sockets: one WebSocket with many subscriptions, and publishes, all by commands.

Their meaning is decided by handlers/commands/commands.py, which gives this its Publisher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from clevrd.connections.many_subscriptions import ManySubscriptions, MemberSubscription
from clevrd.connections.publish_websocket import PublishConnection, Publisher
from clevrd.connections.registry import Connections
from clevrd.connections.websocket import DeliveringWebSocket
from clevrd.core.client_frames import PING, PONG, TEXT
from clevrd.core.notices import GoingAway, notice_frame
from clevrd.http_values import Request
from clevrd.hub import Hub
from clevrd.tenants import Tenant


class CommandWebSocket(DeliveringWebSocket, PublishConnection):
    """A WebSocket that subscribes, unsubscribes and publishes by commands."""

    __slots__ = ("subscription",)

    subscription: ManySubscriptions[MemberSubscription]

    def __init__(
        self,
        connections: Connections,
        transport: asyncio.Transport,
        hub: Hub,
        tenant: Tenant,
        limit: int,
        max_message_bytes: int,
        make_commands: Callable[[CommandWebSocket], Publisher],
        head: Request,
    ) -> None:
        """Args: head: of the request that opened it."""
        self.subscription = ManySubscriptions(hub, tenant, self, limit, has_notices=True)
        super().__init__(
            connections, transport, tenant, make_commands(self), max_message_bytes, head
        )

    def flush_answers(self) -> bool:
        """Write the answers so far, before something else is written.

        Returns whether that may be written now. If not, answers are due before it, and are sealed:
        the publisher is given the command again when they have left.
        """
        self._write_answers()
        if self._due is None:
            return True
        self._due.seal()
        return False

    def renew(self, tenant: Tenant) -> None:
        """Go on as ``tenant``, by another credential of it; or close, to come back at once."""
        self._connections.renew(self, tenant)

    def may_leave(self) -> bool:
        """Whether its client has everything that was offered, and does more than publish."""
        return len(self.subscription) > 0 and not self.subscription.is_lagging

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Give the client its positions before a planned close, behind the answers that are due."""
        if not self.is_closing:
            going = notice_frame(GoingAway(reconnect_after_ms, self.subscription.positions()))
            if self._due is None:
                self.write(going)
            else:
                self._due.add(going)

    def pause_writing(self) -> None:
        """Take no more commands, which might want answers; its pongs are read all the same."""
        self._is_write_paused = True
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client reads again: its subscriptions go on first, then its commands."""
        self._is_write_paused = False
        super().resume_writing()
        # The subscriptions may have filled the transport anew.
        if not self._is_write_paused:
            self._go_on()

    def _receive(self, messages: list[tuple[int, bytes]]) -> None:
        if not self._is_write_paused or self._is_held:
            super()._receive(messages)
            return
        for opcode, payload in messages:
            if opcode == TEXT or (self._due is not None and opcode not in (PING, PONG)):
                self._waiting.append((opcode, payload))
                self.transport.pause_reading()
            else:
                self._receive_other(opcode, payload)
