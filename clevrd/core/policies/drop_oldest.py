"""DropOldest: the cursor moves to the window's beginning. Nothing is kept, so a stall is free."""

from __future__ import annotations

from clevrd.core.drop_strategy import DropStrategy
from clevrd.core.notices import RETENTION, SLOW_CONSUMER
from clevrd.core.policies.policy import Policy, Reader, TopicView, readable_upto


class DropOldest(Policy):
    """A queue that makes room for the newest."""

    __slots__ = ()

    strategy = DropStrategy.DROP_OLDEST

    def settle(self, reader: Reader, view: TopicView, now_s: float) -> None:
        """Move the cursor past what is beyond the window, or no longer there."""
        overflow = self.overflow(reader, view)
        if overflow:
            beyond = self.count_losses(reader, view, overflow)
            reader.lose(overflow, now_s, SLOW_CONSUMER if beyond > 0 else RETENTION)

    def take(self, reader: Reader, view: TopicView, max_bytes: int) -> list[bytes]:
        """Return what follows the cursor."""
        after, spelling = reader.cursor, reader.spelling
        upto = readable_upto(view, after, min(view.edge, after + spelling.max_messages))
        frames = view.frames(after, upto, max_bytes)
        reader.cursor = after + len(frames)
        return spelling.texts(frames, after + 1)
