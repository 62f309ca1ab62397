"""GET /publish as a WebSocket: each text frame is a publish.

A frame with a ``ref`` is answered with that ref; without one only a refusal is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import msgspec

from clevrd.config import Config
from clevrd.connections.publisher import PublishConnection
from clevrd.connections.websocket import WebSockets
from clevrd.core.message import MAX_REF_CHARS, SocketPublish, decode_socket_publish
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.exchange import Failure, Request, Upgrade, failure_of
from clevrd.handlers.handshake import check_handshake, handshake_head
from clevrd.hub import Hub, Published
from clevrd.tenants import Tenant, identify

_encode = msgspec.json.Encoder().encode


class PublishedWithRef(Published, frozen=True, gc=False):
    """What the publisher of a frame with a ref is told."""

    ref: str | int


class FailureWithRef(Failure, frozen=True, kw_only=True):
    """A refusal; with the frame's ref where it had one that could be read."""

    ref: str | int | msgspec.UnsetType = msgspec.UNSET


class _RefOnly(msgspec.Struct, frozen=True):
    ref: str | int | msgspec.UnsetType = msgspec.UNSET


_ref_decoder = msgspec.json.Decoder(_RefOnly)


class PublishSocketEndpoint:
    """Answers the handshake of a publish socket."""

    max_body_bytes = 0

    def __init__(self, hub: Hub, sockets: WebSockets, config: Config) -> None:
        self._hub = hub
        self._sockets = sockets
        self._max_message_bytes = config.max_message_bytes

    def admit(self, request: Request) -> None:
        """Refuse nothing: the whole request is its head."""

    def answer(self, request: Request, body: bytes) -> Upgrade:
        """Return the upgrade after which frames are published."""
        self._hub.refuse_if_draining()
        tenant = identify(request, request.options())
        key = check_handshake(request)

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            publisher = FramePublisher(self._hub, tenant)
            connection = PublishConnection(
                self._sockets, transport, publisher.publish, self._max_message_bytes
            )
            connection.begin(early_data)

        return Upgrade(handshake_head(key), attach)


class FramePublisher:
    """Publishes one socket's frames as one tenant."""

    __slots__ = ("_hub", "_tenant")

    def __init__(self, hub: Hub, tenant: Tenant) -> None:
        self._hub = hub
        self._tenant = tenant

    def publish(self, payload: bytes) -> bytes | Awaitable[bytes | None] | None:
        """Publish one frame's payload; return its answer, None where none is due.

        An awaitable when the publisher is throttled or has to wait for room. Raises nothing.
        """
        hub = self._hub
        try:
            hub.refuse_if_draining()
            hub.check_rate(self._tenant)
            request = decode_socket_publish(payload)
            topic = hub.topic(self._tenant, request.topic)
            if hub.must_wait(topic):
                return self._publish_later(topic, request)
            published = hub.publish(topic, request)
        except ClevrdError as error:
            return self._refusal(error, payload)
        return None if request.ref is None else _answer(published, request.ref)

    async def _publish_later(self, topic: Topic, request: SocketPublish) -> bytes | None:
        try:
            published = await self._hub.publish_later(topic, request)
        except ClevrdError as error:
            return self._refusal(error, b"" if request.ref is None else _encode(request))
        return None if request.ref is None else _answer(published, request.ref)

    def _refusal(self, error: ClevrdError, payload: bytes) -> bytes:
        self._hub.counters.count_refusal(error.code)
        failure = failure_of(error)
        return _encode(
            FailureWithRef(
                error=failure.error,
                code=failure.code,
                retryable=failure.retryable,
                ref=_ref_of(payload),
            )
        )


def _answer(published: Published, ref: str | int) -> bytes:
    return _encode(
        PublishedWithRef(
            published.success,
            published.message_id,
            published.offset,
            published.epoch,
            published.subscribers,
            ref,
        )
    )


def _ref_of(payload: bytes) -> str | int | msgspec.UnsetType:
    """Return the ref of a frame that was refused, if that much of it can be read."""
    try:
        ref = _ref_decoder.decode(payload).ref
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.UNSET
    return msgspec.UNSET if isinstance(ref, str) and len(ref) > MAX_REF_CHARS else ref
