"""Connections with many subscriptions: one that only receives, and one that takes commands.

What the commands mean is decided by handlers/commands/commands.py, which gives this its Publisher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from clevrd.connections.publisher import PublishConnection, Publisher
from clevrd.connections.subscriber import ReceivingConnection
from clevrd.connections.subscriptions import SubscribeOptions, Subscriptions, refusal_reason
from clevrd.connections.websocket import WebSockets
from clevrd.core.client_frames import PING, PONG, TEXT
from clevrd.core.notices import ErrorNotice, Forgotten, GoingAway, Watching, notice_frame
from clevrd.errors import ClevrdError
from clevrd.hub import Hub
from clevrd.tenants import Tenant


class MultiConnection(ReceivingConnection):
    """A subscriber's WebSocket with several topics or patterns, chosen in the handshake."""

    __slots__ = ("_count_refusal", "_has_control", "subscriptions")

    def __init__(
        self,
        sockets: WebSockets,
        transport: asyncio.Transport,
        hub: Hub,
        tenant: Tenant,
        limit: int,
        *,
        has_control: bool,
    ) -> None:
        super().__init__(sockets, transport)
        self.subscriptions = Subscriptions(hub, tenant, self, limit)
        self._count_refusal = hub.counters.count_refusal
        self._has_control = has_control

    def begin(self, wanted: SubscribeOptions, early_data: bytes) -> None:
        """Take over the transport and subscribe to what is wanted, which was checked."""
        self._sockets.add(self)
        self.subscriptions.begin(wanted)
        if early_data:
            self.data_received(early_data)

    def refused(self, error: ClevrdError) -> None:
        """Tell who can be told in-band; others are closed, since a missing topic is a loss."""
        self._count_refusal(error.code)
        if self._has_control:
            self.write(_notice(error))
        else:
            self.close(error.close_code, refusal_reason(error))

    def found_all(self, watching: Watching) -> None:
        """Tell who asked for control frames that every topic which was there is joined."""
        if self._has_control:
            self.write(notice_frame(watching))

    def forgotten(self, topic: Forgotten) -> None:
        """Tell who asked for control frames that a topic is gone."""
        if self._has_control:
            self.write(notice_frame(topic))

    def stall_allowed_s(self) -> float:
        """Return how long its circuits allow it to take nothing; 0 where there are none."""
        return self.subscriptions.stall_allowed_s()

    def leave(self) -> None:
        """Stop delivering. Idempotent."""
        self.subscriptions.leave()

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Give who asked for control frames its positions, before a planned close."""
        if self._has_control and not self.is_closing:
            going = GoingAway(reconnect_after_ms, self.subscriptions.positions())
            self.write(notice_frame(going))

    def pause_writing(self) -> None:
        """The transport's buffer is over its high-water mark."""
        self._sockets.stalled(self)
        self.subscriptions.pause()

    def resume_writing(self) -> None:
        """The transport's buffer is below its low-water mark."""
        self._sockets.moved(self)
        self.subscriptions.resume()


class CommandConnection(PublishConnection):
    """A WebSocket that subscribes, unsubscribes and publishes by commands."""

    __slots__ = ("_count_refusal", "subscriptions")

    def __init__(
        self,
        sockets: WebSockets,
        transport: asyncio.Transport,
        hub: Hub,
        tenant: Tenant,
        limit: int,
        max_message_bytes: int,
        make_commands: Callable[[CommandConnection], Publisher],
    ) -> None:
        self.subscriptions = Subscriptions(hub, tenant, self, limit)
        super().__init__(sockets, transport, make_commands(self), max_message_bytes)
        self._count_refusal = hub.counters.count_refusal

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

    def refused(self, error: ClevrdError) -> None:
        """Tell of a topic that a pattern matches and that can't be joined."""
        self._count_refusal(error.code)
        self.write(_notice(error))

    def found_all(self, watching: Watching) -> None:
        """Answer the command that asked for it."""
        self.write(notice_frame(watching))

    def forgotten(self, topic: Forgotten) -> None:
        """Tell that a topic is gone."""
        self.write(notice_frame(topic))

    def stall_allowed_s(self) -> float:
        """Return how long its circuits allow it to take nothing; 0 where there are none."""
        return self.subscriptions.stall_allowed_s()

    def leave(self) -> None:
        """Stop delivering. Idempotent."""
        self.subscriptions.leave()

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Give its positions before a planned close."""
        if not self.is_closing:
            going = notice_frame(GoingAway(reconnect_after_ms, self.subscriptions.positions()))
            if self._due is None:
                self.write(going)
            else:
                self._due.add(going)

    def pause_writing(self) -> None:
        """Take no more commands, which might want answers; its pongs are read all the same."""
        self._sockets.stalled(self)
        self._is_write_paused = True
        self.subscriptions.pause()

    def resume_writing(self) -> None:
        """It reads again: first what it has subscribed to, then its commands."""
        self._is_write_paused = False
        self._sockets.moved(self)
        self.subscriptions.resume()
        # Which may have filled the transport anew.
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


def _notice(error: ClevrdError) -> bytes:
    return notice_frame(ErrorNotice(error.code, str(error), error.retryable))
