"""Pace: how far apart a node sends records of a few publishes, by how many messages it sends. Pure.

A record costs 100 us and more here and in the engine, whatever it carries. So the records of all
partitions together are to be some thousand a second at most: while there are few messages nobody
waits for company, and while there are many each partition waits a little longer.
"""

from __future__ import annotations

from typing import Final

# Records of a few publishes are so far apart in a partition.
APART_S: Final = 0.001
# Messages a second in all up to which APART_S holds; it grows with them.
_UNHURRIED_PER_S: Final = 2_500.0
# How long messages are counted for a rate: long enough for a mean, and short for a beginning load.
_WINDOW_S: Final = 0.02


class Pace:
    """The pace of one node, over all partitions."""

    __slots__ = ("_apart_s", "_begun_s", "_messages", "_most_s")

    def __init__(self, partitions: int, max_apart_s: float) -> None:
        """Args: max_apart_s: how long a record of the engine is worth waiting for, at most."""
        # One partition alone has all messages in its own records.
        self._most_s = min(max_apart_s, APART_S * partitions)
        # When the window began, by the caller's clock, and the messages that were sent in it.
        self._begun_s = 0.0
        self._messages = 0
        self._apart_s = APART_S

    def sent(self, messages: int, now_s: float) -> None:
        """Note that a record with so many messages is sent."""
        self._messages += messages
        lasted_s = now_s - self._begun_s
        if lasted_s >= _WINDOW_S:
            times = self._messages / lasted_s / _UNHURRIED_PER_S
            self._apart_s = min(max(APART_S * times, APART_S), self._most_s)
            self._begun_s, self._messages = now_s, 0

    @property
    def apart_s(self) -> float:
        """How long after a partition's last record its next one of a few publishes is sent."""
        return self._apart_s
