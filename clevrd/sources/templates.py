"""Templates: names made of parts of a record, such as ``orders.{/customer/id}``. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from clevrd.sources.parts import Part, is_missing, parse_part
from clevrd.sources.records import CannotTake, Record

# Characters of a part in a name at most; the name itself is checked later.
_MAX_CHARS: Final = 1_024
_PIECE: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[^{}]+|[{}]")


class Template:
    """A name with parts of a record in it."""

    __slots__ = ("pieces", "text")

    def __init__(self, text: str) -> None:
        """Read a template; ``{{`` and ``}}`` stand for braces.

        Raises:
            ValueError: with a sentence.
        """
        self.text = text
        # Text that stands there as it is, and the parts.
        self.pieces: tuple[str | Part, ...] = tuple(map(_piece, _PIECE.finditer(text)))

    @property
    def parts(self) -> list[Part]:
        """The parts that it names."""
        return [each for each in self.pieces if isinstance(each, Part)]

    def fill(self, record: Record, decoded: Callable[[], Any]) -> str:
        """Return the name for ``record``.

        Raises:
            CannotTake: a part is missing, or is no text and no whole number.
        """
        return "".join(
            each if isinstance(each, str) else _text_of(each, each.of(record, decoded))
            for each in self.pieces
        )


def _piece(match: re.Match[str]) -> str | Part:
    text = match[0]
    if match[1] is not None:
        return parse_part(match[1])
    if text in ("{", "}"):
        raise ValueError("a brace is not closed, or not opened; write {{ or }} for a brace itself.")
    return text[0] if text in ("{{", "}}") else text


def _text_of(part: Part, value: Any) -> str:
    if is_missing(value):
        raise CannotTake(f"The {part.shown} is missing, and the name is made of it.")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise CannotTake(f"The {part.shown} is no text and no whole number.")
    text = str(value)
    if not text:
        raise CannotTake(f"The {part.shown} is empty, and the name is made of it.")
    if len(text) > _MAX_CHARS:
        raise CannotTake(f"The {part.shown} is too long for a name.")
    return text
