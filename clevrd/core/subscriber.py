"""Subscriber: a cursor into a topic's ring, and the drop policy that moves it when it lags.

A subscriber is not a queue. While it keeps up it is one integer; while it lags, DROP_OLDEST is
still that integer, and DROP_NEWEST and CIRCUIT_BREAKER hold runs of offsets that the topic keeps
for them once the ring is about to move on beneath them. LATEST is the integer and a count: what it
is to be given the topic knows for all of them. Each behaves message for message like the bounded
queue it stands for (tests/core/test_policies.py). No sockets here: frames go to a Sink.

Terms: the topic's *edge* is the highest offset offered to its readers so far; a reader's *lag* is
how many offered messages it has neither been given nor lost.
"""

from __future__ import annotations

import enum
from typing import Final, Protocol

from clevrd.core.gap_log import GapLog
from clevrd.core.kept_frames import KeptFrames
from clevrd.core.newest_by_key import NewestByKey
from clevrd.core.notices import RETENTION, SLOW_CONSUMER, GapReason
from clevrd.core.recent_cache import RecentMessageCache
from clevrd.core.stream_forms import FRAMES, Spelling, StreamForm

# A reader that dropped counts as slow for this long after its last drop.
SLOW_MEMORY_S: Final = 10.0

_NEVER_S: Final = float("-inf")


class DropStrategy(enum.Enum):
    """What a reader that lags beyond its window loses."""

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"
    CIRCUIT_BREAKER = "circuit_breaker"
    LATEST = "latest"


DROP_OLDEST: Final = DropStrategy.DROP_OLDEST
DROP_NEWEST: Final = DropStrategy.DROP_NEWEST
CIRCUIT_BREAKER: Final = DropStrategy.CIRCUIT_BREAKER
LATEST: Final = DropStrategy.LATEST


class Sink(Protocol):
    """Where a subscriber's frames go: a connection, or a fake in tests.

    ``write`` takes whole frames and never blocks; when it can't take more soon the connection
    tells the hub, which stops writing until the connection tells it to go on.
    """

    @property
    def write(self) -> WriteFrames:
        """Hand frames to the transport."""

    def unsent_bytes(self) -> int:
        """Return how much of what was written the peer has not taken yet."""

    def close(self, code: int, reason: str) -> None:
        """Say goodbye with ``code`` and let the connection end."""


class WriteFrames(Protocol):
    """A function that takes finished frames, several joined or one."""

    def __call__(self, data: bytes, /) -> None: ...


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
    def kept(self) -> KeptFrames:
        """What its readers keep although the ring may have moved on."""

    @property
    def newest(self) -> NewestByKey:
        """The newest message of each key, for every lagging LATEST."""

    @property
    def moved_s(self) -> float:
        """When readers were last offered something, or the ring last gave something up."""

    def hasten_alarm(self, reader: Subscriber) -> None:
        """Note that ``reader`` dropped before its window was full: its circuit may open sooner."""


