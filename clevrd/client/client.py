"""The client: one server, and what can be done with it. No printing here."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Self

from clevrd.client.arguments import (
    check_count,
    check_flag,
    check_names,
    check_policy,
    check_seconds,
    patterns_of,
    since_text,
    topics_of,
)
from clevrd.client.backoff import Clockwork
from clevrd.client.feeds import feed_of
from clevrd.client.position import Position, position_of, positions_of
from clevrd.client.publisher import MAX_IN_FLIGHT, Publisher
from clevrd.client.publishing import RETRY_FOR_S, HttpPublisher, IdempotencyKeys, Repeats
from clevrd.client.session import Session
from clevrd.client.subscription import Subscription
from clevrd.client.values import check_json, data_json
from clevrd.client.wire import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ITEMS,
    Outgoing,
    Published,
    Refusal,
    publish_body,
)


class Client:
    """Publishes to one server and subscribes to it; use as ``async with Client(url) as client``.

    Where no block fits, `open` and `close` do the same. It belongs to the event loop in which it is
    opened. Without asyncio: clevrd.client.sync.

    Args:
        url: ``http://host:port``, ``host:port``, ``https://host``, ``unix:/path``; ``ws://`` and
            ``wss://`` are taken for ``http://`` and ``https://``.
        tenant: who publishes or subscribes; None leaves it to the server.
        headers: sent with every request, for a proxy in front of the server. They, and the tenant,
            go to the host of ``url`` only, whatever a redirect says.
        tls: for ``https://``; None trusts what the system trusts.
        retry_for_s: how long a message is offered again before publishing gives up.
        random, sleep, clock: replaced by tests.

    Raises:
        BadUrl: ``url`` is none of these, or the tenant can't stand in a header.
        TypeError, ValueError: another argument is not what it has to be.
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
        self._retry_for_s = check_seconds("retry_for_s", retry_for_s)
        self._new_key = IdempotencyKeys()
        self._repeats = Repeats()
        self._http = HttpPublisher(self._session, self._repeats, self._retry_for_s, self._clockwork)

    async def open(self) -> Self:
        """Be ready; connects nowhere yet. Nothing more where it is open already.

        Raises:
            Misuse: it is open in another event loop.
        """
        self._session.open()
        # A process that was forked counts on from the same number.
        self._new_key.renew()
        return self

    async def close(self) -> None:
        """Close all connections, and end all subscriptions; idempotent."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        """Open."""
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

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
                msgspec structs, dataclasses, datetimes, UUIDs, enums. Infinity and NaN are no
                JSON.
            key: what the message is about, for readers that want the newest of each.
            idempotency_key: a name of your own for this message, such as an order's number; None
                draws one. A repeat within the server's memory is answered and not published.

        Raises:
            TypeError: ``data`` has no JSON form. For bytes that are JSON use `publish_raw`.
            BadRecord: ``data`` holds a value without one: infinity, NaN, half a surrogate pair.
            Refused: the server does not take it.
            Unreachable: no answer; ``may_have_arrived`` says whether it could be there.
            BadAnswer: the answer is not a clevrd server's.
        """
        return await self.publish_encoded(topic, data_json(data), key, idempotency_key)

    async def publish_raw(
        self,
        topic: str,
        raw: bytes | bytearray | memoryview | str,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
    ) -> Published:
        """Publish data that is JSON already, byte for byte; else as `publish`.

        Raises:
            TypeError: ``raw`` is neither bytes nor text.
            BadRecord: ``raw`` is not one JSON value in UTF-8; nothing was sent.
        """
        return await self.publish_encoded(topic, check_json(raw), key, idempotency_key)

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
            BadRecord: an item is none, or its data has no JSON form; ``results`` as above.
        """
        check_count("max_items", max_items)
        check_count("max_bytes", max_bytes)
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
            check_count("max_in_flight", max_in_flight),
            self._retry_for_s,
            self._clockwork,
        )

    def subscribe(
        self,
        *topics: str | Iterable[str],
        topic: str | None = None,
        patterns: Iterable[str] = (),
        policy: str | None = None,
        buffer: int | None = None,
        last: int | None = None,
        since: str | datetime | timedelta | None = None,
        position: Position | str | None = None,
        positions: Mapping[str, Position | str] | None = None,
        reconnect: bool = True,
    ) -> Subscription:
        """Return an async iterator of the topics' messages, and of the gaps between them.

        A plain ``async for`` over it lets go of its connection when the loop is left, however that
        happens; ``async with`` keeps it until the block ends.

        Oldest first in each topic, across lost connections: after one it goes on behind the
        positions it had, so each message comes once. What is missing for good is a `Gap`, at its
        place. There is no order between topics.

        Nothing is buffered beyond one connection's read buffer: whoever consumes slowly is a slow
        reader to the server, and one that stops for longer than the server's ping timeout is cut
        and resumes.

        Args:
            topics: one or more, or lists of them; several, and patterns, share one connection
                (``GET /ws``).
            topic: one by keyword.
            patterns: such as ``orders.*``: the topics that each matches, and those made later,
                from their first message on.
            policy: what is dropped when this reader is too slow: ``drop_oldest``,
                ``drop_newest``, ``circuit_breaker`` or ``latest``; None: the server's.
            buffer: messages that this reader may lag behind, in each topic; None: the server's.
            last: recent messages wanted first, of each topic; None: the server's.
            since: begin in the past instead: ``90s``, ``5m``, a time, a message id, ``all``; a
                timedelta, rounded up to a second, or a datetime with a time zone.
            position: of one topic: begin behind it, where an earlier subscription ended; its text
                will do.
            positions: of several, by topic. A named topic that is not among them begins with the
                server's ``last``; one that a pattern brings, with its first message.
            reconnect: False raises `Closed` or `Unreachable` at the first lost connection.

        Raises:
            ValueError: no topic and no pattern, or one twice, or one that can't be; or it is said
                in two ways where to begin; or another argument is not what it has to be.
            TypeError: an argument is of another type.
        """
        names = topics_of(topics if topic is None else (topic, *topics))
        options: dict[str, str | int | None] = {
            "policy": check_policy(policy),
            "buffer": None if buffer is None else check_count("buffer", buffer),
            "last": None if last is None else check_count("last", last, minimum=0),
            "since": since_text(since),
        }
        feed = feed_of(
            names,
            patterns_of(patterns),
            {name: value for name, value in options.items() if value is not None},
            None if position is None else position_of(position),
            None if positions is None else positions_of(positions),
            self._session.warn,
        )
        check_flag("reconnect", reconnect)
        return Subscription(self._session, feed, self._clockwork, reconnect=reconnect)

    async def publish_encoded(
        self, topic: str, data: bytes, key: str | None, idempotency_key: str | None
    ) -> Published:
        """Publish data that was checked; for the client without asyncio."""
        check_names(topic, key, idempotency_key)
        name = self._new_key() if idempotency_key is None else idempotency_key
        body = publish_body(topic, data, key=key, idempotency_key=name)
        return await self._http.publish(body)
