"""Publishes over sockets with a span each.

A frame that can't be read as a publish has no span. The trace of the handshake is the parent of
none, since a socket outlives it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Final, TypeVar, cast

from clevrd.core.publish_request import PublishRequest, SocketPublish, decode_socket_publish
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.handlers.publish.outcomes import SocketOutcomes
from clevrd.handlers.publish.socket import FramePublisher
from clevrd.handlers.publish.traced import failure_of, note_answer
from clevrd.hub import Hub, Published, Run
from clevrd.tenants import Tenant
from clevrd.tracing.tracing import PublishSpan, Tracing

RequestT = TypeVar("RequestT", bound=PublishRequest)

# Frames of one socket that are traced and not published yet: more than a run has.
_MAX_OPEN: Final = 1_024


class OpenSpans:
    """The spans of one socket's frames, from the decoding of a frame to its outcome."""

    __slots__ = ("_found", "_tenant", "_tracing")

    def __init__(self, tracing: Tracing, tenant: str) -> None:
        self._tracing = tracing
        self._tenant = tenant
        # By the identity of the frame's payload, and of the request that it became: both are held
        # here, so that no other object has that identity meanwhile.
        self._found: dict[int, tuple[bytes, PublishRequest, PublishSpan]] = {}

    def begin(self, payload: bytes, request: RequestT) -> RequestT:
        """Return ``request`` as it is published: with a trace of ours where it is traced.

        A frame that waits, or is too much for a run, is decoded again, and its span goes on.
        """
        known = self._found.get(id(payload))
        if known is not None:
            return cast(RequestT, known[1])
        if len(self._found) >= _MAX_OPEN:
            self._found.clear()
        span = self._tracing.begin_publish(request.headers, self._tenant, "websocket")
        if span is None:
            return request
        span.note_request(request)
        carried = span.carried_by(request)
        found = (payload, carried, span)
        self._found[id(payload)] = self._found[id(carried)] = found
        return carried

    def end(self, known: object) -> PublishSpan | None:
        """Return the span of a payload or a request, whose outcome is known; None without one."""
        return self._forget(known) if self._found else None

    def end_all(self, run: Sequence[PublishRequest]) -> list[tuple[int, PublishSpan]]:
        """Return the spans of a run, each with its place in the run."""
        if not self._found:
            return []
        ended = ((index, self._forget(request)) for index, request in enumerate(run))
        return [(index, span) for index, span in ended if span is not None]

    def _forget(self, known: object) -> PublishSpan | None:
        found = self._found.get(id(known))
        if found is None:
            return None
        payload, request, span = found
        del self._found[id(payload)], self._found[id(request)]
        return span


class TracedOutcomes(SocketOutcomes):
    """Ends the spans of frames where their outcomes are told."""

    __slots__ = ()

    # Set by the class that decodes.
    spans: OpenSpans

    def run_published(
        self, topic: Topic, run: Sequence[SocketPublish], offset: int, ids: list[str]
    ) -> None:
        """Answer what was published."""
        super().run_published(topic, run, offset, ids)
        _end_run(self.spans.end_all(run), offset, ids)

    def run_is_due(
        self, topic: Topic, run: Sequence[SocketPublish], known: asyncio.Future[Run]
    ) -> None:
        """Answer a run once it is known what became of it."""
        super().run_is_due(topic, run, known)
        if spans := self.spans.end_all(run):
            known.add_done_callback(partial(_end_run_when_known, spans))

    def published(self, request: SocketPublish, answer: Published) -> None:
        """Answer a publish that went by itself, or that was published before."""
        super().published(request, answer)
        if (span := self.spans.end(request)) is not None:
            note_answer(span, answer)
            span.end()

    def is_due(self, request: SocketPublish, known: asyncio.Future[Published]) -> None:
        """Answer a publish that went by itself once it is known what became of it."""
        super().is_due(request, known)
        if (span := self.spans.end(request)) is not None:
            known.add_done_callback(partial(_end_when_known, span))

    def refused(self, error: ClevrdError, payload: bytes) -> None:
        """Answer a frame that was refused."""
        super().refused(error, payload)
        if (span := self.spans.end(payload)) is not None:
            span.end(error)


class TracedFramePublisher(FramePublisher, TracedOutcomes):
    """Publishes one socket's frames as `FramePublisher` does, with spans."""

    __slots__ = ("spans",)

    def __init__(self, tracing: Tracing, hub: Hub, tenant: Tenant) -> None:
        self.spans = OpenSpans(tracing, tenant.name)
        super().__init__(hub, tenant, self._decode)

    def _decode(self, payload: bytes) -> SocketPublish:
        return self.spans.begin(payload, decode_socket_publish(payload))


def _end_run(spans: list[tuple[int, PublishSpan]], offset: int, ids: list[str]) -> None:
    for index, span in spans:
        span.note_message(ids[index], offset + index)
        span.end()


def _end_run_when_known(spans: list[tuple[int, PublishSpan]], known: asyncio.Future[Run]) -> None:
    error = failure_of(known)
    if error is None:
        _end_run(spans, *known.result())
        return
    for _, span in spans:
        span.end(error)


def _end_when_known(span: PublishSpan, known: asyncio.Future[Published]) -> None:
    error = failure_of(known)
    if error is None:
        note_answer(span, known.result())
    span.end(error)
