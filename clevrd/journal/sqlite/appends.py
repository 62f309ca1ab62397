"""Appends: records on their way into the log, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clevrd.journal.base import Placed


class Append:
    """A record on its way into the log, and then what became of it."""

    __slots__ = ("error", "placed", "position", "record", "stamp", "waiter")

    def __init__(self, record: bytes, stamp: str, placed: Sequence[Placed], waiter: Any) -> None:
        self.record = record
        self.stamp = stamp
        self.placed = placed
        # The loop's own, which the writer does not look at.
        self.waiter = waiter
        # Set by the writer: its place, or why it has none.
        self.position = 0
        self.error: Exception | None = None


class Commit:
    """Appends that were looked at together, when it is known what became of them."""

    __slots__ = ("appends", "took_ns")

    def __init__(self, appends: list[Append], took_ns: int) -> None:
        self.appends = appends
        # 0 where nothing was committed.
        self.took_ns = took_ns
