"""Budgets: bytes that several parties have in common. No bytes are held here, only counted.

Each party is guaranteed a part. It may take more while the others leave it idle, and gives that
back first when another needs what it is guaranteed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

# A party that has to give back gives so much of the whole pool in addition, as far as it is over
# its guarantee, so that the search for what can be given is not paid for each message.
_SPARE_SHARE: Final = 1 / 16


class Holder(Protocol):
    """An object that holds bytes of a budget."""

    def give_back(self, wanted_bytes: int, /) -> int:
        """Let go of ``wanted_bytes``, or of all there are; return how many came free."""


class Pool:
    """Bytes that several budgets have in common."""

    __slots__ = ("_budgets", "left_bytes", "max_bytes", "on_given_back", "on_refused")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        # Bytes that nobody has taken; changed by budgets only. Negative after a budget that was
        # moved here brought more than there was room for.
        self.left_bytes = max_bytes
        # A dict as an ordered set; changed by `Budget` only.
        self._budgets: dict[Budget, None] = {}
        # Called with a budget that has given back so many bytes to another one, and with a budget
        # whose owner could not take what it needs. Set by the owner of the pool.
        self.on_given_back: Callable[[Budget, int], None] = _tell_nobody
        self.on_refused: Callable[[Budget], None] = _tell_nobody

    def budget(self, guaranteed_bytes: int) -> Budget:
        """Return the budget of one more party."""
        budget = Budget(guaranteed_bytes, self)
        self._budgets[budget] = None
        return budget

    def remove(self, budget: Budget) -> None:
        """Forget the budget of a party that is gone; it holds nothing any more."""
        del self._budgets[budget]

    def recall(self, wanted_bytes: int) -> bool:
        """Make parties that are over their guarantee give back; return whether so much is left.

        The party that is furthest over its guarantee, in proportion, gives first.
        """
        aim_bytes = wanted_bytes + int(self.max_bytes * _SPARE_SHARE)
        borrowers = [budget for budget in self._budgets if budget.borrowed_bytes > 0]
        for budget in sorted(borrowers, key=_over, reverse=True):
            left_bytes = self.left_bytes
            budget.give_back(min(budget.borrowed_bytes, aim_bytes - left_bytes))
            if self.left_bytes > left_bytes:
                self.on_given_back(budget, self.left_bytes - left_bytes)
            if self.left_bytes >= wanted_bytes:
                return True
        return False


class Budget:
    """The part of a pool that one party has: what it is guaranteed, and what it has taken."""

    __slots__ = ("guaranteed_bytes", "holders", "pool", "taken_bytes")

    def __init__(self, guaranteed_bytes: int, pool: Pool | None = None) -> None:
        """Make a budget; without a ``pool`` it is all there is, and nobody else takes of it."""
        self.guaranteed_bytes = guaranteed_bytes
        self.pool = Pool(guaranteed_bytes) if pool is None else pool
        self.taken_bytes = 0
        # Objects that may hold some of ``taken_bytes``; they add and remove themselves. A dict as
        # an ordered set.
        self.holders: dict[Holder, None] = {}

    @property
    def left_bytes(self) -> int:
        """Bytes of the pool that nobody has taken."""
        return self.pool.left_bytes

    @property
    def borrowed_bytes(self) -> int:
        """Bytes taken beyond the guarantee; negative while it is not reached."""
        return self.taken_bytes - self.guaranteed_bytes

    def take(self, size_bytes: int) -> bool:
        """Take so many bytes; return False, and take nothing, where that can't be."""
        pool = self.pool
        if size_bytes > pool.left_bytes and not (
            self.taken_bytes + size_bytes <= self.guaranteed_bytes and pool.recall(size_bytes)
        ):
            return False
        pool.left_bytes -= size_bytes
        self.taken_bytes += size_bytes
        return True

    def give(self, size_bytes: int) -> None:
        """Note that so many bytes, which were taken, are free again."""
        self.pool.left_bytes += size_bytes
        self.taken_bytes -= size_bytes

    def give_back(self, wanted_bytes: int) -> None:
        """Have the holders let go of ``wanted_bytes``, one holder after the other."""
        for holder in list(self.holders):
            if wanted_bytes <= 0:
                return
            wanted_bytes -= holder.give_back(wanted_bytes)

    def hand_over(self, size_bytes: int, other: Budget) -> None:
        """Note that so many of the bytes taken are another party's from now on."""
        self.give(size_bytes)
        other.pool.left_bytes -= size_bytes
        other.taken_bytes += size_bytes


def _tell_nobody(*_: object) -> None:
    pass


def _over(budget: Budget) -> float:
    """Return what a budget has taken as a multiple of what it is guaranteed."""
    return budget.taken_bytes / max(budget.guaranteed_bytes, 1)
