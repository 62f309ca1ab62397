"""Descriptors: computes how many connections the descriptor limit allows.

The figure is computed when every descriptor that stays open is open.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

# Descriptors that are open for a moment: the state's file and its directory while it is saved, a
# file of /proc for /health and /metrics, a connection that is accepted and refused, and as many
# again.
PASSING: Final = 8

# Descriptors assumed open where the system has no list of them: one and a half times what a daemon
# with a state directory has.
_ASSUMED_OPEN: Final = 48

_OPEN_FILES: Final = (Path("/proc/self/fd"), Path("/dev/fd"))


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    for directory in _OPEN_FILES:
        try:
            # One descriptor less: the one that reads the list.
            return len(os.listdir(directory)) - 1
        except OSError:
            continue
    return _ASSUMED_OPEN


def raise_limit() -> None:
    """Raise the soft limit on descriptors to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_allowed(listeners: int, beyond_limit: int) -> int:
    """Return how many connections the descriptor limit leaves room for, at least 1.

    Args:
        listeners: listening sockets; each may be open twice for a moment, since a dead one is
            opened again before it is closed.
        beyond_limit: connections beyond the limit, which only get a short answer.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft - open_descriptors() - listeners - beyond_limit - PASSING)
