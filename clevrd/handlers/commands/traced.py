"""The commands of one WebSocket, of which publishes have a span each."""

from __future__ import annotations

from clevrd.admission import Gate
from clevrd.connections.command_websocket import CommandWebSocket
from clevrd.handlers.commands.commands import Commands, Publish
from clevrd.handlers.publish.traced_frames import OpenSpans, TracedOutcomes
from clevrd.hub import Hub
from clevrd.tenants import Tenant
from clevrd.tracing.tracing import Tracing


class TracedCommands(Commands, TracedOutcomes):
    """Carries out commands as `Commands` does, with spans of publishes."""

    def __init__(
        self,
        tracing: Tracing,
        gate: Gate,
        hub: Hub,
        tenant: Tenant,
        connection: CommandWebSocket,
        *,
        default_last: int,
        max_topics: int,
        may_match_all: bool,
    ) -> None:
        self.spans = OpenSpans(tracing, tenant.name)
        super().__init__(
            *(gate, hub, tenant, connection),
            default_last=default_last,
            max_topics=max_topics,
            may_match_all=may_match_all,
        )

    def _decode(self, payload: bytes) -> Publish:
        return self.spans.begin(payload, super()._decode(payload))
