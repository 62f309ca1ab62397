"""Holdings: how many of something each name holds, without a name that holds nothing. Pure."""

from __future__ import annotations

from collections.abc import Hashable, ItemsView
from typing import Generic, TypeVar

NameT = TypeVar("NameT", bound=Hashable)


class Holdings(Generic[NameT]):
    """Counts by name. Each `take` is followed by one `give_back` of the same name."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        # Name -> its count, at least 1.
        self._counts: dict[NameT, int] = {}

    def __len__(self) -> int:
        """Return how many names hold anything."""
        return len(self._counts)

    def of(self, name: NameT) -> int:
        """Return how many ``name`` holds."""
        return self._counts.get(name, 0)

    def items(self) -> ItemsView[NameT, int]:
        """Return each name that holds anything, with its count."""
        return self._counts.items()

    def take(self, name: NameT) -> None:
        """Count one more."""
        self._counts[name] = self._counts.get(name, 0) + 1

    def give_back(self, name: NameT) -> None:
        """Count one less."""
        left = self._counts[name] - 1
        if left:
            self._counts[name] = left
        else:
            del self._counts[name]
