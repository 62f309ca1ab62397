"""Where the process begins: signals and streams first, then everything else is imported."""

from __future__ import annotations

import os
import sys

from clevrd.argv import with_command


def main() -> int:
    """Run the command that the process was started with and return its exit code."""
    if os.name != "posix":
        # The rest can't even be imported: there are no such signals.
        print(
            "clevrd: the daemon and its commands need Linux or macOS; the client for Python,"
            " clevrd.client, works here.",
            file=sys.stderr,
        )
        return 69  # EX_UNAVAILABLE, as of CannotStart
    from clevrd import signals

    try:
        command, *words = with_command(sys.argv[1:])
        signals.set_for_start(is_daemon=command == "serve")
        _open_missing_streams()
        if command == "health":
            from clevrd.health_check import main as check

            return check(words)
        from clevrd.cli import main as run

        return run()
    except KeyboardInterrupt as stop:
        return signals.interrupted_code(stop)


def _open_missing_streams() -> None:
    """Keep the numbers 0 to 2 from what is opened later, where the process was given none.

    A log line would else go to a file or a client that happens to have the number 2. They are
    opened so that reading and writing fails, as on what is closed.
    """
    for descriptor, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number, which is this one
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
