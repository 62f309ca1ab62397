"""The end of a daemon as a killed process ends: no close frames, no flush; for `testing`."""

from __future__ import annotations

from clevrd.server.parts import Parts


async def crash(parts: Parts) -> None:
    """End at once."""
    messaging, ways_in, connections = parts.messaging, parts.ways_in, parts.clients.connections
    hub = messaging.hub
    hub.is_draining = True
    parts.timers.stop()
    ways_in.close()
    await messaging.sources.crash()
    connections.stop()
    for transport in connections.transports():
        transport.abort()
    ways_in.for_clients.end_handshakes()
    ways_in.for_clients.raw.stop()
    await ways_in.for_clients.aiohttp.shutdown(0)
    await ways_in.end_operators(0)
    hub.stop()
    if messaging.tracing is not None:
        messaging.tracing.sender.abandon()
    if hub.journal is not None:
        await hub.journal.node.crash()
    # The kernel releases the lock of a killed process in the same way; no state was saved.
    parts.restart.leave()
