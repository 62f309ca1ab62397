"""GET /subscribe?poll=1: what lies behind a position, at once or as soon as there is something.

A poll that waits is a subscriber until it is answered; one that is answered at once never was, and
its messages count as offered and delivered. A poll's connection bounds it like any other. Polls of
several topics are handlers/subscribe/poll_many.py's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final, Protocol

import msgspec

from clevrd.core.beginning import After, Beginning, ResolvedBeginning, resolve
from clevrd.core.notices import RETENTION, Gap
from clevrd.core.server_frames import BLANK, BLANK_BYTES, payload_of, payloads_in
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import InvalidRequest
from clevrd.handlers.subscribe.options import single_option
from clevrd.http_values import NOT_STORED, Response, json_answer
from clevrd.hub import Hub

# Proxies cut silent requests after 60 s, and many clients after 30.
DEFAULT_TIMEOUT_S: Final = 25.0
MAX_TIMEOUT_S: Final = 60.0

# What one answer holds at most, but for a single larger message: 10 ms of work at 300 MB/s.
POLL_MAX_MESSAGES: Final = 1_000
POLL_MAX_BYTES: Final = 1_048_576

# HEAD reads nothing, and so counts as nothing.
POLL_HEAD: Final = Response(200, b"", headers=NOT_STORED)

_SECONDS: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3})?", re.ASCII)


class PollView(msgspec.Struct, frozen=True):
    """The answer to a poll."""

    messages: list[msgspec.Raw]
    topic: str
    # The position to ask for next.
    epoch: str
    offset: int
    # A position was asked for, and nothing behind it is missing.
    recovered: bool
    # What is missing before the first of the messages.
    gap: Gap | None


def read_timeout(query: dict[str, list[str]]) -> float:
    """Return how many seconds the poll waits.

    Raises:
        InvalidRequest: it is no number from 0 to MAX_TIMEOUT_S.
    """
    text = single_option(query, "timeout")
    if text is None:
        return DEFAULT_TIMEOUT_S
    if not _SECONDS.fullmatch(text) or float(text) > MAX_TIMEOUT_S:
        raise InvalidRequest(f"The option timeout must be seconds from 0 to {MAX_TIMEOUT_S:g}.")
    return float(text)


def is_poll(query: dict[str, list[str]]) -> bool:
    """Return whether ``query`` asks for a poll.

    Raises:
        InvalidRequest: it neither does nor does not.
    """
    poll = single_option(query, "poll")
    if poll not in (None, "0", "1"):
        raise InvalidRequest("The option poll must be 1 for a long-poll, or 0 for none.")
    return poll == "1"


# Polls answered in one turn of the loop, at some 100 us each with what the connection then does;
# and messages in their answers, at 2 us each, which the last answer may exceed.
POLLS_PER_TURN: Final = 32
MESSAGES_PER_TURN: Final = 2_000


class Poll(Protocol):
    """A poll that is not answered yet."""

    answer: asyncio.Future[Response]

    @property
    def messages(self) -> int:
        """How many messages there are for it by now."""

    def resolve(self) -> None:
        """Answer with what there is by now, which may be nothing, and where to go on."""


class Polls:
    """Answers polls, and knows those that are not answered yet."""

    def __init__(self, hub: Hub, loop: asyncio.AbstractEventLoop) -> None:
        self._hub = hub
        self.loop = loop
        self._open: dict[Poll, None] = {}
        # Those that are answered as soon as it is their turn: one message may be for thousands.
        self._due: dict[Poll, None] = {}
        # What a round wrote last, and the messages in it: it writes the same to all of them.
        self._last = (b"", list[bytes]())

    def __len__(self) -> int:
        """Return how many polls wait."""
        return len(self._open)

    def answer(
        self, topic: Topic, beginning: Beginning, timeout_s: float
    ) -> Response | asyncio.Future[Response]:
        """Return what ``topic`` has from ``beginning`` on, or a future of what comes in time."""
        start = resolve(topic, beginning)
        frames = self._hub.serve(topic, start.after, POLL_MAX_MESSAGES, POLL_MAX_BYTES)
        if frames or start.gap or not timeout_s:
            return poll_answer(topic, start, start.after + len(frames), map(payload_of, frames))
        poll = WaitingPoll(self, self._hub, topic, start)
        self.add(poll)
        poll.begin(timeout_s)
        return poll.answer

    def add(self, poll: Poll) -> None:
        """Know of a poll until it is answered."""
        self._open[poll] = None
        poll.answer.add_done_callback(lambda _: self._forget(poll))

    def settle(self, poll: Poll) -> None:
        """Answer a poll when it is its turn; what comes until then is in the answer."""
        if not self._due:
            self.loop.call_soon(self._settle_some)
        self._due[poll] = None

    def end_all(self) -> None:
        """Answer all that wait with nothing, once what is pending now has been offered to them."""
        for poll in self._open:
            self.settle(poll)

    def payloads_in(self, frames: bytes) -> list[bytes]:
        """Return the messages in ``frames``, found once for all polls that are given the same."""
        if self._last[0] is not frames:
            self._last = frames, payloads_in(frames)
        return self._last[1]

    def _settle_some(self) -> None:
        left_messages = MESSAGES_PER_TURN
        for poll in list(islice(self._due, POLLS_PER_TURN)):
            if left_messages <= 0:
                break
            self._due.pop(poll, None)
            left_messages -= poll.messages
            poll.resolve()
        self._last = b"", []
        if self._due:
            self.loop.call_soon(self._settle_some)

    def _forget(self, poll: Poll) -> None:
        self._open.pop(poll, None)
        self._due.pop(poll, None)


class PollReader:
    """One topic of a poll that waits; the Sink of its Subscriber."""

    __slots__ = ("_hub", "_polls", "_reader", "_take", "is_watching", "topic", "upto")

    def __init__(
        self,
        polls: Polls,
        hub: Hub,
        topic: Topic,
        after: int,
        take: Callable[[list[bytes], Gap | None], None],
        *,
        is_watching: bool = False,
    ) -> None:
        self._polls = polls
        self._hub = hub
        self.topic = topic
        # Everything up to here is accounted for.
        self.upto = after
        # Told what has come, and what is missing before it; told nothing when nothing will come.
        self._take = take
        self.is_watching = is_watching
        # Only while it waits, as with `_take`: it knows its sink, and what knows each other waits
        # for the collector, which stops the daemon for half a second after some hundred polls.
        self._reader: Subscriber | None = None

    def begin(self) -> None:
        """Wait for what comes behind `upto`."""
        self._reader = Subscriber(self, came_by_pattern=self.is_watching)
        self._hub.subscribe(self.topic, self._reader, After(self.upto, self.topic.epoch))

    def leave(self) -> None:
        """Wait no more. Idempotent."""
        if self._reader is not None:
            self._hub.unsubscribe(self.topic, self._reader)
            self._reader = None
            self._take = _take_nothing

    def unsent_bytes(self) -> int:
        """Return 0: what it writes becomes an answer at once."""
        return 0

    def write(self, data: bytes) -> None:
        """Take the messages in ``data``, unless the client has them already."""
        if self._reader is None:
            return
        payloads = self._polls.payloads_in(data)
        cursor, before = self._reader.cursor, self.upto
        # Joined in the middle of a round, it can be given again what it had before.
        new = payloads[max(0, before - (cursor - len(payloads))) :]
        if not new:
            return
        self.upto = cursor
        lost = cursor - len(new) - before
        gap = Gap(self.topic.name, before + 1, before + lost, lost, RETENTION) if lost else None
        self._take(new, gap)

    def close(self, code: int, reason: str) -> None:
        """Have the poll answered: this topic can't be served."""
        self._take([], None)


