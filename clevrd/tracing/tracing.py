"""Tracing of one daemon: begins the spans of publishes, and hands those that have ended on.

It is made where tracing is configured, and everything that uses it is made then as well, so that
nothing asks whether it is on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from msgspec import structs

from clevrd.core.message_headers import together, without_trace
from clevrd.core.publish_request import PublishRequest
from clevrd.core.trace_context import TRACEPARENT, TRACESTATE
from clevrd.errors import ClevrdError, InvalidRequest
from clevrd.tracing.sender import SpanSender
from clevrd.tracing.settings import TracingSettings
from clevrd.tracing.spans import (
    MAX_DESCRIPTION,
    SYSTEM,
    Attribute,
    Sampler,
    Span,
    TraceContext,
    read_context,
)

RequestT = TypeVar("RequestT", bound=PublishRequest)


class Tracing:
    """Spans, from their beginning to the sender's queue."""

    def __init__(
        self,
        sampler: Sampler,
        sender: SpanSender,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Trace what ``sampler`` chooses.

        Args:
            wall_ns: the wall clock, nanoseconds since 1970.
        """
        self._sampler = sampler
        self.sender = sender
        self.wall_ns = wall_ns

    def begin_publish(
        self, headers: Mapping[str, str] | None, tenant: str, protocol: str
    ) -> PublishSpan | None:
        """Return the span of a publish that begins now; None for one that is not traced.

        Args:
            headers: those of the request or the message, which may name a parent.
            protocol: how the publish came.
        """
        parent = read_context(headers) if headers else None
        context = self._sampler.begin(parent)
        if context is None:
            return None
        attributes: dict[str, Attribute] = {
            "messaging.system": SYSTEM,
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
            "clevrd.tenant": tenant,
            "network.protocol.name": protocol,
        }
        return PublishSpan(self, context, parent, attributes)

    def end_delivery(
        self,
        link: TraceContext,
        start_ns: int,
        end_ns: int,
        attributes: dict[str, Attribute],
    ) -> None:
        """Hand on the span of a delivery.

        It is in the trace of the message's publish, and has a link to that, too: by the one it is
        found, by the other the two are told apart from a call.

        Args:
            link: the publish, or what else the message's own traceparent names.
        """
        context = self._sampler.child(link)
        self.sender.offer(Span("deliver", context, link, start_ns, end_ns, attributes, None, link))


class PublishSpan:
    """The span of one publish, or of a batch, until it ends."""

    __slots__ = ("_headers", "_parent", "_start_ns", "_tracing", "attributes", "context")

    def __init__(
        self,
        tracing: Tracing,
        context: TraceContext,
        parent: TraceContext | None,
        attributes: dict[str, Attribute],
    ) -> None:
        self._tracing = tracing
        self.context = context
        self._parent = parent
        self._start_ns = tracing.wall_ns()
        # Added to while the publish goes on.
        self.attributes = attributes
        # The headers of its messages, with which their consumers go on with the trace.
        self._headers = {TRACEPARENT: context.traceparent()}
        if context.tracestate:
            self._headers[TRACESTATE] = context.tracestate

    def carried_by(self, request: RequestT) -> RequestT:
        """Return ``request`` with this span as its trace, if its headers have room for that."""
        own = request.headers
        if not own:
            return structs.replace(request, headers=self._headers)
        try:
            return structs.replace(request, headers=together(self._headers, without_trace(own)))
        except InvalidRequest:
            return request

    def note_message(self, message_id: str, offset: int) -> None:
        """Note which message it has become."""
        attributes = self.attributes
        attributes["messaging.message.id"] = message_id
        attributes["clevrd.offset"] = offset

    def note_request(self, request: PublishRequest) -> None:
        """Note what is published, and where to."""
        self.attributes["messaging.destination.name"] = request.topic
        self.attributes["messaging.message.body.size"] = len(request.data)

    def end(self, error: BaseException | None = None) -> None:
        """End it now, and hand it on.

        Args:
            error: why nothing was published.
        """
        told: str | None = None
        if isinstance(error, ClevrdError):
            told = str(error)[:MAX_DESCRIPTION]
            self.attributes["error.type"] = error.code
        elif error is not None:
            # The words of a bug are for the log.
            told = "a bug in the daemon"
            self.attributes["error.type"] = ClevrdError.code
        tracing = self._tracing
        span = Span(
            "publish",
            self.context,
            self._parent,
            self._start_ns,
            tracing.wall_ns(),
            self.attributes,
            told,
        )
        tracing.sender.offer(span)


def make_tracing(
    settings: TracingSettings | None, loop: asyncio.AbstractEventLoop
) -> Tracing | None:
    """Return what traces a daemon; None without settings. OpenTelemetry is imported here alone."""
    if settings is None:
        return None
    from clevrd.tracing.exporter import OtlpExporter

    sender = SpanSender(OtlpExporter(settings), settings.endpoint, loop)
    return Tracing(Sampler(settings.sample_ratio), sender)
