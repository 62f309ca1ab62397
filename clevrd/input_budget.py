"""InputBudget: what requests and messages that have begun to arrive may hold in memory, in all."""

from __future__ import annotations


class InputBudget:
    """Bytes received of what is not whole yet, over all connections.

    Each is bounded by itself and in time; this bounds their number times their size. Whoever
    would exceed it is refused, and what others have begun goes on.
    """

    __slots__ = ("max_bytes", "received_bytes", "used_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        # All bytes that were read from connections since the start, which those who read count.
        self.received_bytes = 0

    def change(self, before_bytes: int, after_bytes: int) -> bool:
        """Note that somebody holds ``after_bytes`` now; return whether that may be.

        Giving back is always right. After a refusal the bytes are still counted: give them back.
        """
        self.used_bytes += after_bytes - before_bytes
        return after_bytes <= before_bytes or self.used_bytes <= self.max_bytes
