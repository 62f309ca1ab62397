"""Parts: all parts of one daemon, each built of those before it. Nothing listens yet."""

from __future__ import annotations

import asyncio
import time

from clevrd.core.patterns import REST
from clevrd.scheduling.timers import Timers
from clevrd.server.certificates import Certificates
from clevrd.server.clients import Clients
from clevrd.server.messaging import Messaging
from clevrd.server.planned_restart import PlannedRestart
from clevrd.server.setup import Setup, check_certificates_are_asked_for
from clevrd.server.views import Views
from clevrd.server.ways_in import ways_in_of


class Parts:
    """The parts, and the two answers about the daemon that several of them together give."""

    __slots__ = (
        "certificates",
        "clients",
        "keeps_all_topics",
        "messaging",
        "restart",
        "started_s",
        "timers",
        "ways_in",
    )

    def __init__(self, setup: Setup, loop: asyncio.AbstractEventLoop) -> None:
        """Build them.

        Raises:
            ConfigError: a file that the setup names can't be used.
        """
        check_certificates_are_asked_for(setup.access, setup.tls_in_force())
        # On the monotonic clock.
        self.started_s = time.monotonic()
        self.messaging = Messaging(setup, loop)
        self.certificates = Certificates(setup.tls_in_force())
        self.clients = Clients(setup, self.messaging, self.certificates, loop)
        views = Views(
            self.messaging, self.clients, self, self.certificates.ends_in_s, now_s=loop.time
        )
        self.ways_in = ways_in_of(
            setup, self.messaging, self.clients, views, self.certificates.contexts, loop
        )
        # A journal has every topic.
        journal = setup.journal_in_force()
        self.keeps_all_topics = journal.is_on and REST in journal.topics
        hub = self.messaging.hub
        self.timers = Timers(loop, hub.counters.count_background_error)
        self.restart = PlannedRestart(
            setup.config.state_dir, hub, setup.config.shutdown_timeout_s, loop
        )

    def is_ready(self) -> bool:
        """Whether the daemon serves its clients: started, listening and not draining."""
        is_listening = self.ways_in.for_clients.listeners.is_listening()
        return is_listening and not self.messaging.hub.is_draining

    def count_connections(self) -> dict[str, int]:
        """Return how many connections are open, by what they are at the moment."""
        connections, listener = self.clients.connections, self.ways_in.for_clients
        shaking = {} if listener.tls is None else {"tls_handshake": listener.tls.handshakes}
        return {
            **shaking,
            "http": self.ways_in.count_connections(),
            "websocket": len(connections) - connections.streams,
            "stream": connections.streams,
        }
