"""POST /publish: one JSON message into one topic."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import Final, Protocol

import msgspec

from clevrd.admission import Admitted, Gate, Later
from clevrd.config import Config
from clevrd.core.idempotency import key_of_header
from clevrd.core.message_headers import headers_of_head
from clevrd.core.near_names import TENANT_OPTION
from clevrd.core.publish_request import PublishRequest, decode_publish, with_head
from clevrd.core.topic import Topic
from clevrd.errors import InvalidRequest, MessageTooLarge, UnsupportedMediaType
from clevrd.http_values import Request, Response, json_answer
from clevrd.hub import PublishAnswer, Published, with_warnings
from clevrd.scheduling.due_answers import Due
from clevrd.tenants.tenant import NO_LIMITS, Tenant

KEY_HEADER: Final = "idempotency-key"


class PublishHub(Protocol):
    """The part of the hub that one publish needs; each method is the hub's of that name."""

    @property
    def serves_publishers(self) -> bool:
        """Whether publishers are served while readers are sent away."""

    def check_rate(self, tenant: Tenant, /) -> None:
        """Take a message from the budget of the tenant, and of its key."""

    def topic(self, tenant: Tenant, name: str, /) -> Topic:
        """Return the topic to publish to."""

    def must_wait(self, topic: Topic, /) -> bool:
        """Whether a publish to ``topic`` has to wait."""

    def publish(self, topic: Topic, request: PublishRequest, /) -> PublishAnswer:
        """Append the message."""

    def publish_later(
        self, tenant: Tenant, topic: Topic, request: PublishRequest, /
    ) -> Awaitable[PublishAnswer]:
        """Append it when its time has come."""

    def publish_once(
        self, tenant: Tenant, request: PublishRequest, key: str, /
    ) -> PublishAnswer | None:
        """Append it unless its key is known; None where it has to wait."""

    def publish_once_later(
        self, tenant: Tenant, request: PublishRequest, key: str, /
    ) -> Awaitable[PublishAnswer]:
        """Append it when its time has come, unless its key is known."""


class PublishEndpoint:
    """Answers a publish: refuse what is wrong, cheapest first, then append and say where."""

    def __init__(self, gate: Gate, hub: PublishHub, config: Config) -> None:
        self._gate = gate
        self._hub = hub
        self._max_body_bytes = config.max_message_bytes

    @property
    def serves_while_draining(self) -> bool:
        """Whether what is published during a drain outlives it."""
        return self._hub.serves_publishers

    def admit(self, head: Request) -> Admitted:
        """Refuse by the head alone: a body that is coded or too large, no tenant, half an event."""
        check_body_head(head, self._max_body_bytes)
        admitted = self._gate.admit_tenant(head, self._max_body_bytes)
        declared = head.headers.get("content-length", "0")
        check_size(admitted.tenant, int(declared) if declared.isdecimal() else 0)
        admitted.headers = headers_of_head(head.headers)
        return admitted

    def answer(self, admitted: Admitted, body: bytes) -> Response | Later:
        """Publish ``body``; return an awaitable when the publisher has to wait.

        It is a `Due` where the message has its place already, and only the answer comes later.
        """
        request, query, tenant = admitted.head, admitted.options, admitted.tenant
        if tenant.limits is not NO_LIMITS:
            # A body in chunks has declared no size.
            check_size(tenant, len(body))
        self._hub.check_rate(tenant)
        publish = decode_publish(body)
        if admitted.headers is not None:
            publish = with_head(publish, admitted.headers)
        warnings = publish.warnings()
        if query:
            warnings += TENANT_OPTION.warnings(query)
        if publish.idempotency_key is not None or KEY_HEADER in request.headers:
            return self._once(tenant, publish, idempotency_key(request, publish), warnings)
        topic = self._hub.topic(tenant, publish.topic)
        if self._hub.must_wait(topic):
            return self._later(tenant, topic, publish, warnings)
        answer = self._hub.publish(topic, publish)
        if isinstance(answer, Published):
            return json_answer(with_warnings(answer, warnings) if warnings else answer)
        return Due(answer, partial(_answer, warnings))

    async def _later(
        self, tenant: Tenant, topic: Topic, publish: PublishRequest, warnings: tuple[str, ...]
    ) -> Response | Due[Response]:
        answer = await self._hub.publish_later(tenant, topic, publish)
        if isinstance(answer, Published):
            return _answer(warnings, answer)
        return Due(answer, partial(_answer, warnings))

    def _once(
        self, tenant: Tenant, publish: PublishRequest, key: str, warnings: tuple[str, ...]
    ) -> Response | Later:
        published = self._hub.publish_once(tenant, publish, key)
        if published is None:
            return self._once_later(tenant, publish, key, warnings)
        return answer_or_due(warnings, published)

    async def _once_later(
        self, tenant: Tenant, publish: PublishRequest, key: str, warnings: tuple[str, ...]
    ) -> Response | Due[Response]:
        published = await self._hub.publish_once_later(tenant, publish, key)
        return answer_or_due(warnings, published)


def idempotency_key(request: Request, publish: PublishRequest) -> str:
    """Return the key that stands in the publish's body, in its head, or in both.

    Raises:
        InvalidRequest: the header holds no key, or another one than the body.
    """
    in_body = publish.idempotency_key
    field = request.headers.get(KEY_HEADER)
    if field is None and in_body is not None:
        return in_body
    key = key_of_header(field or "")
    if in_body not in (None, key):
        raise InvalidRequest(
            "The header Idempotency-Key and the field idempotency_key differ; send one of them."
        )
    return key


def _answer(warnings: tuple[str, ...], published: Published) -> Response:
    return json_answer(with_warnings(published, warnings))


def answer_or_due(warnings: tuple[str, ...], published: PublishAnswer) -> Response | Due[Response]:
    """Return the answer to a publish with a key; a `Due` where it comes later."""
    if isinstance(published, Published):
        return _answer_once(warnings, published)
    return Due(published, partial(_answer_once, warnings))


def _answer_once(warnings: tuple[str, ...], published: Published) -> Response:
    answer = json_answer(with_warnings(published, warnings))
    if not published.repeated:
        return answer
    return msgspec.structs.replace(answer, headers=(("Idempotency-Replayed", "true"),))


def check_body_head(request: Request, max_bytes: int) -> None:
    """Refuse a body by its head alone.

    Raises:
        UnsupportedMediaType: it is coded; nothing here inflates what a stranger compressed.
        MessageTooLarge: it is declared to be larger than ``max_bytes``.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType(
            "The body is compressed (Content-Encoding); send it as plain JSON."
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise MessageTooLarge(max_bytes, int(declared))


def check_size(tenant: Tenant, size_bytes: int) -> None:
    """Raise MessageTooLarge where a message has more than its tenant's messages may have."""
    limit_bytes = tenant.limits.max_message_bytes
    if limit_bytes is not None and size_bytes > limit_bytes:
        setting = f"max_message_bytes of tenant {tenant.name}"
        raise MessageTooLarge(limit_bytes, size_bytes, setting, tenant.name)
