"""GET /subscribe?poll=1: what lies behind a position, at once or as soon as there is something.

A poll that waits is a subscriber until it is answered; one that is answered at once never was, and
its messages count as offered and delivered. A poll's connection bounds it like any other. Polls of
several topics are handlers/poll_many.py's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import msgspec

from clevrd.core.control_frames import RETENTION, Gap
from clevrd.core.encoding import payload_of, payloads_in
from clevrd.core.positions import After, Start, Wish, start_of
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import InvalidRequest
from clevrd.exchange import Answer, json_answer
from clevrd.handlers.options import single_option
from clevrd.hub import Hub

# Proxies cut silent requests after 60 s, and many clients after 30.
DEFAULT_TIMEOUT_S: Final = 25.0
MAX_TIMEOUT_S: Final = 60.0

# What one answer holds at most, but for a single larger message: 10 ms of work at 300 MB/s.
POLL_MAX_MESSAGES: Final = 1_000
POLL_MAX_BYTES: Final = 1_048_576

NOT_STORED: Final = (("Cache-Control", "no-store"),)

# HEAD reads nothing, and so counts as nothing.
POLL_HEAD: Final = Answer(200, b"", headers=NOT_STORED)

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


class Waiting(Protocol):
    """A poll that is not answered yet."""

    answer: asyncio.Future[Answer]

    def give_up(self) -> None:
        """Answer with nothing, and where to go on."""


class Polls:
    """Answers polls, and knows those that wait."""

    def __init__(self, hub: Hub, loop: asyncio.AbstractEventLoop) -> None:
        self._hub = hub
        self.loop = loop
        self._waiting: dict[Waiting, None] = {}

    def __len__(self) -> int:
        """Return how many polls wait."""
        return len(self._waiting)

    def answer(self, topic: Topic, wish: Wish, timeout_s: float) -> Answer | asyncio.Future[Answer]:
        """Return what ``topic`` has behind ``wish``, or a future of what comes within the time."""
        start = start_of(topic, wish)
        frames = self._hub.serve(topic, start.after, POLL_MAX_MESSAGES, POLL_MAX_BYTES)
        if frames or start.gap or not timeout_s:
            return poll_answer(topic, start, start.after + len(frames), map(payload_of, frames))
        poll = WaitingPoll(self._hub, topic, start, self.loop)
        self.note(poll)
        poll.begin(timeout_s)
        return poll.answer

    def note(self, poll: Waiting) -> None:
        """Know of a poll until it is answered."""
        self._waiting[poll] = None
        poll.answer.add_done_callback(lambda _: self._waiting.pop(poll, None))

    def end_all(self) -> None:
        """Answer all that wait with nothing, once what is pending now has been offered to them."""
        for waiting in list(self._waiting):
            self.loop.call_soon(waiting.give_up)


class PollReader:
    """One topic of a poll that waits; the Sink of its Subscriber."""

    __slots__ = ("_hub", "_reader", "_take", "topic", "upto")

    def __init__(
        self,
        hub: Hub,
        topic: Topic,
        after: int,
        take: Callable[[list[bytes], Gap | None], None],
        *,
        is_watching: bool = False,
    ) -> None:
        self._hub = hub
        self.topic = topic
        # Everything up to here is accounted for.
        self.upto = after
        # Told what has come, and what is missing before it; called with nothing when nothing will.
        self._take = take
        self._reader = Subscriber(self, is_watching=is_watching)

    def begin(self) -> None:
        """Wait for what comes behind `upto`."""
        self._hub.subscribe(self.topic, self._reader, After(self.upto, self.topic.epoch))

    def leave(self) -> None:
        """Wait no more. Idempotent."""
        self._hub.unsubscribe(self.topic, self._reader)

    def unsent_bytes(self) -> int:
        """Return 0: what it writes becomes an answer at once."""
        return 0

    def write(self, data: bytes) -> None:
        """Take the messages in ``data``, unless the client has them already."""
        payloads = payloads_in(data)
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


class WaitingPoll:
    """A poll until its topic has something for it."""

    __slots__ = ("_loop", "_place", "_start", "_timer", "_topic", "answer")

    def __init__(
        self, hub: Hub, topic: Topic, start: Start, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._topic = topic
        self._start = start
        self._loop = loop
        self._place = PollReader(hub, topic, start.after, self._resolve)
        self._timer: asyncio.TimerHandle | None = None
        # Cancelled when the client goes.
        self.answer: asyncio.Future[Answer] = loop.create_future()
        self.answer.add_done_callback(self._end)

    def begin(self, timeout_s: float) -> None:
        """Wait for the first message, ``timeout_s`` at most."""
        self._timer = self._loop.call_later(timeout_s, self.give_up)
        self._place.begin()

    def give_up(self) -> None:
        """Answer with nothing, and where to go on."""
        self._resolve([], None)

    def _resolve(self, payloads: list[bytes], gap: Gap | None) -> None:
        if self.answer.done():
            return
        # Now and not in the callback: nothing more is meant for it.
        self._place.leave()
        start = Start(self._start.after, gap=gap) if gap else self._start
        self.answer.set_result(poll_answer(self._topic, start, self._place.upto, payloads))

    def _end(self, _: asyncio.Future[Answer]) -> None:
        self._place.leave()
        if self._timer is not None:
            self._timer.cancel()


def poll_answer(topic: Topic, start: Start, upto: int, payloads: Iterable[bytes]) -> Answer:
    """Return the answer with the messages in ``payloads``, behind which ``upto`` lies."""
    view = PollView(
        messages=[msgspec.Raw(payload) for payload in payloads],
        topic=topic.name,
        epoch=topic.epoch,
        offset=upto,
        recovered=start.is_recovered,
        gap=start.gap,
    )
    return Answer(200, json_answer(view).body, headers=NOT_STORED)
