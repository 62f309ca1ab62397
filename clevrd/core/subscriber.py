"""Subscriber: a cursor into a topic's ring, and the drop policy that moves it when it lags.

A subscriber is not a queue. While it keeps up it is one integer; while it lags, DROP_OLDEST is
still that integer, and DROP_NEWEST and CIRCUIT_BREAKER hold references to the shared frames they
kept once the ring is about to move on beneath them. Each behaves message for message like the
bounded queue it stands for (tests/test_policies.py). No sockets here: frames go to a Sink.

Terms: the topic's *edge* is the highest offset offered to its readers so far; a reader's *lag* is
how many offered messages it has neither been given nor lost.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final, Protocol

from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES, RecentMessageCache

# A reader that dropped counts as slow for this long after its last drop.
SLOW_MEMORY_S: Final = 10.0

_NEVER_S: Final = float("-inf")


class DropStrategy(enum.Enum):
    """What a reader that lags beyond its window loses."""

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"
    CIRCUIT_BREAKER = "circuit_breaker"


DROP_OLDEST: Final = DropStrategy.DROP_OLDEST
DROP_NEWEST: Final = DropStrategy.DROP_NEWEST
CIRCUIT_BREAKER: Final = DropStrategy.CIRCUIT_BREAKER


class Sink(Protocol):
    """Where a subscriber's frames go: a connection, or a fake in tests.

    ``write`` takes whole frames and never blocks; when it can't take more soon the connection
    tells the hub, which stops writing until the connection tells it to go on.
    """

    @property
    def write(self) -> WriteFrames:
        """Hand frames to the transport."""

    def close(self, code: int, reason: str) -> None:
        """Say goodbye with ``code`` and let the connection end."""


class WriteFrames(Protocol):
    """A function that takes finished frames, several joined or one."""

    def __call__(self, data: bytes, /) -> None: ...


class KeptBudget:
    """Bytes that lagging readers may hold beyond the rings, all readers together.

    Counted per reader, so frames that several readers share count once for each: an upper bound.
    """

    __slots__ = ("left_bytes",)

    def __init__(self, max_bytes: int) -> None:
        self.left_bytes = max_bytes


class Losses:
    """Messages that readers of one topic lost, by reason; they only ever rise."""

    __slots__ = ("memory", "retention", "slow_consumer")

    def __init__(self) -> None:
        # Beyond the reader's window.
        self.slow_consumer = 0
        # Inside the window, but the ring had to give them up first.
        self.retention = 0
        # Refused by DROP_NEWEST or CIRCUIT_BREAKER because the KeptBudget was spent.
        self.memory = 0

    @property
    def total(self) -> int:
        """Messages lost for any reason."""
        return self.slow_consumer + self.retention + self.memory


class Feed(Protocol):
    """What a subscriber needs to know of its topic."""

    @property
    def ring(self) -> RecentMessageCache:
        """The topic's recent frames."""

    @property
    def edge(self) -> int:
        """The highest offset offered to readers so far."""

    @property
    def window_cap(self) -> int:
        """Messages a reader may lag at most, whatever it asked for."""

    @property
    def losses(self) -> Losses:
        """Where drops are counted."""

    @property
    def budget(self) -> KeptBudget:
        """What kept frames are paid from."""

    @property
    def moved_s(self) -> float:
        """When readers were last offered something, or the ring last gave something up."""

    def hasten_alarm(self, reader: Subscriber) -> None:
        """Note that ``reader`` dropped before its window was full: its circuit may open sooner."""


