"""JSON pointers: RFC 6901. Pure."""

from __future__ import annotations

import re
from typing import Any, Final

# Steps of a pointer at most; JSON that is nested deeper is refused anyway.
MAX_STEPS: Final = 64

_ESCAPE: Final = re.compile(r"~(?![01])")
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")

Pointer = tuple[str, ...]


class Missing:
    """The type of MISSING, which no JSON value is."""


MISSING: Final = Missing()


def parse_pointer(text: str) -> Pointer:
    """Return the steps of a pointer; raises ValueError with a sentence."""
    if not text.startswith("/"):
        raise ValueError("a JSON pointer begins with a slash, as /customer/id does.")
    if _ESCAPE.search(text):
        raise ValueError("in a JSON pointer ~ is written ~0, and a slash in a name ~1.")
    steps = text[1:].split("/")
    if len(steps) > MAX_STEPS:
        raise ValueError(f"a JSON pointer has at most {MAX_STEPS} steps.")
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)


def at_pointer(value: Any, pointer: Pointer) -> Any:
    """Return what ``pointer`` leads to in a decoded JSON value; MISSING where there is nothing."""
    for step in pointer:
        if isinstance(value, dict):
            value = value.get(step, MISSING)
        elif isinstance(value, list) and _INDEX.fullmatch(step) and int(step) < len(value):
            value = value[int(step)]
        else:
            return MISSING
    return value
