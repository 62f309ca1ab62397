"""HeadCache: what is known of request heads that clients repeat to the byte. No sockets here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

MAX_KNOWN_HEADS: Final = 1_024
MAX_KNOWN_HEAD_BYTES: Final = 1_024

ValueT = TypeVar("ValueT")


class HeadCache(Generic[ValueT]):
    """A value for each head; all are forgotten when there are too many, as it only saves time."""

    __slots__ = ("_heads", "get")

    def __init__(self) -> None:
        self._heads: dict[bytes, ValueT] = {}
        # Returns a head's value, None for one that is not known. The dict's own, since each
        # request asks it.
        self.get: Callable[[bytes], ValueT | None] = self._heads.get

    def __len__(self) -> int:
        """Return how many heads are known."""
        return len(self._heads)

    def add(self, head: bytes, value: ValueT) -> None:
        """Remember ``head``, unless it is too long for it."""
        if len(head) > MAX_KNOWN_HEAD_BYTES:
            return
        if len(self._heads) >= MAX_KNOWN_HEADS:
            self._heads.clear()
        self._heads[head] = value
