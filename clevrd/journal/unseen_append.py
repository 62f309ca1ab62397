"""UnseenAppend: finds a reader that does not bring what its own engine has appended. Pure."""

from __future__ import annotations


class UnseenAppend:
    """The newest record that an engine has appended, until its reader has read it.

    A connection may lead to a server that is in charge no more, and answers that there is nothing
    new: a reader that waits although there is a record for it is deaf.
    """

    __slots__ = ("_looks", "_most_looks", "position")

    def __init__(self, most_looks: int) -> None:
        """Args: most_looks: looks in a row that find the reader waiting, until it is deaf."""
        self._most_looks = most_looks
        self._looks = 0
        # The record that is expected; 0 for none.
        self.position = 0

    def forget(self) -> None:
        """Expect nothing: the log may have lost what was appended."""
        self.position = self._looks = 0

    def is_deaf(self, at: int, *, is_waiting: bool) -> bool:
        """Look at the reader; return whether it is deaf, after which nothing is expected of it.

        Args:
            at: the position that it has read up to.
            is_waiting: it waits for the next record.
        """
        if self.position <= at or not is_waiting:
            self._looks = 0
            return False
        self._looks += 1
        if self._looks < self._most_looks:
            return False
        self.forget()
        return True
