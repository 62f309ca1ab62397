"""InputBudget: bounds the memory of requests and messages that are not whole yet."""

from __future__ import annotations


class InputBudget:
    """Counts the bytes received of input that is not whole yet, over all connections.

    Other limits bound each request's size and time; this class bounds the sum. A client that would
    exceed the sum is refused, and input that others have begun goes on.
    """

    __slots__ = ("max_bytes", "received_bytes", "used_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        # All bytes that were read from connections since the start, which those who read count.
        self.received_bytes = 0

    def change(self, before_bytes: int, after_bytes: int) -> bool:
        """Note that a connection's input grew or shrank; return whether the sum allows that.

        A smaller value is always allowed. After a refusal the bytes are still counted, so the
        caller has to give them back.

        Args:
            before_bytes: bytes that the connection held before.
            after_bytes: bytes that the connection holds now.
        """
        self.used_bytes += after_bytes - before_bytes
        return after_bytes <= before_bytes or self.used_bytes <= self.max_bytes
