"""Which checkpoints are kept, for engines that keep several whole ones. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from clevrd.journal.base import Checkpoint

# Checkpoints that are kept.
KEPT: Final = 5
# Bytes of each log's newest records that a node may read at its start to fill its rings; the
# checkpoints are kept so that one lies about there.
FILL_BYTES: Final = 32 << 20
# A checkpoint that any node has saved within so many milliseconds will do for all.
_FRESH_MS: Final = 8_000


class Saved(Protocol):
    """A checkpoint that is kept, as far as it says whose it is."""

    @property
    def epoch(self) -> str:
        """The partition's epoch in it."""

    @property
    def saved_ms(self) -> int:
        """When it was saved, in milliseconds since 1970, by the engine's clock."""

    @property
    def saver(self) -> str:
        """The node that saved it."""


def will_do(newest: Saved, checkpoint: Checkpoint, saver: str, now_ms: int) -> bool:
    """Return whether another node has just saved a checkpoint that will do for ``saver``."""
    is_fresh = newest.saved_ms > now_ms - _FRESH_MS
    is_same = newest.epoch == checkpoint.partition_epoch
    return is_fresh and is_same and newest.saver != saver


def to_forget(added: Sequence[int], now_added: int, reach: int) -> list[int]:
    """Return which checkpoints to forget, so that KEPT are left; never the newest.

    The oldest one is kept as long as it is needed to read the last ``reach`` entries again, since
    a node fills its rings from there. The others are spread between it and the newest.

    Args:
        added: how many entries there had ever been at each checkpoint, newest first.
        now_added: the same as it is now.
    """
    left = list(range(len(added)))
    gone = []
    while len(left) > KEPT:
        if now_added - added[left[-2]] >= reach:
            gone.append(left.pop())
            continue
        gaps = [
            (added[left[place - 1]] - added[left[place + 1]], place)
            for place in range(1, len(left) - 1)
        ]
        gone.append(left.pop(min(gaps)[1]))
    return gone
