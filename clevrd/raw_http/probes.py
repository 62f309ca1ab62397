"""Requests that are answered over the limit of connections: for health, and for events."""

from __future__ import annotations

import re
from typing import Final

from clevrd.errors import Unavailable
from clevrd.http_values import Request
from clevrd.raw_http.grammar import begins_like, read_lines

# Connections over the limit that may ask one thing: the daemon's health, since a full daemon is not
# one to be killed by its liveness probe, or events, since an EventSource gives up for good after a
# 503. When there are more, the one that has waited longest goes.
MAX_PROBES: Final = 16
# A probe sends its request with its connection.
PROBE_S: Final = 2.0
_PROBE_LINE: Final = re.compile(r"GET (/[!-~]*) HTTP/1\.([01])", re.ASCII)
_PROBE_BEGINNINGS: Final = (b"GET /health", b"GET /subscribe")


def can_become_probe(part: bytes) -> bool:
    """Return whether ``part`` begins as what may be asked, as far as it goes."""
    return begins_like(part, _PROBE_BEGINNINGS)


def read_probe(head: bytes) -> Request | None:
    """Return the GET without a body that ``head`` is; None when it is anything else."""
    line, *lines = head.split(b"\r\n")
    match = _PROBE_LINE.fullmatch(line.decode("latin-1"))
    fields = read_lines(lines)
    if match is None or fields is None or "content-length" in fields or "upgrade" in fields:
        return None
    return Request("GET", match[1], fields, is_http_1_0=match[2] == "0")


def no_room(max_connections: int) -> Unavailable:
    """Return the refusal of one more connection than there may be."""
    return Unavailable(
        "The daemon has as many connections as it may have; retry later.",
        bound="connections",
        inputs={"connections": max_connections + 1},
        thresholds={"max_connections": max_connections},
    )
