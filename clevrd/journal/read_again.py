"""Which records of those that a node reads its readers know already. Pure.

A node that goes back to a checkpoint reads messages again. Its readers must be given none of them
twice, and none in an epoch that they have left.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

# Epochs whose names are known. They come with failovers, so these are years of them.
_REMEMBERED_EPOCHS: Final = 1_024


class ReadAgain:
    """The epochs of one partition that this process has read, in whatever order."""

    __slots__ = ("_epochs", "_floor", "is_behind", "readers_epoch")

    def __init__(self, *, is_complete: bool) -> None:
        # The epoch that the partition's readers are in. Only its messages are delivered.
        self.readers_epoch = ""
        # All epochs that began behind this position are known, since all was read from there on;
        # None as long as nothing is known.
        self._floor: int | None = 0 if is_complete else None
        self._epochs: OrderedDict[str, None] = OrderedDict()
        # The node went back to before the floor. It can't tell there whether an epoch that it does
        # not know is older than the readers' or newer.
        self.is_behind = False

    def begin_epoch(self, name: str, position: int) -> None:
        """Note that the record at ``position`` was read, and begins the epoch ``name``."""
        if self._floor is None:
            self._floor = position
        if not self.is_behind and name not in self._epochs:
            self._enter(name)

    def go_to(self, name: str, position: int) -> None:
        """Note that reading goes on behind ``position``, in the epoch ``name``; empty: not known.

        A checkpoint behind the floor in an epoch that is not known is newer than all that was read:
        it is there since records were lost that had been read, or were removed unread.
        """
        if self._floor is None or (not self._epochs and name):
            self._floor = position
        self.is_behind = position < self._floor
        if name and not self.is_behind and name not in self._epochs:
            self._floor = position
            self._enter(name)

    def arrive(self, name: str, position: int) -> None:
        """Note that the log's end was reached, so that the epoch ``name`` is the newest."""
        if self.is_behind:
            self.is_behind = False
            self._floor = position
            self._enter(name)

    def _enter(self, name: str) -> None:
        self._epochs[name] = None
        if len(self._epochs) > _REMEMBERED_EPOCHS:
            self._epochs.popitem(last=False)
        self.readers_epoch = name
