"""The noun behind a count, for sentences."""

from __future__ import annotations


def noun_for(count: int, noun: str) -> str:
    """Return ``noun`` as it stands behind ``count``: with an s, except behind 1."""
    return noun if count == 1 else f"{noun}s"
