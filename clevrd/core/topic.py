"""Topic: one ring, its readers, and the rounds that bring the readers up to date.

Pure: the hub calls, writes and keeps time. Offsets are given to ``extend``, not made here, and
all reading by offset goes through ``read``.

A message is *appended* (it has an offset, it is in the ring), then *offered* when the next round
begins (``edge`` moves over it). Live readers are given a round's frames joined once; lagging
readers read with their own cursor, up to the edge and never past it, so joining, catching up and
live delivery are one sequence that can't repeat or reorder.
"""

from __future__ import annotations

import heapq
from typing import Final, NamedTuple

from clevrd.core.kept_frames import KeptBudget, KeptFrames
from clevrd.core.newest_by_key import NewestByKey
from clevrd.core.notices import RETENTION
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES, RecentMessageCache
from clevrd.core.stream_forms import FRAMES, SharedTexts, Spelling, StreamForm, TextBudget
from clevrd.core.subscriber import CIRCUIT_BREAKER, DROP_OLDEST, LATEST, Losses, Subscriber

# A round carries at most this much, so that one join is no pause and a reader's transport is
# handed no more than a few socket buffers at once.
ROUND_MAX_BYTES: Final = 262_144

_NO_CAPTURE: Final = 1 << 62

# Stands for the newest messages of topics in which no LATEST lags; nothing is noted in it.
_NOBODYS_NEWEST: Final = NewestByKey(0)

# Up to this many stale alarms wait until they are reached; more are swept out once they
# outnumber the others.
_STALE_ALARMS: Final = 16

# In a turn of the ring, readers that keep the oldest are asked for their frames so many times, each
# time those that are next: of 10,000 that stalled one message apart all at once would take 30 ms.
_CAPTURES: Final = 8

# Alarms looked at in one round, at about 5 us for each circuit that opens; others wait a turn.
_CIRCUITS_PER_ROUND: Final = 256


class Counts(NamedTuple):
    """Messages a topic counted since it was made; each number only rises."""

    offered: int
    delivered: int
    discarded: int
    slow_consumer: int
    retention: int
    memory: int


class Round:
    """One step forward of a topic's live readers; a value that could be carried out elsewhere.

    Of those of one wire form: ``then`` is the same step of the next form's, or the next part of a
    step that this form makes in several.
    """

    __slots__ = ("end", "messages", "payload", "readers", "start", "then", "topic", "tripped")

    def __init__(
        self,
        topic: Topic,
        start: int,
        frames: list[bytes],
        readers: list[Subscriber],
        spelling: Spelling = FRAMES,
        then: Round | None = None,
    ) -> None:
        self.topic = topic
        # Readers whose cursor is ``start`` get offsets start + 1 to end.
        self.start = start
        self.end = start + len(frames)
        self.messages = len(frames)
        self.payload = spelling.joined(spelling.texts(frames, start + 1)) if readers else b""
        self.readers = readers
        self.then = then
        # Readers whose circuit opens: suspend or close them, they still lag. A round may carry
        # nothing but these, when there were too many for the one before.
        self.tripped: list[Subscriber] = []


_NO_COUNTS: Final = Counts(0, 0, 0, 0, 0, 0)


