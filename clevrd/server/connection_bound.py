"""The bound on connections: the setting, cut to what the descriptors of the process allow."""

from __future__ import annotations

import logging

from clevrd.admin_listener import MAX_DESCRIPTORS as ADMIN_DESCRIPTORS
from clevrd.descriptors import connections_allowed
from clevrd.journal.engines import MAX_DESCRIPTORS as JOURNAL_DESCRIPTORS
from clevrd.raw_http import MAX_LINGERING, MAX_PROBES
from clevrd.server.messaging import Messaging
from clevrd.server.ways_in import WaysIn
from clevrd.sources.sources import DESCRIPTORS as SOURCE_DESCRIPTORS
from clevrd.tls.server import MAX_BEYOND
from clevrd.tls.server import MAX_LINGERING as MAX_LINGERING_TLS

log = logging.getLogger(__name__)


def bound_connections(messaging: Messaging, ways_in: WaysIn) -> None:
    """Set the bound, once every descriptor that stays open is open."""
    wanted = messaging.config.max_connections
    listeners = sum(each.count for each in ways_in.listeners)
    allowed = connections_allowed(listeners, _beyond(messaging, ways_in))
    if wanted > allowed:
        log.warning(
            "max_connections is more than descriptors allow wanted=%d taken=%d", wanted, allowed
        )
    bound = min(wanted or allowed, allowed)
    ways_in.for_clients.raw.max_connections = bound
    messaging.hub.connection_counts.bound(bound)


def _beyond(messaging: Messaging, ways_in: WaysIn) -> int:
    """Return how many descriptors are needed beside those of listeners and of clients."""
    beyond = MAX_PROBES + MAX_LINGERING
    if ways_in.for_clients.tls is not None:
        beyond += MAX_BEYOND + MAX_LINGERING_TLS
    if ways_in.for_operators is not None:
        beyond += ADMIN_DESCRIPTORS
    if messaging.hub.journal is not None:
        beyond += JOURNAL_DESCRIPTORS
    return beyond + SOURCE_DESCRIPTORS * len(messaging.sources.entries)
