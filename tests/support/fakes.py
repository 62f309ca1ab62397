"""Fakes for the core's edges: sinks that fill up, frames that carry their offset, and a driver
that moves rounds as the hub does, without a loop.

Importing this module also chooses hypothesis' profile: `ci` unless HYPOTHESIS_PROFILE says `long`,
which takes many minutes: HYPOTHESIS_PROFILE=long pytest --timeout=0 -o faulthandler_timeout=0
tests/core/test_policies.py and tests/models/test_positions_model.py
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Generator, Iterator
from typing import Protocol, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import engine, providers
from hypothesis.internal.constants_ast import Constants
from websockets.frames import Frame

from clevrd.core.budgets import Budget
from clevrd.core.portions import Portion
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.round import Round
from clevrd.core.subscriber import Subscriber
from clevrd.core.topic import ROUND_MAX_BYTES, Topic
from clevrd.core.topic_manager import TopicManager
from clevrd.core.topic_totals import Totals

# Every run has the same examples, so that a change is judged by its own effect. There is no
# deadline and no health check for slowness, since a shared machine is slow now and then; and no
# database is left behind.
settings.register_profile(
    "ci",
    max_examples=150,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "long",
    max_examples=10_000,
    stateful_step_count=50,
    derandomize=False,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# hypothesis also tries the constants in the sources of all imported modules of this project. Then
# each collected file of tests, each number that changed anywhere, and a path with a folder "tests"
# would change the examples of every test. There is no setting against it; test_how_tests_run.py
# notices if these lines have no effect any more.
_NO_CONSTANTS = Constants()
providers._get_local_constants = lambda: _NO_CONSTANTS

# Seconds for which hypothesis shrinks a failing example. With its default of 300 the time limit of
# a test would end it without showing any example. If the limit comes first nevertheless, it counts
# as one more failure of the running example and is shown beside the other.
engine.MAX_SHRINKING_SECONDS = 10


ResultT = TypeVar("ResultT")


def at_once(steps: Generator[None, None, ResultT]) -> ResultT:
    """Run all ``steps`` of a generator that yields to let others be served."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: ResultT = end.value
            return result


def totals_of(topics: TopicManager, now_s: float = 0.0) -> Totals:
    """Return the sums over all topics."""
    totals, _ = at_once(topics.totals(lambda: now_s))
    return totals


class FakeSink:
    """A Sink that remembers its writes and, like a transport, says when it is full.

    ``on_pause`` is called within the write that passes ``room_bytes``, and ``on_resume`` within the
    drain that leaves room again, as a transport calls its protocol.
    """

    def __init__(self, room_bytes: int = 1 << 60) -> None:
        self.room_bytes = room_bytes
        # Every write, in order.
        self.writes: list[bytes] = []
        # Bytes written and not yet drained.
        self.buffered_bytes = 0
        self.is_paused = False
        # (code, reason) of the first close; None before.
        self.closed: tuple[int, str] | None = None
        # An error that the next writes raise, as a closed transport might; else None.
        self.error: Exception | None = None
        self.on_pause: Callable[[], None] = lambda: None
        self.on_resume: Callable[[], None] = lambda: None

    def write(self, data: bytes) -> None:
        """Keep ``data``, and pause when the buffer is full."""
        if self.error is not None:
            raise self.error
        self.writes.append(data)
        self.buffered_bytes += len(data)
        if self.buffered_bytes > self.room_bytes and not self.is_paused:
            self.is_paused = True
            self.on_pause()

    def close(self, code: int, reason: str) -> None:
        """Remember the first close."""
        if self.closed is None:
            self.closed = code, reason

    def unsent_bytes(self) -> int:
        """Return the bytes written and not drained."""
        return self.buffered_bytes

    def drain(self, max_bytes: int = 1 << 60) -> None:
        """Let the peer read ``max_bytes``; resume when that leaves room."""
        self.buffered_bytes = max(0, self.buffered_bytes - max_bytes)
        if self.is_paused and self.buffered_bytes <= self.room_bytes:
            self.is_paused = False
            self.on_resume()

    @property
    def received(self) -> bytes:
        """All bytes written so far."""
        return b"".join(self.writes)

    @property
    def offsets(self) -> list[int]:
        """Offsets of the frames written so far, which `frame_of` made."""
        return offsets_in(self.received)


def sink_of(reader: Subscriber) -> FakeSink:
    """Return the FakeSink of ``reader``."""
    sink = reader.sink
    assert isinstance(sink, FakeSink)
    return sink


_FAKE_FRAME = re.compile(rb"([0-9]+)\.*(?:\n|,\"key\":\"[a-z]+\"})")


def frame_of(offset: int, size_bytes: int = 64, key: str = "") -> bytes:
    """Return a stand-in for the frame of message ``offset``, ``size_bytes`` long.

    Like a real frame it ends with its key, which has letters only, or without one.
    """
    number, end = b"%d" % offset, b',"key":"%b"}' % key.encode() if key else b"\n"
    return number + b"." * (size_bytes - len(number) - len(end)) + end


def offsets_in(data: bytes) -> list[int]:
    """Return the offsets of the frames in ``data``, in order."""
    assert not _FAKE_FRAME.sub(b"", data)
    return [int(offset) for offset in _FAKE_FRAME.findall(data)]


