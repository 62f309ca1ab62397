"""Variables of the environment in which systemd says numbers."""

from __future__ import annotations


def whole_number(text: str) -> int | None:
    """Return the number that ``text`` is, without a sign and at most 18 digits; None otherwise."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