class Subscriber:
    """One reader of one topic: its cursor, its policy, its counters.

    Conservation, at every instant: ``offered = delivered + dropped + discarded + queued``, where
    ``offered`` is what the topic offered since the reader joined (catch-up included). Nothing is
    offered to it while its circuit is open; what is replayed then is offered again.
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
        "form",
        "gaps",
        "is_blocked",
        "is_half_open",
        "is_joined",
        "is_live",
        "is_watching",
        "kept",
        "kept_messages",
        "last_drop_s",
        "openings",
        "sink",
        "skipped",
        "spelling",
        "start",
        "strategy",
        "write",
    )

    def __init__(
        self,
        sink: Sink,
        strategy: DropStrategy = DROP_OLDEST,
        wanted_window: int | None = None,
        gaps: GapLog | None = None,
        *,
        is_watching: bool = False,
        form: StreamForm | None = None,
    ) -> None:
        self.sink = sink
        # It came by a pattern, so it does not keep its topic from being forgotten.
        self.is_watching = is_watching
        # What its connection speaks; None for WebSocket.
        self.form = form
        # How it is given this topic's messages; set by the topic when it joins.
        self.spelling: Spelling = FRAMES
        # The sink's own bound method: one call less per delivery. While a gap is due it is
        # `_write_behind_gap`, so that readers without one pay nothing for it.
        self.write: WriteFrames = sink.write
        # What it is to be told of its losses; None for who did not ask.
        self.gaps = gaps
        self.strategy = strategy
        # Messages; None takes whatever is allowed.
        self._wanted_window = wanted_window
        # Highest offset that was decided: given to the sink, kept, or dropped. Set by join and
        # moved by the topic and by the hub's rounds; never passes the topic's edge.
        self.cursor = 0
        # Such that offered = edge - start while it is joined and its circuit is not open.
        self.start = 0
        self.delivered = 0
        self.dropped = 0
        # What still waited when it left.
        self.discarded = 0
        # Drops since the reader was last up to date: what opens the circuit.
        self.dropped_in_stall = 0
        self.last_drop_s = _NEVER_S
        # Runs (after, upto) that DROP_NEWEST and CIRCUIT_BREAKER hold of the topic's kept frames,
        # oldest first, none after cursor. A tuple: most readers hold none, or one.
        self.kept: tuple[tuple[int, int], ...] = ()
        # Offsets in them.
        self.kept_messages = 0
        # Messages after the cursor that LATEST has dropped already: they lie between those that
        # it is still to be given.
        self.skipped = 0
        # When its circuit opened, as far as that counts; and whether it has not been up to date
        # since: then the next drop opens it again.
        self.openings: tuple[float, ...] = ()
        self.is_half_open = False
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

    def granted_window(self, cap: int) -> int:
        """Return ``window`` as it is without a catch-up."""
        wanted = self._wanted_window
        return cap if wanted is None else min(cap, wanted)

    def position(self) -> int:
        """Return the offset up to which everything was handed to the sink, or told as lost."""
        if self.gaps is None:
            return self.kept[0][0] if self.kept else self.cursor
        return self.gaps.offset_before(self.delivered, self.cursor, self.kept_messages)

    def lag(self, feed: Feed) -> int:
        """Return how many messages wait for it: kept ones, and offered ones not yet decided."""
        return feed.edge - self.cursor + self.kept_messages - self.skipped

    def overflow(self, feed: Feed) -> int:
        """Return how many waiting messages its policy drops when it is settled now.

        None while it is live: the round that it is about to be given may exceed its window.
        """
        if self.is_live:
            return 0
        if self.strategy is LATEST:
            return self.lag(feed) - self._newest_waiting(feed)[0]
        edge, cursor = feed.edge, self.cursor
        overflow = edge - cursor + self.kept_messages - self.window(feed.window_cap)
        evicted = feed.ring.first - 1 - cursor
        if evicted > overflow:
            overflow = min(evicted, edge - cursor)
        return overflow if overflow > 0 else 0

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
        return self.cursor == feed.edge and not self.kept_messages

    def settle(self, feed: Feed, now_s: float) -> None:
        """Drop what the policy drops, given what has been offered so far.

        Lazy and idempotent: nothing happens at publish time, and asking twice changes nothing.
        Must come before every read, before the window grows and after it has shrunk.
        """
        if self.strategy is LATEST and not self.is_live:
            self._supersede(feed, now_s)
            return
        overflow = self.overflow(feed)
        if overflow == 0:
            return
        beyond = self._count_losses(feed, overflow)
        if self.strategy is DROP_OLDEST or overflow == feed.edge - self.cursor:
            self.lose(overflow, now_s, SLOW_CONSUMER if beyond > 0 else RETENTION)
            return
        # Frames are kept before the ring evicts them, so that only what was evicted before this
        # reader lagged, or before it was offered, comes too late.
        evicted = max(0, self._evicted(feed))
        self.lose(evicted, now_s, RETENTION)
        if overflow > evicted:
            self._keep(feed, feed.edge - (overflow - evicted), now_s)

    def room(self, cap: int) -> int:
        """Return how many more messages its policy keeps, where ``cap`` is the window allowed."""
        return self.window(cap) - self.kept_messages

    def keep(self, run: tuple[int, int]) -> None:
        """Note that the topic holds for it a run that begins after the cursor."""
        after, upto = run
        self.kept = (*self.kept, run) if self.kept else (run,)
        self.kept_messages += upto - after
        self.cursor = upto

    def refuse(self, feed: Feed, unpaid: int, now_s: float) -> None:
        """Lose what comes after the cursor: the budget couldn't pay for ``unpaid`` of it."""
        lost = feed.edge - self.cursor
        feed.losses.memory += unpaid
        feed.losses.slow_consumer += lost - unpaid
        self.lose(lost, now_s, SLOW_CONSUMER)
        feed.hasten_alarm(self)

    def trim_kept(self, feed: Feed, now_s: float) -> None:
        """Refuse the newest of what it kept until it fits the window, which has shrunk."""
        if not self.kept:
            return
        excess = self.kept_messages - self.window(feed.window_cap)
        if excess <= 0:
            return
        self.kept_messages -= excess
        feed.losses.slow_consumer += excess
        self._count_drops(excess, now_s)
        if self.gaps is not None:
            place = self.delivered + self.kept_messages
            self.gaps.refuse_newest(place, excess, self.cursor)
        while excess:
            *others, (after, upto) = self.kept
            end = max(after, upto - excess)
            excess -= upto - end
            if end > after:
                feed.kept.cut(end, upto)
                others.append((after, end))
            else:
                feed.kept.release(after, upto)
            self.kept = tuple(others)

    def pass_over(self, feed: Feed) -> int:
        """Skip what of its backlog LATEST has no use for, uncounted; return how much that is.

        It was never offered to it: who joins is not slow.
        """
        count, first = self._newest_waiting(feed)
        passed = self.lag(feed) - count
        self._skip_to(first - 1 if count else feed.edge, gone=0)
        self.skipped = feed.edge - self.cursor - count
        return passed

    def forfeit(self, feed: Feed, now_s: float) -> int:
        """Give up all that waits: some was lost, the rest is discarded; return how much that is.

        Unlike `settle` this keeps nothing for it any more.
        """
        discarded = self.queued(feed)
        self.discarded += discarded
        if overflow := self.overflow(feed):
            self._count_losses(feed, overflow)
            self._count_drops(overflow, now_s)
        for after, upto in self.kept:
            feed.kept.release(after, upto)
        self.kept = ()
        self.kept_messages = 0
        return discarded

    def suspend(self, position: int, edge: int) -> None:
        """Note that its circuit opened: it has its ``position`` and nothing else any more."""
        self.cursor = position
        # With the cursor at which it goes on added, offered is edge - start again.
        self.start -= edge
        self.dropped_in_stall = 0
        if self.gaps is not None:
            self.gaps.forget()
            self.write = self.sink.write

    def half_open(self, after: int, now_s: float) -> int:
        """Go on behind ``after``, or its own position; return how many messages lie between."""
        missing = max(0, after - self.cursor)
        self.start -= missing
        self.lose(missing, now_s, RETENTION)
        self.dropped_in_stall = 0
        self.is_half_open = True
        return missing

    def take(self, feed: Feed, max_bytes: int) -> list[bytes]:
        """Return the next messages for the sink, oldest first, and count them as delivered.

        They are in its wire form, and ``spelling`` joins them.
        Call ``settle`` first. Empty when nothing waits; at least one frame otherwise. No hole
        that is to be told lies between them: one before them, or before what is to come when
        there are none, is told by the next ``write``.
        """
        if self.gaps is not None:
            self._prepare_gap(self.gaps)
        first = (self.kept[0][0] if self.kept else self.cursor) + 1
        if self.strategy is LATEST:
            texts = self._take_newest(feed, max_bytes)
            self.delivered += len(texts)
            return texts
        if self.kept:
            frames = self._take_kept(feed.kept, max_bytes)
        else:
            upto = min(feed.edge, self.cursor + self.spelling.max_messages)
            frames = feed.ring.take(self.cursor, upto, max_bytes)
            self.cursor += len(frames)
        self.delivered += len(frames)
        return self.spelling.texts(frames, first)

    def caught_up(self) -> None:
        """Note that nothing waits: a stall is over, and so is the catch-up's larger window."""
        self.backlog_limit = 0
        self.dropped_in_stall = 0
        self.is_half_open = False

    def drops_in_stall(self, feed: Feed) -> int:
        """Return ``dropped_in_stall`` as it is once the reader is settled."""
        return self.dropped_in_stall + self.overflow(feed)

    def trips_after(self, threshold: int) -> int:
        """Return how many drops in one stall open its circuit: ``threshold``, or one half-open."""
        return 1 if self.is_half_open else threshold

    def trips_at(self, cap: int, threshold: int) -> int:
        """Return the edge at which its circuit opens if it reads nothing.

        Of a settled reader; ``cap`` is the window allowed now.
        """
        threshold = self.trips_after(threshold)
        if self.dropped_in_stall >= threshold:
            return self.cursor
        return self.cursor + self.room(cap) + threshold - self.dropped_in_stall

    def lose(self, count: int, now_s: float, reason: GapReason) -> None:
        """Count ``count`` messages after the cursor as lost and move past them."""
        self.cursor += count
        self._count_drops(count, now_s)
        if count and self.gaps is not None:
            place = self.delivered + self.kept_messages
            self.gaps.note(place, self.cursor - count + 1, self.cursor, reason)
            if self.is_live:
                self._prepare_gap(self.gaps)

    def _evicted(self, feed: Feed) -> int:
        """Return how many messages after the cursor the ring has given up; may be negative."""
        return min(feed.edge, feed.ring.first - 1) - self.cursor

    def _count_losses(self, feed: Feed, overflow: int) -> int:
        """Count ``overflow`` lost messages by reason; return how far they are beyond the window.

        For LATEST, how many of them are no longer wanted.
        """
        if self.strategy is LATEST:
            # Newest of their keys as of now, and no longer there.
            gone = self._newest_gone(feed)
            feed.losses.retention += gone
            feed.losses.slow_consumer += overflow - gone
            return overflow - gone
        beyond = feed.edge - self.cursor + self.kept_messages - self.window(feed.window_cap)
        losses = feed.losses
        if beyond == overflow:
            losses.slow_consumer += overflow
        else:
            losses.slow_consumer += max(0, beyond)
            losses.retention += overflow - max(0, beyond)
        return beyond

    def _prepare_gap(self, gaps: GapLog) -> None:
        if gaps.is_due(self.delivered):
            self.write = self._write_behind_gap

    def _write_behind_gap(self, data: bytes, /) -> None:
        """Stand in for the sink's ``write`` once: tell of the hole that ``data`` follows."""
        # Before the write, in which the transport may pause this reader.
        self.write = self.sink.write
        if self.gaps:
            gap = self.gaps.take()
            data = self.spelling.control(gap, gap.last) + data
        self.write(data)

    # --- LATEST ----------------------------------------------------------------------------------

    def _newest_waiting(self, feed: Feed) -> tuple[int, int]:
        """Return how many messages LATEST is to be given, and the first one's offset."""
        after = max(self.cursor, feed.ring.first - 1)
        return feed.newest.waiting(after, self.window(feed.window_cap))

    def _newest_gone(self, feed: Feed) -> int:
        """Return how many messages LATEST would be given if the ring still had them."""
        if feed.ring.first - 1 <= self.cursor:
            return 0
        wanted, _ = feed.newest.waiting(self.cursor, self.window(feed.window_cap))
        return wanted - self._newest_waiting(feed)[0]

    def _supersede(self, feed: Feed, now_s: float) -> None:
        """Drop what LATEST has no use for, and what the ring gave up."""
        count, first = self._newest_waiting(feed)
        overflow = self.lag(feed) - count
        if overflow:
            gone = overflow - self._count_losses(feed, overflow)
            self._count_drops(overflow, now_s)
            self._skip_to(first - 1 if count else feed.edge, gone)
            self.skipped = feed.edge - self.cursor - count

    def _skip_to(self, before: int, gone: int) -> None:
        """Move the cursor ``before`` the first message that waits.

        Of what lies between, ``gone`` were newest that the ring gave up: they lie before all that
        waits.
        """
        hole = before - self.cursor
        if self.gaps is not None and hole:
            reason: GapReason = RETENTION if hole == gone else SLOW_CONSUMER
            self.gaps.note(self.delivered, self.cursor + 1, before, reason)
        self.cursor = before

    def _take_newest(self, feed: Feed, max_bytes: int) -> list[bytes]:
        """Return what LATEST is to be given, in its wire form, each behind the gap that it follows.

        Here holes are told within a write: there can be one before every message.
        """
        offsets = feed.newest.after(self.cursor, self.window(feed.window_cap))
        texts: list[bytes] = []
        for offset in offsets[: self.spelling.max_messages]:
            (text,) = self.spelling.texts([feed.ring.frame(offset)], offset)
            if self.gaps is not None and offset > self.cursor + 1:
                gap = self.gaps.between(self.cursor, offset, SLOW_CONSUMER)
                text = self.spelling.told(gap, gap.last) + text
            max_bytes -= len(text)
            if max_bytes < 0 and texts:
                break
            texts.append(text)
            self.cursor = offset
        self.skipped = feed.edge - self.cursor - (len(offsets) - len(texts))
        return texts

    # --- losses and what is kept -----------------------------------------------------------------

    def _count_drops(self, count: int, now_s: float) -> None:
        if count:
            self.dropped += count
            self.last_drop_s = now_s
            # What the ring gives up before a live reader could be offered it is no stall.
            if not self.is_live:
                self.dropped_in_stall += count

    def _keep(self, feed: Feed, upto: int, now_s: float) -> None:
        """Hold the frames after the cursor up to offset ``upto``, and lose the rest.

        Those that the budget can't pay for are refused like any newest.
        """
        paid = upto
        if upto > self.cursor:
            paid = feed.kept.hold(feed.ring, self.cursor, upto)
            if paid > self.cursor:
                self.keep((self.cursor, paid))
        # For want of memory too: it is lagging readers that need any.
        self.lose(feed.edge - self.cursor, now_s, SLOW_CONSUMER)
        if paid < upto:
            feed.losses.memory += upto - paid
            feed.hasten_alarm(self)

    def _take_kept(self, kept: KeptFrames, max_bytes: int) -> list[bytes]:
        """Return frames of the oldest run it holds, and let go of them.

        Of one run only: what lies behind a hole is a write of its own, and holes part runs.
        """
        (after, upto), *others = self.kept
        frames = kept.take(after, min(upto, after + self.spelling.max_messages), max_bytes)
        end = after + len(frames)
        if end == upto:
            kept.release(after, upto)
            self.kept = tuple(others)
        else:
            kept.advance(after, end)
            self.kept = ((end, upto), *others)
        self.kept_messages -= len(frames)
        return frames
