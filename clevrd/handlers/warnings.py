"""Warnings about parts of a request that are ignored: misspelt options, patterns as topics.

Warnings go into a header field, since every transport has a header before its first message. The
field's form: RFC 8941 §3.1, a list of strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from clevrd.core.near_names import MAX_WARNINGS, SUBSCRIBE_OPTIONS, quoted
from clevrd.core.patterns import parse_pattern
from clevrd.errors import InvalidRequest

WARNING_HEADER: Final = "Clevrd-Warning"


def subscribe_warnings(query: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Return the warnings for the options of a subscription."""
    told = SUBSCRIBE_OPTIONS.warnings(query)
    return (*told, *topic_warnings(query.get("topic", [])))[:MAX_WARNINGS]


def topic_warnings(names: Iterable[str]) -> tuple[str, ...]:
    """Return the warnings for topics that were perhaps meant as patterns."""
    return tuple(
        f"The topic {quoted(name)} is taken as a name that has a star; to read all topics that"
        " match it, subscribe to a pattern."
        for name in names
        if _is_pattern(name)
    )[:MAX_WARNINGS]


def warning_fields(warnings: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the header field with ``warnings``; none without any."""
    if not warnings:
        return ()
    strings = (each.replace("\\", "\\\\").replace('"', '\\"') for each in warnings)
    return ((WARNING_HEADER, ", ".join(f'"{each}"' for each in strings)),)


def _is_pattern(name: str) -> bool:
    if "*" not in name:
        return False
    try:
        parse_pattern(name)
    except InvalidRequest:
        return False
    return True
