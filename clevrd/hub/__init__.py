"""The heart: what comes between a request and a topic. No HTTP and no sockets here.

Everything happens on the loop's thread, and no ``await`` stands between reading and changing
shared state; that is the only lock there is. Time comes from the loop, wall time from a function.

`publishing` gives messages their place in a topic's order and answers publishers; `delivery` takes
messages at their place and hands them to readers. Each knows two things of the other. `hub` puts
them together, with what decides from the load (`control_loops`) and what a stop waits for
(`drain`), and is what the floors above talk to.
"""

from clevrd.hub.circuits import CLOSE_SLOW_CONSUMER
from clevrd.hub.control_loops import Stats
from clevrd.hub.hub import RUN_MAX_BYTES, Hub
from clevrd.hub.publish_answers import Published, audience_of, with_warnings

__all__ = [
    "CLOSE_SLOW_CONSUMER",
    "RUN_MAX_BYTES",
    "Hub",
    "Published",
    "Stats",
    "audience_of",
    "with_warnings",
]
