"""WriterSequences: the last record of each writer, by which retries are recognised. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

# Writers whose last sequence is known. A writer is one start of a node, and retries within seconds.
# It is part of the format: nodes with other numbers would count differently.
MAX_WRITERS: Final = 1_024


class WriterSequences:
    """The writers of one partition epoch."""

    __slots__ = ("_last",)

    def __init__(self, rows: Iterable[tuple[str, int]] = ()) -> None:
        """Begin with the writers of a checkpoint, the latest one last."""
        self._last: dict[str, int] = dict(rows)

    def have(self, writer: str, sequence: int) -> bool:
        """Return whether a writer's record, or one behind it, was counted before."""
        return sequence <= self._last.get(writer, 0)

    def note(self, writer: str, sequence: int) -> None:
        """Note a writer's last record; the writer that wrote longest ago may be forgotten."""
        last = self._last
        last.pop(writer, None)
        last[writer] = sequence
        if len(last) > MAX_WRITERS:
            del last[next(iter(last))]

    def rows(self) -> tuple[tuple[str, int], ...]:
        """Return each writer and its last sequence, the latest writer last."""
        return tuple(self._last.items())
