"""GET /subscribe: the options of a subscription.

What happens on the connection afterwards is connections/subscriber.py's.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final

import msgspec

from clevrd.config import Config
from clevrd.connections.subscriber import SubscriberConnection
from clevrd.connections.websocket import WebSockets
from clevrd.core.subscriber import DropStrategy
from clevrd.errors import InvalidRequest
from clevrd.exchange import Request, Upgrade
from clevrd.handlers.handshake import check_handshake, handshake_head
from clevrd.hub import Hub
from clevrd.tenants import identify

_POLICIES: Final = tuple(strategy.value for strategy in DropStrategy)
# Fits every bound there is; int() is quadratic in the length.
_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)


class SubscribeOptions(msgspec.Struct, frozen=True):
    """What a subscriber asks for."""

    topic: str
    strategy: DropStrategy
    # Messages it may lag; None takes what is allowed.
    wanted_window: int | None
    # Recent messages to begin with.
    last: int


class SubscribeEndpoint:
    """Answers a subscribe with the 101 and what to do with the connection then."""

    max_body_bytes = 0

    def __init__(self, hub: Hub, sockets: WebSockets, config: Config) -> None:
        self._hub = hub
        self._sockets = sockets
        self._catch_up_messages = config.catch_up_messages

    def admit(self, request: Request) -> None:
        """Refuse nothing: the whole request is its head."""

    def answer(self, request: Request, body: bytes) -> Upgrade:
        """Return the upgrade that begins the subscription."""
        self._hub.refuse_if_draining()
        query = request.options()
        tenant = identify(request, query)
        options = read_options(query, self._catch_up_messages)
        key = check_handshake(request)
        topic = self._hub.topic(tenant, options.topic)

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            connection = SubscriberConnection(
                self._sockets,
                transport,
                self._hub,
                topic,
                options.strategy,
                options.wanted_window,
            )
            connection.begin(options.last, early_data)

        return Upgrade(handshake_head(key), attach)


def read_options(query: dict[str, list[str]], default_last: int) -> SubscribeOptions:
    """Return the subscription that ``query`` asks for.

    Raises:
        InvalidRequest: an option is missing, malformed or given twice; the sentence says which.
    """
    topic = _single(query, "topic")
    if topic is None:
        raise InvalidRequest("The topic is missing; connect to /subscribe?topic=NAME.")
    policy = _single(query, "policy")
    if policy is not None and policy not in _POLICIES:
        raise InvalidRequest(f"Unknown policy; use one of {', '.join(_POLICIES)}.")
    last = _number(query, "last", least=0)
    return SubscribeOptions(
        topic=topic,
        strategy=DropStrategy(policy) if policy else DropStrategy.DROP_OLDEST,
        wanted_window=_number(query, "buffer", least=1),
        last=default_last if last is None else last,
    )


def _single(query: dict[str, list[str]], name: str) -> str | None:
    values = query.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise InvalidRequest(f"The option {name} is given {len(values)} times; give it once.")
    return values[0]


def _number(query: dict[str, list[str]], name: str, least: int) -> int | None:
    text = _single(query, name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or int(text) < least:
        raise InvalidRequest(
            f"The option {name} must be a whole number of messages, {least} or more."
        )
    return int(text)
