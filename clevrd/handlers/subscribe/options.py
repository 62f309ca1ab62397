"""Options of a query: each at most once, numbers within bounds."""

from __future__ import annotations

import re
from typing import Final

from clevrd.errors import InvalidRequest

# Nine digits fit every bound there is; int() is quadratic in the length.
_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)


def single_option(query: dict[str, list[str]], name: str) -> str | None:
    """Return the option's value, None when it is not given.

    Raises:
        InvalidRequest: it is given twice.
    """
    values = query.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise InvalidRequest(f"The option {name} is given {len(values)} times; give it once.")
    return values[0]


def flag_option(query: dict[str, list[str]], name: str) -> bool:
    """Return whether the option is true; it is false where it is not given.

    Raises:
        InvalidRequest: it is neither true nor false, or given twice.
    """
    text = single_option(query, name)
    if text not in (None, "true", "false"):
        raise InvalidRequest(f"The option {name} must be true or false.")
    return text == "true"


def number_option(query: dict[str, list[str]], name: str, least: int) -> int | None:
    """Return the option's value as a number of messages, None when it is not given.

    Raises:
        InvalidRequest: it is no such number, below ``least``, or given twice.
    """
    text = single_option(query, name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or int(text) < least:
        raise InvalidRequest(
            f"The option {name} must be a whole number of messages, {least} or more."
        )
    return int(text)
