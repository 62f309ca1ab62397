"""Ports of this machine, for servers that can't be told to take any and say which."""

from __future__ import annotations

import socket


def free_port(*, highest: int = 65_535) -> int:
    """Return a port that nobody listens on at the moment, ``highest`` or below."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= highest:
            return port


def accepts(port: int) -> bool:
    """Say whether somebody listens on ``port``."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
