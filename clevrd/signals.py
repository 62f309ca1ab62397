"""Which signals there are, and what they do before there is anything to stop.

Process 1 of a container is not ended by a signal that it has no handler for (pid_namespaces(7)),
and importing the rest takes longer than some supervisors wait before they change their mind. So
nothing slow is imported here, `typing` not either. A handler of Python's runs between two steps of
the code, within an import too. What a running daemon does: daemon_signals.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from types import FrameType

# What is sent to end a process: by a supervisor, by Ctrl-C, and by a terminal that is closed.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What would end a process as well, and means nothing here. SIGPIPE and SIGXFSZ are ignored by
# Python (their errors are told), SIGTSTP and SIGCONT do what they do everywhere.
STRAY = (
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGPOLL,
)
# What asks for the stacks: kill -QUIT, or Ctrl-\ on a terminal.
STACKS = signal.SIGQUIT

Handler = Callable[[int, FrameType | None], object]


def set_for_start(*, is_daemon: bool) -> None:
    """Let a stop be a stop from here on; of a command, one that its sums are told at."""
    if not is_daemon:
        for number in (signal.SIGTERM, signal.SIGHUP):
            handle(number, _interrupt)
        return
    for number in STOPS:
        handle(number, _end)
    for number in (*STRAY, STACKS):
        signal.signal(number, signal.SIG_IGN)


def handle(number: signal.Signals, handler: Handler) -> None:
    """Have ``handler`` called, unless the process was started to outlive its terminal: nohup(1)."""
    if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
        return
    signal.signal(number, handler)


def interrupted_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a command that a signal ended, as shells say it."""
    return 128 + (int(stop.args[0]) if stop.args else signal.SIGINT)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _end(number: int, _: FrameType | None) -> None:
    """End at once, in order: nothing is held, and what was saved is as it was."""
    name = signal.Signals(number).name
    # Python's streams may be in the middle of something; nobody waits for one that is full.
    if select.select([], [2], [], 0)[1]:
        os.write(2, f"clevrd: stopped before it began signal={name}\n".encode())
    os._exit(0)
