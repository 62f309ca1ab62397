"""Polls as a transport: an answer with what lies behind a position, at once or when it comes.

A poll that waits is a subscriber until it is answered; one that is answered at once never was, and
its messages count as offered and delivered. A poll's connection bounds it like any other.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import ClassVar, Final

import msgspec

from clevrd.connections.many_subscriptions import ManySubscriptions, PatternSubscription
from clevrd.core.beginning import After, Beginning, ResolvedBeginning, resolve
from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.event_ids import EventIds, EventIdSlot, event_ids_for
from clevrd.core.notices import (
    EXPIRED,
    RETENTION,
    Gap,
    Notice,
    Position,
    Ref,
    Warnings,
    unknown_gap,
)
from clevrd.core.server_frames import (
    BLANK,
    BLANK_BYTES,
    message_id_in,
    message_id_of,
    payload_of,
    payloads_in,
    plain_payload_of,
)
from clevrd.core.stream_forms import FRAMES_WITH_HEADERS, StreamForm
from clevrd.core.subscriber import Subscriber
from clevrd.core.subscription import DeliveryOptions, SubscribeRequest
from clevrd.core.topic import Topic, newest_epoch_of
from clevrd.errors import ClevrdError, JournalUnavailable
from clevrd.http_values import NOT_STORED, Response, json_answer
from clevrd.hub import Hub, OlderMessages, past_expired
from clevrd.scheduling.turn_queue import TurnQueue
from clevrd.tenants import Tenant

# An answer holds no more, but for a single larger message: 10 ms of work at 300 MB/s.
POLL_MAX_MESSAGES: Final = 1_000
POLL_MAX_BYTES: Final = 1_048_576

# HEAD reads nothing, and so counts as nothing.
POLL_HEAD: Final = Response(200, b"", headers=NOT_STORED)

# Polls answered in one turn of the loop, at some 100 us each with what the connection then does;
# and messages in their answers, at 2 us each, which the last answer may exceed. A poll counts as so
# many messages at least that both bounds hold.
POLLS_PER_TURN: Final = 32
MESSAGES_PER_TURN: Final = 2_000
_LEAST_COST: Final = -(-MESSAGES_PER_TURN // POLLS_PER_TURN)

# An answer never lags.
_NO_OPTIONS: Final = DeliveryOptions(
    DropStrategy.DROP_OLDEST, wanted_window=None, has_notices=False
)

# A poll that reads a history is handed so many bytes of each topic at least, of many topics too.
_LEAST_OLDER_BYTES: Final = 65_536
# How often a history is asked again that can't be read, as long as the poll may wait.
_RETRY_S: Final = 0.5

# Messages that were counted for an answer are served whatever their bytes.
_ANY_SIZE: Final = 1 << 60


class PollView(msgspec.Struct, frozen=True):
    """The answer to a poll of one topic."""

    messages: list[msgspec.Raw]
    topic: str
    # The position to ask for next.
    epoch: str
    offset: int
    # A position was asked for, and nothing behind it is missing.
    recovered: bool
    # The hole before the first of the messages; None where nothing is missing.
    gap: Gap | None


class ManyTopicsPollView(msgspec.Struct, frozen=True):
    """The answer to a poll of many topics."""

    # In the order in which they were taken, over all topics.
    messages: list[msgspec.Raw]
    # By topic, the position to ask for next; and all of them as one word.
    positions: dict[str, Position]
    last_event_id: str
    # Positions were asked for, and nothing behind them is missing.
    recovered: bool
    # The holes, each before the first message of its topic.
    gaps: list[Gap]


class Polls:
    """Answers polls, and knows those that are not answered yet."""

    def __init__(self, hub: Hub, loop: asyncio.AbstractEventLoop) -> None:
        self.hub = hub
        self.loop = loop
        # Polls that are not answered, and whose each is.
        self._open: dict[Poll, Tenant] = {}
        # Polls that are answered as soon as it is their turn: one message may be for thousands.
        self._due: deque[Poll] = deque()
        self._queue = TurnQueue(
            MESSAGES_PER_TURN, self._answer_next, loop, hub.counters.count_background_error
        )
        # The last round's frames, and the messages in them: it writes the same to all polls.
        self._last = (b"", list[bytes]())

    def __len__(self) -> int:
        """Return how many polls wait."""
        return len(self._open)

    def answer_one(
        self,
        tenant: Tenant,
        topic: Topic,
        beginning: Beginning,
        timeout_s: float,
        *,
        has_headers: bool = False,
    ) -> Response | asyncio.Future[Response]:
        """Return what ``topic`` has from ``beginning`` on, or a future of what comes in time.

        Raises:
            ConnectionLimit: it would have to wait, and the tenant has too many connections.
        """
        if self.hub.in_history(topic, beginning) is not None:
            poll = self._add(tenant, timeout_s, has_headers=has_headers)
            poll.read_one(topic, beginning)
            return poll.answer
        start = past_expired(topic, resolve(topic, beginning), self.loop.time())
        frames = self.hub.serve(topic, start.after, POLL_MAX_MESSAGES, POLL_MAX_BYTES)
        if frames or start.gap or not timeout_s:
            is_plain = topic.has_headers and not has_headers
            payloads = map(plain_payload_of if is_plain else payload_of, frames)
            return answer_of_one(topic, start, start.after + len(frames), payloads)
        poll = self._add(tenant, timeout_s, has_headers=has_headers)
        poll.wait_for_one(topic, start)
        return poll.answer

    def answer_many(
        self, tenant: Tenant, request: SubscribeRequest, limit: int, timeout_s: float
    ) -> asyncio.Future[Response]:
        """Return a future of what there is of many topics, or of what comes in time.

        Args:
            limit: topics and patterns that the poll may have.

        Raises:
            ConnectionLimit: the tenant has too many connections.
        """
        poll = self._add(tenant, timeout_s, has_headers=request.options.has_headers)
        poll.subscribe(tenant, request, limit)
        return poll.answer

    def settle(self, poll: Poll) -> None:
        """Answer a poll when it is its turn; what comes until then is in the answer."""
        if not poll.is_due:
            poll.is_due = True
            self._due.append(poll)
            self._queue.work_soon()

    def end_all(self) -> None:
        """Answer all that wait with nothing, once what is pending now has been offered to them."""
        for poll in self._open:
            self.settle(poll)

    def payloads_in(self, frames: bytes) -> list[bytes]:
        """Return the messages in ``frames``, found once for all polls that are given the same."""
        if self._last[0] is not frames:
            self._last = frames, payloads_in(frames)
        return self._last[1]

    def _add(self, tenant: Tenant, timeout_s: float, *, has_headers: bool) -> Poll:
        """Return a new poll, which is known and counted until it is answered."""
        counts = self.hub.connection_counts
        counts.check(tenant)
        poll = Poll(self, timeout_s, has_headers=has_headers)
        self._open[poll] = tenant
        counts.take(tenant)
        return poll

    def _answer_next(self) -> int | None:
        """Answer the poll that is due for longest; return what that costs."""
        if not self._due:
            self._last = b"", []
            return None
        poll = self._due.popleft()
        cost = max(poll.messages, _LEAST_COST)
        poll.resolve()
        return cost

    def forget(self, poll: Poll) -> None:
        """Know no more of a poll, which was answered. Idempotent."""
        tenant = self._open.pop(poll, None)
        if tenant is not None:
            self.hub.connection_counts.give_back(tenant)


class PolledTopic:
    """One topic of a poll; the Sink of its reader while the poll waits."""

    __slots__ = (
        "_older",
        "_poll",
        "_reader",
        "_slot",
        "beginning",
        "is_recovered",
        "pattern",
        "topic",
        "upto",
    )

    # A poll looks by itself where it begins, before it is answered.
    has_begun = True
    # A poll never lags: messages that it has not been given are asked for by the next one.
    is_lagging = False

    def __init__(
        self,
        poll: Poll,
        topic: Topic,
        pattern: PatternSubscription | None,
        slot: EventIdSlot | None,
    ) -> None:
        self._poll = poll
        self.topic = topic
        self.pattern = pattern
        self._slot = slot
        # Set by `join`: what was asked for.
        self.beginning: Beginning = After(0)
        # Set by `look`: everything up to here is accounted for, and nothing was missing before.
        self.upto = 0
        self.is_recovered = False
        # Messages of the history behind `beginning`; None where the ring has all that follows.
        self._older: OlderMessages | None = None
        # Only while it waits: the reader knows its sink, and what knows each other waits for the
        # collector, which stops the daemon for half a second after some hundred polls.
        self._reader: Subscriber | None = None

    # --- what many subscriptions ask for ---------------------------------------------------------

    def join(
        self,
        beginning: Beginning,
        ref: Ref = msgspec.UNSET,
        warnings: Warnings = msgspec.UNSET,
        /,
    ) -> None:
        """Read from ``beginning`` on, when the poll looks; wait at once if it has looked."""
        self.beginning = beginning
        self.topic = newest_epoch_of(self.topic)
        if self._poll.has_looked:
            gap = self.look()
            if gap is not None:
                self._poll.collect([], gap)
            self.wait()

    def unsubscribe(self) -> None:
        """Wait no more. Idempotent."""
        if self._reader is not None:
            self._poll.polls.hub.unsubscribe(self.topic, self._reader)
            self._reader = None

    def topic_position(self) -> Position:
        """Return where the next poll goes on."""
        return Position(self.topic.epoch, self.upto)

    def pause_delivery(self) -> None:
        """Do nothing: an answer is never full."""

    def resume_delivery(self) -> None:
        """Do nothing: an answer is never full."""

    def stall_allowed_s(self) -> float:
        """Return 0: a poll's connection is an HTTP connection like others."""
        return 0.0

    # --- what the poll asks for ------------------------------------------------------------------

    def look(self) -> Gap | None:
        """Find out where it begins; return what is missing there."""
        older = self._older
        if older is None:
            resolved = resolve(self.topic, self.beginning)
            start = past_expired(self.topic, resolved, self._poll.polls.loop.time())
        else:
            start = older.start
        self.upto, self.is_recovered = start.after, start.is_recovered
        return start.gap

    def frames(self) -> Iterator[tuple[bytes, PolledTopic, bytes]]:
        """Return what there is, each frame with its message's id."""
        older = [] if self._older is None else self._older.frames
        for frame in older:
            yield message_id_of(frame), self, frame
        behind = self.upto + len(older)
        # There may be more in the history than was read.
        if behind >= self.topic.first - 1:
            for frame in self.topic.frames_behind(behind):
                yield message_id_of(frame), self, frame

    def serve(self, count: int) -> None:
        """Count so many of the frames as given."""
        hub, topic = self._poll.polls.hub, self.topic
        older = 0 if self._older is None else min(count, len(self._older.frames))
        if older:
            topic.note_served(older, hub.now_s())
        if count > older:
            hub.serve(topic, self.upto + older, count - older, _ANY_SIZE)
        self.upto += count

    def lacks_older(self) -> bool:
        """Return whether it begins before the ring, and the history was not read yet."""
        topic = newest_epoch_of(self.topic)
        if topic is not self.topic:
            # Messages that were read are of an epoch that is over.
            self.topic, self._older = topic, None
        hub = self._poll.polls.hub
        return self._older is None and hub.in_history(topic, self.beginning) is not None

    async def read_older(self, max_bytes: int) -> None:
        """Read what the history has.

        Raises:
            JournalUnavailable: it can't be read.
        """
        hub = self._poll.polls.hub
        start = hub.in_history(self.topic, self.beginning)
        if start is not None:
            self._older = await hub.older(self.topic, start, POLL_MAX_MESSAGES, max_bytes)

    def note_in_id(self) -> None:
        """Say in the id of an event where the next poll goes on."""
        if self._slot is not None:
            self._slot.move(f"{self.topic.epoch}:{self.upto}".encode())

    def wait(self) -> None:
        """Wait for what comes behind `upto`."""
        self._older = None
        self._reader = PollReader(
            self, came_by_pattern=self.pattern is not None, form=self._poll.form
        )
        self._poll.polls.hub.subscribe(self.topic, self._reader, After(self.upto, self.topic.epoch))

    def begin_anew(self, topic: Topic) -> None:
        """Wait for what comes in the next epoch: its poll is told that another one has begun."""
        self.topic, self.upto, self.is_recovered = topic, 0, False
        self._poll.collect([], unknown_gap(topic.name))
        if self._reader is not None:
            self._poll.polls.hub.subscribe(topic, self._reader, After(0, topic.epoch))

    # --- Sink ------------------------------------------------------------------------------------

    def unsent_bytes(self) -> int:
        """Return 0: what it is written becomes an answer at once."""
        return 0

    def write(self, data: bytes) -> None:
        """Take the messages in ``data``, unless the client has them already."""
        if self._reader is None:
            return
        payloads = self._poll.polls.payloads_in(data)
        cursor, before = self._reader.cursor, self.upto
        # Joined in the middle of a round, it can be given again what it had before.
        new = payloads[max(0, before - (cursor - len(payloads))) :]
        if not new:
            return
        self.upto = cursor
        lost = cursor - len(new) - before
        gap = Gap(self.topic.name, before + 1, before + lost, lost, RETENTION) if lost else None
        self._poll.collect(new, gap)

    def close(self, code: int, reason: str) -> None:
        """Have the poll answered: this topic can't be served."""
        if self._reader is not None:
            self._poll.collect([], None)


