"""Plain publishes and subscribes, answered without aiohttp; every connection begins here.

A request is plain when a strict grammar, narrower than HTTP's, recognises all of it (`grammar`). At
the first thing it does not recognise the connection and its unread bytes go to aiohttp for good:
when in doubt, hand over, never guess. Both ways ask the same endpoints, so a request means the same
on both. `probes`: what may be asked over the limit of connections. `server`: what all connections
share. `connection`: one of them. `proxied`: one of a proxy's, until its PROXY header was read. Each
imports only from those named before it.
"""

from clevrd.raw_http.connection import RawConnection
from clevrd.raw_http.grammar import PlainGrammar
from clevrd.raw_http.probes import MAX_PROBES
from clevrd.raw_http.proxied import ProxiedConnection
from clevrd.raw_http.server import MAX_LINGERING, RawServer

__all__ = [
    "MAX_LINGERING",
    "MAX_PROBES",
    "PlainGrammar",
    "ProxiedConnection",
    "RawConnection",
    "RawServer",
]
