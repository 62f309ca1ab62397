"""InputBudget: bounds the memory of requests and messages that are not whole yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from clevrd.core.portions import Weights
from clevrd.errors import Unavailable


class Sender(NamedTuple):
    """The client whose input is counted, as far as that is known."""

    # The portion of its tenant; None before its head was admitted.
    portion: str | None
    # The client's address, or the network that counts as one; empty on a Unix socket.
    address: str


# The sender of what is not counted yet.
NOBODY: Final = Sender(None, "")


class InputBudget:
    """Counts the bytes received of input that is not whole yet, over all connections.

    Other limits bound each request's size and time; this class bounds the sum, and shares it out,
    so that no client and no tenant keeps the others from sending. Half of it is whoever's comes
    first. A quarter is guaranteed to tenants, by their weights, and a quarter to addresses, in
    equal parts. Input that would exceed all three is refused, and what others have begun goes on.
    """

    __slots__ = (
        "_by_address",
        "_by_portion",
        "_weights",
        "max_bytes",
        "received_bytes",
        "used_bytes",
    )

    def __init__(self, max_bytes: int, weights: Callable[[], Weights]) -> None:
        """Args: weights: returns how tenants share what all have in common."""
        self.max_bytes = max_bytes
        self._weights = weights
        self.used_bytes = 0
        # Portion -> the bytes of its tenants, and address -> its bytes; none of either is 0.
        self._by_portion: dict[str, int] = {}
        self._by_address: dict[str, int] = {}
        # All bytes that were read from connections since the start, which those who read count.
        self.received_bytes = 0

    def sender(self, tenant: str | None, address: str) -> Sender:
        """Return the sender that input is counted for; the caller keeps it to give bytes back.

        Args:
            tenant: None while it is not known.
            address: of the client, or the network that counts as one.
        """
        return Sender(None if tenant is None else self._weights().portion_of(tenant), address)

    def change(self, before_bytes: int, after_bytes: int, sender: Sender) -> bool:
        """Note that a connection's input grew or shrank; return whether that may be.

        A smaller value is always allowed. After a refusal the bytes are still counted, so the
        caller has to give them back.

        Args:
            before_bytes: bytes that the connection held before, counted for the same sender.
            after_bytes: bytes that the connection holds now.
            sender: whose input it is.
        """
        growth_bytes = after_bytes - before_bytes
        if not growth_bytes:
            return True
        portion, address = sender
        self.used_bytes += growth_bytes
        by_address = _add(self._by_address, address, growth_bytes)
        by_portion = 0 if portion is None else _add(self._by_portion, portion, growth_bytes)
        if growth_bytes < 0 or self.used_bytes <= self.max_bytes // 2:
            return True
        quarter_bytes = self.max_bytes // 4
        if portion is not None and by_portion <= quarter_bytes * self._weights().ratio_of(portion):
            return True
        # The tenants' quarter stays free for them, so the sum is never exceeded.
        return (
            self.used_bytes <= self.max_bytes - quarter_bytes
            and by_address <= quarter_bytes // len(self._by_address)
        )

    def refusal(self) -> Unavailable:
        """Return what a client is told whose input there is no room for."""
        return Unavailable(
            "Too much is arriving at once from all clients together; send it again in a moment.",
            bound="input",
            inputs={"bytes": self.used_bytes},
            thresholds={"max_bytes": self.max_bytes},
        )


def _add(counts: dict[str, int], name: str, growth: int) -> int:
    """Add ``growth`` to what ``name`` has, which is forgotten at 0; return what it has now."""
    now = counts.get(name, 0) + growth
    if now:
        counts[name] = now
    else:
        del counts[name]
    return now