class Subscriber:
    """One reader of one topic: its cursor, its policy, its counters.

    Conservation, at every instant: ``offered = delivered + dropped + discarded + queued``, where
    ``offered`` is what the topic offered since the reader joined (catch-up included).
    """

    __slots__ = (
        "_wanted_window",
        "alarm",
        "backlog_limit",
        "cursor",
        "delivered",
        "discarded",
        "dropped",
        "dropped_in_stall",
        "is_blocked",
        "is_joined",
        "is_live",
        "kept",
        "kept_bytes",
        "last_drop_s",
        "sink",
        "start",
        "strategy",
        "write",
    )

    def __init__(
        self, sink: Sink, strategy: DropStrategy = DROP_OLDEST, wanted_window: int | None = None
    ) -> None:
        self.sink = sink
        # The sink's own bound method: one call less per delivery.
        self.write = sink.write
        self.strategy = strategy
        # Messages; None takes whatever is allowed.
        self._wanted_window = wanted_window
        # Highest offset that was decided: given to the sink, kept, or dropped. Set by join and
        # moved by the topic and by the hub's rounds; never passes the topic's edge.
        self.cursor = 0
        # The cursor at join, so that offered = edge - start while joined.
        self.start = 0
        self.delivered = 0
        self.dropped = 0
        # What still waited when it left.
        self.discarded = 0
        # Drops since the reader was last up to date: what opens the circuit.
        self.dropped_in_stall = 0
        self.last_drop_s = _NEVER_S
        # Frames DROP_NEWEST and CIRCUIT_BREAKER hold, oldest first, all before cursor.
        self.kept: deque[bytes] | None = None
        self.kept_bytes = 0
        # Catch-up that was asked for may exceed the window until the reader is first up to date.
        self.backlog_limit = 0
        # In the topic's live set: cursor equals the edge, or the running round's start.
        self.is_live = False
        # The transport is full; set and cleared by the hub only.
        self.is_blocked = False
        self.is_joined = False
        # Number of the topic's alarm for this reader, 0 for none; the topic's own.
        self.alarm = 0

    def window(self, cap: int) -> int:
        """Return how many messages it may lag, where ``cap`` is what is allowed now."""
        wanted = self._wanted_window
        window = cap if wanted is None or wanted > cap else wanted
        return window if window > self.backlog_limit else self.backlog_limit

    def lag(self, feed: Feed) -> int:
        """Return how many messages wait for it: kept ones, and offered ones not yet decided."""
        undecided = feed.edge - self.cursor
        return undecided + len(self.kept) if self.kept else undecided

    def overflow(self, feed: Feed) -> int:
        """Return how many waiting messages its policy drops when it is settled now.

        None while it is live: the round that it is about to be given may exceed its window.
        """
        if self.is_live:
            return 0
        beyond = self.lag(feed) - self.window(feed.window_cap)
        return max(0, beyond, self._evicted(feed))

    def queued(self, feed: Feed) -> int:
        """Return how many offered messages it will still be given if it reads on now."""
        return self.lag(feed) - self.overflow(feed)

    def is_slow(self, feed: Feed, now_s: float) -> bool:
        """Whether it lagged beyond its window, or dropped, within the last SLOW_MEMORY_S."""
        if now_s - self.last_drop_s < SLOW_MEMORY_S:
            return True
        # What it turns out to have lost, it lost when something last moved.
        return now_s - feed.moved_s < SLOW_MEMORY_S and self.overflow(feed) > 0

    def is_up_to_date(self, feed: Feed) -> bool:
        """Whether nothing waits for it."""
        return self.cursor == feed.edge and not self.kept

    def settle(self, feed: Feed, now_s: float) -> None:
        """Drop what the policy drops, given what has been offered so far.

        Lazy and idempotent: nothing happens at publish time, and asking twice changes nothing.
        Must come before every read, before the window grows and after it has shrunk.
        """
        overflow = self.overflow(feed)
        if overflow == 0:
            return
        self._count_losses(feed, overflow)
        if self.strategy is DROP_OLDEST:
            self.lose(overflow, now_s)
            return
        # Frames are kept before the ring evicts them, so that only what was evicted before this
        # reader lagged, or before it was offered, comes too late.
        evicted = max(0, self._evicted(feed))
        self.lose(evicted, now_s)
        if overflow > evicted:
            self._keep(feed, feed.edge - (overflow - evicted), now_s)

    def capture(self, feed: Feed, now_s: float) -> None:
        """Hold the frames it keeps itself, because the ring is about to evict them."""
        if self.strategy is DROP_OLDEST:
            return
        self.settle(feed, now_s)
        self._keep(feed, feed.edge, now_s)

    def trim_kept(self, feed: Feed, now_s: float) -> None:
        """Refuse the newest of what it kept until it fits the window, which has shrunk."""
        kept = self.kept
        if not kept:
            return
        excess = len(kept) - self.window(feed.window_cap)
        if excess > 0:
            for _ in range(excess):
                self._free(kept.pop(), feed.budget)
            feed.losses.slow_consumer += excess
            self._count_drops(excess, now_s)

    def forfeit(self, feed: Feed, now_s: float) -> None:
        """Give up all that waits, as the reader is leaving: some was lost, the rest is discarded.

        Unlike `settle` this keeps nothing for it any more.
        """
        self.discarded += self.queued(feed)
        if overflow := self.overflow(feed):
            self._count_losses(feed, overflow)
            self._count_drops(overflow, now_s)
        feed.budget.left_bytes += self.kept_bytes
        self.kept_bytes = 0
        self.kept = None

    def take(self, feed: Feed, max_bytes: int) -> list[bytes]:
        """Return the next frames for the sink, oldest first, and count them as delivered.

        Call ``settle`` first. Empty when nothing waits; at least one frame otherwise.
        """
        if self.kept:
            frames = self._take_kept(self.kept, max_bytes, feed.budget)
        else:
            frames = feed.ring.take(self.cursor, feed.edge, max_bytes)
            self.cursor += len(frames)
        self.delivered += len(frames)
        return frames

    def caught_up(self) -> None:
        """Note that nothing waits: a stall is over, and so is the catch-up's larger window."""
        self.backlog_limit = 0
        self.dropped_in_stall = 0
        self.kept = None

    def drops_in_stall(self, feed: Feed) -> int:
        """Return ``dropped_in_stall`` as it is once the reader is settled."""
        return self.dropped_in_stall + self.overflow(feed)

    def trips_at(self, cap: int, threshold: int) -> int:
        """Return the edge at which its drops in this stall reach ``threshold`` if it reads nothing.

        Of a settled reader; ``cap`` is the window allowed now.
        """
        if self.dropped_in_stall >= threshold:
            return self.cursor
        room = self.window(cap) - (len(self.kept) if self.kept else 0)
        return self.cursor + room + threshold - self.dropped_in_stall

    def lose(self, count: int, now_s: float) -> None:
        """Count ``count`` messages after the cursor as lost and move past them."""
        self.cursor += count
        self._count_drops(count, now_s)

    def _evicted(self, feed: Feed) -> int:
        """Return how many messages after the cursor the ring has given up; may be negative."""
        return min(feed.edge, feed.ring.first - 1) - self.cursor

    def _count_losses(self, feed: Feed, overflow: int) -> None:
        beyond = max(0, self.lag(feed) - self.window(feed.window_cap))
        feed.losses.slow_consumer += beyond
        feed.losses.retention += overflow - beyond

    def _count_drops(self, count: int, now_s: float) -> None:
        if count:
            self.dropped += count
            self.last_drop_s = now_s
            # What the ring gives up before a live reader could be offered it is no stall.
            if not self.is_live:
                self.dropped_in_stall += count

    def _keep(self, feed: Feed, upto: int, now_s: float) -> None:
        """Hold the frames after the cursor up to offset ``upto``, and refuse the rest.

        Those that the budget can't pay for are refused like any newest.
        """
        frames = feed.ring.frames(self.cursor, upto)
        size_bytes = sum(map(len, frames)) + FRAME_OVERHEAD_BYTES * len(frames)
        unpaid = 0
        while size_bytes > feed.budget.left_bytes:
            size_bytes -= len(frames.pop()) + FRAME_OVERHEAD_BYTES
            unpaid += 1
        feed.budget.left_bytes -= size_bytes
        self.kept_bytes += size_bytes
        if self.kept is None:
            self.kept = deque()
        self.kept.extend(frames)
        self.cursor += len(frames)
        self.lose(feed.edge - self.cursor, now_s)
        if unpaid:
            feed.losses.memory += unpaid
            feed.hasten_alarm(self)

    def _free(self, frame: bytes, budget: KeptBudget) -> None:
        size = len(frame) + FRAME_OVERHEAD_BYTES
        self.kept_bytes -= size
        budget.left_bytes += size

    def _take_kept(self, kept: deque[bytes], max_bytes: int, budget: KeptBudget) -> list[bytes]:
        frames: list[bytes] = []
        left_bytes = max_bytes
        while kept and (not frames or len(kept[0]) <= left_bytes):
            frame = kept.popleft()
            left_bytes -= len(frame)
            self._free(frame, budget)
            frames.append(frame)
        return frames
