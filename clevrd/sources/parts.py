"""Parts of a record that a template or a filter names: its key, a header, a JSON pointer. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from clevrd.sources.pointers import MISSING, Missing, Pointer, at_pointer, parse_pointer
from clevrd.sources.records import CannotTake, Record

KEY: Final = "key"
_HEADER: Final = "header:"


class Part(msgspec.Struct, frozen=True):
    """One part of records, by the name that the configuration has for it."""

    name: str
    # The header's name; empty for another part.
    header: str = ""
    # The pointer into the value; None for another part.
    pointer: Pointer | None = None

    def of(self, record: Record, decoded: Callable[[], Any]) -> Any:
        """Return what ``record`` has there: text, or a JSON value; MISSING where it has nothing.

        Args:
            decoded: returns the record's value as JSON.

        Raises:
            CannotTake: it is no text, or the value is no JSON.
        """
        if self.pointer is not None:
            return at_pointer(decoded(), self.pointer)
        if not self.header:
            found = record.key
        elif record.headers is None:
            raise CannotTake(f"The {self.shown} can't be read: a header's name is not UTF-8.")
        else:
            found = record.headers.get(self.header)
        if found is None:
            return MISSING
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise CannotTake(f"The {self.shown} is not UTF-8.") from error

    @property
    def shown(self) -> str:
        """The part as the subject of a sentence."""
        if self.pointer is not None:
            return f"value at {self.name}"
        return f"header {self.header}" if self.header else "key"


def parse_part(name: str) -> Part:
    """Return the part called ``name``; raises ValueError with a sentence."""
    if name == KEY:
        return Part(name)
    if name.startswith(_HEADER):
        if name == _HEADER:
            raise ValueError("name the header: header:region.")
        return Part(name, header=name.removeprefix(_HEADER))
    if name.startswith("/"):
        return Part(name, pointer=parse_pointer(name))
    raise ValueError(f"{name[:80]!a} is none of key, header:NAME and a JSON pointer such as /id.")


def is_missing(value: Any) -> bool:
    """Return whether a part of a record is not there; null counts as that."""
    return value is None or isinstance(value, Missing)