class Topic:
    """One topic of one tenant."""

    __slots__ = (
        "_active",
        "_alarmed",
        "_alarms",
        "_capture_from",
        "_circuits_wait",
        "_keepers",
        "_last_alarm",
        "_shared_texts",
        "_suspects",
        "_text_budget",
        "_trip_threshold",
        "created_at",
        "delivered",
        "discarded",
        "edge",
        "epoch",
        "flush_is_scheduled",
        "is_noted",
        "kept",
        "lagging",
        "last_used_s",
        "live",
        "losses",
        "moved_s",
        "name",
        "newest",
        "offered",
        "oldest_pending_ns",
        "pending_bytes",
        "published",
        "reported",
        "ring",
        "size_class",
        "slow",
        "suspended",
        "tenant",
        "watchers",
        "window_cap",
    )

    def __init__(
        self,
        tenant: str,
        name: str,
        *,
        ring: RecentMessageCache,
        budget: KeptBudget,
        window_cap: int,
        trip_threshold: int = 100,
        epoch: str = "",
        created_at: str = "",
        now_s: float = 0.0,
        active: dict[Topic, None] | None = None,
        text_budget: TextBudget | None = None,
    ) -> None:
        self.tenant = tenant
        self.name = name
        self.epoch = epoch
        # RFC 3339, for people.
        self.created_at = created_at
        # Monotonic; the last publish, join or leave. Idle topics are evicted by it.
        self.last_used_s = now_s
        self.ring = ring
        # What lagging readers keep beyond the ring.
        self.kept = KeptFrames(budget)
        # Topics whose counts may have changed since they were last summed up: this one adds itself
        # when readers join.
        self._active: dict[Topic, None] = {} if active is None else active
        # Owned by the manager: the counts that its sums contain, whether it is kept in mind as
        # busy, and the ring's order of size.
        self.reported = _NO_COUNTS
        self.is_noted = False
        self.size_class = 0
        # Highest offset offered; moves in begin_round only, and in extend while nobody reads.
        self.edge = ring.head
        # Monotonic; when the edge last moved before readers, or the ring gave something up: what a
        # reader turns out to have lost, it lost then.
        self.moved_s = now_s
        # Messages appended but not yet offered, as the ring counts them.
        self.pending_bytes = 0
        # When the oldest of them was appended; the hub's own, for its figures.
        self.oldest_pending_ns = 0
        self.window_cap = min(window_cap, ring.max_messages)
        # Readers at the edge, or at the running round's start; dicts as ordered sets.
        self.live: dict[Subscriber, None] = {}
        # Readers behind: joining, blocked, or catching up.
        self.lagging: dict[Subscriber, None] = {}
        # Those of them that keep the oldest.
        self._keepers: dict[Subscriber, None] = {}
        # How many readers came by a pattern.
        self.watchers = 0
        # Wire form -> its messages, for each form but WebSocket that somebody reads.
        self._shared_texts: dict[StreamForm, SharedTexts] = {}
        self._text_budget = text_budget or TextBudget(0)
        # For those of them that want the newest.
        self.newest = _NOBODYS_NEWEST
        # Readers whose circuit is open: nothing is offered to them, nor kept for them.
        self.suspended: dict[Subscriber, None] = {}
        # Readers that may be slow: everyone who lagged and was not seen to be well since.
        self._suspects: dict[Subscriber, None] = {}
        # How many of them were slow when slow_count was last asked, and have not left since.
        self.slow = 0
        self._trip_threshold = trip_threshold
        # Heap of (edge at which a circuit may open, number of the alarm): lower bounds for
        # lagging CIRCUIT_BREAKERs, so that a round costs nothing for those far from opening.
        self._alarms: list[tuple[int, int]] = []
        # Number of the alarm -> its reader; an entry of the heap that is not in here is stale.
        self._alarmed: dict[int, Subscriber] = {}
        self._last_alarm = 0
        # The last round reached more alarms than it could look at.
        self._circuits_wait = False
        # Lowest offset that a lagging DROP_NEWEST or CIRCUIT_BREAKER still reads from the ring.
        self._capture_from = _NO_CAPTURE
        # Owned by the hub: a round is running or will be begun this turn.
        self.flush_is_scheduled = False
        # Counters; all only rise. offered: messages times the readers they were offered to.
        self.published = 0
        self.offered = 0
        self.delivered = 0
        self.discarded = 0
        self.losses = Losses()

    @property
    def head(self) -> int:
        """Offset of the newest message; 0 before the first."""
        return self.ring.head

    @property
    def pending(self) -> int:
        """Messages appended but not yet offered."""
        return self.ring.head - self.edge

    @property
    def subscribers(self) -> int:
        """How many readers are joined."""
        return len(self.live) + len(self.lagging) + len(self.suspended)

    @property
    def is_unused(self) -> bool:
        """Whether nobody would miss it: only watchers of patterns, and those have everything."""
        return len(self.live) == self.subscribers == self.watchers

    @property
    def needs_round(self) -> bool:
        """Whether there is anything to offer, or circuits that the round before left waiting."""
        return self.ring.head != self.edge or self._circuits_wait

    @property
    def counts(self) -> Counts:
        """What was counted so far; losses are exact after ``settle``."""
        losses = self.losses
        return Counts(
            self.offered,
            self.delivered,
            self.discarded,
            losses.slow_consumer,
            losses.retention,
            losses.memory,
        )

    def extend(self, offset: int, frames: list[bytes], now_s: float) -> None:
        """Hold ``frames`` as the messages from ``offset`` on, which must be ``head + 1``."""
        ring = self.ring
        if offset != ring.head + 1:
            raise ValueError(f"message {offset} can't follow message {ring.head} of {self.name!r}")
        before_bytes = ring.size_bytes
        excess = ring.extend(frames)
        self.published += len(frames)
        self.last_used_s = now_s
        if self.live or self.lagging:
            self.pending_bytes += ring.size_bytes - before_bytes
        else:
            self.edge = ring.head
        if excess:
            self._evict(excess, now_s)

    def trim(self, max_bytes: int, now_s: float) -> int:
        """Evict the oldest messages until the ring holds at most ``max_bytes``; return bytes freed.

        What is yet to be offered stays, whatever its size: that is this turn's business.
        """
        before = self.ring.size_bytes
        excess = self.ring.oldest_over(max_bytes, self.edge)
        if excess:
            self._evict(excess, now_s)
        return before - self.ring.size_bytes

    def join(self, reader: Subscriber, last: int, now_s: float) -> None:
        """Add ``reader``, to be given the ``last`` messages first (or as many as there are).

        It starts among the lagging: the caller lets it read until it is up to date.
        """
        self.join_after(reader, max(self.ring.first, self.ring.head - last + 1) - 1, now_s)

    def join_after(self, reader: Subscriber, after: int, now_s: float) -> None:
        """Add ``reader``, to be given what follows offset ``after``, which the ring must reach.

        It begins at the edge at the latest: what is yet to be offered is offered to it too.
        """
        reader.is_joined = True
        self.watchers += reader.is_watching
        if reader.form is not None:
            reader.spelling = self._join_form(reader.form)
        self.last_used_s = now_s
        self._active[self] = None
        self._offer_behind(reader, after)

    def _offer_behind(self, reader: Subscriber, after: int) -> None:
        """Put ``reader`` among the lagging, its backlog what follows offset ``after``."""
        reader.cursor = min(self.edge, after)
        reader.start += reader.cursor
        backlog = self.edge - reader.cursor
        reader.backlog_limit = backlog
        self._add_lagging(reader)
        if reader.strategy is LATEST:
            passed = reader.pass_over(self)
            reader.start += passed
            backlog -= passed
        self.offered += backlog

    def leave(self, reader: Subscriber, now_s: float) -> None:
        """Remove ``reader``; what still waited for it is counted as discarded. Idempotent."""
        if not reader.is_joined:
            return
        if reader in self.suspended:
            del self.suspended[reader]
        else:
            self._offer_no_more(reader)
        reader.is_joined = False
        self.watchers -= reader.is_watching
        if reader.form is not None:
            self._leave_form(reader.form)
        self.slow = min(self.slow, self.subscribers)
        self.last_used_s = now_s

    def suspend(self, reader: Subscriber) -> None:
        """Open the circuit of ``reader``: it stays, at the place up to which it has everything.

        Until `resume` nothing is offered to it and it costs nothing. What waited for it is
        discarded, and what it was still to be told is forgotten: it may yet be given.
        """
        position, edge = reader.position(), self.edge
        self._offer_no_more(reader)
        reader.suspend(position, edge)
        self.suspended[reader] = None

    def resume(self, reader: Subscriber, now_s: float) -> None:
        """Let a suspended ``reader`` go on where it stopped, as if it joined with that position.

        What the ring no longer has is offered to it as well, and lost. Until it is up to date its
        circuit is half-open.
        """
        del self.suspended[reader]
        missing = reader.half_open(min(self.edge, self.ring.first - 1), now_s)
        self.offered += missing
        self.losses.retention += missing
        self._offer_behind(reader, reader.cursor)

    def mark_lagging(self, reader: Subscriber) -> None:
        """Take ``reader`` out of the live set, with its cursor: its transport is full."""
        if reader.is_live:
            del self.live[reader]
            reader.is_live = False
            self._add_lagging(reader)

    def mark_live(self, reader: Subscriber) -> None:
        """Put ``reader``, which is up to date, among those the next round is for."""
        if not reader.is_up_to_date(self):
            # Every round would pass it over, and nobody would know.
            raise ValueError(f"{reader.lag(self)} messages of {self.name!r} wait for the reader")
        self._remove_lagging(reader)
        self.live[reader] = None
        reader.is_live = True
        reader.caught_up()

    def read(self, reader: Subscriber, max_bytes: int, now_s: float) -> list[bytes]:
        """Return the next messages for a lagging reader, oldest first, up to the edge.

        Its policy is applied first. They are in its wire form, for its ``spelling`` to join. Empty
        when it is up to date.
        """
        reader.settle(self, min(now_s, self.moved_s))
        frames = reader.take(self, max_bytes)
        self.delivered += len(frames)
        return frames

    def begin_round(self, now_s: float, max_bytes: int = ROUND_MAX_BYTES) -> Round | None:
        """Offer what was appended since the last round; None when there is nothing to be done.

        For each of ``readers`` that is still live with its cursor at ``start`` the caller moves
        the cursor to ``end``, counts, and then writes ``payload``: in this order, because the
        write itself may make the reader lag or leave. And then the same of ``then``, whose
        readers may be at the end of this part. One round at a time.
        """
        ring = self.ring
        if ring.first - 1 > self.edge:
            self._lose_unoffered(now_s)
        start = self.edge
        if start == ring.head:
            return self._overdue_circuits()
        frames = ring.take(start, ring.head, max_bytes)
        count = len(frames)
        step = self._round_of(start, frames)
        self.edge += count
        if self.edge == ring.head:
            self.pending_bytes = 0
        else:
            self.pending_bytes -= sum(map(len, frames)) + FRAME_OVERHEAD_BYTES * count
        self.moved_s = now_s
        self.offered += count * (len(self.live) + len(self.lagging))
        if self.newest.readers:
            self.newest.note(start + 1, frames)
        if self._alarms:
            step.tripped = self._tripped()
        return step

    def _round_of(self, start: int, frames: list[bytes]) -> Round:
        """Return the round that brings ``frames`` to all live readers, form by form."""
        readers = list(self.live)
        forms = self._shared_texts
        if not forms:
            return Round(self, start, frames, readers)
        if len(forms) == 1:
            (only,) = forms.values()
            if only.readers == self.subscribers:
                return self._parts_of(start, frames, readers, only, None)
        by_spelling: dict[Spelling, list[Subscriber]] = {}
        for reader in readers:
            by_spelling.setdefault(reader.spelling, []).append(reader)
        step: Round | None = None
        for spelling, alike in by_spelling.items():
            step = self._parts_of(start, frames, alike, spelling, step)
        return step or Round(self, start, frames, [])

    def _parts_of(
        self,
        start: int,
        frames: list[bytes],
        readers: list[Subscriber],
        spelling: Spelling,
        then: Round | None,
    ) -> Round:
        """Return the round of one form, in as many parts as its bound on a write makes of it."""
        size = spelling.max_messages
        *others, last = range(0, len(frames), size)
        step = Round(self, start + last, frames[last:], readers, spelling, then)
        for first in reversed(others):
            step = Round(self, start + first, frames[first : first + size], readers, spelling, step)
        return step

    def _overdue_circuits(self) -> Round | None:
        """Return a round that carries no message, if the one before left circuits waiting."""
        if not self._circuits_wait:
            return None
        step = Round(self, self.edge, [], [])
        step.tripped = self._tripped()
        return step

    def serve(self, after: int, upto: int, max_bytes: int, now_s: float) -> list[bytes]:
        """Return frames behind offset ``after``, up to ``upto``, for who does not stay to read.

        They are offered to it and delivered at once. Empty when there are none; at least one
        otherwise. ``after`` must not lie before what the ring has.
        """
        frames = self.ring.take(after, min(upto, self.ring.head), max_bytes)
        self.offered += len(frames)
        self.delivered += len(frames)
        self._active[self] = None
        self.last_used_s = now_s
        return frames

    def set_window(self, window_cap: int, now_s: float) -> None:
        """Let readers lag ``window_cap`` messages at most, those that lag now included."""
        cap, before = min(window_cap, self.ring.max_messages), self.window_cap
        if cap == before:
            return
        affected = [
            reader for reader in self.lagging if reader.window(cap) != reader.window(before)
        ]
        if cap > before:
            # What the smaller window has cost is lost; the larger one begins now.
            for reader in affected:
                reader.settle(self, self.moved_s)
        self.window_cap = cap
        if self.newest.readers:
            self.newest.limit = max(self.newest.limit, cap)
        if cap < before:
            for reader in affected:
                reader.trim_kept(self, now_s)
                reader.settle(self, now_s)
            self._reset_alarms()

    def settle(self, now_s: float) -> None:
        """Bring every reader's counters up to date, as a view of them must be."""
        # What a lagging reader has lost by now, it lost when the edge last moved.
        lost_s = min(now_s, self.moved_s)
        for reader in self.lagging:
            reader.settle(self, lost_s)

    def slow_count(self, now_s: float) -> int:
        """Return how many readers are slow: over their window, or dropping within the last 10 s.

        And those whose circuit is open. It looks at every reader that may be, at up to 0.3 us each;
        ``slow`` keeps the result.
        """
        slow = 0
        well: list[Subscriber] = []
        for reader in self._suspects:
            if reader.is_slow(self, now_s):
                slow += 1
            elif reader.is_live:
                well.append(reader)
        for reader in well:
            del self._suspects[reader]
        self.slow = slow + len(self.suspended)
        return self.slow

    def queued(self) -> int:
        """Return how many offered messages wait, over all readers; exact after ``settle``."""
        live = sum(self.edge - reader.cursor for reader in self.live)
        return live + sum(reader.queued(self) for reader in self.lagging)

    def hasten_alarm(self, reader: Subscriber) -> None:
        """Reckon the reader's alarm anew: it dropped although its window was not full."""
        if reader.alarm:
            self._forget_alarm(reader)
            self._set_alarm(reader)

    def _add_lagging(self, reader: Subscriber) -> None:
        self.lagging[reader] = None
        self._suspects[reader] = None
        if reader.strategy is DROP_OLDEST:
            return
        if reader.strategy is LATEST:
            self._follow_newest(reader)
            return
        # The ring may have given up parts of a round that this reader was not given yet.
        reader.settle(self, self.moved_s)
        self._keepers[reader] = None
        self._capture_from = min(self._capture_from, reader.cursor + 1)
        self._set_alarm(reader)

    def _join_form(self, form: StreamForm) -> SharedTexts:
        shared = self._shared_texts.get(form)
        if shared is None:
            shared = SharedTexts(form, self.epoch, self._text_budget)
            self._shared_texts[form] = shared
        shared.readers += 1
        return shared

    def _leave_form(self, form: StreamForm) -> None:
        shared = self._shared_texts[form]
        shared.readers -= 1
        if not shared.readers:
            shared.clear()
            del self._shared_texts[form]

    def _remove_lagging(self, reader: Subscriber) -> None:
        del self.lagging[reader]
        self._keepers.pop(reader, None)
        self._forget_alarm(reader)
        if reader.strategy is LATEST:
            self.newest.readers -= 1
            if not self.newest.readers:
                self.newest = _NOBODYS_NEWEST

    def _follow_newest(self, reader: Subscriber) -> None:
        """Know the newest message of each key behind the reader's cursor from now on."""
        if not self.newest.readers:
            self.newest = NewestByKey(self.edge)
        self.newest.readers += 1
        self.newest.reach_back(self.ring, reader.cursor, reader.window(self.window_cap))

    def _offer_no_more(self, reader: Subscriber) -> None:
        """Take ``reader`` out of the live or the lagging; what waited for it is discarded."""
        self.discarded += reader.forfeit(self, self.moved_s)
        if reader.is_live:
            del self.live[reader]
            reader.is_live = False
        else:
            self._remove_lagging(reader)
        self._suspects.pop(reader, None)
        if not self.live and not self.lagging:
            # Nobody is left to be offered what waits; later readers find it in the ring.
            self.edge = self.ring.head
            self.pending_bytes = 0

    def _set_alarm(self, reader: Subscriber) -> None:
        if reader.strategy is CIRCUIT_BREAKER:
            self._last_alarm += 1
            reader.alarm = self._last_alarm
            self._alarmed[reader.alarm] = reader
            trips_at = reader.trips_at(self.window_cap, self._trip_threshold)
            heapq.heappush(self._alarms, (trips_at, reader.alarm))

    def _forget_alarm(self, reader: Subscriber) -> None:
        """Drop the reader's alarm; its heap entry waits until it is reached or swept out."""
        if reader.alarm:
            del self._alarmed[reader.alarm]
            reader.alarm = 0
            if len(self._alarms) > 2 * len(self._alarmed) + _STALE_ALARMS:
                self._alarms = [entry for entry in self._alarms if entry[1] in self._alarmed]
                heapq.heapify(self._alarms)

    def _reset_alarms(self) -> None:
        """Reckon all alarms anew: the window has shrunk."""
        alarmed = list(self._alarmed.values())
        self._alarmed.clear()
        self._alarms.clear()
        for reader in alarmed:
            self._set_alarm(reader)

    def _is_alarmed(self) -> bool:
        return bool(self._alarms) and self._alarms[0][0] <= self.edge

    def _tripped(self) -> list[Subscriber]:
        """Return readers whose circuit opens at this edge; what it does not look at stays due."""
        tripped: list[Subscriber] = []
        for _ in range(_CIRCUITS_PER_ROUND):
            if not self._is_alarmed():
                break
            reader = self._alarmed.pop(heapq.heappop(self._alarms)[1], None)
            if reader is None:
                continue
            reader.alarm = 0
            # Not settled where it opens: it needn't keep what it will never be given.
            if reader.drops_in_stall(self) >= reader.trips_after(self._trip_threshold):
                tripped.append(reader)
            else:
                reader.settle(self, self.moved_s)
                self._set_alarm(reader)
        self._circuits_wait = self._is_alarmed()
        return tripped

    def _lose_unoffered(self, now_s: float) -> None:
        """Move the edge past what the ring gave up before it could be offered.

        Only a burst larger than the ring within one turn gets that far.
        """
        # What was offered before is settled before that is added to it.
        self.settle(now_s)
        gone = self.ring.first - 1 - self.edge
        self.edge += gone
        self.moved_s = now_s
        self.pending_bytes = self.ring.size_bytes
        readers = len(self.live) + len(self.lagging)
        self.offered += gone * readers
        self.losses.retention += gone * readers
        for reader in self.live:
            reader.lose(gone, now_s, RETENTION)
            self._suspects[reader] = None
        for reader in self.lagging:
            reader.lose(gone, now_s, RETENTION)
            self.hasten_alarm(reader)

    def _evict(self, count: int, now_s: float) -> None:
        if self._capture_from <= self.edge and self._capture_from < self.ring.first + count:
            self._capture(self.ring.first + count, now_s)
        self.ring.evict(count)
        self.moved_s = now_s

    def _capture(self, first: int, now_s: float) -> None:
        """Keep for the readers what they keep, before what precedes ``first`` leaves the ring.

        And what follows soon, so that the next time is some way off; those that lack the same
        messages together, as most do when they stall together. What is beyond their windows they
        lose when they are settled: it costs nothing here.
        """
        lost_s = min(now_s, self.moved_s)
        for (after, upto), readers in self._needs(first + len(self.ring) // _CAPTURES).items():
            paid = self.kept.hold(self.ring, after, upto, len(readers))
            if paid > after:
                run = (after, paid)
                for reader in readers:
                    reader.keep(run)
            if paid < upto:
                for reader in readers:
                    reader.refuse(self, upto - paid, lost_s)

    def _needs(self, horizon: int) -> dict[tuple[int, int], list[Subscriber]]:
        """Return runs of the ring and the readers that keep them, of who reads before ``horizon``.

        Notes where the others begin to read.
        """
        edge, cap = self.edge, self.window_cap
        needs: dict[tuple[int, int], list[Subscriber]] = {}
        others = edge
        for reader in self._keepers:
            after = reader.cursor
            if after >= horizon:
                others = min(others, after)
                continue
            upto = min(edge, after + reader.room(cap))
            if upto > after:
                needs.setdefault((after, upto), []).append(reader)
        self._capture_from = others + 1 if self._keepers else _NO_CAPTURE
        return needs
