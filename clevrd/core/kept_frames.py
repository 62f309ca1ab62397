"""KeptFrames: frames that outlive the ring because lagging readers keep them. No policy here.

Each frame is held, and paid for, once, however many readers keep it. Holders are counted by blocks
of consecutive offsets, so that thousands of readers that stall over one window cost a few additions
each.
"""

from __future__ import annotations

from typing import Final

from clevrd.core.budgets import Budget
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES, FramesByOffset

# 128 messages: a window of 1,000 is nine blocks to count, and a reader holds on to at most a
# block of what it has read already.
_BLOCK_BITS: Final = 7
BLOCK_MESSAGES: Final = 1 << _BLOCK_BITS
_IN_BLOCK: Final = BLOCK_MESSAGES - 1

# Stands where no frame is kept; frames are never empty.
_NONE: Final = b""


class _Block:
    """Frames of consecutive offsets, of which some are kept, and how many runs reach into it."""

    __slots__ = ("bottom", "frames", "holds", "size_bytes", "top")

    def __init__(self) -> None:
        self.frames = [_NONE] * BLOCK_MESSAGES
        # Bytes that were paid for ``frames``.
        self.size_bytes = 0
        self.holds = 0
        # All offsets from ``bottom`` to ``top`` are kept; others may be too.
        self.bottom = 0
        self.top = -1


class KeptFrames:
    """One topic's kept frames, by offset, from when they are held until the last holder lets go.

    Each holder remembers its runs (after, upto): the offsets ``after + 1`` to ``upto``. Frames that
    several readers keep are taken from the budget once.
    """

    __slots__ = ("_blocks", "budget")

    def __init__(self, budget: Budget) -> None:
        # Changes in `move` only.
        self.budget = budget
        self._blocks: dict[int, _Block] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of the frames that are held, as taken from the budget."""
        return sum(block.size_bytes for block in self._blocks.values())

    def move(self, budget: Budget) -> None:
        """Have the frames counted in another ``budget`` from now on."""
        self.budget.hand_over(self.size_bytes, budget)
        self.budget = budget

    def last_without(self, wanted_bytes: int) -> int:
        """Return the offset behind which frames of ``wanted_bytes`` are held, or all there are."""
        last = 0
        for number in sorted(self._blocks, reverse=True):
            last = (number << _BLOCK_BITS) - 1
            wanted_bytes -= self._blocks[number].size_bytes
            if wanted_bytes <= 0:
                break
        return last

    def hold(self, source: FramesByOffset, after: int, upto: int, holders: int = 1) -> int:
        """Keep what ``source`` has of a run for so many holders; return how far the budget went.

        The offset returned ends the run that each of them holds now; ``after`` is nothing.
        """
        offset = after + 1
        while offset <= upto:
            number = offset >> _BLOCK_BITS
            last = min(upto, offset | _IN_BLOCK)
            block = self._blocks.get(number)
            if block is None:
                block = self._blocks[number] = _Block()
            if offset < block.bottom or last > block.top:
                lacks = block.top + 1 if block.bottom <= offset <= block.top else offset
                paid = self._fill(block, source, lacks, last)
                if paid < offset:
                    self._drop_unheld(number, block)
                    return paid
                if paid < last:
                    block.holds += holders
                    return paid
            block.holds += holders
            offset = last + 1
        return upto

    def release(self, after: int, upto: int, holders: int = 1) -> None:
        """Let go of a run that each of so many holders holds."""
        if after < upto:
            self._release(after + 1 >> _BLOCK_BITS, (upto >> _BLOCK_BITS) + 1, holders)

    def advance(self, after: int, to: int) -> None:
        """Let go of the front of a run, which goes on after ``to``."""
        self._release(after + 1 >> _BLOCK_BITS, to + 1 >> _BLOCK_BITS, 1)

    def cut(self, to: int, upto: int, holders: int = 1) -> None:
        """Let go of the end of a run, which now ends with ``to``."""
        self._release((to >> _BLOCK_BITS) + 1, (upto >> _BLOCK_BITS) + 1, holders)

    def take(self, after: int, upto: int, max_bytes: int) -> list[bytes]:
        """Return as many frames of a run that is held as fit ``max_bytes``, and at least one."""
        frames: list[bytes] = []
        for offset in range(after + 1, upto + 1):
            frame = self._blocks[offset >> _BLOCK_BITS].frames[offset & _IN_BLOCK]
            max_bytes -= len(frame)
            if max_bytes < 0 and frames:
                break
            frames.append(frame)
        return frames

    def _fill(self, block: _Block, source: FramesByOffset, first: int, last: int) -> int:
        """Keep the offsets from ``first`` to ``last`` in ``block`` as far as there is budget."""
        budget = self.budget
        for offset, frame in enumerate(source.frames(first - 1, last), first):
            if block.frames[offset & _IN_BLOCK]:
                continue
            size_bytes = len(frame) + FRAME_OVERHEAD_BYTES
            if not budget.take(size_bytes):
                budget.pool.on_refused(budget)
                last = offset - 1
                break
            block.size_bytes += size_bytes
            block.frames[offset & _IN_BLOCK] = frame
        if first <= last:
            is_joined = first <= block.top + 1 and last >= block.bottom - 1
            block.bottom = min(first, block.bottom) if is_joined else first
            block.top = max(last, block.top) if is_joined else last
        return last

    def _release(self, first_block: int, end_block: int, holders: int) -> None:
        for number in range(first_block, end_block):
            block = self._blocks[number]
            block.holds -= holders
            if not block.holds:
                self._drop_unheld(number, block)

    def _drop_unheld(self, number: int, block: _Block) -> None:
        if block.holds == 0:
            self.budget.give(block.size_bytes)
            del self._blocks[number]
