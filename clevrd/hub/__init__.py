"""The heart: what comes between a request and a topic. No HTTP and no sockets here.

Everything happens on the loop's thread, and no ``await`` stands between reading and changing
shared state; that is the only lock there is. Time comes from the loop, wall time from a function.

A module for each thing that has a state of its own: `acceptance`, `waiting`, `first_answers`,
`readers`, `circuits`, `rounds`, `control_loops`, `drain`. `restart` and `shares` have none. `hub`
puts them together, and is what the floors above talk to.
"""

from clevrd.hub.acceptance import Published, audience_of, with_warnings
from clevrd.hub.circuits import CLOSE_SLOW_CONSUMER
from clevrd.hub.control_loops import Stats
from clevrd.hub.hub import RUN_MAX_BYTES, Hub

__all__ = [
    "CLOSE_SLOW_CONSUMER",
    "RUN_MAX_BYTES",
    "Hub",
    "Published",
    "Stats",
    "audience_of",
    "with_warnings",
]
