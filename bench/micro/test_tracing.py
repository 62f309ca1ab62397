"""What tracing costs a publish with ten readers: off, on and not sampled, on and sampled.

`python -m pytest bench/micro/test_tracing.py`. Off is what a daemon without `otel_endpoint` does; a
publish costs there what it did before there was tracing, since the same code runs, to the bytecode
(tests/tracing/test_tracing_parts.py). What the thread that sends takes is not in it:
docs/operations.md, Tracing.
"""

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest
from test_hot_path import BODY, Benchmark, NullSink, Turns

from clevrd.admission import Admitted, Gate
from clevrd.config import Config
from clevrd.connections.registry import Connections
from clevrd.core.beginning import Last
from clevrd.core.subscriber import Subscriber
from clevrd.handlers.publishers import publishers
from clevrd.http_values import Request
from clevrd.hub import Hub
from clevrd.hub.traced_delivery import delivery_maker
from clevrd.tenants import Tenant
from clevrd.tenants.authenticator import Authenticator
from clevrd.tenants.settings import OPEN
from clevrd.tracing.sender import SpanSender
from clevrd.tracing.spans import Sampler, Span
from clevrd.tracing.tracing import Tracing


class NullExporter:
    """A collector that takes everything at once."""

    def send(self, spans: Sequence[Span]) -> str | None:
        """Take them."""
        return None

    def end(self) -> None:
        """Nothing waits."""


class Fixture:
    """What answers a publish, to a topic with ten readers that keep up."""

    def __init__(self, ratio: float | None) -> None:
        """Args: ratio: of the publishes that are traced; None: tracing is off."""
        self.turns = Turns()
        loop = cast("asyncio.AbstractEventLoop", self.turns)
        tracing: Tracing | None = None
        if ratio is not None:
            tracing = Tracing(Sampler(ratio), SpanSender(NullExporter(), "", loop))
        hub = Hub(Config(), loop, make_delivery=delivery_maker(tracing))
        gate = Gate(Authenticator(OPEN), lambda: False, lambda: 0.0)
        nothing = cast("Connections", None)
        self.endpoint = publishers(gate, hub, nothing, Config(), tracing).publish
        head = Request("POST", "/publish", {"host": "x", "content-length": str(len(BODY))})
        self.admitted: Admitted = self.endpoint.admit(head)
        topic = hub.topic(Tenant("default-tenant"), "bench-0")
        for _ in range(10):
            hub.subscribe(topic, Subscriber(NullSink()), Last(0))
        self.turns.run()

    def publish(self) -> None:
        """Publish one message, and let the turn end."""
        self.endpoint.answer(self.admitted, BODY)
        self.turns.run()


@pytest.mark.parametrize("ratio", [None, 0.0, 1.0], ids=["off", "not sampled", "sampled"])
def test_publish(benchmark: Benchmark, ratio: float | None) -> None:
    """From the body to the last write of the round."""
    benchmark(Fixture(ratio).publish)
