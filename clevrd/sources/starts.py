"""Where a source begins that was never read before. Pure."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Final

import msgspec

from clevrd.sources.places import Kind

EARLIEST: Final = "earliest"
LATEST: Final = "latest"

_REDIS_ID: Final = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?")
_NUMBER: Final = re.compile(r"0|[1-9]\d{0,17}")
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]")
_U64: Final = 1 << 64


class Start(msgspec.Struct, frozen=True):
    """A beginning: at one end, or with the first record from a moment or a position on."""

    # EARLIEST, LATEST, or empty.
    end: str = ""
    # Milliseconds since 1970; None for another beginning.
    since_ms: int | None = None
    # The first record's position, as its source spells it; empty for another beginning.
    position: str = ""


def parse_start(text: str, kind: Kind) -> Start:
    """Return what a setting says, for a stream of ``kind``; raises ValueError with a sentence."""
    if text in (EARLIEST, LATEST):
        return Start(end=text)
    if _DATE.match(text):
        return Start(since_ms=_milliseconds(text))
    if kind != "redis":
        if _NUMBER.fullmatch(text):
            return Start(position=text)
        raise ValueError(
            'write "earliest", "latest", a time such as "2026-01-31T08:00:00Z", or the number of'
            ' the first record that is taken, such as "1200".'
        )
    match = _REDIS_ID.fullmatch(text)
    if match is None or max(int(match[1]), int(match[2] or 0)) >= _U64:
        raise ValueError(
            'write "earliest", "latest", a time such as "2026-01-31T08:00:00Z", or the ID of the'
            ' first entry that is taken, such as "1700000000000-0".'
        )
    return Start(position=f"{int(match[1])}-{int(match[2] or 0)}")


def _milliseconds(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text[:40]!a} is no time; write 2026-01-31T08:00:00Z.") from error
    if moment.tzinfo is None:
        raise ValueError("a time needs its zone: 2026-01-31T08:00:00Z.")
    milliseconds = int(moment.timestamp() * 1000)
    if milliseconds < 0:
        raise ValueError("a time is not before 1970.")
    return milliseconds


def id_before(entry: str) -> str:
    """Return the ID of an entry in Redis that is the last before ``entry`` could be."""
    milliseconds, _, sequence = entry.partition("-")
    if int(sequence):
        return f"{milliseconds}-{int(sequence) - 1}"
    if int(milliseconds):
        return f"{int(milliseconds) - 1}-{_U64 - 1}"
    return "0-0"
