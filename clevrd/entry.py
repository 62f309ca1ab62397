"""Where the process begins: sets signals and streams, then imports everything else."""

from __future__ import annotations

import os
import sys

from clevrd import __version__
from clevrd.argv import with_command


def main() -> int:
    """Run the command that the process was started with and return its exit code."""
    if os.name != "posix":
        # The other modules can't be imported here: they use signals that this system lacks.
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
        if [command, *words] == ["version"] and _print_version():
            return 0
        from clevrd.cli import main as run

        return run()
    except KeyboardInterrupt as stop:
        return signals.interrupted_code(stop)


def _print_version() -> bool:
    """Print the version, which scripts ask for often; return False where that fails.

    The command `version` then says why: it imports the command line, which takes longer.
    """
    try:
        os.write(1, f"clevrd {__version__}\n".encode())
    except OSError:
        return False
    return True


def _open_missing_streams() -> None:
    """Open descriptors 0 to 2 where the process was started without them.

    Otherwise a file or a client could get the number 2, and log lines would go there. The
    descriptors are opened in the wrong direction, so that reading and writing fail as on a closed
    one.
    """
    for descriptor, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number, which is this one
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
