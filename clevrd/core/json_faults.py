"""Faults of bytes that should be JSON, in words for the client that sent them.

JSON: RFC 8259; UTF-8: RFC 3629. Nesting: core/nesting.
"""

from __future__ import annotations

import re
from typing import Final

from clevrd.core.nesting import TOO_DEEP

# A byte order mark, which tools on Windows put before UTF-8; JSON has none (RFC 8259 §8.1).
BOM: Final = b"\xef\xbb\xbf"
BEGINS_WITH_BOM: Final = (
    "begins with a byte order mark (EF BB BF), which JSON has not; leave it out"
)
# All text before the first escape of half a surrogate pair that stands without the other half.
_PAIRED: Final = re.compile(
    rb"(?s:[^\\]++|\\[^u]|\\u(?![Dd][89A-Fa-f])|\\u[Dd][89ABab]..\\u[Dd][C-Fc-f]..)*+"
)
_ESCAPE: Final = re.compile(rb"\\u[0-9A-Fa-f]{4}")
_AT_BYTE: Final = re.compile(r"\(byte (\d+)\)")

# A JSON value's first byte -> what it is; the others begin numbers.
_KINDS: Final = {
    b"{": "an object",
    b"[": "an array",
    b'"': "a string",
    b"t": "a boolean",
    b"f": "a boolean",
    b"n": "null",
}


def json_fault(text: bytes, error: Exception) -> str:
    """Return what is wrong with ``text``, which is no JSON, as the rest of a sentence about it."""
    if isinstance(error, RecursionError):
        return f"is {TOO_DEEP}"
    if text.startswith(BOM):
        return BEGINS_WITH_BOM
    if not text.strip():
        return "is empty"
    at = _AT_BYTE.search(str(error))
    # msgspec says little of half a surrogate pair, and takes one at a string's end for the end of
    # the body.
    half = _half_of_a_pair(text, int(at[1]) if at else len(text))
    if half is not None:
        return half
    return f"is not JSON at byte {at[1]}" if at else "is not complete JSON"


def _half_of_a_pair(text: bytes, before: int) -> str | None:
    """Return what to say of a lone surrogate's escape ``before`` that place; None without one."""
    paired = _PAIRED.match(text)
    lone = _ESCAPE.match(text, paired.end()) if paired else None
    if lone is None or lone.start() > before:
        return None
    return (
        f"has {lone[0].decode()} at byte {lone.start()}, which is half a surrogate pair (one"
        " character in two escapes); send both halves, or the character itself"
    )


def json_kind(json: bytes) -> str:
    """Return what ``json``, one value without whitespace before it, is; empty where it is."""
    return _KINDS.get(json[:1], "a number") if json else ""
