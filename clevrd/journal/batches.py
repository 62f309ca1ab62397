"""Batches: publishes that wait for their place in the order, and the record made of several.

Pure: `node` sends the records, and answers when they come back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from clevrd import __version__
from clevrd.core.publish_request import PublishRequest
from clevrd.core.topic import Topic, newest_epoch_of
from clevrd.journal.records import (
    MAX_RECORD_BYTES,
    Clear,
    Header,
    Keyed,
    Run,
    Seen,
    encode_record,
    lines_of,
)

# Bytes of a header: all but runs and keys, and each of these without its names. Names are ASCII, or
# take twice as much at most.
_HEADER_BYTES: Final = 512
_RUN_BYTES: Final = 64
_KEYED_BYTES: Final = 64

# The memory that a publish takes while it waits, beside its lines: 600 B by tracemalloc.
_PENDING_BYTES: Final = 600
# Publishes in one record: each is delivered and answered at 20 us, in one turn of the loop.
MAX_PUBLISHES: Final = 256

# A message's id and its timestamp (RFC 3339).
Stamp = tuple[str, str]
# Makes the answer to a publish from its topic, its first offset, its messages' stamps, and whether
# an earlier publish with the same key has this place.
MakeAnswer = Callable[[Topic, int, Sequence[Stamp], bool], Any]
# Makes the answer to a clear from the epoch that the topic has now, and the offset behind which its
# messages come.
MakeCleared = Callable[[str, int], Any]


class Pending:
    """Messages that one publisher appends to one topic at once, until they have their place."""

    __slots__ = (
        "answer",
        "content",
        "cost_bytes",
        "key",
        "lines",
        "make_answer",
        "requests",
        "size_bytes",
        "topic",
    )

    def __init__(
        self,
        topic: Topic,
        requests: Sequence[PublishRequest],
        make_answer: MakeAnswer,
        answer: asyncio.Future[Any],
        key: str | None = None,
        content: str = "",
    ) -> None:
        """Args: key: an idempotency key, of a publish of one message; content: its digest."""
        self.topic = topic
        self.requests = requests
        self.make_answer = make_answer
        # Done when the messages have their place, or have failed.
        self.answer = answer
        self.key = key
        self.content = content
        self.lines = lines_of(requests, key) if requests else b""
        self.size_bytes = len(self.lines)
        # The memory that it takes.
        self.cost_bytes = self.size_bytes + _PENDING_BYTES


class PendingClear(Pending):
    """A topic that is to lose its messages, until it has."""

    __slots__ = ("_make_cleared", "epoch")

    def __init__(
        self, topic: Topic, make_cleared: MakeCleared, answer: asyncio.Future[Any]
    ) -> None:
        super().__init__(topic, (), self._make, answer)
        self._make_cleared = make_cleared
        # The epoch that begins behind the messages that are gone; set when its record is counted.
        self.epoch = ""

    def _make(self, _topic: Topic, upto: int, _stamps: Sequence[Stamp], _repeated: bool) -> Any:
        return self._make_cleared(self.epoch, upto)


class Batch:
    """Publishes that go into one record, and the header's parts that come from them."""

    __slots__ = (
        "clears",
        "cost_bytes",
        "is_reset",
        "keyed",
        "lines",
        "messages",
        "parts",
        "runs",
        "size_bytes",
    )

    def __init__(self, taken: Sequence[Pending], *, is_reset: bool = False) -> None:
        """Args: is_reset: the record begins a new epoch for all nodes."""
        self.is_reset = is_reset
        # Publishes by the line at which each begins, topic by topic; of one topic in their order.
        # A clear has no line, and a number below 0.
        self.parts: dict[int, Pending] = {}
        # The sum of the bytes as they were counted when submitted, clears too.
        self.cost_bytes = sum([each.cost_bytes for each in taken])
        clears = [each for each in taken if isinstance(each, PendingClear)]
        self.clears = tuple(Clear(each.topic.tenant, each.topic.name) for each in clears)
        self.parts.update((-1 - place, each) for place, each in enumerate(clears))
        if clears:
            taken = [each for each in taken if not isinstance(each, PendingClear)]
        # The lines of each publish, in the order of the record.
        self.lines: list[bytes] = []
        runs: list[Run] = []
        keyed: list[Keyed] = []
        line = all_bytes = 0
        for topic, of_topic in _by_topic(taken).items():
            begin, size_bytes = line, 0
            for each in of_topic:
                self.parts[line] = each
                if each.key is not None:
                    keyed.append(Keyed(line, each.key, each.content))
                self.lines.append(each.lines)
                size_bytes += each.size_bytes
                line += len(each.requests)
            runs.append(Run(topic.tenant, topic.name, line - begin, size_bytes))
            all_bytes += size_bytes
        self.size_bytes = all_bytes
        # The number of messages in it.
        self.messages = line
        self.runs = tuple(runs)
        self.keyed = tuple(keyed)

    def header(
        self,
        stamp: str,
        writer: str,
        sequence: int,
        time_us: int,
        seen: Seen | None,
        keep_keys_ms: int,
        max_keys: int,
    ) -> Header:
        """Return the header of the record that is to be sent now."""
        return Header(
            *(stamp, writer, sequence, time_us, self.runs, self.keyed, seen),
            *(self.is_reset, keep_keys_ms, max_keys),
            "" if self.runs else __version__,
            self.clears,
        )

    def record(self, header: Header) -> bytes:
        """Return the record with ``header``."""
        return encode_record(header, self.lines)

    def fail(self, error: Exception) -> int:
        """Answer all publishes that are not answered with ``error``; return their messages."""
        failed = 0
        for each in self.parts.values():
            if not each.answer.done():
                each.answer.set_exception(error)
                failed += len(each.requests)
        return failed


def _by_topic(taken: Sequence[Pending]) -> Mapping[Topic, Sequence[Pending]]:
    if len(taken) == 1:
        return {taken[0].topic: taken}
    first = taken[0].topic if taken else None
    if first is not None and all(each.topic is first for each in taken):
        return {first: list(taken)}
    by_topic: dict[Topic, list[Pending]] = {}
    for each in taken:
        by_topic.setdefault(each.topic, []).append(each)
    return by_topic


def give_answer(part: Pending, offset: int, stamps: Sequence[Stamp], is_repeated: bool) -> None:
    """Answer a publish whose messages have their place."""
    if not part.answer.done():
        # The topic may have begun a new epoch since the message was submitted.
        topic = newest_epoch_of(part.topic)
        part.answer.set_result(part.make_answer(topic, offset, stamps, is_repeated))


def take_batch(pending: deque[Pending]) -> Batch:
    """Take the publishes for the next record from ``pending``, the first one at least."""
    taken: list[Pending] = []
    topics: set[Topic] = set()
    size_bytes = _HEADER_BYTES
    while pending and len(taken) < MAX_PUBLISHES:
        each = pending[0]
        if isinstance(each, PendingClear):
            # A clear has a record of its own, so that the order is plain.
            return Batch(taken or (pending.popleft(),))
        topic = each.topic
        size_bytes += each.size_bytes
        if each.key is not None:
            size_bytes += len(each.key) + _KEYED_BYTES
        if topic not in topics:
            topics.add(topic)
            size_bytes += 2 * (len(topic.tenant) + len(topic.name)) + _RUN_BYTES
        if taken and size_bytes > MAX_RECORD_BYTES:
            break
        taken.append(pending.popleft())
    return Batch(taken)
