"""The paths under /admin, for one way in: the daemon's own address, or the admin listener."""

from __future__ import annotations

from clevrd.admission import Endpoint, Operators
from clevrd.connections.registry import Connections
from clevrd.handlers.operate.actions import (
    ClearEndpoint,
    DisconnectEndpoint,
    MessagesEndpoint,
    Operator,
)
from clevrd.handlers.operate.explain import ExplainEndpoint
from clevrd.handlers.operate.subscriber_rows import SubscribersEndpoint
from clevrd.handlers.operate.top import TopEndpoint, TopViews
from clevrd.hub import Hub


def admin_routes(
    gate: Operators, hub: Hub, connections: Connections, views: TopViews
) -> dict[str, dict[str, Endpoint]]:
    """Return path -> method -> endpoint.

    Args:
        gate: says who may operate the daemon on this way in.
        views: the same for all ways.
    """
    operator = Operator(gate, hub)
    return {
        "/admin/top": {"GET": TopEndpoint(gate, views)},
        "/admin/explain": {"GET": ExplainEndpoint(gate, hub)},
        "/admin/subscribers": {
            "GET": SubscribersEndpoint(gate, hub, connections),
            "DELETE": DisconnectEndpoint(operator, connections),
        },
        "/admin/topics": {"DELETE": ClearEndpoint(operator, drops=True)},
        "/admin/messages": {
            "GET": MessagesEndpoint(operator),
            "DELETE": ClearEndpoint(operator),
        },
    }
