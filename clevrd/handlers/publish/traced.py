"""Publishes over HTTP with a span each, and batches with one for all their messages.

These endpoints are made where tracing is configured, in the place of those that they extend. A
request that is refused by its head alone has no span: without a credential nobody fills the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import msgspec

from clevrd.admission import Admitted, Gate, Later
from clevrd.config import Config
from clevrd.core.message_headers import trace_of_head
from clevrd.core.publish_request import PublishRequest
from clevrd.core.topic import Topic
from clevrd.core.trace_context import TRACEPARENT
from clevrd.errors import ShuttingDown
from clevrd.handlers.publish.batch import BatchEndpoint, BatchResults
from clevrd.handlers.publish.endpoint import PublishEndpoint, PublishHub
from clevrd.http_values import Response
from clevrd.hub import Hub, PublishAnswer, Published
from clevrd.scheduling.due_answers import Due
from clevrd.tenants import Tenant
from clevrd.tracing.tracing import PublishSpan, Tracing

_NAMED: Final = f'"{TRACEPARENT}"'.encode()


class TracedPublishEndpoint:
    """Answers a publish as another endpoint does, with a span where the publish is traced.

    Args:
        make: makes that endpoint: one that publishes to this hub, or to one publish's `SpanHub`.
        is_enveloped: a body is a publish, whose headers may name a trace; not the data alone.
    """

    def __init__(
        self,
        make: Callable[[PublishHub], PublishEndpoint],
        hub: Hub,
        tracing: Tracing,
        *,
        is_enveloped: bool,
    ) -> None:
        self._make = make
        self._hub = hub
        self._tracing = tracing
        self._is_enveloped = is_enveloped
        self._untraced = make(hub)
        self.admit = self._untraced.admit

    @property
    def serves_while_draining(self) -> bool:
        """Whether what is published during a drain outlives it."""
        return self._untraced.serves_while_draining

    def answer(self, admitted: Admitted, body: bytes) -> Response | Later:
        """Publish ``body``; return an awaitable when the publisher has to wait."""
        headers = _own_headers(body) if self._is_enveloped and _NAMED in body else None
        # The trace in the head may not be carried, and is the publish's all the same.
        trace = headers or trace_of_head(admitted.head.headers)
        span = self._tracing.begin_publish(trace, admitted.tenant.name, "http")
        if span is None:
            return self._untraced.answer(admitted, body)
        with _ends_on_error(span):
            reply = self._make(SpanHub(self._hub, span)).answer(admitted, body)
        if isinstance(reply, Response):
            span.end()
        elif isinstance(reply, Due):
            reply.when_known(partial(_end_when_known, span))
        else:
            return _ending(span, reply)
        return reply


class TracedBatchEndpoint(BatchEndpoint):
    """Answers a batch as `BatchEndpoint` does, with a span where the batch is traced.

    An item that has a trace of its own keeps that.
    """

    def __init__(self, gate: Gate, hub: Hub, config: Config, tracing: Tracing) -> None:
        super().__init__(gate, hub, config)
        self._config = config
        self._tracing = tracing

    def answer(self, admitted: Admitted, body: bytes) -> Awaitable[Response]:
        """Return the work to await."""
        trace = trace_of_head(admitted.head.headers)
        span = self._tracing.begin_publish(trace, admitted.tenant.name, "http")
        if span is None:
            return super().answer(admitted, body)
        traced = _SpanBatch(self._gate, self._hub, self._config, span)
        with _ends_on_error(span):
            work = traced.answer(admitted, body)
        return _ending_batch(span, work)


class _SpanBatch(BatchEndpoint):
    """Answers the one batch whose span it has."""

    _may_decode_several = False

    def __init__(self, gate: Gate, hub: Hub, config: Config, span: PublishSpan) -> None:
        super().__init__(gate, hub, config)
        self._span = span

    def _decode(self, item: bytes) -> PublishRequest:
        request = super()._decode(item)
        if request.headers and TRACEPARENT in request.headers:
            return request
        return self._span.carried_by(request)

    async def _publish_into(
        self, results: BatchResults, admitted: Admitted, items: list[bytes]
    ) -> None:
        self._span.attributes["messaging.batch.message_count"] = len(items)
        await super()._publish_into(results, admitted, items)
        self._span.attributes["clevrd.refused"] = results.refused_items


class SpanHub:
    """The hub as one traced publish sees it: what is published carries the span, and is noted."""

    __slots__ = ("_hub", "_span", "check_rate", "must_wait")

    def __init__(self, hub: Hub, span: PublishSpan) -> None:
        self._hub = hub
        self._span = span
        self.check_rate = hub.check_rate
        self.must_wait = hub.must_wait

    @property
    def serves_publishers(self) -> bool:
        """Whether the hub serves publishers while readers are sent away."""
        return self._hub.serves_publishers

    def topic(self, tenant: Tenant, name: str) -> Topic:
        """Return the topic as the hub does, and note its name even where that is refused."""
        self._span.attributes["messaging.destination.name"] = name
        return self._hub.topic(tenant, name)

    def publish(self, topic: Topic, request: PublishRequest) -> PublishAnswer:
        """Publish as the hub does."""
        return self._noted(request, self._hub.publish(topic, self._span.carried_by(request)))

    async def publish_later(
        self, tenant: Tenant, topic: Topic, request: PublishRequest
    ) -> PublishAnswer:
        """Publish as the hub does."""
        carried = self._span.carried_by(request)
        return self._noted(request, await self._hub.publish_later(tenant, topic, carried))

    def publish_once(
        self, tenant: Tenant, request: PublishRequest, key: str
    ) -> PublishAnswer | None:
        """Publish as the hub does."""
        self._span.note_request(request)
        answer = self._hub.publish_once(tenant, self._span.carried_by(request), key)
        return None if answer is None else self._noted(request, answer)

    async def publish_once_later(
        self, tenant: Tenant, request: PublishRequest, key: str
    ) -> PublishAnswer:
        """Publish as the hub does."""
        carried = self._span.carried_by(request)
        return self._noted(request, await self._hub.publish_once_later(tenant, carried, key))

    def _noted(self, request: PublishRequest, answer: PublishAnswer) -> PublishAnswer:
        self._span.note_request(request)
        if isinstance(answer, Published):
            note_answer(self._span, answer)
        else:
            # Called before what ends the span, which is added later.
            answer.add_done_callback(partial(_note_when_known, self._span))
        return answer


def note_answer(span: PublishSpan, answer: Published) -> None:
    """Note what a publisher is answered."""
    span.note_message(answer.message_id, answer.offset)
    attributes = span.attributes
    attributes["clevrd.epoch"] = answer.epoch
    attributes["clevrd.subscribers"] = answer.subscribers
    if answer.repeated:
        attributes["clevrd.repeated"] = True


def _note_when_known(span: PublishSpan, known: asyncio.Future[Published]) -> None:
    if failure_of(known) is None:
        note_answer(span, known.result())


def _end_when_known(span: PublishSpan, known: asyncio.Future[object]) -> None:
    span.end(failure_of(known))


def failure_of(known: asyncio.Future[Any]) -> BaseException | None:
    """Return why an answer that was due is an error; None where it is none."""
    return ShuttingDown() if known.cancelled() else known.exception()


async def _ending(
    span: PublishSpan, reply: Awaitable[Response | Due[Response]]
) -> Response | Due[Response]:
    """Return what ``reply`` returns, and end the span with it, or once it is known."""
    with _ends_on_error(span):
        answer = await reply
    if isinstance(answer, Due):
        answer.when_known(partial(_end_when_known, span))
    else:
        span.end()
    return answer


async def _ending_batch(span: PublishSpan, work: Awaitable[Response]) -> Response:
    with _ends_on_error(span):
        answer = await work
    span.end()
    return answer


@contextmanager
def _ends_on_error(span: PublishSpan) -> Iterator[None]:
    """End the span where the block raises; a stop that cuts the wait is no bug."""
    try:
        yield
    except asyncio.CancelledError:
        span.end(ShuttingDown())
        raise
    except Exception as error:
        span.end(error)
        raise


class _Own(msgspec.Struct):
    """The part of a publish that names its trace."""

    headers: dict[str, str] | None = None


_own_decoder = msgspec.json.Decoder(_Own)


def _own_headers(body: bytes) -> dict[str, str] | None:
    """Return the headers in a publish; None where it has none, or is none."""
    try:
        headers = _own_decoder.decode(body).headers
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return headers if headers and TRACEPARENT in headers else None
