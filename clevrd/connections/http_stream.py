"""Responses that do not end, SSE and NDJSON: what all have in common, and those of one topic.

What the texts look like is core/stream_forms.py's, and the sweep is that of all connections.
Nothing is read here: what a client sends behind its request means nothing. Several topics on one
response are connections/many_streams.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from email.utils import formatdate
from typing import ClassVar, Final

import msgspec

from clevrd.connections.subscriptions import Manner
from clevrd.connections.websocket import RESTARTING, WebSockets
from clevrd.core.beginning import Beginning
from clevrd.core.client_frames import POLICY_VIOLATION
from clevrd.core.gap_log import GapLog
from clevrd.core.notices import ErrorNotice, GoingAway, Notice, Position, Warnings
from clevrd.core.stream_forms import StreamForm
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub import CLOSE_SLOW_CONSUMER, Hub
from clevrd.progress import unsent_bytes_of

# What a client may send behind its request, in all: requests that it pipelined won't be answered.
MAX_IGNORED_BYTES: Final = 65_536

# Close code -> what a client is told that has no close code.
_SENTENCES: Final = {
    RESTARTING: "The daemon is shutting down; come back in a moment.",
    CLOSE_SLOW_CONSUMER: "You read too slowly, and too much was lost; come back with a backoff.",
    POLICY_VIOLATION: "A subscriber only receives; send nothing behind the request.",
    1011: "Writing to this connection failed; come back with a backoff.",
}


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


class Stream(asyncio.Protocol):
    """A subscriber's response; subclasses say what it subscribes to."""

    __slots__ = (
        "_form",
        "_has_said_why",
        "_held_bytes",
        "_ignored_bytes",
        "_sockets",
        "awaits_pong",
        "is_closing",
        "transport",
        "wheel_slot",
        "write",
    )

    def __init__(self, sockets: WebSockets, transport: asyncio.Transport, form: StreamForm) -> None:
        self._sockets = sockets
        self.transport = transport
        # The transport's own, nothing in between.
        self.write: Callable[[bytes], None] = transport.write
        self._form = form
        self._ignored_bytes = 0
        # The registry's own, as of every connection it sweeps. Nobody answers a keep-alive: the
        # peer's kernel acknowledges it.
        self.awaits_pong = False
        self.wheel_slot = 0
        self._held_bytes = 0
        # The last word was written, or the client has gone.
        self.is_closing = False
        # It was told that, and when, to come back.
        self._has_said_why = False

    answers_pings: ClassVar[bool] = False
    # Nothing that a client sends is waited for.
    is_sending: ClassVar[bool] = False

    def take_over(self) -> None:
        """Have the transport call this, and the sweep know of it."""
        self._sockets.add(self)

    # --- what subclasses say ---------------------------------------------------------------------

    def leave(self) -> None:
        """Stop delivering. Idempotent."""
        raise NotImplementedError

    def stall_allowed_s(self) -> float:
        """Return how long the peer was promised that it may take nothing; 0 for no promise."""
        raise NotImplementedError

    def positions(self) -> dict[str, Position]:
        """Return by topic where the client is, as far as it is told such things."""
        raise NotImplementedError

    @property
    def is_stalled(self) -> bool:
        """Whether the transport has enough to send."""
        raise NotImplementedError

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Ignore what the client sends, within bounds."""
        self._sockets.budget.received_bytes += len(data)
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
        self.leave()
        self._sockets.remove(self)

    # --- what the sweep and the hub ask for ------------------------------------------------------

    def unsent_bytes(self) -> int:
        """Return how much of what was written the peer has not acknowledged, as far as is known."""
        return unsent_bytes_of(self.transport)

    def ping(self) -> None:
        """Show that the connection is alive; one that is stalled has enough to take."""
        self.awaits_pong = True
        if not self.is_stalled:
            self.write(self._form.framed(self._form.keep_alive))

    def announce_end(self, reconnect_after_ms: int) -> None:
        """Give who is told such things its position, and when to come back."""
        if self.is_closing or not (positions := self.positions()):
            return
        self._has_said_why = True
        retry = self._form.retry(reconnect_after_ms)
        going = self._spelled(GoingAway(reconnect_after_ms, positions))
        self.write((self._form.framed(retry) if retry else b"") + going)

    def close(self, code: int, reason: str) -> None:
        """Say why, since there is no close code, and end the response so that it is whole."""
        sentence = _SENTENCES.get(code, reason)
        self.end_with(code, ErrorNotice(reason, sentence, code != POLICY_VIOLATION))

    def end_with(self, code: int, last_word: ErrorNotice) -> None:
        """End the response with ``last_word``, unless the client knows why it ends.

        Args:
            code: what a WebSocket would be closed with.
        """
        if self.is_closing:
            return
        self._sockets.counters.count_close(code)
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

    def _spelled(self, control: Notice) -> bytes:
        """Return what tells ``control``, which has no place among the messages."""
        return self._form.framed(self._form.control(control, b"", None))

    def _begin_to_end(self) -> None:
        self.is_closing = True
        self.leave()
        self._sockets.await_close(self)


class TopicStream(Stream):
    """A response with one topic; also the Sink that its Subscriber writes to."""

    __slots__ = ("_hub", "reader", "topic")

    def __init__(
        self,
        sockets: WebSockets,
        transport: asyncio.Transport,
        hub: Hub,
        topic: Topic,
        manner: Manner,
        form: StreamForm,
    ) -> None:
        super().__init__(sockets, transport, form)
        self._hub = hub
        self.topic = topic
        gaps = GapLog(topic.name) if manner.has_control else None
        self.reader = Subscriber(self, manner.strategy, manner.wanted_window, gaps, form=form)

    def begin(
        self, beginning: Beginning, early_data: bytes, warnings: Warnings = msgspec.UNSET
    ) -> None:
        """Take over the transport, deliver what is wished of the past and then what comes.

        Args:
            beginning: where to begin.
            early_data: what was received behind the request.
            warnings: what its client is told with where it begins.
        """
        self.take_over()
        self._hub.subscribe(self.topic, self.reader, beginning, warnings=warnings)
        if early_data:
            self.data_received(early_data)

    def leave(self) -> None:
        """Stop delivering. Idempotent."""
        self._hub.unsubscribe(self.topic, self.reader)

    def stall_allowed_s(self) -> float:
        """Return how long its circuit allows it to take nothing; 0 where there is none."""
        return self._hub.stall_allowed_s(self.reader)

    def positions(self) -> dict[str, Position]:
        """Return where a client with control frames is."""
        reader = self.reader
        if reader.gaps is None or not reader.is_joined:
            return {}
        return {self.topic.name: Position(self.topic.epoch, reader.position())}

    @property
    def is_stalled(self) -> bool:
        """Whether the transport has enough to send."""
        return self.reader.is_blocked

    def pause_writing(self) -> None:
        """The transport's buffer is over its high-water mark."""
        self._sockets.stalled(self)
        self._hub.paused(self.topic, self.reader)

    def resume_writing(self) -> None:
        """The transport's buffer is below its low-water mark."""
        self._sockets.moved(self)
        self._hub.resumed(self.topic, self.reader)
