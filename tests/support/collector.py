"""A collector of traces for tests: a real OTLP/HTTP receiver, on a socket of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web
from daemons import until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from clevrd.tracing.exporter import OtlpExporter
from clevrd.tracing.settings import TracingSettings

# The first exporter imports libraries, for which a test's loop would be held.
OtlpExporter(TracingSettings("http://127.0.0.1:9/v1/traces", 1.0)).end()

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"


class ReceivedSpan:
    """A span as the collector has read it, with what its resource says."""

    def __init__(self, span: Span, resource: dict[str, Any]) -> None:
        self.name = span.name
        self.trace_id = span.trace_id.hex()
        self.span_id = span.span_id.hex()
        self.parent_id = span.parent_span_id.hex()
        self.tracestate = span.trace_state
        self.kind = Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower()
        self.attributes = attributes_of(span.attributes)
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
        self.is_error = span.status.code == Status.STATUS_CODE_ERROR
        self.message = span.status.message
        self.start_ns = span.start_time_unix_nano
        self.end_ns = span.end_time_unix_nano
        self.resource = resource

    @property
    def traceparent(self) -> str:
        """Return what names this span as a parent."""
        return f"00-{self.trace_id}-{self.span_id}-01"


def attributes_of(pairs: Any) -> dict[str, Any]:
    """Return attributes by name, with their values as Python has them."""
    return {pair.key: _value(pair) for pair in pairs}


def _value(pair: KeyValue) -> Any:
    kind = pair.value.WhichOneof("value")
    return None if kind is None else getattr(pair.value, kind)


class Collector:
    """Takes spans, or does not, as the test says."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[ReceivedSpan] = []
        self.requests = 0
        # The header fields of the last request, by lower-case name.
        self.headers: dict[str, str] = {}
        # The status that a request is answered; 200 takes its spans.
        self.status = 200
        # Whether an answer goes on until its connection breaks.
        self.is_endless = False
        # Requests are not answered before it is set.
        self.answers = asyncio.Event()
        self.answers.set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Take the spans of a request."""
        body = await request.read()
        self.requests += 1
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        await self.answers.wait()
        if self.status != 200:
            return web.Response(status=self.status)
        for part in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = attributes_of(part.resource.attributes)
            for scope in part.scope_spans:
                self.spans += [ReceivedSpan(span, resource) for span in scope.spans]
        if self.is_endless:
            return await self._answer_on(request)
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )

    async def _answer_on(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        with suppress(ConnectionError):
            while True:
                await answer.write(bytes(65_536))
        return answer

    def named(self, name: str) -> list[ReceivedSpan]:
        """Return the spans that have come of this name."""
        return [span for span in self.spans if span.name == name]

    async def wait_for(self, name: str, count: int = 1) -> list[ReceivedSpan]:
        """Wait until so many spans of this name have come, and return them."""
        await until(lambda: len(self.named(name)) >= count)
        return self.named(name)


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """Run a collector in this loop."""
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield collector
    finally:
        collector.answers.set()
        await runner.cleanup()
