"""Subscriber: one reader of one topic, which is a cursor into the topic's ring.

A subscriber is not a queue. While it keeps up it is one integer. While it lags its policy
(core/policies) moves that integer, or notes beside it which frames the topic keeps for the reader
or how many messages are passed over. No sockets here: frames go to a Sink.

Terms: the topic's *edge* is the highest offset offered to its readers so far; a reader's *lag* is
how many offered messages it has neither been given nor lost.
"""

from __future__ import annotations

from typing import Final, Protocol

from clevrd.core.drop_strategy import CIRCUIT_BREAKER, DROP_NEWEST, DROP_OLDEST, DropStrategy
from clevrd.core.gap_log import GapLog
from clevrd.core.notices import EXPIRED, RETENTION, SLOW_CONSUMER, GapReason
from clevrd.core.policies.drop_oldest import DropOldest
from clevrd.core.policies.keep_oldest import KeepOldest
from clevrd.core.policies.latest import Latest
from clevrd.core.policies.policy import Policy, TopicView
from clevrd.core.stream_forms import FRAMES, Spelling, StreamForm

# A reader that dropped counts as slow for this long after its last drop.
SLOW_MEMORY_S: Final = 10.0

_NEVER_S: Final = float("-inf")

# The cursor of a reader that is yet to be told where it begins.
NOT_BEGUN: Final = -1

_POLICIES: Final[dict[DropStrategy, Policy]] = {
    policy.strategy: policy
    for policy in (
        DropOldest(),
        KeepOldest(DROP_NEWEST, has_circuit=False),
        KeepOldest(CIRCUIT_BREAKER, has_circuit=True),
        Latest(),
    )
}


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