def frames_in(data: bytes, *, masked: bool = False) -> list[Frame]:
    """Return the WebSocket frames in ``data``, read by another library's parser.

    Raises:
        EOFError: the last one is incomplete.
    """
    stream = io.BytesIO(data)

    def read_exact(size: int) -> Generator[None, None, bytes]:
        yield from ()
        part = stream.read(size)
        if len(part) < size:
            raise EOFError(f"{size - len(part)} bytes are missing")
        return part

    frames = []
    while stream.tell() < len(data):
        try:
            next(Frame.parse(read_exact, mask=masked))
        except StopIteration as parsed:
            frames.append(parsed.value)
    return frames


def make_topic(
    *,
    ring_messages: int = 1_000,
    ring_bytes: int = 1 << 30,
    window: int = 100,
    trip_threshold: int = 100,
    budget: Budget | None = None,
) -> Topic:
    """Return an empty topic."""
    return Topic(
        "tenant",
        "topic",
        ring=RecentMessageCache(ring_messages, ring_bytes),
        portion=Portion("tenant", 1 << 30, budget or Budget(1 << 30)),
        window_cap=window,
        trip_threshold=trip_threshold,
    )


class Extend(Protocol):
    """An object that takes messages: a topic, or a manager in its place."""

    def __call__(self, offset: int, frames: list[bytes], now_s: float, /) -> None: ...


class TopicDriver:
    """Does the hub's work for one topic: rounds to live readers, catching up for the others.

    A round can be done in steps: `begin`, some `write_next`, other work, then `finish`.
    """

    def __init__(self, topic: Topic, extend: Extend | None = None) -> None:
        self.topic = topic
        # The time in seconds; a test sets it to let time pass.
        self.now_s = 0.0
        self._extend = extend or topic.extend
        # Readers whose circuit opened, in order. They are closed, or suspended until they take more
        # if they `may_half_open`.
        self.tripped: list[Subscriber] = []
        self.may_half_open = False
        self._step: Round | None = None
        self._unwritten: Iterator[Subscriber] = iter(())

    def publish(self, count: int = 1, size_bytes: int = 64, key: str = "") -> None:
        """Append ``count`` messages that no round has offered yet."""
        for _ in range(count):
            offset = self.topic.head + 1
            self._extend(offset, [frame_of(offset, size_bytes, key)], self.now_s)

    def begin(self, max_bytes: int = ROUND_MAX_BYTES) -> Round | None:
        """Begin a round, finishing the one before it; nothing is written yet."""
        self.finish()
        self._step = step = self.topic.begin_round(self.now_s, max_bytes)
        if step is not None:
            self._unwritten = iter(step.readers)
            for reader in step.tripped:
                self.tripped.append(reader)
                if self.may_half_open:
                    self.topic.suspend(reader)
                    continue
                self.topic.leave(reader, self.now_s)
                reader.sink.close(4101, "circuit_open")
        return step

    def write_next(self) -> bool:
        """Write the round to its next reader that may have it; return False without one."""
        step = self._step
        if step is None:
            return False
        for reader in self._unwritten:
            if reader.is_live and reader.cursor == step.start:
                reader.cursor = step.end
                reader.delivered += step.messages
                self.topic.delivered += step.messages
                reader.write(step.payload)
                return True
        self._step = step.then
        if self._step is not None:
            self._unwritten = iter(self._step.readers)
            return self.write_next()
        return False

    def finish(self) -> None:
        """Write the round to all its readers that are left."""
        while self.write_next():
            pass

    def flush(self) -> None:
        """Run rounds until nothing is pending."""
        while self.begin() is not None:
            self.finish()

    def send(self, count: int = 1, size_bytes: int = 64) -> None:
        """Publish ``count`` messages, one round each."""
        for _ in range(count):
            self.publish(1, size_bytes)
            self.flush()

    def send_keys(self, keys: str) -> None:
        """Publish a message for each letter, which is its key, or none if blank; a round each."""
        for key in keys:
            self.publish(key=key.strip())
            self.flush()

    def join(self, reader: Subscriber, last: int = 0) -> Subscriber:
        """Join ``reader``, connect its sink's calls, and let it catch up."""
        sink = reader.sink
        if isinstance(sink, FakeSink):
            sink.on_pause = lambda: self.block(reader)
            sink.on_resume = lambda: self.unblock(reader)
        self.topic.join(reader, last, self.now_s)
        self.catch_up(reader)
        return reader

    def block(self, reader: Subscriber) -> None:
        """Note that the reader's transport is full."""
        reader.is_blocked = True
        if reader.is_joined:
            self.topic.mark_lagging(reader)

    def unblock(self, reader: Subscriber) -> None:
        """Note that the reader's transport takes more, and let it catch up."""
        reader.is_blocked = False
        if reader in self.topic.suspended:
            self.topic.resume(reader, self.now_s)
        if reader.is_joined:
            self.catch_up(reader)

    def catch_up(self, reader: Subscriber, max_bytes: int = 65_536) -> None:
        """Let a lagging reader read until it is blocked, or up to date and live."""
        while not reader.is_blocked and reader.is_joined:
            if not self.read_once(reader, max_bytes):
                return

    def read_once(self, reader: Subscriber, max_bytes: int = 65_536) -> bool:
        """Let a lagging reader read one batch; make it live and return False if there is none."""
        frames = self.topic.read(reader, max_bytes, self.now_s)
        if not frames:
            self.topic.mark_live(reader)
            return False
        reader.write(reader.spelling.joined(frames))
        return True

    def leave(self, reader: Subscriber) -> None:
        """Remove ``reader``."""
        self.topic.leave(reader, self.now_s)
