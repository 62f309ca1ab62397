"""Filters: which records of a source are taken. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from clevrd.sources.parts import Part, is_missing
from clevrd.sources.records import Record

# Values that a part can be compared with.
Scalar = str | int | float | bool


class Condition(msgspec.Struct, frozen=True):
    """A condition on one part; one of ``equals`` and ``exists`` is given."""

    part: Part
    equals: Scalar | None = None
    exists: bool | None = None

    def holds(self, record: Record, decoded: Callable[[], Any]) -> bool:
        """Return whether ``record`` fulfils it; raises CannotTake."""
        value = self.part.of(record, decoded)
        if self.exists is not None:
            return self.exists is not is_missing(value)
        # In Python True equals 1, and in JSON it does not.
        return isinstance(value, bool) is isinstance(self.equals, bool) and value == self.equals
