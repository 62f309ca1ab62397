"""POST /publish: one JSON message into one topic."""

from __future__ import annotations

from collections.abc import Awaitable

from clevrd.config import Config
from clevrd.core.message import PublishRequest, decode_publish
from clevrd.core.topic import Topic
from clevrd.errors import MessageTooLarge, UnsupportedMediaType
from clevrd.exchange import Answer, Request, json_answer
from clevrd.hub import Hub
from clevrd.tenants import identify


class PublishEndpoint:
    """Answers a publish: refuse what is wrong, cheapest first, then append and say where."""

    def __init__(self, hub: Hub, config: Config) -> None:
        self._hub = hub
        self.max_body_bytes = config.max_message_bytes

    def admit(self, request: Request) -> None:
        """Refuse by the head alone: draining, a coded body, or one declared too large."""
        self._hub.refuse_if_draining()
        check_body_head(request, self.max_body_bytes)

    def answer(self, request: Request, body: bytes) -> Answer | Awaitable[Answer]:
        """Publish ``body``; return an awaitable when the publisher has to wait."""
        tenant = identify(request, request.options())
        self._hub.check_rate(tenant)
        publish = decode_publish(body)
        topic = self._hub.topic(tenant, publish.topic)
        if self._hub.must_wait(topic):
            return self._later(topic, publish)
        return json_answer(self._hub.publish(topic, publish))

    async def _later(self, topic: Topic, publish: PublishRequest) -> Answer:
        return json_answer(await self._hub.publish_later(topic, publish))


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
        raise MessageTooLarge(max_bytes)
