"""Rounds: offer appended messages to a topic's readers, and write them to the live ones.

Lagging readers read on in `readers`. Which messages and readers a round has is decided in
`core/topic`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from clevrd.core.round import Round
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.hub.circuits import Circuits
from clevrd.hub.readers import Readers
from clevrd.metrics.counters import Counters

log = logging.getLogger(__name__)

# 256: a slice of about 1.5 ms at 6 us a write, between which other connections are served. With
# 1,000 readers at 1,000/s slices of 64, 256 and 1,024 give a p50 of 5.0, 4.8 and 4.5 ms: no gain.
# Starting a back-to-back round a third of a round later was tried there too: a quarter less CPU,
# but p50 from 4.8 to 6.4 ms and p99 from 11 to 15, so rounds follow each other at once.
WRITES_PER_SLICE: Final = 256
# Writes of all topics' rounds in one turn of the loop, and rounds, which cost one each: the turn
# ends with the round or slice that reaches this. Without it a batch for 1,000 topics with 100
# readers each would hold the loop for half a second.
WRITES_PER_TURN: Final = 256

# A topic makes publishers wait for the round when the messages not offered yet pass one part in so
# many of its ring, so that the ring never gives up a message that was not offered.
_PENDING_SHARE: Final = 4

# How long a topic pauses after a round has failed, for a bug or for want of memory.
_RETRY_S: Final = 1.0


class RoomWaiters(Protocol):
    """Publishes that wait for room in a topic."""

    def is_awaited(self, topic: Topic) -> bool:
        """Return whether any publish waits for room in ``topic``."""

    def room_made(self, topic: Topic, messages: int) -> None:
        """Note that ``topic``, for which publishes wait, has room for so many messages."""


class _Rest(NamedTuple):
    """The rest of a round that has more readers than one slice."""

    topic: Topic
    step: Round
    # The place of its next reader in the step.
    first: int
    # Messages that the round carries, in all its parts.
    messages: int
    # When the oldest of them was appended, and when the round began.
    oldest_ns: int
    began_ns: int


class Rounds:
    """The rounds of all topics, one at a time in each, and the room that they make."""

    __slots__ = (
        "_circuits",
        "_clock_ns",
        "_counters",
        "_due",
        "_has_turn",
        "_loop",
        "_max_pending_bytes",
        "_readers",
        "_record",
        "_room_waiters",
        "_writes",
        "max_pending",
        "running",
    )

    def __init__(
        self,
        ring_messages: int,
        ring_bytes: int,
        readers: Readers,
        circuits: Circuits,
        room_waiters: RoomWaiters,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        clock_ns: Callable[[], int],
    ) -> None:
        self._readers = readers
        self._circuits = circuits
        self._room_waiters = room_waiters
        self._counters = counters
        self._loop = loop
        self._clock_ns = clock_ns
        self._record = counters.rounds.record
        # Messages, and bytes, that a topic may hold that are not offered yet.
        self.max_pending = max(1, ring_messages // _PENDING_SHARE)
        self._max_pending_bytes = max(1, ring_bytes // _PENDING_SHARE)
        # Topics with a round that has begun and is not written to all its readers yet. Changed here
        # alone.
        self.running: set[Topic] = set()
        # Topics whose round is due, and rounds that go on, in the order in which they have a turn;
        # and whether `_work` is called in the next turn.
        self._due: deque[Topic | _Rest] = deque()
        self._has_turn = False
        # Writes so far; only differences count.
        self._writes = 0

    def makes_room(self, topic: Topic) -> bool:
        """Return whether ``topic`` takes more; begin a round now if that makes room."""
        # This is `_is_full` written out, since the call would cost each publish 0.1 us.
        if (
            topic.ring.head - topic.edge < self.max_pending
            and topic.pending_bytes < self._max_pending_bytes
        ):
            return True
        if topic in self.running or len(topic.live) > WRITES_PER_SLICE:
            return False
        while self._is_full(topic):
            if not self.begin(topic):
                break
        return True

    def schedule(self, topic: Topic) -> None:
        """Have a round begin in the next turn of the loop, and note it in ``flush_is_scheduled``.

        It begins in a later turn where other topics have enough to do in the next one.
        """
        # The flag is set last: a topic that is marked and has no round to come would never have
        # one.
        self._have_turn()
        self._due.append(topic)
        topic.flush_is_scheduled = True

    def begin(self, topic: Topic) -> bool:
        """Offer the pending messages to all readers of ``topic``, unless a round is under way.

        Return whether anything was offered.
        """
        if topic in self.running:
            return False
        began_ns = self._clock_ns()
        step = topic.begin_round(self._loop.time())
        if step is None:
            self._end(topic)
            return False
        for reader in step.tripped:
            self._circuits.open(topic, reader)
        if step.then is None and len(step.readers) <= WRITES_PER_SLICE:
            # Most rounds are so: in one form, and within one slice.
            self._write_to(topic, step, step.readers)
            if step.messages:
                ended_ns = self._clock_ns()
                self._record(step.messages, topic.oldest_pending_ns, began_ns, ended_ns)
            self._end(topic)
            return True
        # Messages left for the next round were appended after this one's oldest.
        messages = topic.edge - step.start
        self._write_slice(topic, step, 0, messages, topic.oldest_pending_ns, began_ns)
        return True

    def _is_full(self, topic: Topic) -> bool:
        return topic.pending >= self.max_pending or topic.pending_bytes >= self._max_pending_bytes

    def _end(self, topic: Topic) -> None:
        """Let waiting publishes go on, and schedule another round if one is needed."""
        self.running.discard(topic)
        topic.flush_is_scheduled = False
        if self._room_waiters.is_awaited(topic):
            self._room_waiters.room_made(topic, self.max_pending - topic.pending)
            self.schedule(topic)
        elif topic.needs_round:
            self.schedule(topic)

    def _work(self) -> None:
        """Do what is due by now, as far as one turn reaches; what is due later waits for the next.

        Topics that are published to without end have one round, or one slice of it, in a turn.
        """
        due, left = self._due, WRITES_PER_TURN
        for _ in range(len(due)):
            if left <= 0:
                break
            writes = self._writes
            self._do(due.popleft())
            left -= 1 + self._writes - writes
        self._has_turn = False
        if due:
            self._have_turn()

    def _have_turn(self) -> None:
        """Have `_work` called in the next turn of the loop."""
        if not self._has_turn:
            self._loop.call_soon(self._work)
            self._has_turn = True

    def _do(self, due: Topic | _Rest) -> None:
        """Do a step of a round; if it raises, the topic goes on a second later.

        Without this a bug, or a lack of memory, would leave the topic marked as busy, its
        publishers waiting, and its live readers at an edge that has moved on.
        """
        try:
            if isinstance(due, Topic):
                self.begin(due)
            else:
                self._write_slice(*due)
        except Exception:
            topic = due if isinstance(due, Topic) else due.topic
            self._counters.count_background_error()
            self.running.discard(topic)
            self._loop.call_later(_RETRY_S, self._end, topic)
            self._readers.read_on(topic)
            log.exception("round failed topic=%s", topic.name)

    def _write_slice(
        self,
        topic: Topic,
        step: Round,
        first: int,
        messages: int,
        oldest_ns: int,
        began_ns: int,
    ) -> None:
        """Write a round to its next readers, then yield to the loop or end the round.

        Args:
            messages: how many it carries, in all its parts.
            oldest_ns: when the oldest of its messages was appended.
            began_ns: when the round began.
        """
        left = WRITES_PER_SLICE
        while True:
            readers = step.readers
            last = first + left
            # A list that fits into one slice, as most do, is not copied.
            is_whole = first == 0 and len(readers) <= left
            self._write_to(topic, step, readers if is_whole else readers[first:last])
            if last < len(readers):
                first = last
                break
            left = last - len(readers)
            if step.then is None:
                self._record(messages, oldest_ns, began_ns, self._clock_ns())
                self._end(topic)
                return
            step, first = step.then, 0
            if not left:
                break
        self.running.add(topic)
        self._have_turn()
        self._due.append(_Rest(topic, step, first, messages, oldest_ns, began_ns))

    def _write_to(self, topic: Topic, step: Round, readers: list[Subscriber]) -> None:
        start, end, messages, payload = step.start, step.end, step.messages, step.payload
        writes = 0
        for reader in readers:
            # Skip a reader that left, lags or has read past the start since the round began.
            if reader.cursor != start or not reader.is_live:
                continue
            # The cursor moves before the write, since the transport may pause this reader within
            # it.
            reader.cursor = end
            reader.delivered += messages
            writes += 1
            try:
                reader.write(payload)
            except Exception:
                self._readers.write_failed(topic, reader)
        self._writes += writes
        topic.delivered += messages * writes
        self._counters.delivered_bytes += len(payload) * writes
