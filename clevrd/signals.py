"""The signals, and their handlers until there is a daemon to stop.

A signal without a handler does not end process 1 of a container (pid_namespaces(7)), and importing
the other modules takes longer than some supervisors wait before they send SIGKILL. So this module
imports nothing slow, not even `typing`. Python calls a handler between two steps of the code, also
during an import. The handlers of a running daemon are in daemon_signals.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from types import FrameType

# Signals that ask a process to end: from a supervisor, from Ctrl-C, and from a terminal that is
# closed.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Signals that would end the process by default, and have no meaning here. Python ignores SIGPIPE
# and SIGXFSZ already (a failed write raises an error instead); SIGTSTP and SIGCONT work as
# everywhere.
STRAY = (
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGPOLL,
)
# Signal that logs the stacks: kill -QUIT, or Ctrl-\ on a terminal.
STACKS = signal.SIGQUIT

Handler = Callable[[int, FrameType | None], object]


def set_for_start(*, is_daemon: bool) -> None:
    """Set the handlers for the start: a daemon ends, a command raises KeyboardInterrupt."""
    if not is_daemon:
        for number in (signal.SIGTERM, signal.SIGHUP):
            handle(number, _interrupt)
        return
    for number in STOPS:
        handle(number, _end)
    for number in (*STRAY, STACKS):
        signal.signal(number, signal.SIG_IGN)


def handle(number: signal.Signals, handler: Handler) -> None:
    """Install ``handler``, except for SIGHUP in a process started with nohup(1)."""
    if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
        return
    signal.signal(number, handler)


def interrupted_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a command that a signal ended: 128 and its number, as in shells."""
    return 128 + (int(stop.args[0]) if stop.args else signal.SIGINT)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _end(number: int, _: FrameType | None) -> None:
    """End with exit code 0: the process holds nothing yet, and saved state is unchanged."""
    name = signal.Signals(number).name
    # Python's streams may be within a write, so the line goes to the descriptor itself, unless that
    # would block.
    if select.select([], [2], [], 0)[1]:
        os.write(2, f"clevrd: stopped before it began signal={name}\n".encode())
    os._exit(0)
