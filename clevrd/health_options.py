"""The options of clevrd health by argparse: for help, for mistakes, and for documents.

`health_check` reads options that are as they should be without this module.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from clevrd.health_check import EXIT_USAGE, TIMEOUT_S, Options, run, say, seconds_in

__all__ = ["add_arguments", "parse", "run"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line, since a health check's log has room for one."""
        sys.exit(say(2, f"{message} (try: {self.prog} --help)", EXIT_USAGE))


def parse(argv: Sequence[str]) -> Options:
    """Return the options in ``argv``; end the process where they are wrong, or ask for help."""
    parser = _Parser(
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, up to 3600")
    return seconds
