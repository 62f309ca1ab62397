"""The hub: everything between a request and a topic's readers. No HTTP and no sockets here.

All code here runs on the loop's thread, and no ``await`` stands between reading and changing shared
state, so nothing needs a lock. Time comes from the loop's clock, wall time from a function.

`publishing` gives each message its place in its topic's order and answers the publisher; `delivery`
takes messages at their place and hands them to readers. Neither of the two looks into the other:
`publishing` hands messages to `delivery` and asks whether a topic has room, and `delivery` tells
waiting publishes that room was made. `hub` puts both together with the periodic decisions from the
load (`control_loops`) and the wait for readers at a stop (`drain`). The floors above call `hub`
alone.
"""

from clevrd.hub.circuits import CLOSE_SLOW_CONSUMER
from clevrd.hub.control_loops import Stats
from clevrd.hub.history_readers import OlderMessages
from clevrd.hub.hub import RUN_MAX_BYTES, Hub
from clevrd.hub.message_reading import ReadMessages, past_expired, read_messages
from clevrd.hub.publish_answers import (
    PublishAnswer,
    Published,
    Run,
    RunAnswer,
    audience_of,
    with_warnings,
)

__all__ = [
    "CLOSE_SLOW_CONSUMER",
    "RUN_MAX_BYTES",
    "Hub",
    "OlderMessages",
    "PublishAnswer",
    "Published",
    "ReadMessages",
    "Run",
    "RunAnswer",
    "Stats",
    "audience_of",
    "past_expired",
    "read_messages",
    "with_warnings",
]
