"""The client: one server, and what can be done with it. No printing here."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Self

from clevrd.client.backoff import Clockwork
from clevrd.client.feeds import feed_of
from clevrd.client.position import Position
from clevrd.client.publisher import MAX_IN_FLIGHT, Publisher
from clevrd.client.publishing import RETRY_FOR_S, HttpPublisher, IdempotencyKeys, Repeats
from clevrd.client.session import Session
from clevrd.client.subscription import Subscription
from clevrd.client.wire import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ITEMS,
    Outgoing,
    Published,
    Refusal,
    check_json,
    data_json,
    publish_body,
)


class Client:
    """Publishes to one server and subscribes to it; use as ``async with Client(url) as client``.

    Args:
        url: ``http://host:port``, ``host:port``, ``https://host``, ``unix:/path``; ``ws://`` and
            ``wss://`` are taken for ``http://`` and ``https://``.
        tenant: who publishes or subscribes; None leaves it to the server.
        headers: sent with every request, for a proxy in front of the server.
        tls: for ``https://``; None trusts what the system trusts.
        retry_for_s: how long a message is offered again before publishing gives up.
        random, sleep, clock: replaced by tests.

    Raises:
        BadUrl: ``url`` is none of these, or the tenant can't stand in a header.
    """

    def __init__(
        self,
        url: str,
        tenant: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        retry_for_s: float = RETRY_FOR_S,
        random: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = Session(url, tenant, headers, tls)
        self._clockwork = Clockwork(random, sleep, clock)
        self._retry_for_s = retry_for_s
        self._new_key = IdempotencyKeys()
        self._repeats = Repeats()
        self._http = HttpPublisher(self._session, self._repeats, retry_for_s, self._clockwork)

    async def __aenter__(self) -> Self:
        """Be ready; connects nowhere yet."""
        self._session.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self._session.close()

    @property
    def repeated_messages(self) -> int:
        """How many messages may be there twice: sent again after their answer was lost.

        Only a server too old for idempotency keys has copies; one that heeds them has one of each
        message, as far as its memory for keys reaches.
        """
        return self._repeats.messages

    async def publish(
        self, topic: str, data: Any, *, key: str | None = None, idempotency_key: str | None = None
    ) -> Published:
        """Publish ``data`` and return the server's answer.

        What time heals (429, 503, a gateway's 502 and 504, and a lost connection once the server
        has been reached) is tried again for ``retry_for_s``, waiting at least what the server
        asks. When a connection, or a gateway's, breaks before the whole answer came, nobody can
        know whether the message was taken; it is sent again under the same idempotency key, by
        which the server knows a copy.

        Args:
            data: what JSON can say: None excepted, any dict, list, str, number, bool; also
                msgspec structs, dataclasses, datetimes, UUIDs, enums.
            key: what the message is about, for readers that want the newest of each.
            idempotency_key: a name of your own for this message, such as an order's number; None
                draws one. A repeat within the server's memory is answered and not published.

        Raises:
            TypeError: ``data`` has no JSON form. For bytes that are JSON use `publish_raw`.
            Refused: the server does not take it.
            Unreachable: no answer; ``may_have_arrived`` says whether it could be there.
            BadAnswer: the answer is not a clevrd server's.
        """
        return await self._publish(topic, data_json(data), key, idempotency_key)

    async def publish_raw(
        self, topic: str, raw: bytes, *, key: str | None = None, idempotency_key: str | None = None
    ) -> Published:
        """Publish data that is JSON already, byte for byte; else as `publish`.

        Raises:
            BadRecord: ``raw`` is not one JSON value in UTF-8; nothing was sent.
        """
        return await self._publish(topic, check_json(raw), key, idempotency_key)

    async def publish_batch(
        self,
        items: Iterable[Outgoing | tuple[str, Any]],
        *,
        max_items: int = MAX_BATCH_ITEMS,
        max_bytes: int = MAX_BATCH_BYTES,
    ) -> list[Published | Refusal]:
        """Publish many messages in few requests; return what became of each, in their order.

        A refused item is a value, `Refusal`, and does not hold back the others. Those that time
        heals are offered again for ``retry_for_s``, counted anew whenever some are taken.

        Args:
            items: (topic, data) pairs, or `Outgoing` for keys; taken as they are sent.
            max_items, max_bytes: of one request; the server's limits, unless it has others.

        Raises:
            Refused, Unreachable, BadAnswer: a whole request failed; ``results`` of the error is
                what had been answered before.
        """
        return await self._http.publish_batch(items, max_items, max_bytes, self._new_key)

    def publisher(self, *, max_in_flight: int = MAX_IN_FLIGHT) -> Publisher:
        """Return a stream of publishes over one WebSocket; use with ``async with``.

        Args:
            max_in_flight: messages sent and not answered yet; one more waits.
        """
        return Publisher(
            self._session,
            self._repeats,
            self._new_key,
            max_in_flight,
            self._retry_for_s,
            self._clockwork,
        )

    def subscribe(
        self,
        *topics: str,
        topic: str | None = None,
        patterns: Iterable[str] = (),
        policy: str | None = None,
        buffer: int | None = None,
        last: int | None = None,
        since: str | None = None,
        position: Position | None = None,
        positions: Mapping[str, Position] | None = None,
        reconnect: bool = True,
    ) -> Subscription:
        """Return an async iterator of the topics' messages, and of the gaps between them.

        Oldest first in each topic, across lost connections: after one it goes on behind the
        positions it had, so each message comes once. What is missing for good is a `Gap`, at its
        place. There is no order between topics.

        Nothing is buffered beyond one connection's read buffer: whoever consumes slowly is a slow
        reader to the server, and one that stops for longer than the server's ping timeout is cut
        and resumes.

        Args:
            topics: one or more; several, and patterns, share one connection (``GET /ws``).
            topic: one by keyword.
            patterns: such as ``orders.*``: the topics that each matches, and those made later,
                from their first message on.
            policy: what is dropped when this reader is too slow: ``drop_oldest``,
                ``drop_newest``, ``circuit_breaker`` or ``latest``; None: the server's.
            buffer: messages that this reader may lag behind, in each topic; None: the server's.
            last: recent messages wanted first, of each topic; None: the server's.
            since: begin in the past instead: ``90s``, ``5m``, a time, a message id, ``all``.
            position: of one topic: begin behind it, where an earlier subscription ended.
            positions: of several, by topic. A named topic that is not among them begins with the
                server's ``last``; one that a pattern brings, with its first message.
            reconnect: False raises `Closed` or `Unreachable` at the first lost connection.

        Raises:
            ValueError: no topic and no pattern, or one twice; or it is said in two ways where to
                begin.
        """
        if topic is not None:
            topics = (topic, *topics)
        options = {"policy": policy, "buffer": buffer, "last": last, "since": since}
        given = {name: value for name, value in options.items() if value is not None}
        feed = feed_of(topics, patterns, given, position, positions, self._session.warn)
        return Subscription(self._session, feed, self._clockwork, reconnect=reconnect)

    async def _publish(
        self, topic: str, data: bytes, key: str | None, idempotency_key: str | None
    ) -> Published:
        body = publish_body(
            topic, data, key=key, idempotency_key=idempotency_key or self._new_key()
        )
        return await self._http.publish(body)
