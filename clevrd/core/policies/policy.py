"""Policy: what a lagging reader loses, and what it is given next. A policy has no state.

A policy decides from the numbers of a reader (`Reader`) and from what its topic shows of itself
(`TopicView`), and moves the reader's numbers. Each policy behaves message for message like the
bounded queue it stands for (tests/core/test_policies.py).
"""

from __future__ import annotations

from typing import Protocol

from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.expiring import Expiring
from clevrd.core.gap_log import GapLog
from clevrd.core.kept_frames import KeptFrames
from clevrd.core.newest_by_key import NewestByKey
from clevrd.core.notices import GapReason
from clevrd.core.stream_forms import Spelling


class Losses:
    """Messages that readers of one topic lost, by reason; the numbers only rise."""

    __slots__ = ("expired", "memory", "retention", "slow_consumer")

    def __init__(self) -> None:
        # Beyond the reader's window.
        self.slow_consumer = 0
        # Inside the window, but the ring had to give them up first.
        self.retention = 0
        # Refused by a reader that keeps the oldest because the KeptBudget was spent.
        self.memory = 0
        # Their time to live was over before the reader could be given them.
        self.expired = 0

    @property
    def total(self) -> int:
        """Messages lost for any reason."""
        return self.slow_consumer + self.retention + self.memory + self.expired


class TopicView(Protocol):
    """A topic as its reader sees it."""

    @property
    def first(self) -> int:
        """Offset of the oldest message that can be read; of the next one where there is none."""

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
        """The frames that readers keep although the ring may have moved on."""

    @property
    def newest(self) -> NewestByKey:
        """The newest message of each key, for every lagging LATEST."""

    @property
    def moved_s(self) -> float:
        """When readers were last offered something, or the ring last gave something up."""

    @property
    def expiring(self) -> Expiring | None:
        """The messages that expire; None in a topic without such."""

    def frames(self, after: int, upto: int, max_bytes: int | None = None, /) -> list[bytes]:
        """Return the messages behind offset ``after`` up to ``upto``, as far as they fit."""

    def hasten_alarm(self, reader: Reader, /) -> None:
        """Note that ``reader`` dropped before its window was full: its circuit may open sooner."""


class Reader(Protocol):
    """The numbers of a subscriber that policies read and move. Their meaning: core/subscriber."""

    cursor: int
    delivered: int
    kept: tuple[tuple[int, int], ...]
    kept_messages: int
    skipped: int
    gaps: GapLog | None
    spelling: Spelling
    alarm: int

    def window(self, cap: int) -> int:
        """Return how many messages it may lag, where ``cap`` is what is allowed now."""

    def room(self, cap: int) -> int:
        """Return how many more messages it may keep, where ``cap`` is the window allowed."""

    def lag(self, view: TopicView) -> int:
        """Return how many messages wait for it."""

    def lose(self, count: int, now_s: float, reason: GapReason) -> None:
        """Count ``count`` messages after the cursor as lost and move past them."""

    def count_drops(self, count: int, now_s: float) -> None:
        """Count ``count`` messages as lost; the cursor stays."""

    def pass_expired(self, upto: int, count: int) -> None:
        """Move past ``count`` expired messages, the last one ``upto``."""


def readable_upto(view: TopicView, after: int, upto: int) -> int:
    """Return the offset up to which no message behind ``after`` has expired, ``upto`` at most."""
    expiring = view.expiring
    if expiring is None:
        return upto
    expired = expiring.next_expired(after, upto)
    return expired - 1 if expired else upto


class Policy:
    """The part that all policies share; the defaults suit a reader that has nothing but a cursor.

    `overflow` and `settle` are for lagging readers: a live one is about to be given a round, which
    may exceed its window.
    """

    __slots__ = ()

    strategy: DropStrategy
    # The topic keeps frames for its readers before the ring gives them up.
    keeps_oldest = False
    # The topic knows the newest message of each key while readers with this policy lag.
    wants_newest = False
    # Too many drops in one stall open the reader's circuit.
    has_circuit = False

    def overflow(self, reader: Reader, view: TopicView) -> int:
        """Return how many waiting messages are dropped when the reader is settled now."""
        edge, cursor = view.edge, reader.cursor
        overflow = edge - cursor + reader.kept_messages - reader.window(view.window_cap)
        evicted = view.first - 1 - cursor
        if evicted > overflow:
            overflow = min(evicted, edge - cursor)
        return overflow if overflow > 0 else 0

    def settle(self, reader: Reader, view: TopicView, now_s: float) -> None:
        """Drop what there is to drop, given what has been offered so far.

        Settling is lazy and idempotent: nothing happens at publish time, and a second call changes
        nothing. A call must come before every `take`, before the window grows and after the window
        has shrunk.
        """
        raise NotImplementedError

    def skip_expired(self, reader: Reader, view: TopicView, expiring: Expiring) -> None:
        """Move past messages behind the cursor that have expired, and count them.

        A reader can't help it: it is not slow for that, and no circuit opens. Messages that are
        kept for a reader beyond the ring come first, and are given though they may have expired.
        """
        if reader.kept:
            return
        upto = expiring.end_of_expired(reader.cursor, view.edge)
        count = upto - reader.cursor
        if count:
            view.losses.expired += count
            reader.pass_expired(upto, count)

    def take(self, reader: Reader, view: TopicView, max_bytes: int) -> list[bytes]:
        """Return the next messages in the reader's wire form, oldest first, and move past them.

        The reader's ``spelling`` joins them. Call `settle` first. There is at least one message
        unless nothing waits. The caller counts the messages as delivered.
        """
        raise NotImplementedError

    def count_losses(self, reader: Reader, view: TopicView, overflow: int) -> int:
        """Count ``overflow`` lost messages by reason; return how far they are beyond the window."""
        beyond = view.edge - reader.cursor + reader.kept_messages - reader.window(view.window_cap)
        losses = view.losses
        if beyond == overflow:
            losses.slow_consumer += overflow
        else:
            losses.slow_consumer += max(0, beyond)
            losses.retention += overflow - max(0, beyond)
        return beyond

    def pass_over(self, reader: Reader, view: TopicView) -> int:
        """Skip unwanted messages of a new backlog, uncounted; return how many they are.

        Skipped messages were never offered to the reader: a reader that joins is not slow.
        """
        return 0

    def trim_kept(self, reader: Reader, view: TopicView, now_s: float) -> None:
        """Refuse what was kept beyond the window, which has shrunk."""

    def release_kept(self, reader: Reader, view: TopicView) -> None:
        """Let go of all that is kept for the reader."""
