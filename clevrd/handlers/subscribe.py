"""GET /subscribe: the options of a subscription.

What happens on the connection afterwards is connections/subscriber.py's.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from clevrd.config import Config
from clevrd.connections.subscriber import SubscriberConnection
from clevrd.connections.websocket import WebSockets
from clevrd.core.positions import Last, Wish, check_wish
from clevrd.core.subscriber import DropStrategy
from clevrd.errors import InvalidRequest
from clevrd.exchange import Request, Upgrade
from clevrd.handlers.handshake import (
    CONTROL_PROTOCOL,
    check_handshake,
    handshake_head,
    offers_control,
)
from clevrd.handlers.options import number_option, single_option
from clevrd.handlers.resume import read_resume
from clevrd.hub import Hub
from clevrd.tenants import identify

_POLICIES: Final = tuple(strategy.value for strategy in DropStrategy)


class SubscribeOptions(msgspec.Struct, frozen=True):
    """What a subscriber asks for."""

    topic: str
    strategy: DropStrategy
    # Messages it may lag; None takes what is allowed.
    wanted_window: int | None
    # Where to begin.
    wish: Wish
    # Control frames are wanted.
    has_control: bool


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
        options = read_options(request, query, self._catch_up_messages, self._hub.wall_us())
        key = check_handshake(request)
        topic = self._hub.topic(tenant, options.topic)
        check_wish(topic, options.wish)
        has_protocol = offers_control(request)

        def attach(transport: asyncio.Transport, early_data: bytes) -> None:
            connection = SubscriberConnection(
                self._sockets,
                transport,
                self._hub,
                topic,
                options.strategy,
                options.wanted_window,
                has_control=options.has_control or has_protocol,
            )
            connection.begin(options.wish, early_data)

        return Upgrade(handshake_head(key, CONTROL_PROTOCOL if has_protocol else ""), attach)


def read_options(
    request: Request, query: dict[str, list[str]], default_last: int, now_us: int
) -> SubscribeOptions:
    """Return the subscription that ``request`` with this ``query`` asks for.

    Args:
        default_last: recent messages for who does not say where to begin.
        now_us: wall clock, which durations are reckoned from.

    Raises:
        InvalidRequest: an option is missing, malformed, given twice or against another; the
            sentence says which.
    """
    topic = single_option(query, "topic")
    if topic is None:
        raise InvalidRequest("The topic is missing; connect to /subscribe?topic=NAME.")
    policy = single_option(query, "policy")
    if policy is not None and policy not in _POLICIES:
        raise InvalidRequest(f"Unknown policy; use one of {', '.join(_POLICIES)}.")
    control = single_option(query, "control")
    if control not in (None, "0", "1"):
        raise InvalidRequest("The option control must be 1 for control frames, or 0 for none.")
    last = number_option(query, "last", least=0)
    resume = read_resume(request, query, now_us)
    if resume is not None and last is not None:
        raise InvalidRequest("The option last begins anew; leave it out to resume.")
    return SubscribeOptions(
        topic=topic,
        strategy=DropStrategy(policy) if policy else DropStrategy.DROP_OLDEST,
        wanted_window=number_option(query, "buffer", least=1),
        wish=resume or Last(default_last if last is None else last),
        has_control=control == "1",
    )
