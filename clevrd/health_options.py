"""The options of clevrd health: read at a look where they are as they should be.

argparse, which takes as much CPU as all the rest of a check, has the help and the sentences about
mistakes, and is imported for these alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

TYPE_CHECKING = False  # as in errors
if TYPE_CHECKING:
    import argparse
    from typing import Final, NoReturn

EXIT_USAGE: Final = 2

# Less than the 3 s that the image allows its health check.
TIMEOUT_S: Final = 2.0


class Options:
    """The options of the command; those of them that name a place are None unless given."""

    __slots__ = ("address", "config", "ready", "timeout")

    def __init__(self) -> None:
        self.address: str | None = None
        self.config: str | None = None
        self.ready = False
        # Seconds.
        self.timeout = TIMEOUT_S


def options_in(argv: Sequence[str]) -> Options:
    """Return the options in ``argv``; end the process where they are wrong, or ask for help."""
    return plain_options(argv) or parse(argv)


def plain_options(argv: Sequence[str]) -> Options | None:
    """Return the options in ``argv``; None where that takes more than a look at each word."""
    options = Options()
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--ready":
            options.ready = True
            continue
        if not equals:
            value = next(words, "")
        if not value or value.startswith("-"):
            return None
        if name == "--address":
            options.address = value
        elif name == "--config":
            options.config = value
        elif name == "--timeout" and (seconds := seconds_in(value)) is not None:
            options.timeout = seconds
        else:
            return None
    return options


def parse(argv: Sequence[str]) -> Options:
    """Return the options in ``argv``; end the process where they are wrong, or ask for help."""
    from argparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            """End with one line, since a health check's log has room for one."""
            sys.exit(say(2, f"{message} (try: {self.prog} --help)", EXIT_USAGE))

    parser = Parser(
        prog="clevrd health",
        description="Ask the daemon of these settings whether it is well; for health checks.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    return parser.parse_args(argv, Options())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: where the daemon is, and what to ask it."""
    parser.add_argument("--address", metavar="VALUE", help="where it listens, as for serve")
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (CLEVRD_CONFIG)")
    parser.add_argument("--ready", action="store_true", help="ask /health/ready, not /health/live")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="how long the answer may take (default %(default)g)",
    )


def _seconds(text: str) -> float:
    seconds = seconds_in(text)
    if seconds is None:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} is not a number of seconds, up to 3600")
    return seconds


def seconds_in(text: str) -> float | None:
    """Return a number of seconds, up to an hour; None where ``text`` is none."""
    with suppress(ValueError):
        if 0 < (number := float(text)) <= 3600:
            return number
    return None


def say(descriptor: int, sentence: str, code: int) -> int:
    """Write one line if the descriptor takes it, and return ``code``."""
    line = sentence if descriptor == 1 else f"clevrd: {sentence}"
    with suppress(OSError):
        os.write(descriptor, line.encode(errors="backslashreplace") + b"\n")
    return code
