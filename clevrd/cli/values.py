"""Types of options' values, for argparse."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Final

from clevrd.core.ttl import MAX_TTL_S, MIN_TTL_S


def seconds(text: str) -> float:
    """Return a number of seconds, 0 or more."""
    with suppress(ValueError):
        if 0 <= (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")


def ttl_seconds(text: str) -> float:
    """Return a message's time to live; a whole number stays one, as it is sent."""
    with suppress(ValueError):
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else float(text)
        if MIN_TTL_S <= number <= MAX_TTL_S:
            return number
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a number of seconds from {MIN_TTL_S} to {MAX_TTL_S}"
    )


def header(text: str) -> tuple[str, str]:
    """Return the name and the value of a message's header."""
    # Commands that publish import the client anyway, and others are not to.
    from clevrd.client.arguments import check_header_name

    name, colon, value = text.partition(":")
    if not (colon and name.strip() and value.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is no header; it is like 'ce-type: paid'")
    try:
        check_header_name(name.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name.strip(), value.strip()


def count(text: str) -> int:
    """Return a whole number of 1 or more."""
    return _whole_number(text, at_least=1)


def count_or_zero(text: str) -> int:
    """Return a whole number of 0 or more."""
    return _whole_number(text, at_least=0)


def _whole_number(text: str, at_least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= at_least):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {at_least} or more")
    return int(text)


# Units of `duration_s`, in seconds.
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
# Ten years: no token should live longer.
_MAX_DURATION_S: Final = 3_653 * 86_400.0


def duration_s(text: str) -> float:
    """Return the seconds of a length of time, such as 90s, 30m, 12h or 7d."""
    number, unit = text[:-1], text[-1:]
    if unit in _UNITS and number.isascii() and number.isdigit() and len(number) < 10:
        wanted_s = int(number) * _UNITS[unit]
        if 0 < wanted_s <= _MAX_DURATION_S:
            return wanted_s
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a length of time such as 90s, 30m, 12h or 7d, up to ten years"
    )