class Subscriber:
    """One reader of one topic: its cursor, its policy, its counters.

    Conservation, at every instant: ``offered = delivered + dropped + discarded + queued``, where
    ``offered`` is what the topic offered since the reader joined (catch-up included). Nothing is
    offered to it while its circuit is open; what is replayed then is offered again.
    """

    __slots__ = (
        "alarm",
        "backlog_limit",
        "came_by_pattern",
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
        "kept",
        "kept_messages",
        "last_drop_s",
        "openings",
        "policy",
        "sink",
        "skipped",
        "spelling",
        "start",
        "wanted_window",
        "write",
    )

    def __init__(
        self,
        sink: Sink,
        strategy: DropStrategy = DROP_OLDEST,
        wanted_window: int | None = None,
        gaps: GapLog | None = None,
        *,
        came_by_pattern: bool = False,
        form: StreamForm | None = None,
    ) -> None:
        self.sink = sink
        # A reader that came by a pattern does not keep its topic from being forgotten.
        self.came_by_pattern = came_by_pattern
        # The wire form that its connection speaks; None for a WebSocket that has not asked for
        # headers.
        self.form = form
        # The way in which it is given this topic's messages; set by the topic when it joins.
        self.spelling: Spelling = FRAMES
        # The sink's own bound method: one call less per delivery. While a gap is due it is
        # `_write_behind_gap`, so that readers without one pay nothing for it.
        self.write: WriteFrames = sink.write
        # The holes that it is to be told of; None for a reader that did not ask.
        self.gaps = gaps
        # The object that decides what a lagging reader loses, and is given next; has no state.
        self.policy = _POLICIES[strategy]
        # The window that its client asked for, in messages; None for as much as is allowed.
        self.wanted_window = wanted_window
        # Highest offset that was decided: given to the sink, kept, or dropped. Set by join and
        # moved by the policy and by the hub's rounds; never passes the topic's edge.
        self.cursor = 0
        # A number such that offered = edge - start while the reader is joined and its circuit is
        # not open.
        self.start = 0
        # Messages handed to the sink; counted by the topic's `read` and by the hub's rounds.
        self.delivered = 0
        # Messages lost; changes in count_drops only.
        self.dropped = 0
        # Messages that still waited when it left, or when its circuit opened.
        self.discarded = 0
        # Drops since the reader was last up to date: what opens the circuit.
        self.dropped_in_stall = 0
        # On the caller's clock; changes with ``dropped``.
        self.last_drop_s = _NEVER_S
        # Runs (after, upto) that a reader which keeps the oldest holds of the topic's kept frames,
        # oldest first, none after the cursor. A tuple: most readers hold none, or one.
        self.kept: tuple[tuple[int, int], ...] = ()
        # Offsets in ``kept``; changes with it, in policies/keep_oldest only.
        self.kept_messages = 0
        # Messages after the cursor that LATEST has dropped already: they lie between the ones that
        # it is still to be given. Changes in policies/latest only.
        self.skipped = 0
        # When its circuit opened, on the loop's clock, as far as that counts; set by hub/circuits.
        self.openings: tuple[float, ...] = ()
        # Its circuit was open, and the reader has not been up to date since: the next drop opens
        # the circuit again.
        self.is_half_open = False
        # Catch-up that was asked for may exceed the window until the reader is first up to date.
        self.backlog_limit = 0
        # Whether it is in the topic's live set: the cursor equals the edge, or the running round's
        # start.
        self.is_live = False
        # The transport is full; set and cleared by the hub only.
        self.is_blocked = False
        # Set by the topic's join and cleared by its leave.
        self.is_joined = False
        # Number of its alarm, 0 for none; changes in CircuitAlarms only. A slot for every reader is
        # 8 bytes; a dict would be 30 to 60 for each reader with an alarm, of which all may stall.
        self.alarm = 0

    @property
    def strategy(self) -> DropStrategy:
        """The policy's name."""
        return self.policy.strategy

    def window(self, cap: int) -> int:
        """Return how many messages it may lag, where ``cap`` is what is allowed now."""
        wanted = self.wanted_window
        window = cap if wanted is None or wanted > cap else wanted
        return window if window > self.backlog_limit else self.backlog_limit

    def granted_window(self, cap: int) -> int:
        """Return ``window`` as it is without a catch-up."""
        wanted = self.wanted_window
        return cap if wanted is None else min(cap, wanted)

    def room(self, cap: int) -> int:
        """Return how many more messages it may keep, where ``cap`` is the window allowed."""
        return self.window(cap) - self.kept_messages

    def position(self) -> int:
        """Return the offset up to which everything was handed to the sink, or told as lost."""
        if self.gaps is None:
            return self.kept[0][0] if self.kept else self.cursor
        return self.gaps.offset_before(self.delivered, self.cursor, self.kept_messages)

    def lag(self, view: TopicView) -> int:
        """Return how many messages wait for it: kept ones, and offered ones not yet decided."""
        return view.edge - self.cursor + self.kept_messages - self.skipped

    def needed_from(self, view: TopicView) -> int:
        """Return the lowest offset that the reader may yet be given from the ring.

        A reader that keeps the oldest may be given its next one, also with a full window.
        """
        window = self.window(view.window_cap)
        if self.policy.wants_newest:
            return next(iter(view.newest.after(self.cursor, window)), view.edge + 1)
        if self.policy.keeps_oldest:
            return self.cursor + 1
        return max(self.cursor, view.edge - window) + 1

    def overflow(self, view: TopicView) -> int:
        """Return how many waiting messages its policy drops when it is settled now.

        0 while it is live: the round that it is about to be given may exceed its window.
        """
        return 0 if self.is_live else self.policy.overflow(self, view)

    def queued(self, view: TopicView) -> int:
        """Return how many offered messages it will still be given if it reads on now."""
        return self.lag(view) - self.overflow(view)

    def is_slow(self, view: TopicView, now_s: float) -> bool:
        """Whether it lagged beyond its window, or dropped, within the last SLOW_MEMORY_S."""
        if now_s - self.last_drop_s < SLOW_MEMORY_S:
            return True
        # A loss that is not counted yet happened when something last moved.
        return now_s - view.moved_s < SLOW_MEMORY_S and self.overflow(view) > 0

    def is_up_to_date(self, view: TopicView) -> bool:
        """Whether nothing waits for it."""
        return self.cursor == view.edge and not self.kept_messages

    def caught_up(self) -> None:
        """Note that nothing waits: a stall is over, and so is the catch-up's larger window."""
        self.backlog_limit = 0
        self.dropped_in_stall = 0
        self.is_half_open = False

    def drops_in_stall(self, view: TopicView) -> int:
        """Return ``dropped_in_stall`` as it is once the reader is settled."""
        return self.dropped_in_stall + self.overflow(view)

    def lose(self, count: int, now_s: float, reason: GapReason) -> None:
        """Count ``count`` messages after the cursor as lost and move past them."""
        self.cursor += count
        self.count_drops(count, now_s)
        if count and self.gaps is not None:
            place = self.delivered + self.kept_messages
            self.gaps.note(place, self.cursor - count + 1, self.cursor, reason)
            if self.is_live:
                self.prepare_gap(self.gaps)

    def count_drops(self, count: int, now_s: float) -> None:
        """Count ``count`` messages as lost; the cursor stays."""
        if count:
            self.dropped += count
            self.last_drop_s = now_s
            # A live reader that loses what the ring gave up before a round does not stall.
            if not self.is_live:
                self.dropped_in_stall += count

    def pass_expired(self, upto: int, count: int) -> None:
        """Move past ``count`` expired messages, the last one ``upto``: they are lost to it.

        With LATEST, superseded ones that were lost before lie between them.
        """
        self.dropped += count
        if self.gaps is not None:
            reason: GapReason = EXPIRED if upto - self.cursor == count else SLOW_CONSUMER
            self.gaps.note(self.delivered, self.cursor + 1, upto, reason)
        self.cursor = upto

    def forfeit(self, view: TopicView, now_s: float) -> int:
        """Give up all that waits: some was lost, the rest is discarded; return how much that is.

        Unlike the policy's `settle` this keeps nothing for the reader any more.
        """
        discarded = self.queued(view)
        self.discarded += discarded
        if overflow := self.overflow(view):
            self.policy.count_losses(self, view, overflow)
            self.count_drops(overflow, now_s)
        self.policy.release_kept(self, view)
        return discarded

    def suspend(self, position: int, edge: int) -> None:
        """Note that its circuit opened: it has its ``position`` and nothing else any more."""
        self.cursor = position
        # The topic adds the cursor at which the reader goes on; then offered is edge - start again.
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

    def begin_anew(self, edge: int) -> None:
        """Forget the topic that the reader has left, whose ``edge`` was offered to it.

        Its counters go on.
        """
        self.start -= edge
        self.cursor = 0
        self.skipped = 0
        self.backlog_limit = 0
        self.dropped_in_stall = 0
        self.is_half_open = False
        if self.gaps is not None:
            self.gaps.forget()
            self.write = self.sink.write

    def prepare_gap(self, gaps: GapLog) -> None:
        """Have the next ``write`` tell of a hole that lies right before what it hands over."""
        if gaps.is_due(self.delivered):
            self.write = self._write_behind_gap

    def _write_behind_gap(self, data: bytes, /) -> None:
        """Stand in for the sink's ``write`` once: tell of the hole that ``data`` follows."""
        # The method is put back before the write, in which the transport may pause this reader.
        self.write = self.sink.write
        if self.gaps:
            gap = self.gaps.take()
            data = self.spelling.notice(gap, gap.last) + data
        self.write(data)
