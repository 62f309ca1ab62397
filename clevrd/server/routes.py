"""Routes: which endpoint answers which path, for clients and for operators.

The endpoints are in `handlers`; docs/wire.md and docs/operations.md say what each promises.
"""

from __future__ import annotations

from typing import NamedTuple

from clevrd.admission import EverybodyOperates, Operators
from clevrd.config import Config
from clevrd.handlers.operate.admin import admin_routes
from clevrd.handlers.operate.configuration import ConfigurationEndpoint
from clevrd.handlers.operate.metrics import MetricsEndpoint, TenantMetricsEndpoint
from clevrd.handlers.publishers import Publishers, publishers
from clevrd.handlers.router import PathRouter, Routes
from clevrd.handlers.site.assets import AssetEndpoint
from clevrd.handlers.site.pages import (
    AdminHomeEndpoint,
    Facts,
    HomeEndpoint,
    Whereabouts,
    kept_sentence,
)
from clevrd.handlers.subscribe.endpoint import SubscribeEndpoint
from clevrd.handlers.subscribe.ticket import TicketEndpoint
from clevrd.handlers.topics.clear import ClearEndpoint
from clevrd.handlers.topics.endpoint import TopicEndpoint, TopicsEndpoint
from clevrd.handlers.topics.messages import MessagesEndpoint
from clevrd.raw_http import PlainGrammar
from clevrd.server.clients import Clients
from clevrd.server.messaging import Messaging
from clevrd.server.setup import Setup
from clevrd.server.views import Views


class ClientRoutes(NamedTuple):
    """All paths, and the plain requests to a few of them, which are recognised by their bytes."""

    router: PathRouter
    # None where the settings switch the recognition off.
    grammar: PlainGrammar | None


def client_routes(
    setup: Setup, messaging: Messaging, clients: Clients, views: Views
) -> ClientRoutes:
    """Return what the daemon's own address answers."""
    gate, hub, config = clients.gate, messaging.hub, messaging.config
    made = publishers(gate, hub, clients.connections, config, messaging.tracing)
    subscribe = SubscribeEndpoint(gate, hub, clients.connections, clients.polls, config)
    router = PathRouter(
        {
            "/": {"GET": _home(setup, messaging, clients, views)},
            "/clevrd.js": {"GET": AssetEndpoint("clevrd.js")},
            "/clevrd.d.ts": {"GET": AssetEndpoint("clevrd.d.ts")},
            "/publish": {"POST": made.publish, "GET": made.publish_socket},
            "/publish/batch": {"POST": made.batch},
            "/subscribe": {"GET": subscribe},
            "/topics": {"GET": TopicsEndpoint(gate, hub)},
            "/topics/*": {"GET": TopicEndpoint(gate, hub)},
            "/topics/*/messages": {
                "GET": MessagesEndpoint(gate, hub),
                "POST": made.topic_publish,
                "DELETE": ClearEndpoint(gate, hub),
            },
            "/ticket": {"POST": TicketEndpoint(gate, clients.access.tickets)},
            "/ws": {"GET": made.commands},
            **_about_the_daemon(gate, messaging, clients, views),
        }
    )
    return ClientRoutes(router, _grammar(made, subscribe, config) if config.raw_paths else None)


def _home(setup: Setup, messaging: Messaging, clients: Clients, views: Views) -> HomeEndpoint:
    config, journal = messaging.config, setup.journal_in_force()
    engine = journal.engine if journal.is_on else ""
    return HomeEndpoint(
        clients.gate,
        views.figures,
        messaging.hub.turns,
        Whereabouts(clients.asked_for, is_secure=setup.tls_in_force().is_on),
        Facts(config.catch_up_messages, kept_sentence(engine, journal.topics, config.state_dir)),
    )


def _grammar(made: Publishers, subscribe: SubscribeEndpoint, config: Config) -> PlainGrammar:
    return PlainGrammar(
        made.publish,
        {"/publish": made.publish_socket, "/subscribe": subscribe, "/ws": made.commands},
        config.max_message_bytes,
    )


def operator_routes(messaging: Messaging, clients: Clients, views: Views) -> PathRouter:
    """Return what the address for operators answers, to everybody who reaches it."""
    gate = EverybodyOperates()
    return PathRouter(
        {
            "/": {"GET": AdminHomeEndpoint(Whereabouts(clients.asked_for))},
            **_about_the_daemon(gate, messaging, clients, views),
        }
    )


def _about_the_daemon(
    gate: Operators, messaging: Messaging, clients: Clients, views: Views
) -> Routes:
    hub = messaging.hub
    return {
        "/dashboard": {"GET": views.dashboard},
        "/health": {"GET": views.health},
        "/health/live": {"GET": views.live},
        "/health/ready": {"GET": views.ready},
        "/metrics": {"GET": MetricsEndpoint(gate, views.figures, hub.turns)},
        "/metrics/tenants": {"GET": TenantMetricsEndpoint(gate, views.figures, hub.turns)},
        "/config": {"GET": ConfigurationEndpoint(gate, clients.in_force, hub.turns)},
        **admin_routes(gate, hub, clients.connections, views.top),
    }
