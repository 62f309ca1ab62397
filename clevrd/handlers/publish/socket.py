"""GET /publish as a WebSocket: each text frame is a publish.

A frame with a ``ref`` is answered with that ref; without one only a refusal is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from clevrd.admission import Admitted, admit_tenant
from clevrd.config import Config
from clevrd.connections.publish_websocket import PublishConnection
from clevrd.connections.registry import Connections
from clevrd.core.message import MAX_REF_CHARS, SocketPublish, decode_socket_publish
from clevrd.core.near_names import TENANT_OPTION
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, Unavailable
from clevrd.handlers.handshake import check_handshake, handshake_head
from clevrd.handlers.publish.run import RunPublisher
from clevrd.http_values import Failure, Request, WebSocketUpgrade, failure_of
from clevrd.hub import Hub, Published, audience_of
from clevrd.tenants import Tenant

_encode = msgspec.json.Encoder().encode


class PublishedWithRef(Published, frozen=True, gc=False, omit_defaults=True):
    """What the publisher of a frame with a ref is told."""

    ref: str | int | msgspec.UnsetType = msgspec.UNSET
    warnings: tuple[str, ...] = ()


AnswerT = TypeVar("AnswerT", bound=PublishedWithRef)


class FailureWithRef(Failure, frozen=True, kw_only=True):
    """A refusal; with the frame's ref where it had one that could be read."""

    ref: str | int | msgspec.UnsetType = msgspec.UNSET


class _RefOnly(msgspec.Struct, frozen=True):
    ref: str | int | msgspec.UnsetType = msgspec.UNSET


_ref_decoder = msgspec.json.Decoder(_RefOnly)


class PublishSocketEndpoint:
    """Answers the handshake of a publish socket."""

    serves_while_draining = False

    def __init__(self, hub: Hub, connections: Connections, config: Config) -> None:
        self._hub = hub
        self._connections = connections
        self._max_message_bytes = config.max_message_bytes

    def admit(self, head: Request) -> Admitted:
        """Refuse what names no tenant."""
        return admit_tenant(head)

    def answer(self, admitted: Admitted, body: bytes) -> WebSocketUpgrade:
        """Return the upgrade after which frames are published."""
        query, tenant = admitted.options, admitted.tenant
        key = check_handshake(admitted.head)

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            connection = PublishConnection(
                self._connections,
                transport,
                FramePublisher(self._hub, tenant),
                self._max_message_bytes,
            )
            connection.begin(early_data)

        return WebSocketUpgrade(handshake_head(key, warnings=TENANT_OPTION.warnings(query)), attach)


class FramePublisher:
    """Publishes one socket's frames as one tenant, and collects the answers to them."""

    __slots__ = ("_hub", "_runs", "answers", "wait_for")

    def __init__(self, hub: Hub, tenant: Tenant) -> None:
        self._hub = hub
        # JSON, in the order of the frames; whoever writes them takes them out.
        self.answers: list[bytes] = []
        self._runs = RunPublisher(
            hub, tenant, decode_socket_publish, self._run_published, self._published, self._refused
        )
        self.wait_for = self._runs.wait_for

    def take(self, payloads: Sequence[bytes]) -> tuple[int, bool]:
        """Publish ``payloads`` as `RunPublisher.take` does.

        While the daemon drains all are refused; a publisher that never pauses must not delay it.
        """
        try:
            self._hub.refuse_if_draining()
        except Unavailable as error:
            for payload in payloads:
                self._refused(error, payload)
            return len(payloads), False
        return self._runs.take(payloads)

    def _run_published(
        self, topic: Topic, run: Sequence[SocketPublish], offset: int, ids: Sequence[str]
    ) -> None:
        self.answers += map(_encode, run_answers(PublishedWithRef, topic, run, offset, ids))

    def _published(self, request: SocketPublish, answer: Published) -> None:
        if request.ref is not None:
            told = with_ref(PublishedWithRef, answer, request.ref, request.warnings())
            self.answers.append(_encode(told))

    def _refused(self, error: ClevrdError, payload: bytes) -> None:
        self._hub.counters.count_refusal(error.code)
        failure = failure_of(error)
        answer = FailureWithRef(
            error=failure.error,
            code=failure.code,
            retryable=failure.retryable,
            ref=ref_of(payload),
        )
        self.answers.append(_encode(answer))


def run_answers(
    kind: type[AnswerT],
    topic: Topic,
    run: Sequence[SocketPublish],
    offset: int,
    ids: Sequence[str],
) -> list[AnswerT]:
    """Return what a run's publishers that want an answer are told, as so many ``kind``."""
    audience = audience_of(topic)
    return [
        kind(
            True,
            ids[index],
            offset + index,
            *audience,
            False,
            request.ref,
            request.warnings(),
        )
        for index, request in enumerate(run)
        if request.ref is not None
    ]


def with_ref(
    kind: type[AnswerT], answer: Published, ref: str | int, warnings: tuple[str, ...]
) -> AnswerT:
    """Return ``answer`` as a ``kind`` that carries ``ref`` and ``warnings``."""
    return kind(**msgspec.structs.asdict(answer), ref=ref, warnings=warnings)


def ref_of(payload: bytes) -> str | int | msgspec.UnsetType:
    """Return the ref of a frame that was refused, if that much of it can be read."""
    try:
        ref = _ref_decoder.decode(payload).ref
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.UNSET
    return msgspec.UNSET if isinstance(ref, str) and len(ref) > MAX_REF_CHARS else ref
