"""Views: the endpoints about the daemon itself that both ways in have, for clients and operators.

They are made once, so that both ways share what is kept between two requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from clevrd.admission import Endpoint
from clevrd.handlers.operate.figures import Figures
from clevrd.handlers.operate.health import HealthEndpoint, ProbeEndpoint
from clevrd.handlers.operate.top import TopViews
from clevrd.handlers.site.dashboard import DashboardEndpoint
from clevrd.server.clients import Clients
from clevrd.server.messaging import Messaging


class Standing(Protocol):
    """The daemon, of which some answers are asked for; none is asked before all of it is built."""

    started_s: float

    def is_ready(self) -> bool:
        """Whether the daemon serves its clients."""

    def count_connections(self) -> dict[str, int]:
        """Return how many connections are open, by kind."""


class Views:
    """Health, figures, the dashboard, and the tables of `clevrd top`."""

    __slots__ = ("dashboard", "figures", "health", "live", "ready", "top")

    def __init__(
        self,
        messaging: Messaging,
        clients: Clients,
        standing: Standing,
        certificate_ends_in_s: Callable[[], float | None],
        now_s: Callable[[], float],
    ) -> None:
        """Make them; ``now_s`` is the loop's clock."""
        hub = messaging.hub
        self.health = HealthEndpoint(hub, standing.started_s)
        self.live = ProbeEndpoint(lambda: True, "never")
        self.ready = ProbeEndpoint(standing.is_ready, "The daemon is starting or shutting down.")
        self.figures = Figures(
            *(hub, standing.count_connections, standing.started_s, certificate_ends_in_s),
            *(messaging.sources.figures, messaging.webhooks.counts, messaging.tracing_figures),
        )
        self.dashboard = DashboardEndpoint()
        self.top = TopViews(hub, clients.connections, self.figures, now_s)

    def probes(self) -> dict[str, Endpoint]:
        """Return path -> what answers it also over the limit of connections."""
        return {
            "/health": self.health,
            "/health/live": self.live,
            "/health/ready": self.ready,
        }
