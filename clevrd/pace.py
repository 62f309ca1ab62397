"""Pace: decides how slowly a client may send and read before that counts as an attack.

A request, or a message on a socket, has to be whole within `request_timeout_s`. A body that comes
slowly but steadily gets more: each time that MIN_SENT_BYTES_PER_S times this timeout has arrived,
the timeout begins anew. Heads get no such extension. An answer has to be read at
MIN_READ_BYTES_PER_S over each `keepalive_timeout_s`. Both rules follow Apache's mod_reqtimeout,
whose MinRate is 500 B/s.
"""

from __future__ import annotations

from typing import Final

# Attacks with slow bodies send a few bytes a second, seldom 500; a slow uplink brings five times
# this rate. A body of 1 MiB takes 128 s at this rate.
MIN_SENT_BYTES_PER_S: Final = 8_192

# Kernels report progress in steps of up to 64 KiB, so a reader at 1 KB/s is seen to read this much
# in 75 s, whenever the measurement begins.
MIN_READ_BYTES_PER_S: Final = 512

# A number of bytes that no input reaches, for input whose timeout never begins anew.
NEVER: Final = 1 << 62


def sent_step_bytes(timeout_s: float) -> int:
    """Return how many bytes of a body have to arrive for its ``timeout_s`` to begin anew."""
    return max(1, int(MIN_SENT_BYTES_PER_S * timeout_s))


def reads_on(taken_bytes: int, within_s: float) -> bool:
    """Return whether a client that took ``taken_bytes`` of an answer in ``within_s`` may go on."""
    return taken_bytes >= max(1, int(MIN_READ_BYTES_PER_S * within_s))
