"""The heart: what comes between a request and a topic. No HTTP and no sockets here.

Everything happens on the loop's thread, and no ``await`` stands between reading and changing
shared state; that is the only lock there is. Time comes from the loop, wall time from a function.

A module for each thing that has a state of its own: `stamping`, `waiting_publishes`,
`idempotent_publishes`, `readers`, `circuits`, `rounds`, `pattern_index`, `control_loops`, `drain`.
`memory_shares` has none. `hub` puts them together, and is what the floors above talk to.
"""

from clevrd.hub.circuits import CLOSE_SLOW_CONSUMER
from clevrd.hub.control_loops import Stats
from clevrd.hub.hub import RUN_MAX_BYTES, Hub
from clevrd.hub.stamping import Published, audience_of, with_warnings

__all__ = [
    "CLOSE_SLOW_CONSUMER",
    "RUN_MAX_BYTES",
    "Hub",
    "Published",
    "Stats",
    "audience_of",
    "with_warnings",
]
