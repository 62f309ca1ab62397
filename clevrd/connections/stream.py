"""Streams as a transport: responses that do not end, SSE and NDJSON.

The texts are core/stream_forms.py's, and the sweep is that of all connections. Nothing is read
here: what a client sends behind its request means nothing.

Lines are the same for all who read them. The id of an event of many topics says where its reader is
in all of them, so it is the reader's own: the shared text has a blank for it, which each write
fills in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import ClassVar, Final

import msgspec

from clevrd.connections.expiry import EXPIRED
from clevrd.connections.many_subscriptions import (
    MemberSubscription,
    PatternSubscription,
    refusal_reason,
)
from clevrd.connections.one_subscription import OneSubscription, Subscription
from clevrd.connections.registry import CHANGED, DISCONNECTED, RESTARTING, REVOKED, Connections
from clevrd.core.client_frames import POLICY_VIOLATION
from clevrd.core.event_ids import EventIdSlot
from clevrd.core.notices import ErrorNotice, GoingAway, Notice
from clevrd.core.stream_forms import (
    SLOTTED_EVENTS,
    SlottedWrites,
    StreamForm,
    notice_event,
    with_headers,
)
from clevrd.core.subscriber import Sink
from clevrd.core.subscription import DeliveryOptions, SubscribeRequest
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, OriginNotAllowed
from clevrd.hub import CLOSE_SLOW_CONSUMER, Hub
from clevrd.progress import unsent_bytes_of
from clevrd.tenants import Tenant

# A client may send so much behind its request, in all; requests that it pipelined are not answered.
MAX_IGNORED_BYTES: Final = 65_536

# Close code -> what a client is told that has no close code.
_SENTENCES: Final = {
    RESTARTING: "The daemon is shutting down; come back in a moment.",
    REVOKED: "Your credential is valid no more; ask the operator for another.",
    EXPIRED: "Your credential has expired; come back with a fresh one.",
    OriginNotAllowed.close_code: "Web pages of this origin may not ask here any more.",
    DISCONNECTED: "An operator has ended this connection; come back with a backoff.",
    CHANGED: "What you may subscribe to has changed; come back, and you are told.",
    CLOSE_SLOW_CONSUMER: "You read too slowly, and too much was lost; come back with a backoff.",
    POLICY_VIOLATION: "A subscriber only receives; send nothing behind the request.",
    1013: "The topic's history can't be read at the moment; come back with a backoff.",
    1011: "Writing to this connection failed; come back with a backoff.",
}

# Close codes after which the same request fails again.
_FINAL: Final = (POLICY_VIOLATION, REVOKED, OriginNotAllowed.close_code)


def stream_head(form: StreamForm, fields: tuple[tuple[str, str], ...] = ()) -> bytes:
    """Return the head of a response in ``form``; the connection is of no use after it."""
    own = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return (
        "HTTP/1.1 200 OK\r\n"
        f"Content-Type: {form.content_type}\r\n"
        "Cache-Control: no-cache, no-transform\r\n"
        # nginx buffers responses unless it is asked not to.
        f"X-Accel-Buffering: no\r\n{own}"
        "Server: clevrd\r\n"
        f"Date: {formatdate(usegmt=True)}\r\n"
        + ("Transfer-Encoding: chunked\r\n" if form.is_chunked else "")
        + "Connection: close\r\n\r\n"
    ).encode()


class SubscriberStream(asyncio.Protocol):
    """A subscriber's response; also the Sink of its Subscription."""

    __slots__ = (
        "_connections",
        "_form",
        "_has_said_why",
        "_held_bytes",
        "_ignored_bytes",
        "awaits_pong",
        "is_closing",
        "subscription",
        "tenant",
        "transport",
        "wheel_slot",
        "write",
    )

    def __init__(
        self,
        connections: Connections,
        transport: asyncio.Transport,
        tenant: Tenant,
        form: StreamForm,
    ) -> None:
        self._connections = connections
        self.transport = transport
        # The tenant of its client; changed by take_tenant.
        self.tenant = tenant
        # The transport's own method, with nothing in between.
        self.write: Callable[[bytes], None] = transport.write
        self._form = form
        self._ignored_bytes = 0
        # The registry asks every connection that it sweeps for this. No client answers a
        # keep-alive: its kernel acknowledges it.
        self.awaits_pong = False
        self.wheel_slot = 0
        self._held_bytes = 0
        # The last word was written, or the client has gone.
        self.is_closing = False
        # The client was told to come back, and when.
        self._has_said_why = False

    answers_pings: ClassVar[bool] = False
    # Nothing that a client sends is waited for.
    is_sending: ClassVar[bool] = False

    def subscribe(
        self, subscription: Subscription, request: SubscribeRequest, early_data: bytes
    ) -> None:
        """Take over the transport, and subscribe to what is asked for, which was checked.

        Args:
            subscription: what writes to this connection from now on.
            early_data: what was received behind the request.
        """
        self.subscription = subscription
        self._connections.add(self)
        subscription.subscribe(request)
        if early_data:
            self.data_received(early_data)

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Ignore what the client sends, within bounds."""
        self._connections.budget.received_bytes += len(data)
        self._ignored_bytes += len(data)
        if self._ignored_bytes > MAX_IGNORED_BYTES:
            self.close(POLICY_VIOLATION, "subscribers_only_receive")

    def eof_received(self) -> bool | None:
        """Let the transport close: a client that leaves looks no different."""
        if not self.is_closing:
            self._begin_to_end()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone, whoever closed it: nothing is written or begun any more."""
        self.is_closing = True
        self.stop_delivery()
        self._connections.remove(self)

    def pause_writing(self) -> None:
        """The transport's buffer is over its high-water mark."""
        self._connections.stalled(self)
        self.subscription.pause_delivery()

    def resume_writing(self) -> None:
        """The transport's buffer is below its low-water mark."""
        self._connections.moved(self)
        self.subscription.resume_delivery()

    # --- what the registry and the hub ask for ---------------------------------------------------

    def stop_delivery(self) -> None:
        """End the subscription. Idempotent."""
        self.subscription.unsubscribe()

    @property
    def kind(self) -> str:
        """Return what its client reads."""
        return "sse" if self._form.content_type.startswith("text/event-stream") else "ndjson"

    def readers(self) -> Sequence[OneSubscription]:
        """Return the reader of each topic that it is subscribed to."""
        return self.subscription.readers()

    def take_tenant(self, tenant: Tenant) -> bool:
        """Go on as ``tenant``; return whether it may subscribe to all that it does."""
        self.tenant = tenant
        return self.subscription.take_tenant(tenant)

    def stall_allowed_s(self) -> float:
        """Return how long its circuits allow it to take nothing; 0 where there are none."""
        return self.subscription.stall_allowed_s()

    def unsent_bytes(self) -> int:
        """Return how much of what was written the peer has not acknowledged, as far as is known."""
        return unsent_bytes_of(self.transport)

    def ping(self) -> None:
        """Show that the connection is alive; one that is stalled has enough to take."""
        self.awaits_pong = True
        if not self.subscription.is_paused:
            self.write(self._form.framed(self._form.keep_alive))

    def may_leave(self) -> bool:
        """Whether its client has everything that was offered."""
        return not self.subscription.is_lagging

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Give a client with notices its positions, and say when to come back."""
        if self.is_closing or not (positions := self.subscription.positions_to_tell()):
            return
        self._has_said_why = True
        retry = self._form.retry(reconnect_after_ms)
        going = self._spelled(GoingAway(reconnect_after_ms, positions))
        self.write((self._form.framed(retry) if retry else b"") + going)

    def close(self, code: int, reason: str) -> None:
        """Say why, since there is no close code, and end the response so that it is whole."""
        sentence = _SENTENCES.get(code, reason)
        is_retryable = code not in _FINAL
        self.end_with(code, ErrorNotice(reason, sentence, is_retryable))

    def end_with(self, code: int, last_word: ErrorNotice) -> None:
        """End the response with ``last_word``, unless the client knows why it ends.

        Args:
            code: what a WebSocket would be closed with.
        """
        if self.is_closing:
            return
        self._connections.note_close(self, code, last_word.code)
        last = b"" if self._has_said_why else self._spelled(last_word)
        self._begin_to_end()
        if last := last + self._form.end:
            self.write(last)
        self.transport.close()

    def cut(self) -> None:
        """End the connection without a word: the client is not listening."""
        self.transport.abort()

    def end_unfinished(self) -> None:
        """Do nothing: nothing that a client sends is waited for."""

    # --- what many subscriptions ask for ---------------------------------------------------------

    keeps_positions: ClassVar[bool] = False

    def topic_subscription(
        self,
        hub: Hub,
        topic: Topic,
        options: DeliveryOptions,
        pattern: PatternSubscription | None,
        slot: EventIdSlot | None,
    ) -> MemberSubscription:
        """Return a reader of ``topic`` that writes to this connection, its ids by ``slot``."""
        if slot is None:
            return MemberSubscription(hub, topic, self, options, pattern, self._form)
        sink = EventIdSink(self, self._form, slot, self._connections.event_writes)
        form = with_headers(SLOTTED_EVENTS) if options.has_headers else SLOTTED_EVENTS
        return MemberSubscription(hub, topic, sink, options, pattern, form)

    def tell(self, notice: Notice, event_id: bytes) -> None:
        """Write ``notice``, in an event with this id where there is one."""
        if event_id:
            self.write(self._form.framed(notice_event(notice, event_id)))
        else:
            self.write(self._spelled(notice))

    def refuse(self, error: ClevrdError) -> None:
        """End: the client can't be told in any other way, and a missing topic is a loss."""
        notice = self._connections.refusals.notice(error)
        last_word = msgspec.structs.replace(notice, code=refusal_reason(error))
        self.end_with(error.close_code, last_word)

    def found_all(self) -> None:
        """Do nothing: what was found is delivered already."""

    def _spelled(self, notice: Notice) -> bytes:
        """Return what tells ``notice``, which has no place among the messages."""
        return self._form.framed(self._form.notice(notice, b"", None))

    def _begin_to_end(self) -> None:
        self.is_closing = True
        self.stop_delivery()
        self._connections.await_close(self)


class EventIdSink:
    """The Sink of one topic's reader: says in each id where the client is in the other topics."""

    __slots__ = ("_form", "_slot", "_stream", "_writes")

    def __init__(
        self, stream: Sink, form: StreamForm, slot: EventIdSlot, writes: SlottedWrites
    ) -> None:
        self._stream = stream
        self._form = form
        self._slot = slot
        self._writes = writes

    @property
    def write(self) -> Callable[[bytes], None]:
        """Return the function that takes events with blanks in their ids."""
        return self._write

    def close(self, code: int, reason: str) -> None:
        """Say goodbye: what ends one topic's subscription ends the connection."""
        self._stream.close(code, reason)

    def unsent_bytes(self) -> int:
        """Return how much of what was written the peer has not taken yet."""
        return self._stream.unsent_bytes()

    def _write(self, events: bytes) -> None:
        # There are as few calls as can be: a microsecond more is a sixth of what a write costs.
        writes, form = self._writes, self._form
        if events is not writes.events:
            writes.begin(events)
        rest = self._slot.move(writes.position) if writes.position else b""
        is_finished = writes.finished and rest == writes.rest and form is writes.form
        self._stream.write(writes.finished if is_finished else writes.finish(rest, form))
