"""The endpoints that publish: with spans where tracing is configured, and otherwise without a trace
of it, so that it costs nothing where it is off.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from clevrd.admission import Endpoint, Gate
from clevrd.config import Config
from clevrd.connections.registry import Connections
from clevrd.handlers.commands.endpoint import CommandEndpoint
from clevrd.handlers.publish.batch import BatchEndpoint
from clevrd.handlers.publish.endpoint import PublishEndpoint, PublishHub
from clevrd.handlers.publish.socket import PublishSocketEndpoint
from clevrd.handlers.topics.publish import TopicPublishEndpoint
from clevrd.hub import Hub
from clevrd.tracing.tracing import Tracing


class Publishers(NamedTuple):
    """Each endpoint by the path that it is for."""

    publish: Endpoint
    batch: Endpoint
    topic_publish: Endpoint
    publish_socket: Endpoint
    commands: Endpoint


def publishers(
    gate: Gate, hub: Hub, connections: Connections, config: Config, tracing: Tracing | None
) -> Publishers:
    """Return the endpoints that publish to ``hub``."""
    if tracing is not None:
        return _traced(gate, hub, connections, config, tracing)
    return Publishers(
        PublishEndpoint(gate, hub, config),
        BatchEndpoint(gate, hub, config),
        TopicPublishEndpoint(gate, hub, config),
        PublishSocketEndpoint(gate, hub, connections, config),
        CommandEndpoint(gate, hub, connections, config),
    )


def _traced(
    gate: Gate, hub: Hub, connections: Connections, config: Config, tracing: Tracing
) -> Publishers:
    from clevrd.handlers.commands.traced import TracedCommands
    from clevrd.handlers.publish.traced import TracedBatchEndpoint, TracedPublishEndpoint
    from clevrd.handlers.publish.traced_frames import TracedFramePublisher

    def publish(to: PublishHub) -> PublishEndpoint:
        return PublishEndpoint(gate, to, config)

    def publish_data(to: PublishHub) -> PublishEndpoint:
        return TopicPublishEndpoint(gate, to, config)

    return Publishers(
        TracedPublishEndpoint(publish, hub, tracing, is_enveloped=True),
        TracedBatchEndpoint(gate, hub, config, tracing),
        TracedPublishEndpoint(publish_data, hub, tracing, is_enveloped=False),
        PublishSocketEndpoint(
            *(gate, hub, connections, config), partial(TracedFramePublisher, tracing)
        ),
        CommandEndpoint(*(gate, hub, connections, config), partial(TracedCommands, tracing)),
    )
