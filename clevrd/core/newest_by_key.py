"""NewestByKey: the newest offered message of each key. No readers and no policy here."""

from __future__ import annotations

from bisect import bisect_right
from itertools import islice
from typing import Final

from clevrd.core.recent_cache import FramesByOffset
from clevrd.core.server_frames import key_of

# Over twice the limit by this much the oldest keys are forgotten, all at once.
_SLACK: Final = 64


class NewestByKey:
    """Offsets of the newest message of each key, those without a key taken as one.

    The map is kept while readers with the policy `latest` lag, and for all of them together: each
    is still to be given the offsets behind its cursor. Keys are read from the frames, so that no
    other reader pays for them.
    """

    # A dict in the order in which its keys were last seen, so its offsets only rise.
    __slots__ = ("_newest", "_offsets", "limit", "readers", "since")

    def __init__(self, edge: int) -> None:
        self._newest: dict[bytes, int] = {}
        # The values of ``_newest``; None when they have changed since.
        self._offsets: list[int] | None = None
        # Every key seen after this offset is known, and no reader asks for older ones.
        self.since = edge
        # The most offsets that a reader asks for: older ones may be forgotten. Only rises, with the
        # readers that reach back and with the topic's window.
        self.limit = 0
        # How many readers it is kept for; changed by the topic as these begin and cease to lag.
        self.readers = 0

    def __len__(self) -> int:
        """Return how many keys are known."""
        return len(self._newest)

    def note(self, first: int, frames: list[bytes]) -> None:
        """Take in the messages from offset ``first`` on, which follow all that are known."""
        newest = self._newest
        forget = newest.pop
        for offset, frame in enumerate(frames, first):
            key = key_of(frame)
            forget(key, None)
            newest[key] = offset
        self._offsets = None
        if len(newest) > 2 * self.limit + _SLACK:
            self._forget_oldest()

    def reach_back(self, source: FramesByOffset, after: int, window: int) -> None:
        """Take in what ``source`` has behind offset ``after``, for a reader with this window."""
        self.limit = max(self.limit, window)
        if after >= self.since or len(self._newest) >= window:
            return
        # The ring may have given up all of a round that is still being written.
        start = min(max(after, source.first - 1), self.since)
        older: dict[bytes, int] = {}
        frames = source.frames(start, self.since) if start < self.since else []
        for offset, frame in enumerate(frames, start + 1):
            key = key_of(frame)
            older.pop(key, None)
            older[key] = offset
        for key in older.keys() & self._newest.keys():
            del older[key]
        self._newest = {**older, **self._newest}
        self._offsets = None
        self.since = after

    def waiting(self, after: int, window: int) -> tuple[int, int]:
        """Return how many offsets lie behind ``after``, ``window`` at most, and the first of them.

        The newest are counted; the first is 0 where there is none.
        """
        offsets = self._rising()
        index = max(bisect_right(offsets, after), len(offsets) - window)
        count = len(offsets) - index
        return count, offsets[index] if count else 0

    def after(self, after: int, window: int) -> list[int]:
        """Return the offsets that `waiting` counts."""
        offsets = self._rising()
        return offsets[max(bisect_right(offsets, after), len(offsets) - window) :]

    def _rising(self) -> list[int]:
        # Made anew once a round at most, about 10 us for 1,000 keys, and searched by every reader.
        if self._offsets is None:
            self._offsets = list(self._newest.values())
        return self._offsets

    def _forget_oldest(self) -> None:
        excess = len(self._newest) - self.limit
        items = iter(self._newest.items())
        for _, offset in islice(items, excess):
            self.since = max(self.since, offset)
        self._newest = dict(items)
