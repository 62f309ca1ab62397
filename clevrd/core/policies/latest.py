"""Latest: the newest message of each key is given, and what was superseded is dropped.

Which messages are the newest, the topic knows for all such readers (core/newest_by_key).
"""

from __future__ import annotations

from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.expiring import Expiring
from clevrd.core.notices import RETENTION, SLOW_CONSUMER, GapReason
from clevrd.core.policies.policy import Policy, Reader, TopicView


class Latest(Policy):
    """A queue with one place for each key."""

    __slots__ = ()

    strategy = DropStrategy.LATEST
    wants_newest = True

    def overflow(self, reader: Reader, view: TopicView) -> int:
        """Return how many waiting messages are superseded, or no longer there."""
        return reader.lag(view) - _waiting(reader, view)[0]

    def settle(self, reader: Reader, view: TopicView, now_s: float) -> None:
        """Move the cursor before the first message that is still wanted."""
        count, first = _waiting(reader, view)
        overflow = reader.lag(view) - count
        if overflow:
            gone = overflow - self.count_losses(reader, view, overflow)
            reader.count_drops(overflow, now_s)
            _skip_to(reader, first - 1 if count else view.edge, gone)
            reader.skipped = view.edge - reader.cursor - count

    def skip_expired(self, reader: Reader, view: TopicView, expiring: Expiring) -> None:
        """Move past the first of the newest messages, as far as they have expired."""
        offsets = view.newest.after(reader.cursor, reader.window(view.window_cap))
        expired = next(
            (place for place, each in enumerate(offsets) if not expiring.has_expired(each)),
            len(offsets),
        )
        if expired:
            view.losses.expired += expired
            is_all = expired == len(offsets)
            reader.pass_expired(view.edge if is_all else offsets[expired] - 1, expired)
            reader.skipped = view.edge - reader.cursor - (len(offsets) - expired)

    def take(self, reader: Reader, view: TopicView, max_bytes: int) -> list[bytes]:
        """Return the newest of each key, each behind the gap that it follows.

        Gaps are told within a write here: there can be one before every message.
        """
        offsets = view.newest.after(reader.cursor, reader.window(view.window_cap))
        spelling, gaps, expiring = reader.spelling, reader.gaps, view.expiring
        texts: list[bytes] = []
        for offset in offsets[: spelling.max_messages]:
            if expiring is not None and expiring.has_expired(offset):
                break
            (text,) = spelling.texts(view.frames(offset - 1, offset), offset)
            if gaps is not None and offset > reader.cursor + 1:
                gap = gaps.between(reader.cursor, offset, SLOW_CONSUMER)
                text = spelling.told(gap, gap.last) + text
            max_bytes -= len(text)
            if max_bytes < 0 and texts:
                break
            texts.append(text)
            reader.cursor = offset
        reader.skipped = view.edge - reader.cursor - (len(offsets) - len(texts))
        return texts

    def count_losses(self, reader: Reader, view: TopicView, overflow: int) -> int:
        """Count ``overflow`` lost messages by reason; return how many were superseded."""
        # Newest of their keys as of now, and no longer there.
        gone = _gone(reader, view)
        view.losses.retention += gone
        view.losses.slow_consumer += overflow - gone
        return overflow - gone

    def pass_over(self, reader: Reader, view: TopicView) -> int:
        """Skip what of the backlog is superseded."""
        count, first = _waiting(reader, view)
        passed = reader.lag(view) - count
        _skip_to(reader, first - 1 if count else view.edge, gone=0)
        reader.skipped = view.edge - reader.cursor - count
        return passed


def _waiting(reader: Reader, view: TopicView) -> tuple[int, int]:
    """Return how many messages the reader is to be given, and the first one's offset."""
    after = max(reader.cursor, view.first - 1)
    return view.newest.waiting(after, reader.window(view.window_cap))


def _gone(reader: Reader, view: TopicView) -> int:
    """Return how many messages more the reader would be given if they were still there."""
    if view.first - 1 <= reader.cursor:
        return 0
    wanted, _ = view.newest.waiting(reader.cursor, reader.window(view.window_cap))
    return wanted - _waiting(reader, view)[0]


def _skip_to(reader: Reader, before: int, gone: int) -> None:
    """Move the cursor ``before`` the first message that waits.

    Among the messages between, ``gone`` were newest that the ring gave up: they lie before all that
    waits.
    """
    hole = before - reader.cursor
    if reader.gaps is not None and hole:
        reason: GapReason = RETENTION if hole == gone else SLOW_CONSUMER
        reader.gaps.note(reader.delivered, reader.cursor + 1, before, reason)
    reader.cursor = before