def _take_nothing(payloads: list[bytes], gap: Gap | None) -> None:
    """Stand in for a poll that waits no more."""


class WaitingPoll:
    """A poll until its topic has something for it."""

    __slots__ = ("_gap", "_payloads", "_place", "_polls", "_start", "_timer", "answer")

    def __init__(self, polls: Polls, hub: Hub, topic: Topic, start: ResolvedBeginning) -> None:
        self._polls = polls
        self._start = start
        self._place = PollReader(polls, hub, topic, start.after, self._take)
        self._payloads: list[bytes] = []
        self._gap: Gap | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Cancelled when the client goes.
        self.answer: asyncio.Future[Response] = polls.loop.create_future()
        self.answer.add_done_callback(self._end)

    def begin(self, timeout_s: float) -> None:
        """Wait for the first message, ``timeout_s`` at most."""
        self._timer = self._polls.loop.call_later(timeout_s, self.resolve)
        self._place.begin()

    @property
    def messages(self) -> int:
        """How many messages have come."""
        return len(self._payloads)

    def resolve(self) -> None:
        """Answer with what has come, and where to go on."""
        if self.answer.done():
            return
        # Now and not in the callback: nothing more is meant for it.
        self._place.leave()
        start = ResolvedBeginning(self._start.after, gap=self._gap) if self._gap else self._start
        place = self._place
        self.answer.set_result(poll_answer(place.topic, start, place.upto, self._payloads))

    def _take(self, payloads: list[bytes], gap: Gap | None) -> None:
        # The first round's: of those that come before its turn the next poll has the rest.
        self._place.leave()
        self._payloads, self._gap = payloads, gap
        self._polls.settle(self)

    def _end(self, _: asyncio.Future[Response]) -> None:
        self._place.leave()
        if self._timer is not None:
            self._timer.cancel()


def poll_answer(
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
    return answer_with(view, payloads)


def answer_with(view: object, payloads: Iterable[bytes]) -> Response:
    """Return the answer that ``view`` is, with ``payloads`` where its messages are BLANK alone.

    A MiB of messages is joined once and not encoded: see `encoding.SPLICED_BYTES`.
    """
    before, after = json_answer(view).body.split(BLANK_BYTES)
    return Response(200, b"".join((before, b",".join(payloads), after)), headers=NOT_STORED)
