"""Descriptors: how many connections their limit allows, beside what the daemon needs itself.

Reckoned, not guessed, when everything that stays open is open.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

# What is open for a moment: the state's file and its directory while it is saved, a file of /proc
# for /health and /metrics, a connection that is accepted and refused, and as many again.
PASSING: Final = 8

# Where nobody can say what is open, as much as a daemon with a state directory has, and half more.
_ASSUMED_OPEN: Final = 48

_OPEN_FILES: Final = (Path("/proc/self/fd"), Path("/dev/fd"))


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    for directory in _OPEN_FILES:
        try:
            # Less the one that lists them.
            return len(os.listdir(directory)) - 1
        except OSError:
            continue
    return _ASSUMED_OPEN


def raise_limit() -> None:
    """Take as many descriptors as the machine gives without asking."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_allowed(listeners: int, beyond_limit: int) -> int:
    """Return how many connections there is room for, 1 at least.

    Args:
        listeners: that are open, and are opened again before the old ones are closed.
        beyond_limit: connections that are not counted: those that are only told something.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft - open_descriptors() - listeners - beyond_limit - PASSING)
