"""Topic: one ring, its readers, and the rounds that bring the readers up to date.

Pure: the hub calls, writes and keeps time. Offsets are given to ``extend``, not made here, and
all reading by offset goes through ``frames``. Losses of lagging readers: core/policies; their
circuits: core/circuit_alarms; frames kept for them: core/keepers.

A message is *appended* (it has an offset, it is in the ring), then *offered* when the next round
begins (``edge`` moves over it). Live readers are given a round's frames joined once; lagging
readers read with their own cursor, up to the edge and never past it, so joining, catching up and
live delivery are one sequence that can't repeat or reorder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from clevrd.core.circuit_alarms import CircuitAlarms
from clevrd.core.expiring import Expiring
from clevrd.core.journal_place import JournalPlace
from clevrd.core.keepers import Keepers
from clevrd.core.kept_frames import KeptFrames
from clevrd.core.newest_by_key import NewestByKey
from clevrd.core.notices import RETENTION
from clevrd.core.policies.policy import Losses, Reader, readable_upto
from clevrd.core.portions import Portion
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES, RecentMessageCache
from clevrd.core.round import Round, round_in_forms
from clevrd.core.shared_texts import TextsByForm
from clevrd.core.stream_forms import FRAMES, FRAMES_WITH_HEADERS, PLAIN_FRAMES
from clevrd.core.subscriber import NOT_BEGUN, Subscriber

# A round carries at most this much, so that one join is no pause and a reader's transport is
# handed no more than a few socket buffers at once.
ROUND_MAX_BYTES: Final = 262_144

# The map of all topics in which no LATEST reader lags; nothing is noted in it.
_NOBODYS_NEWEST: Final = NewestByKey(0)


class Counts(NamedTuple):
    """Messages a topic counted since it was made; each number only rises."""

    offered: int
    delivered: int
    discarded: int
    slow_consumer: int
    retention: int
    memory: int
    expired: int


NO_COUNTS: Final = Counts(0, 0, 0, 0, 0, 0, 0)


class TopicHistory:
    """The part of a journaled topic, or of one that is over, that other topics do without.

    Args:
        began_behind: offset behind which the topic began in this process.
    """

    __slots__ = ("began_behind", "readers", "successor")

    def __init__(self, began_behind: int) -> None:
        self.began_behind = began_behind
        # Joined readers whose next message is read from the history; changed by Topic only.
        self.readers: dict[Subscriber, None] = {}
        # The topic of the same name in its next epoch, once that has begun; None before. Code that
        # still has this topic goes over to that one.
        self.successor: Topic | None = None


class Topic:
    """One topic of one tenant."""

    __slots__ = (
        "_active",
        "_alarms",
        "_keepers",
        "_suspects",
        "_texts",
        "_trip_threshold",
        "created_at",
        "delivered",
        "discarded",
        "edge",
        "epoch",
        "expiring",
        "first",
        "flush_is_scheduled",
        "history",
        "is_noted",
        "journal",
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
        "pattern_readers",
        "pending_bytes",
        "portion",
        "reported",
        "ring",
        "seen_messages",
        "size_class",
        "slow",
        "suspended",
        "tenant",
        "throttled_until_s",
        "window_cap",
    )

    def __init__(
        self,
        tenant: str,
        name: str,
        *,
        ring: RecentMessageCache,
        portion: Portion,
        window_cap: int,
        trip_threshold: int = 100,
        epoch: str = "",
        created_at: str = "",
        now_s: float = 0.0,
        active: dict[Topic, None] | None = None,
        journal: JournalPlace | None = None,
    ) -> None:
        self.tenant = tenant
        self.name = name
        self.epoch = epoch
        # RFC 3339, for people.
        self.created_at = created_at
        # Where its messages are put in order and kept; None for a topic of this process alone.
        self.journal = journal
        # Readers beyond its ring, and its next epoch; None where ``journal`` is, until the next
        # epoch has begun.
        self.history = None if journal is None else TopicHistory(ring.head)
        # Monotonic; the last publish, join or leave. Idle topics are evicted by it.
        self.last_used_s = now_s
        # Messages are appended and evicted here, and read by `frames`.
        self.ring = ring
        # Offset of the oldest message that `frames` has; of the next one to come where there is
        # none. Changes in _evict only. The ring's own, once more for readers that are settled: by a
        # property it took 60 ns of the 300 that settling one takes.
        self.first = ring.first
        # The portion of the memory that its tenant has; changes in move only.
        self.portion = portion
        # The frames that lagging readers keep beyond the ring.
        self.kept = KeptFrames(portion.kept)
        # Topics whose counts may have changed since they were last summed up: this one adds itself
        # when readers join.
        self._active: dict[Topic, None] = {} if active is None else active
        # The counts that the sums over all topics contain; changed by TopicTotals only. A slot is
        # 8 bytes; the entry of a dict of topics would be 30 to 60.
        self.reported = NO_COUNTS
        # Whether BusyTopics, which alone changes it, has noted the topic as busy. Asked at each
        # append, where a look-up among the busy topics would take 20 ns more.
        self.is_noted = False
        # Messages published to it and delivered when operators last asked who is busy; changed by
        # handlers/operate/top only. The difference to now is a rate, of every topic there is.
        self.seen_messages = 0
        # Order of the ring's size; changed by RingSizes only. Compared at each append, where a dict
        # of topics would take 13 ns more, and 30 to 60 bytes for each topic.
        self.size_class = 0
        # Highest offset offered; moves in begin_round only, and in extend while nobody reads.
        self.edge = ring.head
        # Monotonic; when the edge last moved before readers, or the ring gave something up. A loss
        # that is found later happened then.
        self.moved_s = now_s
        # Messages appended but not yet offered, as the ring counts them.
        self.pending_bytes = 0
        # When the oldest pending message was appended, in nanoseconds of the delivery's clock; set
        # by the delivery alone, for its figures.
        self.oldest_pending_ns = 0
        # Messages that a reader may lag at most; changes in set_window only.
        self.window_cap = min(window_cap, ring.max_messages)
        # Readers at the edge, or at the running round's start; dicts as ordered sets.
        self.live: dict[Subscriber, None] = {}
        # Readers behind: joining, blocked, or catching up.
        self.lagging: dict[Subscriber, None] = {}
        # Lagging readers that keep the oldest; None until there is one.
        self._keepers: Keepers | None = None
        # Joined readers that came by a pattern.
        self.pattern_readers = 0
        # The messages in each wire form that somebody reads and that is not the ring's own frames.
        self._texts = TextsByForm(epoch, portion.texts)
        # The messages that expire; None as long as none was published with a time to live.
        self.expiring: Expiring | None = None
        # For lagging readers that want the newest message of each key.
        self.newest = _NOBODYS_NEWEST
        # Readers whose circuit is open: nothing is offered to them, nor kept for them.
        self.suspended: dict[Subscriber, None] = {}
        # Readers that may be slow: all that lagged and were not seen to be well since.
        self._suspects: dict[Subscriber, None] = {}
        # Readers that were slow when slow_count was last asked, and have not left since.
        self.slow = 0
        # Drops in one stall that open a circuit.
        self._trip_threshold = trip_threshold
        # When the circuits of lagging readers open; None until a reader with a circuit lags.
        self._alarms: CircuitAlarms | None = None
        # Until when publishes to it wait a little, on the loop's clock; 0 while they do not. Set by
        # hub/control_loops only, and asked at each publish.
        self.throttled_until_s = 0.0
        # A round is running, or one will be begun this turn of the loop; set by hub/rounds only.
        self.flush_is_scheduled = False
        # Counters; all only rise. offered: messages times the readers they were offered to.
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
    def published(self) -> int:
        """Messages that were published to it, by its offsets: in processes before this one too."""
        return self.ring.head

    @property
    def subscribers(self) -> int:
        """How many readers are joined."""
        in_ring = len(self.live) + len(self.lagging) + len(self.suspended)
        return in_ring if self.history is None else in_ring + len(self.history.readers)

    @property
    def is_unused(self) -> bool:
        """Whether nobody would miss it: all readers came by a pattern, and have everything."""
        if not len(self.live) == self.subscribers == self.pattern_readers:
            return False
        # A topic that is kept in a journal is not gone when it is forgotten here, so its readers
        # are not to be told that it has gone.
        return self.history is None or not self.pattern_readers

    @property
    def needs_round(self) -> bool:
        """Whether there is anything to offer, or alarms that the round before left waiting."""
        alarms = self._alarms
        return self.ring.head != self.edge or (alarms is not None and alarms.has_overdue)

    @property
    def held_messages(self) -> int:
        """Messages in the ring."""
        return len(self.ring)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the ring's messages take."""
        return self.ring.size_bytes

    @property
    def counts(self) -> Counts:
        """All that was counted so far; losses are exact after ``settle``."""
        losses = self.losses
        return Counts(
            self.offered,
            self.delivered,
            self.discarded,
            losses.slow_consumer,
            losses.retention,
            losses.memory,
            losses.expired,
        )

    def extend(self, offset: int, frames: list[bytes], now_s: float) -> None:
        """Hold ``frames`` as the messages from ``offset`` on, which must be ``head + 1``."""
        ring = self.ring
        if offset != ring.head + 1:
            raise ValueError(f"message {offset} can't follow message {ring.head} of {self.name!r}")
        before_bytes = ring.size_bytes
        excess = ring.extend(frames)
        self.last_used_s = now_s
        if self.live or self.lagging:
            self.pending_bytes += ring.size_bytes - before_bytes
        else:
            self.edge = ring.head
        if excess:
            self._evict(excess, now_s)

    def note_expiry(self, offset: int, until_s: float) -> None:
        """Note that message ``offset``, the newest that expires, does so at ``until_s``."""
        if self.expiring is None:
            self.expiring = Expiring()
        self.expiring.note(offset, until_s, self.first)

    @property
    def has_headers(self) -> bool:
        """Whether messages may have headers, which are not for every reader."""
        return self._texts.has_headers

    def note_headers(self) -> None:
        """Note that messages from now on may have headers; 0.2 us for each reader that is joined.

        WebSockets that have not asked for headers are given the ring's own frames no more.
        """
        self._texts.note_headers()
        history = {} if self.history is None else self.history.readers
        for readers in (self.live, self.lagging, self.suspended, history):
            for reader in readers:
                if reader.form is None:
                    self._spell_for(reader)

    def end_of_expired(self, after: int, now_s: float) -> int:
        """Return the last of the expired messages that follow ``after``; ``after`` without any."""
        if self.expiring is None:
            return after
        self.expiring.now_s = now_s
        return self.expiring.end_of_expired(after, self.ring.head)

    def note_expired(self, messages: int) -> None:
        """Count messages that somebody asked for who does not stay, and that have expired."""
        self.offered += messages
        self.losses.expired += messages
        self._active[self] = None

    def trim(self, max_bytes: int, now_s: float) -> int:
        """Evict the oldest messages until the ring holds at most ``max_bytes``; return bytes freed.

        Messages that are yet to be offered stay, whatever their size: the round of this turn
        offers them.
        """
        before = self.ring.size_bytes
        excess = self.ring.oldest_over(max_bytes, self.edge)
        if excess:
            self._evict(excess, now_s)
        return before - self.ring.size_bytes

    def spare(self, max_bytes: int, now_s: float) -> int:
        """Evict as `trim` does, but nothing that a lagging reader waits for; return bytes freed.

        Readers that keep the oldest have their messages kept for them beyond the ring, where there
        is room for these. About 0.3 us for each lagging reader.
        """
        before = self.ring.size_bytes
        has_room = self.portion.kept.left_bytes >= before
        needed = min(
            (
                reader.needed_from(self)
                for reader in self.lagging
                if not (has_room and reader.policy.keeps_oldest)
            ),
            default=self.edge + 1,
        )
        excess = self.ring.oldest_over(max_bytes, min(self.edge, needed - 1))
        if excess:
            self._evict(excess, now_s)
        return before - self.ring.size_bytes

    def give_back(self, wanted_bytes: int, /) -> int:
        """Keep less for lagging readers: ``wanted_bytes``, or nothing; return the bytes freed.

        The readers lose the newest of what is kept for them.
        """
        if self._keepers is None:
            return 0
        before_bytes = self.kept.size_bytes
        self._keepers.give_back(self, self.kept.last_without(wanted_bytes), self.moved_s)
        return before_bytes - self.kept.size_bytes

    def outlive(self, successor: Topic) -> None:
        """Note that the topic's next epoch, ``successor``, has begun."""
        if self.history is None:
            self.history = TopicHistory(self.first - 1)
        self.history.successor = successor

    def move(self, portion: Portion) -> None:
        """Count what is kept and made for readers in another ``portion`` from now on.

        The caller has taken the ring out of the portion before, and adds it to the other.
        """
        if self._keepers:
            del self.portion.kept.holders[self]
            portion.kept.holders[self] = None
        self.kept.move(portion.kept)
        self._texts.move(portion.texts)
        self.portion = portion

    def join(self, reader: Subscriber, last: int, now_s: float) -> None:
        """Add ``reader``, to be given the ``last`` messages first (or as many as there are).

        The reader starts among the lagging: the caller lets it read until it is up to date.
        """
        self.join_after(reader, max(self.first, self.ring.head - last + 1) - 1, now_s)

    def join_after(self, reader: Subscriber, after: int, now_s: float) -> None:
        """Add ``reader``, to be given what follows offset ``after``, which the ring must reach.

        The reader begins at the edge at the latest: messages that are yet to be offered are
        offered to it too.
        """
        self._count_in(reader, now_s)
        self._offer_behind(reader, after)

    def join_in_history(self, reader: Subscriber, now_s: float) -> None:
        """Add ``reader``, which is given messages from the history until `join_from_history`.

        The reader has begun nowhere until the caller sets its cursor.
        """
        if self.history is None:
            raise ValueError(f"topic {self.name!r} has no history")
        self._count_in(reader, now_s)
        self.history.readers[reader] = None
        reader.cursor = NOT_BEGUN

    def note_given(self, reader: Subscriber, upto: int, messages: int) -> None:
        """Move a reader in the history to offset ``upto``, with so many messages given to it."""
        reader.cursor = upto
        reader.start -= messages
        reader.delivered += messages
        self.offered += messages
        self.delivered += messages

    def note_missed(self, reader: Subscriber, expired: int) -> None:
        """Count messages that a reader in the history is not given, since they have expired."""
        reader.start -= expired
        reader.dropped += expired
        self.offered += expired
        self.losses.expired += expired

    def join_from_history(self, reader: Subscriber) -> None:
        """Have ``reader``, which has everything up to the ring's first message, read on there."""
        if self.history is not None:
            del self.history.readers[reader]
        self._offer_behind(reader, reader.cursor)

    def _count_in(self, reader: Subscriber, now_s: float) -> None:
        reader.is_joined = True
        self.pattern_readers += reader.came_by_pattern
        if reader.form is not None or self._texts.has_headers:
            self._spell_for(reader)
        self.last_used_s = now_s
        self._active[self] = None

    def _spell_for(self, reader: Subscriber) -> None:
        """Have ``reader`` given messages in its form, unless that is the ring's own frames."""
        form = reader.form or PLAIN_FRAMES
        if form is not FRAMES_WITH_HEADERS:
            reader.spelling = self._texts.join(form)

    def _offer_behind(self, reader: Subscriber, after: int) -> None:
        """Put ``reader`` among the lagging, its backlog what follows offset ``after``."""
        reader.cursor = min(self.edge, after)
        reader.start += reader.cursor
        backlog = self.edge - reader.cursor
        reader.backlog_limit = backlog
        self._add_lagging(reader)
        passed = reader.policy.pass_over(reader, self)
        reader.start += passed
        self.offered += backlog - passed

    def leave(self, reader: Subscriber, now_s: float) -> None:
        """Remove ``reader``; messages that waited for it count as discarded. Idempotent."""
        if not reader.is_joined:
            return
        if reader in self.suspended:
            del self.suspended[reader]
        elif self.history is not None and reader in self.history.readers:
            del self.history.readers[reader]
        else:
            self._offer_no_more(reader)
        reader.is_joined = False
        self.pattern_readers -= reader.came_by_pattern
        if reader.spelling is not FRAMES:
            self._texts.leave(reader.form or PLAIN_FRAMES)
            if reader.form is None:
                # The topic that it joins next may have no message with headers.
                reader.spelling = FRAMES
        self.slow = min(self.slow, self.subscribers)
        self.last_used_s = now_s

    def let_go(self, reader: Subscriber, now_s: float) -> None:
        """Remove ``reader`` as `leave` does, so that it can join the topic's next epoch."""
        is_offered = reader.is_live or reader in self.lagging
        # The next join adds the offset at which the reader begins; then offered is edge - start
        # again.
        edge = self.edge if is_offered else 0
        self.leave(reader, now_s)
        reader.begin_anew(edge)

    def suspend(self, reader: Subscriber) -> None:
        """Open the circuit of ``reader``: it stays, at the place up to which it has everything.

        Until `resume` nothing is offered to the reader, which costs nothing. Messages that waited
        for it are discarded, and the holes that it was to be told of are forgotten: what lies in
        them may yet be given.
        """
        position, edge = reader.position(), self.edge
        self._offer_no_more(reader)
        reader.suspend(position, edge)
        self.suspended[reader] = None

    def resume(self, reader: Subscriber, now_s: float) -> None:
        """Let a suspended ``reader`` go on where it stopped, as if it joined with that position.

        Messages that the ring no longer has are offered to the reader as well, and lost. Until the
        reader is up to date its circuit is half-open.
        """
        del self.suspended[reader]
        missing = reader.half_open(min(self.edge, self.first - 1), now_s)
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

    def frames(self, after: int, upto: int, max_bytes: int | None = None) -> list[bytes]:
        """Return the messages behind offset ``after`` up to ``upto``, as finished frames.

        Everything that reads messages by offset comes through here. ``after`` must not lie before
        ``first - 1``. With ``max_bytes`` as many as fit, and at least one when there is one.
        """
        if max_bytes is None:
            return self.ring.frames(after, upto)
        return self.ring.take(after, upto, max_bytes)

    def frames_behind(self, after: int) -> Iterator[bytes]:
        """Return the frames behind offset ``after`` one by one, up to the first that has expired.

        The caller has asked `end_of_expired` at this time. Nothing is counted as offered. ``after``
        must not lie before what the ring has.
        """
        for offset in range(after + 1, readable_upto(self, after, self.ring.head) + 1):
            yield self.frames(offset - 1, offset)[0]

    def last_before(self, message_id: bytes, *, or_at: bool) -> int:
        """Return the offset of the newest message before ``message_id``, ``or_at`` it.

        ``first - 1`` when there is none among those that `frames` has.
        """
        return self.ring.last_before(message_id, or_at=or_at)

    def read(self, reader: Subscriber, max_bytes: int, now_s: float) -> list[bytes]:
        """Return the next messages for a lagging reader, oldest first, up to the edge.

        The reader's policy is applied first. The messages are in the reader's wire form, for its
        ``spelling`` to join; there are none when it is up to date. No hole that is to be told lies
        between them: a hole before them, or before what is to come when there are none, is told by
        the reader's next ``write``.
        """
        policy = reader.policy
        policy.settle(reader, self, min(now_s, self.moved_s))
        if self.expiring is not None:
            self.expiring.now_s = now_s
            policy.skip_expired(reader, self, self.expiring)
        if reader.gaps is not None:
            reader.prepare_gap(reader.gaps)
        texts = policy.take(reader, self, max_bytes)
        reader.delivered += len(texts)
        self.delivered += len(texts)
        return texts

    def begin_round(self, now_s: float, max_bytes: int = ROUND_MAX_BYTES) -> Round | None:
        """Offer what was appended since the last round; None when there is nothing to be done.

        For each of ``readers`` that is still live with its cursor at ``start`` the caller moves
        the cursor to ``end``, counts, and then writes ``payload``: in this order, because the
        write itself may make the reader lag or leave. The same is done with ``then``, whose
        readers may be at the end of this part. A topic has one round at a time.
        """
        if self.first - 1 > self.edge:
            self._lose_unoffered(now_s)
        start, head = self.edge, self.ring.head
        if start == head:
            return self._round_of_overdue()
        # Where all of it fits, as in most rounds, no frame is measured.
        frames = self.frames(start, head, max_bytes if self.pending_bytes > max_bytes else None)
        count = len(frames)
        readers, shared = list(self.live), self._texts.shared
        if shared:
            step = round_in_forms(start, frames, readers, list(shared.values()), self.subscribers)
        else:
            step = Round(start, frames, readers)
        self.edge = edge = start + count
        if edge == head:
            self.pending_bytes = 0
        else:
            self.pending_bytes -= sum(map(len, frames)) + FRAME_OVERHEAD_BYTES * count
        self.moved_s = now_s
        self.offered += count * (len(readers) + len(self.lagging))
        if self.newest.readers:
            self.newest.note(start + 1, frames)
        if self._alarms is not None:
            step.tripped = self._alarms.tripped(self)
        return step

    def _round_of_overdue(self) -> Round | None:
        """Return a round that carries no message, if the one before left alarms waiting."""
        if self._alarms is None or not self._alarms.has_overdue:
            return None
        step = Round(self.edge, [], [])
        step.tripped = self._alarms.tripped(self)
        return step

    def note_served(self, messages: int, now_s: float) -> None:
        """Count messages from the history that were given to a reader that does not stay."""
        self.offered += messages
        self.delivered += messages
        self._active[self] = None
        self.last_used_s = now_s

    def serve(self, after: int, upto: int, max_bytes: int, now_s: float) -> list[bytes]:
        """Return frames behind offset ``after``, up to ``upto``, for a reader that does not stay.

        They end before one that has expired. The frames count as offered and delivered at once.
        There is at least one unless no message follows, or one that has expired. ``after`` must not
        lie before ``first - 1``.
        """
        if self.expiring is not None:
            self.expiring.now_s = now_s
        upto = readable_upto(self, after, min(upto, self.ring.head))
        frames = self.frames(after, upto, max_bytes)
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
            # Messages beyond the smaller window are lost; the larger window begins now.
            for reader in affected:
                reader.policy.settle(reader, self, self.moved_s)
        self.window_cap = cap
        if self.newest.readers:
            self.newest.limit = max(self.newest.limit, cap)
        if cap < before:
            for reader in affected:
                reader.policy.trim_kept(reader, self, now_s)
                reader.policy.settle(reader, self, now_s)
            if self._alarms is not None:
                self._alarms.reckon_anew(cap)

    def settle(self, now_s: float) -> None:
        """Bring every reader's counters up to date, as a view of them must be."""
        # Nothing was lost since the edge, or the ring, last moved.
        lost_s = min(now_s, self.moved_s)
        for reader in self.lagging:
            reader.policy.settle(reader, self, lost_s)

    def slow_count(self, now_s: float) -> int:
        """Return how many readers are slow: over their window, or dropping within the last 10 s.

        Readers whose circuit is open count too. Every reader that may be slow is looked at, at up
        to 0.3 us each; ``slow`` keeps the result.
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

    def hasten_alarm(self, reader: Reader) -> None:
        """Reckon the reader's alarm anew: it dropped although its window was not full."""
        if self._alarms is not None:
            self._alarms.hasten_alarm(reader, self.window_cap)

    def _add_lagging(self, reader: Subscriber) -> None:
        self.lagging[reader] = None
        self._suspects[reader] = None
        policy = reader.policy
        if policy.wants_newest:
            self._follow_newest(reader)
        elif policy.keeps_oldest:
            # The ring may have given up parts of a round that this reader was not given yet.
            policy.settle(reader, self, self.moved_s)
            if self._keepers is None:
                self._keepers = Keepers()
            self._keepers.add(reader)
            self.portion.kept.holders[self] = None
            if policy.has_circuit:
                if self._alarms is None:
                    self._alarms = CircuitAlarms(self._trip_threshold)
                self._alarms.set_alarm(reader, self.window_cap)

    def _remove_lagging(self, reader: Subscriber) -> None:
        del self.lagging[reader]
        policy = reader.policy
        if policy.wants_newest:
            self.newest.readers -= 1
            if not self.newest.readers:
                self.newest = _NOBODYS_NEWEST
        elif self._keepers is not None and policy.keeps_oldest:
            self._keepers.remove(reader)
            if not self._keepers:
                del self.portion.kept.holders[self]
            if self._alarms is not None:
                self._alarms.forget_alarm(reader)

    def _follow_newest(self, reader: Subscriber) -> None:
        """Know the newest message of each key behind the reader's cursor from now on."""
        if not self.newest.readers:
            self.newest = NewestByKey(self.edge)
        self.newest.readers += 1
        self.newest.reach_back(self, reader.cursor, reader.window(self.window_cap))

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
            # No reader is left for the messages that wait; later readers find them in the ring.
            self.edge = self.ring.head
            self.pending_bytes = 0

    def _lose_unoffered(self, now_s: float) -> None:
        """Move the edge past what the ring gave up before it could be offered.

        Only a burst larger than the ring within one turn of the loop gets that far.
        """
        # Readers are settled by the edge as it was before the loss is added.
        self.settle(now_s)
        gone = self.first - 1 - self.edge
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
        ring, first, keepers = self.ring, self.first + count, self._keepers
        if keepers is not None and keepers.first_needed <= min(self.edge, first - 1):
            keepers.capture(self, first, len(ring), min(now_s, self.moved_s))
        ring.evict(count)
        self.first = first
        self.moved_s = now_s


def newest_epoch_of(topic: Topic) -> Topic:
    """Return ``topic``, or the topic of its name whose epoch has begun since."""
    while topic.history is not None and topic.history.successor is not None:
        topic = topic.history.successor
    return topic
