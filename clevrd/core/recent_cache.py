"""RecentMessageCache: a ring of recent frames, by offset. No readers and no policy here."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import Final, Protocol

from clevrd.core.server_frames import message_id_of

# The cost of a frame besides its bytes: the bytes object's header, the allocator's rounding and
# the ring's pointer (sys.getsizeof(b"") is 33 on CPython 3.11 to 3.13).
FRAME_OVERHEAD_BYTES: Final = 56

# A message's keys, id and timestamp alone are longer, so a bound in bytes is one in frames too:
# a short read from a long ring doesn't look at all of it.
_MIN_FRAME_BYTES: Final = 64

# The object in the place of an evicted frame, until the list is compacted.
_EVICTED: Final = b""


class FramesByOffset(Protocol):
    """An object that has frames by offset: a ring, or a topic."""

    @property
    def first(self) -> int:
        """Offset of the oldest frame there is; of the next one to come where there is none."""

    def frames(self, after: int, upto: int, /) -> list[bytes]:
        """Return the frames of offsets ``after + 1`` to ``upto``, which must be there."""


class RecentMessageCache:
    """Frames under consecutive offsets, oldest first; bounded by count and by bytes.

    Appending never evicts: the topic is told how many frames are too many and evicts them when
    its readers are ready, in the same call. The newest is never too many, however large it is.
    """

    # A list with a moving start instead of a circular array: any range is one C-speed slice for
    # join, and deleting the dead front once it is half of the list costs O(1) per append.
    __slots__ = ("_base", "_frames", "first", "head", "max_bytes", "max_messages", "size_bytes")

    def __init__(self, max_messages: int, max_bytes: int, first: int = 1) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        # Offset of the oldest frame held; of the next one to come while the ring is empty.
        self.first = first
        # Offset of the newest frame ever appended; first - 1 while there was none.
        self.head = first - 1
        # Frames held, with FRAME_OVERHEAD_BYTES each.
        self.size_bytes = 0
        self._frames: list[bytes] = []
        # Offset of _frames[0]; the entries before ``first`` were evicted.
        self._base = first

    def __len__(self) -> int:
        """Return how many frames are held."""
        return self.head - self.first + 1

    def extend(self, frames: list[bytes]) -> int:
        """Hold ``frames`` under the offsets after ``head``; return how many first ones must go."""
        self._frames += frames
        count = len(frames)
        self.size_bytes = size = (
            self.size_bytes + sum(map(len, frames)) + FRAME_OVERHEAD_BYTES * count
        )
        self.head = head = self.head + count
        over = head + 1 - self.first - self.max_messages
        if size > self.max_bytes:
            return max(over, self.oldest_over(self.max_bytes, head - 1))
        return over if over > 0 else 0

    def oldest_over(self, max_bytes: int, upto: int) -> int:
        """Return how many of the oldest frames, none after offset ``upto``, are over the bound."""
        start = self.first - self._base
        stop = upto + 1 - self._base
        index = start
        over_bytes = self.size_bytes - max_bytes
        while over_bytes > 0 and index < stop:
            over_bytes -= len(self._frames[index]) + FRAME_OVERHEAD_BYTES
            index += 1
        return index - start

    def evict(self, count: int) -> None:
        """Let go of the ``count`` oldest frames."""
        frames = self._frames
        index = self.first - self._base
        self.first += count
        dead = index + count
        if count == 1:
            # One frame goes for every message that is published alone to a full ring.
            self.size_bytes -= len(frames[index]) + FRAME_OVERHEAD_BYTES
            frames[index] = _EVICTED
        else:
            self.size_bytes -= sum(map(len, frames[index:dead])) + FRAME_OVERHEAD_BYTES * count
            frames[index:dead] = [_EVICTED] * count
        if dead * 2 > len(frames):
            del frames[:dead]
            self._base = self.first

    def frames(self, after: int, upto: int) -> list[bytes]:
        """Return the frames of offsets ``after + 1`` to ``upto``.

        ``after`` must not lie before ``first - 1``: the caller has settled what was lost.
        """
        return self._frames[after + 1 - self._base : upto + 1 - self._base]

    def last_before(self, message_id: bytes, *, or_at: bool) -> int:
        """Return the offset of the newest message before ``message_id``, ``or_at`` it.

        ``first - 1`` when none that is held is. Ids rise with offsets.
        """
        search = bisect_right if or_at else bisect_left
        start = self.first - self._base
        return self._base + search(self._frames, message_id, lo=start, key=message_id_of) - 1

    def take(self, after: int, upto: int, max_bytes: int) -> list[bytes]:
        """Return as many ``frames`` as fit ``max_bytes``, and at least one when there is one."""
        frames = self.frames(after, min(upto, after + max_bytes // _MIN_FRAME_BYTES + 1))
        if len(frames) < 2 or sum(map(len, frames)) <= max_bytes:
            return frames
        ends = list(accumulate(map(len, frames)))
        return frames[: max(1, bisect_right(ends, max_bytes))]