class PollReader(Subscriber):
    """The reader of a topic of a poll that waits."""

    __slots__ = ()

    sink: PolledTopic

    def follow(self, topic: Topic, beginning: Beginning, ref: Ref, warnings: Warnings, /) -> None:
        """Go over to the topic's next epoch."""
        self.sink.begin_anew(topic)


class Poll:
    """A poll that is not answered yet: it looks what there is, and waits if that is nothing."""

    __slots__ = (
        "_ends_s",
        "_gaps",
        "_ids",
        "_is_resumed",
        "_many",
        "_may_wait",
        "_payloads",
        "_size_bytes",
        "_timer",
        "_topics",
        "answer",
        "form",
        "has_looked",
        "is_due",
        "polls",
    )

    def __init__(self, polls: Polls, timeout_s: float, *, has_headers: bool) -> None:
        self.polls = polls
        # The form in which its readers are given messages while it waits.
        self.form: StreamForm | None = FRAMES_WITH_HEADERS if has_headers else None
        # None for a poll of one topic, and when it subscribes to nothing any more.
        self._many: ManySubscriptions[PolledTopic] | None = None
        # The topics that are not in `_many`: the only one, or all when it subscribes no more.
        self._topics: tuple[PolledTopic, ...] = ()
        # None for a poll of one topic.
        self._ids: EventIds | None = None
        # Whether the client said where it is, be it that nothing had begun there.
        self._is_resumed = False
        # Whether the poll has looked at the messages that there are.
        self.has_looked = False
        # Whether the poll waits for its turn to be answered; set by `Polls.settle`.
        self.is_due = False
        # False answers with nothing at once, as soon as it has looked.
        self._may_wait = timeout_s > 0
        self._payloads: list[bytes] = []
        self._size_bytes = 0
        self._gaps: tuple[Gap, ...] = ()
        # On the loop's clock.
        self._ends_s = polls.loop.time() + timeout_s
        self._timer = polls.loop.call_later(timeout_s, self.resolve) if timeout_s else None
        # Cancelled when the client goes.
        self.answer: asyncio.Future[Response] = polls.loop.create_future()
        self.answer.add_done_callback(self._end)

    @property
    def messages(self) -> int:
        """How many messages have come."""
        return len(self._payloads)

    def resolve(self) -> None:
        """Answer with what there is by now, and where to go on; wait only until all is found."""
        self._may_wait = False
        if self.has_looked and not self.answer.done():
            self._resolve()

    # --- one topic -------------------------------------------------------------------------------

    def wait_for_one(self, topic: Topic, start: ResolvedBeginning) -> None:
        """Wait for the first messages behind ``start``, where there is nothing now."""
        polled = PolledTopic(self, topic, None, None)
        polled.upto, polled.is_recovered = start.after, start.is_recovered
        self._topics = (polled,)
        self.has_looked = True
        polled.wait()

    def read_one(self, topic: Topic, beginning: Beginning) -> None:
        """Answer with what the history has of ``topic`` from ``beginning`` on, and the ring."""
        polled = PolledTopic(self, topic, None, None)
        polled.beginning = beginning
        self._topics = (polled,)
        self._look_when_read()

    # --- many topics -----------------------------------------------------------------------------

    def subscribe(self, tenant: Tenant, request: SubscribeRequest, limit: int) -> None:
        """Answer with what there is of the topics and patterns, or with what comes."""
        self._is_resumed = request.is_resumed
        self._ids = event_ids_for(request)
        self._many = many = ManySubscriptions(
            self.polls.hub, tenant, self, limit, has_notices=False, ids=self._ids
        )
        try:
            many.subscribe(request)
        except ClevrdError as error:
            self.refuse(error)

    # An answer tells nobody where the life of a topic ended, so a position counts in the next one.
    keeps_positions: ClassVar[bool] = True

    def topic_subscription(
        self,
        hub: Hub,
        topic: Topic,
        options: DeliveryOptions,
        pattern: PatternSubscription | None,
        slot: EventIdSlot | None,
    ) -> PolledTopic:
        """Return one more topic of this poll."""
        return PolledTopic(self, topic, pattern, slot)

    def tell(self, notice: Notice, event_id: bytes) -> None:
        """Take a gap, which is all that an answer tells: at once, or when it has looked."""
        if not isinstance(notice, Gap):
            return
        if self.has_looked:
            self.collect([], notice)
        else:
            self._gaps += (notice,)

    def refuse(self, error: ClevrdError) -> None:
        """Answer with a refusal: there can't be one more topic."""
        if not self.answer.done():
            self._unsubscribe()
            self.answer.set_exception(error)

    def found_all(self) -> None:
        """Look what there is: every topic that was there has been found."""
        if not self.has_looked and not self.answer.done():
            self._look_when_read()

    def _look_when_read(self) -> None:
        """Look what there is, once what lies before the rings was read."""
        try:
            self._replace_forgotten()
            if any(each.lacks_older() for each in self._topics_now()):
                self.polls.hub.tasks.spawn(self._read_older())
            else:
                self._look()
        except ClevrdError as error:
            self.refuse(error)

    async def _read_older(self) -> None:
        """Read the histories of all topics that begin before their ring, and then look."""
        while not self.answer.done():
            lacking = [each for each in self._topics_now() if each.lacks_older()]
            if not lacking:
                self._look_when_read()
                return
            share_bytes = max(POLL_MAX_BYTES // len(lacking), _LEAST_OLDER_BYTES)
            try:
                for each in lacking:
                    await each.read_older(share_bytes)
            except JournalUnavailable as error:
                if not self._may_wait or self.polls.loop.time() + _RETRY_S >= self._ends_s:
                    self.refuse(error)
                    return
                await asyncio.sleep(_RETRY_S)

    def _look(self) -> None:
        """Answer with what there is, the oldest messages first; wait if that is nothing."""
        self.has_looked = True
        topics = self._topics_now()
        self._gaps += tuple(gap for each in topics if (gap := each.look()) is not None)
        taken: Counter[PolledTopic] = Counter()
        payload = plain_payload_of if self.form is None else payload_of
        for _, each, frame in heapq.merge(*(each.frames() for each in topics), key=_by_id):
            if self._payloads and self._is_full(len(frame)):
                break
            taken[each] += 1
            self._hold(payload(frame))
        for each, count in taken.items():
            each.serve(count)
        if self._payloads or self._gaps or not self._may_wait:
            self._resolve()
            return
        for each in topics:
            each.wait()

    def _replace_forgotten(self) -> None:
        """Find topics anew that were forgotten meanwhile: who has not joined is not told of it."""
        many = self._many
        if many is None:
            return
        for name, each in list(many.topics.items()):
            if self.polls.hub.topics.find(each.topic.tenant, name) is not each.topic:
                many.replace_topic(name, _NO_OPTIONS, each.beginning)

    # --- answering -------------------------------------------------------------------------------

    def collect(self, payloads: list[bytes], gap: Gap | None) -> None:
        """Take what a topic is given.

        The answer of many topics has all that comes this turn, if there is room. That of one has
        the first round's: the next poll has what comes before this one's turn.
        """
        if self.answer.done():
            return
        self._gaps += (gap,) if gap is not None else ()
        for payload in payloads:
            self._hold(payload)
        if self._ids is None or self._is_full(0):
            self._unsubscribe()
        self.polls.settle(self)

    def _hold(self, payload: bytes) -> None:
        self._payloads.append(payload)
        self._size_bytes += len(payload)

    def _is_full(self, more_bytes: int) -> bool:
        return (
            len(self._payloads) >= POLL_MAX_MESSAGES
            or self._size_bytes + more_bytes > POLL_MAX_BYTES
        )

    def _resolve(self) -> None:
        # Now and not in the callback: nothing more is meant for it.
        self._unsubscribe()
        self.answer.set_result(
            self._answer_of_one() if self._ids is None else self._answer_of_many(self._ids)
        )

    def _answer_of_one(self) -> Response:
        (polled,) = self._topics
        gap = self._gaps[0] if self._gaps else None
        is_whole = gap is None or gap.reason == EXPIRED
        start = ResolvedBeginning(polled.upto, polled.is_recovered and is_whole, gap)
        return answer_of_one(polled.topic, start, polled.upto, self._payloads)

    def _answer_of_many(self, ids: EventIds) -> Response:
        for each in self._topics:
            each.note_in_id()
        view = ManyTopicsPollView(
            messages=[BLANK],
            positions={each.topic.name: each.topic_position() for each in self._topics},
            last_event_id=ids.whole().decode(),
            recovered=self._is_resumed and all(each.is_recovered for each in self._topics),
            gaps=list(self._gaps),
        )
        return _answer_with(view, sorted(self._payloads, key=message_id_in))

    def _topics_now(self) -> tuple[PolledTopic, ...]:
        return self._topics if self._many is None else tuple(self._many.topics.values())

    def _unsubscribe(self) -> None:
        """Be no subscriber any more. Idempotent."""
        self._topics = self._topics_now()
        for each in self._topics:
            each.unsubscribe()
        if self._many is not None:
            self._many.unsubscribe()
            self._many = None

    def _end(self, _: asyncio.Future[Response]) -> None:
        self._unsubscribe()
        # The topics and the poll hold each other (`PolledTopic`), and would be freed late.
        self._topics = ()
        if self._timer is not None:
            self._timer.cancel()
        self.polls.forget(self)


def _by_id(each: tuple[bytes, PolledTopic, bytes]) -> bytes:
    return each[0]


def answer_of_one(
    topic: Topic, start: ResolvedBeginning, upto: int, payloads: Iterable[bytes]
) -> Response:
    """Return the answer with the messages in ``payloads``, behind which ``upto`` lies."""
    view = PollView(
        messages=[BLANK],
        topic=topic.name,
        epoch=topic.epoch,
        offset=upto,
        recovered=start.is_recovered,
        gap=start.gap,
    )
    return _answer_with(view, payloads)


def _answer_with(view: object, payloads: Iterable[bytes]) -> Response:
    """Return the answer that ``view`` is, with ``payloads`` where its messages are BLANK alone.

    A MiB of messages is joined once and not encoded: see `server_frames.SPLICED_BYTES`.
    """
    before, after = json_answer(view).body.split(BLANK_BYTES)
    return Response(200, b"".join((before, b",".join(payloads), after)), headers=NOT_STORED)
