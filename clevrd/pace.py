"""Pace: how slowly a client may send and read before that is taken for an attack. Decides only.

A request, or a message on a socket, has to be whole in `request_timeout_s`. A body that comes
slowly but steadily is given more: whenever so much of it has arrived as MIN_SENT_BYTES_PER_S brings
in that time, the time begins anew. Heads get no such time. An answer has to be read at
MIN_READ_BYTES_PER_S over each `keepalive_timeout_s`. After Apache's mod_reqtimeout, whose MinRate
is 500 B/s.
"""

from __future__ import annotations

from typing import Final

# Attacks with slow bodies send some bytes a second, seldom 500; a slow uplink brings five times
# this.
# A body of a MiB takes 128 s at it.
MIN_SENT_BYTES_PER_S: Final = 8_192

# Kernels tell of what is read in steps of up to 64 KiB, so a reader at 1 KB/s is seen to read
# this much in 75 s, whenever one begins to look.
MIN_READ_BYTES_PER_S: Final = 512

# More than anything may have: what is never given more time.
NEVER: Final = 1 << 62


def sent_step_bytes(timeout_s: float) -> int:
    """Return how many bytes of a body have to arrive for its ``timeout_s`` to begin anew."""
    return max(1, int(MIN_SENT_BYTES_PER_S * timeout_s))


def reads_on(taken_bytes: int, within_s: float) -> bool:
    """Return whether a client that took so much of an answer within ``within_s`` may go on."""
    return taken_bytes >= max(1, int(MIN_READ_BYTES_PER_S * within_s))
