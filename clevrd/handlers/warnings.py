"""What is told of a request that would be ignored: misspelt options, and topics that are patterns.

In a header, since every transport has one before its first message. Its form: RFC 8941 §3.1, a list
of strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from clevrd.core.near_names import MAX_WARNINGS, SUBSCRIBE_OPTIONS, quoted
from clevrd.core.patterns import parse_pattern
from clevrd.errors import InvalidRequest

WARNING_HEADER: Final = "Clevrd-Warning"


def subscribe_warnings(query: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Return what to say of the options of a subscription."""
    told = SUBSCRIBE_OPTIONS.warnings(query)
    return (*told, *topic_warnings(query.get("topic", [])))[:MAX_WARNINGS]


def topic_warnings(names: Iterable[str]) -> tuple[str, ...]:
    """Return what to say of topics that were perhaps meant as patterns."""
    return tuple(
        f"The topic {quoted(name)} is taken as a name, star and all; what matches it is"
        " subscribed as a pattern."
        for name in names
        if _is_pattern(name)
    )[:MAX_WARNINGS]


def warning_fields(warnings: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the header field that says ``warnings``; none without any."""
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
