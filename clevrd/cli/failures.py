"""Failures of commands: each knows its exit code.

Exit codes: 0 success; 1 the operation failed; 2 bad usage; 69 can't start, or no server there; 78
bad configuration (the last two as in sysexits.h); 128 and a signal's number: interrupted.
"""

from __future__ import annotations

from typing import Final

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 69


class CommandFailed(Exception):
    """The command could not do its work; the message is one sentence, or a line for each fault."""

    exit_code = EXIT_FAILED


class UsageError(CommandFailed):
    """The command line is wrong; the message says how it is meant."""

    exit_code = EXIT_USAGE


class NoServer(CommandFailed):
    """No server answers at the URL."""

    exit_code = EXIT_UNAVAILABLE
