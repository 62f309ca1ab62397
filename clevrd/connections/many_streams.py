"""Responses with several topics or patterns: SSE and NDJSON streams on many subscriptions.

Lines are the same for all who read them. The id of an event says where its reader is in all its
topics, so it is the reader's own: the shared text has a hole for it, filled at each write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from clevrd.connections.http_stream import Stream
from clevrd.connections.subscriptions import SubscribeOptions, Subscriptions, ids_of, refusal_reason
from clevrd.connections.websocket import WebSockets
from clevrd.core.event_ids import EventIds, IdPlace
from clevrd.core.notices import (
    ErrorNotice,
    Forgotten,
    Notice,
    Position,
    Watching,
    unknown_gap,
)
from clevrd.core.stream_forms import (
    PLACED_EVENTS,
    PlacedWrites,
    ServerSentEvents,
    StreamForm,
    control_event,
)
from clevrd.core.subscriber import Sink
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.hub import Hub
from clevrd.tenants import Tenant


class ManyStream(Stream):
    """A response with several topics or patterns."""

    __slots__ = ("_count_refusal", "_ids", "_unfound", "_wanted", "subscriptions")

    def __init__(
        self,
        sockets: WebSockets,
        transport: asyncio.Transport,
        hub: Hub,
        tenant: Tenant,
        limit: int,
        form: StreamForm,
        wanted: SubscribeOptions,
        writes: PlacedWrites,
    ) -> None:
        super().__init__(sockets, transport, form)
        self._count_refusal = hub.counters.count_refusal
        self._wanted = wanted
        # None where messages are the same for all readers.
        self._ids = ids_of(wanted) if isinstance(form, ServerSentEvents) else None
        self.subscriptions = Subscriptions(
            hub,
            tenant,
            self,
            limit,
            form=PLACED_EVENTS if self._ids else form,
            places=EventPlaces(self, form, self._ids, writes, self._tell) if self._ids else None,
        )
        # Patterns that have not found all topics there were.
        self._unfound = set(wanted.patterns)

    def begin(self, early_data: bytes) -> None:
        """Take over the transport and subscribe to what is wanted, which was checked."""
        self.take_over()
        self.subscriptions.begin(self._wanted)
        if early_data:
            self.data_received(early_data)

    def refused(self, error: ClevrdError) -> None:
        """Tell who can be told in-band; others are closed, since a missing topic is a loss."""
        self._count_refusal(error.code)
        if self._wanted.manner.has_control:
            self._tell(ErrorNotice(error.code, str(error), error.retryable))
        else:
            last_word = ErrorNotice(refusal_reason(error), str(error), error.retryable)
            self.end_with(error.close_code, last_word)

    def found_all(self, watching: Watching) -> None:
        """Tell that every topic which was there is joined: an id from here on knows them all."""
        self._unfound.discard(watching.pattern)
        if self._ids is not None and not self._unfound:
            self._ids.watch()
        self._tell(watching)

    def forgotten(self, topic: Forgotten) -> None:
        """Tell that a topic is gone, which is in no id from here on."""
        self._tell(topic)

    def _tell(self, control: Notice) -> None:
        """Tell who takes control frames what is of no one topic's messages."""
        if self._ids is not None:
            self.write(self._form.framed(control_event(control, self._ids.whole())))
        elif self._wanted.manner.has_control:
            self.write(self._spelled(control))

    def stall_allowed_s(self) -> float:
        """Return how long its circuits allow it to take nothing; 0 where there are none."""
        return self.subscriptions.stall_allowed_s()

    def leave(self) -> None:
        """Stop delivering. Idempotent."""
        self.subscriptions.leave()

    def positions(self) -> dict[str, Position]:
        """Return by topic where a client with control frames is."""
        return self.subscriptions.positions() if self._wanted.manner.has_control else {}

    @property
    def is_stalled(self) -> bool:
        """Whether the transport has enough to send."""
        return self.subscriptions.is_paused

    def pause_writing(self) -> None:
        """The transport's buffer is over its high-water mark."""
        self._sockets.stalled(self)
        self.subscriptions.pause()

    def resume_writing(self) -> None:
        """The transport's buffer is below its low-water mark."""
        self._sockets.moved(self)
        self.subscriptions.resume()


class EventPlaces:
    """Gives each topic of a stream of events a sink that finishes the ids."""

    __slots__ = ("_form", "_ids", "_stream", "_tell", "_writes")

    def __init__(
        self,
        stream: Sink,
        form: StreamForm,
        ids: EventIds,
        writes: PlacedWrites,
        tell: Callable[[Notice], None],
    ) -> None:
        self._stream = stream
        # Tells what is of no one topic's messages.
        self._tell = tell
        self._form = form
        self._ids = ids
        self._writes = writes

    def sink_of(self, topic: Topic) -> Sink:
        """Return where the events of ``topic`` are written.

        Raises:
            InvalidRequest: the position in one more topic would make ids too long.
        """
        place = self._ids.add(topic.name, topic.epoch)
        for name in self._ids.given_way():
            self._tell(unknown_gap(name))
        return EventPlace(self._stream, self._form, place, self._writes)

    def forget(self, name: str) -> None:
        """Leave a topic, of which nothing waits, out of the ids."""
        self._ids.forget(name)


class EventPlace:
    """The Sink of one topic's Subscriber: says in each id where the reader is in other topics."""

    __slots__ = ("_form", "_place", "_stream", "_writes")

    def __init__(
        self, stream: Sink, form: StreamForm, place: IdPlace, writes: PlacedWrites
    ) -> None:
        self._stream = stream
        self._form = form
        self._place = place
        self._writes = writes

    @property
    def write(self) -> Callable[[bytes], None]:
        """Return what takes events with holes in their ids."""
        return self._write

    def close(self, code: int, reason: str) -> None:
        """Say goodbye: what ends one topic's subscription ends the connection."""
        self._stream.close(code, reason)

    def unsent_bytes(self) -> int:
        """Return how much of what was written the peer has not taken yet."""
        return self._stream.unsent_bytes()

    def _write(self, events: bytes) -> None:
        # As few calls as can be: a microsecond more is a sixth of what a write costs.
        writes, form = self._writes, self._form
        if events is not writes.events:
            writes.begin(events)
        rest = self._place.move(writes.position) if writes.position else b""
        is_finished = writes.finished and rest == writes.rest and form is writes.form
        self._stream.write(writes.finished if is_finished else writes.finish(rest, form))
