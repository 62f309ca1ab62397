"""OpenTelemetry's exporter for OTLP over HTTP, fed with `Span`s. Imports OpenTelemetry.

Bytes, headers, certificates, compression and retries are the library's, and so are the standard
variables for them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from typing import Any, Final

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from clevrd import __version__
from clevrd.tracing.settings import GRPC_PORT, TracingSettings
from clevrd.tracing.spans import SYSTEM, Span, SpanName, TraceContext

# The loggers in which the library says why a request failed; the root of all of its own.
_LIBRARY_LOG: Final = "opentelemetry"
_REASONS_LOG: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_MAX_REASON: Final = 300
# Bytes of an answer that are read; a collector's has less than a hundred.
_MAX_ANSWER_BYTES: Final = 65_536
# Variables that have the library make a session of its own, with credentials.
_PROVIDERS: Final = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
)

_KINDS: Final[dict[SpanName, SpanKind]] = {
    "publish": SpanKind.PRODUCER,
    "deliver": SpanKind.CONSUMER,
}
_UNSET: Final = Status(StatusCode.UNSET)
_SCOPE: Final = InstrumentationScope(SYSTEM, __version__)


# The parts that are worth telling of the library's sentences, which show objects and a URL.
_ANSWERED: Final = re.compile(r"code: (\d+), reason: (.*)")
_REDIRECTED: Final = re.compile(r"it was answered 3\d\d .*", re.DOTALL)
_ERRNO: Final = re.compile(r"\[Errno -?\d+\] ([A-Za-z ,']+)")
_TIMED_OUT: Final = re.compile(r"timed out|timeout=|Timeout")


class _Reasons(logging.Handler):
    """Keeps what the library says of a request first, in the place of a line for each try."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, unless there is one already."""
        self.first = self.first or record.getMessage()


def short_reason(said: str) -> str:
    """Return in a few words why a request failed, of which the library has ``said`` something."""
    if redirected := _REDIRECTED.search(said):
        return redirected[0][:_MAX_REASON]
    if answered := _ANSWERED.search(said):
        return f"it was answered {answered[1]} {answered[2]}"[:_MAX_REASON]
    if failed := _ERRNO.search(said):
        return f"it can't be reached: {failed[1]}"
    if _TIMED_OUT.search(said):
        return "no answer in time"
    return said[:_MAX_REASON] or "they were not taken"


class _Session(requests.Session):
    """Reads a bounded part of each answer, and takes a redirect for a refusal.

    The library reads all of an answer, and counts spans as taken that were only sent elsewhere.
    """

    def send(self, request: requests.PreparedRequest, **more: Any) -> requests.Response:
        """Send ``request``.

        Raises:
            requests.RequestException: it was not answered, or with a redirect.
        """
        # Where a redirect was followed, the request would become a GET without the spans.
        more.update(stream=True, allow_redirects=False)
        with super().send(request, **more) as answer:
            status, body = answer.status_code, answer.raw.read(_MAX_ANSWER_BYTES)
        if 300 <= status < 400:
            raise requests.RequestException(
                f"it was answered {status} {answer.reason}, and redirects are not followed; set"
                " otel_endpoint to the address that takes spans"
            )
        read = requests.Response()
        read.status_code, read.reason, read.headers = status, answer.reason, answer.headers
        read.raw = BytesIO(body)
        return read


class OtlpExporter:
    """Sends spans to one collector: an `Exporter` of the sender's."""

    def __init__(self, settings: TracingSettings) -> None:
        """Connect to nothing yet."""
        self._reasons = _Reasons()
        # The library's lines would come once for each request, and some of them show variables.
        logging.getLogger(_LIBRARY_LOG).propagate = False
        reasons = logging.getLogger(_REASONS_LOG)
        reasons.propagate = False
        reasons.addHandler(self._reasons)
        self._resource = _resource()
        session = None if any(map(os.environ.get, _PROVIDERS)) else _Session()
        self._exporter = OTLPSpanExporter(endpoint=settings.endpoint, session=session)
        self._hint = ""
        if f":{GRPC_PORT}/" in settings.endpoint:
            self._hint = f" ({GRPC_PORT} is as a rule the port of gRPC, and 4318 that of HTTP)"

    def send(self, spans: Sequence[Span]) -> str | None:
        """Return None once the collector has taken ``spans``, or else why it has not."""
        self._reasons.first = ""
        if self._exporter.export(list(map(self._readable, spans))) is SpanExportResult.SUCCESS:
            return None
        return short_reason(self._reasons.first) + self._hint

    def end(self) -> None:
        """Send nothing more, and cut short what waits to be tried again."""
        shutdown: Callable[[], object] = self._exporter.shutdown
        # The exporter's connections are closed, also under a request that is under way.
        with suppress(Exception):
            shutdown()
        logging.getLogger(_REASONS_LOG).removeHandler(self._reasons)

    def _readable(self, span: Span) -> ReadableSpan:
        parent, link = span.parent, span.link
        return ReadableSpan(
            span.name,
            context=_context(span.context),
            parent=None if parent is None else _context(parent, is_remote=True),
            resource=self._resource,
            attributes=span.attributes,
            links=() if link is None else (Link(_context(link, is_remote=True)),),
            kind=_KINDS[span.name],
            status=_UNSET if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=_SCOPE,
        )


@cache
def _resource() -> Resource:
    """Return what says which daemon this is, by the standard variables where they say it.

    The library asks threads for it and waits for them, so it is asked once.
    """
    found = Resource.create({SERVICE_VERSION: __version__})
    name = str(found.attributes.get(SERVICE_NAME, ""))
    if not name or name.startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: SYSTEM}))
    return found


def _context(context: TraceContext, *, is_remote: bool = False) -> SpanContext:
    state = TraceState.from_header([context.tracestate]) if context.tracestate else None
    return SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote,
        TraceFlags(TraceFlags.SAMPLED if context.is_sampled else TraceFlags.DEFAULT),
        state,
    )
