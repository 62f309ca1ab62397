"""KeepOldest: the first messages of a window are kept, and later ones refused.

`drop_newest` is this policy; `circuit_breaker` is the same with a circuit. The topic holds the
frames (core/kept_frames); a reader holds runs of offsets.
"""

from __future__ import annotations

from collections.abc import Sequence

from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.kept_frames import KeptFrames
from clevrd.core.notices import RETENTION, SLOW_CONSUMER
from clevrd.core.policies.policy import Policy, Reader, TopicView, readable_upto


class KeepOldest(Policy):
    """A queue that refuses what comes while it is full."""

    __slots__ = ("has_circuit", "strategy")

    keeps_oldest = True

    def __init__(self, strategy: DropStrategy, *, has_circuit: bool) -> None:
        self.strategy = strategy
        self.has_circuit = has_circuit

    def settle(self, reader: Reader, view: TopicView, now_s: float) -> None:
        """Keep what fits the window, and lose what follows; lose what is no longer there."""
        overflow = self.overflow(reader, view)
        if overflow == 0:
            return
        beyond = self.count_losses(reader, view, overflow)
        if overflow == view.edge - reader.cursor:
            reader.lose(overflow, now_s, SLOW_CONSUMER if beyond > 0 else RETENTION)
            return
        # Frames are kept before the ring evicts them, so that only what was evicted before this
        # reader lagged, or before it was offered, comes too late.
        evicted = max(0, min(view.edge, view.first - 1) - reader.cursor)
        reader.lose(evicted, now_s, RETENTION)
        if overflow > evicted:
            _keep_upto(reader, view, view.edge - (overflow - evicted), now_s)

    def take(self, reader: Reader, view: TopicView, max_bytes: int) -> list[bytes]:
        """Return what is kept, and once that is read what follows the cursor."""
        spelling = reader.spelling
        if reader.kept:
            after = reader.kept[0][0]
            frames = _take_kept(reader, view.kept, max_bytes)
        else:
            after = reader.cursor
            upto = readable_upto(view, after, min(view.edge, after + spelling.max_messages))
            frames = view.frames(after, upto, max_bytes)
            reader.cursor = after + len(frames)
        return spelling.texts(frames, after + 1)

    def trim_kept(self, reader: Reader, view: TopicView, now_s: float) -> None:
        """Refuse the newest of what is kept until it fits the window, which has shrunk."""
        if not reader.kept:
            return
        excess = reader.kept_messages - reader.window(view.window_cap)
        if excess <= 0:
            return
        reader.kept_messages -= excess
        view.losses.slow_consumer += excess
        reader.count_drops(excess, now_s)
        if reader.gaps is not None:
            place = reader.delivered + reader.kept_messages
            reader.gaps.refuse_newest(place, excess, reader.cursor)
        while excess:
            *others, (after, upto) = reader.kept
            end = max(after, upto - excess)
            excess -= upto - end
            if end > after:
                view.kept.cut(end, upto)
                others.append((after, end))
            else:
                view.kept.release(after, upto)
            reader.kept = tuple(others)

    def release_kept(self, reader: Reader, view: TopicView) -> None:
        """Let go of all that is kept for the reader."""
        for after, upto in reader.kept:
            view.kept.release(after, upto)
        reader.kept = ()
        reader.kept_messages = 0


def keep(reader: Reader, run: tuple[int, int]) -> None:
    """Note that the topic holds for ``reader`` a run that begins after its cursor."""
    after, upto = run
    reader.kept = (*reader.kept, run) if reader.kept else (run,)
    reader.kept_messages += upto - after
    reader.cursor = upto


def refuse(reader: Reader, view: TopicView, unpaid: int, now_s: float) -> None:
    """Lose what comes after the cursor: the budget couldn't pay for ``unpaid`` of it."""
    lost = view.edge - reader.cursor
    view.losses.memory += unpaid
    view.losses.slow_consumer += lost - unpaid
    reader.lose(lost, now_s, SLOW_CONSUMER)
    view.hasten_alarm(reader)


def give_back(readers: Sequence[Reader], view: TopicView, last: int, now_s: float) -> None:
    """Lose what is kept behind offset ``last`` for readers that keep the same runs.

    Another tenant needs the memory.
    """
    left: list[tuple[int, int]] = []
    lost = 0
    for after, upto in readers[0].kept:
        end = max(after, min(upto, last))
        lost += upto - end
        if end > after:
            view.kept.cut(end, upto, len(readers))
            left.append((after, end))
        else:
            view.kept.release(after, upto, len(readers))
    if not lost:
        return
    kept = tuple(left)
    view.losses.memory += lost * len(readers)
    for reader in readers:
        reader.kept = kept
        reader.kept_messages -= lost
        reader.count_drops(lost, now_s)
        if reader.gaps is not None:
            place = reader.delivered + reader.kept_messages
            reader.gaps.refuse_newest(place, lost, reader.cursor)
        if reader.alarm:
            view.hasten_alarm(reader)


def _keep_upto(reader: Reader, view: TopicView, upto: int, now_s: float) -> None:
    """Hold the frames after the cursor up to offset ``upto``, and lose the rest.

    Frames that the budget can't pay for are refused like any newest.
    """
    paid = upto
    if upto > reader.cursor:
        paid = view.kept.hold(view, reader.cursor, upto)
        if paid > reader.cursor:
            keep(reader, (reader.cursor, paid))
    # Want of memory has the same reason as a full window: lagging readers alone need any.
    reader.lose(view.edge - reader.cursor, now_s, SLOW_CONSUMER)
    if paid < upto:
        view.losses.memory += upto - paid
        view.hasten_alarm(reader)


def _take_kept(reader: Reader, kept: KeptFrames, max_bytes: int) -> list[bytes]:
    """Return frames of the oldest run that the reader holds, and let go of them.

    The frames are of one run only: holes part runs, and messages behind a hole are a write of their
    own.
    """
    (after, upto), *others = reader.kept
    frames = kept.take(after, min(upto, after + reader.spelling.max_messages), max_bytes)
    end = after + len(frames)
    if end == upto:
        kept.release(after, upto)
        reader.kept = tuple(others)
    else:
        kept.advance(after, end)
        reader.kept = ((end, upto), *others)
    reader.kept_messages -= len(frames)
    return frames
