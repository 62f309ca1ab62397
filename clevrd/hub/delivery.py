"""Delivery: encodes messages, puts them into their topic's ring and hands them to its readers.

This module knows only one thing of publishers: some of them wait for room in a topic.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from clevrd.config import Config
from clevrd.control.adaptive_buffer import AdaptiveBufferManager
from clevrd.core.beginning import Beginning, HistoryBeginning, in_history, resolve
from clevrd.core.circuit import CircuitBudget
from clevrd.core.journal_place import TopicStart
from clevrd.core.message import ExpiringMessage, KeyedMessage, Message, message_of
from clevrd.core.message_headers import Headers, headers_json
from clevrd.core.message_ids import us_of_id
from clevrd.core.notices import Ref, Warnings
from clevrd.core.publish_request import PublishRequest
from clevrd.core.server_frames import FrameEncoder, frame_with_headers
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.errors import JournalUnavailable
from clevrd.hub.circuits import Circuits
from clevrd.hub.history_readers import HistoryReaders, OlderMessages
from clevrd.hub.new_epochs import NewEpochs
from clevrd.hub.pattern_index import PatternIndex
from clevrd.hub.readers import Asked, Readers
from clevrd.hub.rounds import RoomWaiters, Rounds
from clevrd.hub.stamping import Stamp
from clevrd.metrics.counters import Counters
from clevrd.metrics.decisions import Decisions


class Delivery:
    """The topics' rings, readers, rounds, circuits and patterns, put together."""

    def __init__(
        self,
        config: Config,
        topics: TopicManager,
        buffers: AdaptiveBufferManager,
        room_waiters: RoomWaiters,
        counters: Counters,
        decisions: Decisions,
        loop: asyncio.AbstractEventLoop,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        wall_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        make_rounds: Callable[..., Rounds] = Rounds,
    ) -> None:
        """Put the parts together.

        Args:
            clock_ns: times rounds; the loop's own clock stands still within a turn.
            wall_us: the wall clock, microseconds since 1970, by which messages expire.
            make_rounds: makes the rounds, from what `Rounds` takes.
        """
        self._wall_us = wall_us
        self._topics = topics
        self._clock_ns = clock_ns
        self.buffers = buffers
        self._loop = loop
        encoder = FrameEncoder()
        self._encode, self._encode_all = encoder.frame, encoder.frames
        self.patterns = PatternIndex(topics, loop, counters.count_background_error)
        self.readers = Readers(counters, topics.note_left, loop)
        self.circuits = Circuits(
            _circuit_budget(config),
            config.circuit_breaker_threshold,
            self.readers,
            counters,
            decisions,
            loop,
        )
        self.rounds = make_rounds(
            config.ring_messages,
            config.ring_bytes,
            self.readers,
            self.circuits,
            room_waiters,
            counters,
            loop,
            clock_ns,
        )
        self.new_epochs = NewEpochs(self.readers, topics, counters, loop)
        self.makes_room = self.rounds.makes_room
        # None where no topic has a history; set by `keep_history` alone.
        self.history: HistoryReaders | None = None

    def keep_history(self, history: HistoryReaders) -> None:
        """Read from ``history`` what subscribers ask for that lies before the rings."""
        self.history = self.readers.history = self.new_epochs.history = history

    def deliver(
        self, topic: Topic, offset: int, requests: Sequence[PublishRequest], stamps: Sequence[Stamp]
    ) -> None:
        """Append ``topic``'s messages from ``offset`` on, and have them offered to its readers.

        Each message is encoded here, once, since nothing in it changes from here on. The caller has
        asked `makes_room` first, so the ring gives up no message that was not offered yet.

        Args:
            stamps: the id and the time of each of ``requests``, in the same order.
        """
        encode, name, tenant = self._encode, topic.name, topic.tenant
        # Offset, id and time to live of each message that expires.
        expiring: list[tuple[int, str, float]] = []
        if len(requests) == 1 and requests[0].ttl_s is None:
            # Most messages are published alone, and one takes fewer steps without a loop.
            (request,), ((message_id, timestamp),) = requests, stamps
            data, key = request.data, request.key
            message = (
                Message(message_id, name, tenant, data, timestamp, offset)
                if key is None
                else KeyedMessage(message_id, name, tenant, data, timestamp, offset, key)
            )
            frames = [encode(message)]
            if request.headers:
                frames[0] = _with_headers(topic, frames[0], request.headers)
        else:
            messages = [
                Message(stamp[0], name, tenant, request.data, stamp[1], number)
                if request.key is None and request.ttl_s is None
                else message_of(
                    stamp, name, tenant, request.data, number, request.key, request.ttl_s
                )
                for number, (request, stamp) in enumerate(
                    zip(requests, stamps, strict=True), offset
                )
            ]
            frames = self._encode_all(messages)
            expiring = [
                (each.offset, each.id, each.ttl_s)
                for each in messages
                if isinstance(each, ExpiringMessage)
            ]
            for place, request in enumerate(requests):
                if request.headers:
                    frames[place] = _with_headers(topic, frames[place], request.headers)
        now_s = self._loop.time()
        self._topics.extend(topic, offset, frames, now_s)
        if expiring:
            self._note_expiries(topic, expiring, now_s)
        if offset == 1:
            self.patterns.topic_made(topic)
        # The ring's field is read here because a call of the topic's `pending` costs 45 ns.
        if topic.ring.head != topic.edge:
            if not topic.flush_is_scheduled:
                self.rounds.schedule(topic)
            if offset == topic.edge + 1:
                topic.oldest_pending_ns = self._clock_ns()

    def _note_expiries(
        self, topic: Topic, expiring: Sequence[tuple[int, str, float]], now_s: float
    ) -> None:
        """Note when messages expire: so long after they were taken, here or on another node."""
        # On the loop's clock, by which no jump of the wall clock matters later.
        ahead_s = now_s - self._wall_us() / 1e6
        for offset, message_id, ttl_s in expiring:
            topic.note_expiry(offset, us_of_id(message_id) / 1e6 + ttl_s + ahead_s)

    def subscribe(
        self,
        topic: Topic,
        reader: Subscriber,
        beginning: Beginning,
        *,
        pattern: str | msgspec.UnsetType = msgspec.UNSET,
        ref: Ref = msgspec.UNSET,
        warnings: Warnings = msgspec.UNSET,
    ) -> None:
        """Join ``reader`` to ``topic`` and hand it the messages from ``beginning`` on.

        A reader that asked for notices is told first by which ``pattern`` it came, the ``ref`` of
        the command that subscribed it, and the ``warnings`` for its client.
        """
        now_s = self._loop.time()
        topic.set_window(self.buffers.window_of(topic.portion.name), now_s)
        if self.history is not None and (start := in_history(topic, beginning)) is not None:
            self.history.begin(topic, reader, start, Asked(beginning, pattern, ref, warnings))
            return
        resolved = resolve(topic, beginning)
        if resolved.after > topic.edge:
            # The reader has a message of this turn already, for instance from the answer to its own
            # publish, so the edge has to move past that message before the reader joins.
            self.rounds.begin(topic)
        self.readers.join(topic, reader, resolved, pattern, ref, warnings, now_s)

    def serve(self, topic: Topic, after: int, max_messages: int, max_bytes: int) -> list[bytes]:
        """Return the frames behind offset ``after``, for a long-poll, which is no reader."""
        return topic.serve(after, after + max_messages, max_bytes, self._loop.time())

    def begin_anew(self, topic: Topic, start: TopicStart, head: int = 0) -> Topic:
        """Let the name of ``topic``, which is journaled, begin a new epoch; return its new topic.

        Messages go into that from here on. All readers go over to it, in turns, and are told that
        a new epoch has begun. Where it is the same epoch they are told what they don't get.

        Args:
            head: the offset behind which it begins here.
        """
        begun = self._topics.begin_anew(topic, start, self._loop.time(), head)
        self.new_epochs.move_readers(topic, begun)
        return begun

    def in_history(self, topic: Topic, beginning: Beginning) -> HistoryBeginning | None:
        """Return where in the topic's history a poll begins; None where the ring has it all."""
        return None if self.history is None else in_history(topic, beginning)

    async def older(
        self, topic: Topic, start: HistoryBeginning, max_messages: int, max_bytes: int
    ) -> OlderMessages:
        """Return messages of a history, for a long-poll, which is no reader.

        Raises:
            JournalUnavailable: the history can't be read at the moment.
        """
        if self.history is None:
            raise JournalUnavailable("There is no history.")
        return await self.history.older(topic, start, max_messages, max_bytes)

    def is_under_way(self) -> bool:
        """Whether any message is yet to be offered, or any round is still writing."""
        return bool(self.rounds.running or any(topic.pending for topic in self.readers.topics))

    def is_lagging(self) -> bool:
        """Whether any reader is lagging."""
        return any(topic.lagging for topic in self.readers.topics)

    def progress(self) -> tuple[int, int]:
        """Return two figures; either changes when a lagging reader takes anything. 1 us a reader.

        The first is messages handed to readers so far. The second is bytes that the lagging
        readers' connections still hold: a reader at some KB/s takes nothing else for many seconds.
        """
        topics = self.readers.topics
        delivered = sum(topic.delivered for topic in topics)
        unsent_bytes = sum(
            reader.sink.unsent_bytes() for topic in topics for reader in topic.lagging
        )
        return delivered, unsent_bytes


def _with_headers(topic: Topic, frame: bytes, headers: Headers) -> bytes:
    """Return the frame of one of ``topic``'s messages with its headers."""
    if not topic.has_headers:
        topic.note_headers()
    return frame_with_headers(frame, headers_json(headers))


def _circuit_budget(config: Config) -> CircuitBudget:
    return CircuitBudget(
        config.circuit_breaker_openings,
        config.circuit_breaker_period_s,
        config.circuit_breaker_open_s,
    )
