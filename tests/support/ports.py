"""Ports of this machine, for servers that can't be told to take any and say which."""

from __future__ import annotations

import os
import random
import socket
from itertools import cycle, islice
from typing import Final

# Below the ports that Linux gives to connections (32768 on). Each process of a test run has a range
# of its own: a port whose server is killed, to be started again, must not become that of another
# process's server meanwhile, since daemons that come back to it would go on there.
_FIRST: Final = 10_000
_PORTS: Final = 2_500
_PROCESSES: Final = 9


def _own_ports() -> range:
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
    first = _FIRST + number * _PORTS
    return range(first, first + _PORTS)


# Where it begins is left to chance, for runs that follow each other.
_candidates = islice(cycle(_own_ports()), random.randrange(_PORTS), None)  # noqa: S311


def free_port() -> int:
    """Return a port that nobody listens on at the moment, and that was not given out lately."""
    while True:
        port = next(_candidates)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def accepts(port: int) -> bool:
    """Say whether somebody listens on ``port``."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
