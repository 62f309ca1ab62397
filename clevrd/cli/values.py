"""Types of options' values, for argparse."""

from __future__ import annotations

import argparse
from contextlib import suppress


def seconds(text: str) -> float:
    """Return a number of seconds, 0 or more."""
    with suppress(ValueError):
        if 0 <= (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")


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
