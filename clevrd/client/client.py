"""The client of one server: publishes and subscribes. No printing here."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Self

from clevrd.client.arguments import (
    check_after,
    check_count,
    check_flag,
    check_policy,
    check_seconds,
    path_of,
    patterns_of,
    publish_fields,
    since_text,
    subscriber_id_of,
    topics_of,
)
from clevrd.client.backoff import Clockwork
from clevrd.client.credential import Token
from clevrd.client.feeds import feed_of
from clevrd.client.history import HEADERS_OPTION, History, Walk, beginning_of
from clevrd.client.position import Position, position_of, positions_of
from clevrd.client.publisher import MAX_IN_FLIGHT, Publisher
from clevrd.client.publishing import RETRY_FOR_S, HttpPublisher, IdempotencyKeys, Repeats
from clevrd.client.retries import Retries
from clevrd.client.session import Session
from clevrd.client.subscription import Subscription
from clevrd.client.topics import MAX_LIMIT, ListedTopic, TopicInfo, Topics, TopicsPage
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

    Where no block fits, `open` and `close` do the same. A client belongs to the event loop in which
    it is opened. Without asyncio: clevrd.client.sync.

    Args:
        url: ``http://host:port``, ``host:port``, ``https://host``, ``unix:/path``; ``ws://`` and
            ``wss://`` mean ``http://`` and ``https://``.
        tenant: the tenant that publishes or subscribes; None leaves the choice to the server.
        token: an API key or a JSON Web Token to present, or a function, also an async one, that
            returns one. The function is asked again before a token ends, and after a refusal.
        headers: sent with every request, for a proxy in front of the server. Headers, tenant and
            token are sent only to the host of ``url``, whatever a redirect says.
        tls: for ``https://``; None trusts the system's certificates.
        retry_for_s: seconds that a publish, or a read of topics, is tried again before it
            fails.
        random, sleep, clock: replaced by tests.

    Raises:
        BadUrl: ``url`` has another form, or the tenant can't stand in a header.
        TypeError, ValueError: another argument has a wrong type or value.
    """

    def __init__(
        self,
        url: str,
        tenant: str | None = None,
        *,
        token: Token | None = None,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        retry_for_s: float = RETRY_FOR_S,
        random: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = Session(url, tenant, headers, tls, token)
        self._clockwork = Clockwork(random, sleep, clock)
        self._retry_for_s = check_seconds("retry_for_s", retry_for_s)
        self._new_key = IdempotencyKeys()
        self._repeats = Repeats()
        self._http = HttpPublisher(self._session, self._repeats, self._retries("publish"))
        self._topics = Topics(self._session, self._retries("read"))

    async def open(self) -> Self:
        """Prepare for calls, without connecting; a second call does nothing.

        Raises:
            Misuse: the client is open in another event loop.
        """
        self._session.open()
        # A forked process continues the same count, so each opening draws new random bits.
        self._new_key.renew()
        return self

    async def close(self) -> None:
        """Close all connections, and end all subscriptions. A second call does nothing."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        """Open."""
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    @property
    def repeated_messages(self) -> int:
        """Number of messages that may be there twice, since they were sent again without an answer.

        Only a server too old for idempotency keys can have two copies; another one has a single
        copy of each message, as long as it remembers the key.
        """
        return self._repeats.messages

    async def publish(
        self,
        topic: str,
        data: Any,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Published:
        """Publish ``data`` and return the server's answer.

        Failures that may pass (429, 503, a gateway's 502 and 504, and a lost connection once the
        server was reached) are tried again for ``retry_for_s``, each after at least the wait that
        the server asks for. If a connection, the client's or a gateway's, breaks before the whole
        answer, the message may have been taken or not; it is sent again under the same idempotency
        key, by which the server recognises a copy.

        Args:
            data: a value that has a JSON form: dict, list, str, number, bool, but not None; also
                msgspec structs, dataclasses, datetimes, UUIDs, enums. Infinity and NaN have no JSON
                form.
            key: names the message's subject, for readers that want the newest message of each key.
            idempotency_key: a name of your own for this message, such as an order's number; None
                draws one. A repeat that the server remembers is answered and not published.
            ttl_s: seconds for which the message is worth reading, 0.001 to 100,000,000; readers
                that come or catch up later get a gap (``expired``) instead. None for ever.
            headers: what the message carries beside its data: the publisher's trace
                (``traceparent``, ``tracestate``) and attributes of a CloudEvent (``ce-*``), for
                readers that ask for them.

        Raises:
            TypeError: ``data`` has no JSON form. Use `publish_raw` for bytes that are JSON.
            BadRecord: ``data`` holds a value without a JSON form: infinity, NaN, half a surrogate
                pair.
            Refused: the server does not take the message.
            Unreachable: there was no answer; ``may_have_arrived`` says whether the message may be
                there.
            BadAnswer: the answer is not a clevrd server's.
        """
        fields = publish_fields(topic, key, ttl_s, headers, idempotency_key)
        return await self.publish_encoded(topic, data_json(data), fields)

    async def publish_raw(
        self,
        topic: str,
        raw: bytes | bytearray | memoryview | str,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Published:
        """Publish data that is JSON already, byte for byte; otherwise the same as `publish`.

        Raises:
            TypeError: ``raw`` is neither bytes nor text.
            BadRecord: ``raw`` is not one JSON value in UTF-8; it was not sent.
        """
        fields = publish_fields(topic, key, ttl_s, headers, idempotency_key)
        return await self.publish_encoded(topic, check_json(raw), fields)

    async def publish_batch(
        self,
        items: Iterable[Outgoing | tuple[str, Any]],
        *,
        max_items: int = MAX_BATCH_ITEMS,
        max_bytes: int = MAX_BATCH_BYTES,
    ) -> list[Published | Refusal]:
        """Publish many messages in few requests; return a result for each, in their order.

        A refused item has a `Refusal` as its result, and the others are published all the same.
        Refusals that may pass are tried again for ``retry_for_s``, counted anew whenever some items
        are taken.

        Args:
            items: (topic, data) pairs, or `Outgoing` for other fields; read as they are sent.
            max_items, max_bytes: limits of one request; the defaults are the server's own defaults.

        Raises:
            Refused, Unreachable, BadAnswer: a whole request failed; the error's ``results`` are
                those of earlier requests.
            BadRecord: an item is malformed, or its data has no JSON form; ``results`` as above.
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
        subscriber_id: str | None = None,
        headers: bool = False,
        reconnect: bool = True,
    ) -> Subscription:
        """Return an async iterator of the topics' messages, and of the gaps between them.

        A plain ``async for`` closes its connection when the loop is left in any way; ``async with``
        keeps the connection until the block ends.

        Messages come oldest first in each topic, each once, also across lost connections: a new
        connection continues behind the positions of the old one. Messages that are lost for good
        are a `Gap`, at their place. There is no order between topics.

        Only one connection's read buffer is held, so a slow consumer is a slow reader to the
        server, and a consumer that stops for longer than the server's ping timeout is cut off and
        resumes later.

        Args:
            topics: one topic or more, or lists of topics; several topics, and patterns, share one
                connection (``GET /ws``).
            topic: one topic, by keyword.
            patterns: patterns such as ``orders.*``. A pattern brings the topics that it matches,
                and topics made later, from their first message on.
            policy: decides which messages this reader loses when it is too slow: ``drop_oldest``,
                ``drop_newest``, ``circuit_breaker`` or ``latest``; None for the server's choice.
            buffer: messages that this reader may lag in each topic; None for the server's choice.
            last: recent messages of each topic to begin with; None for the server's choice.
            since: where in the past to begin instead: ``90s``, ``5m``, a time, a message id,
                ``all``; a timedelta, rounded up to a second, or a datetime with a time zone.
            position: for one topic: where an earlier subscription ended, as a Position or its text;
                this one begins behind it.
            positions: for several topics: topic -> position. A named topic without a position
                begins with the server's ``last``; a topic that a pattern brings, with its first
                message.
            subscriber_id: the name by which others see this reader among the readers of its topics
                (`topic`, and the topic ``$events``): 1 to 128 bytes; None for no name.
            headers: True for messages with the headers that they were published with.
            reconnect: False raises `Closed` or `Unreachable` at the first lost connection.

        Raises:
            ValueError: no topic and no pattern, one of them twice, or a malformed one; two
                arguments that say where to begin; or a wrong value of another argument.
            TypeError: an argument has a wrong type.
        """
        names = topics_of(topics if topic is None else (topic, *topics))
        options: dict[str, str | int | None] = {
            "policy": check_policy(policy),
            "buffer": None if buffer is None else check_count("buffer", buffer),
            "last": None if last is None else check_count("last", last, minimum=0),
            "since": since_text(since),
            "subscriber_id": subscriber_id_of(subscriber_id),
            "headers": check_flag("headers", headers) or None,
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

    def history(
        self,
        topic: str,
        *,
        last: int | None = None,
        since: str | datetime | timedelta | None = None,
        position: Position | str | None = None,
        limit: int | None = None,
        headers: bool = False,
    ) -> History:
        """Return an async iterator of the messages that the topic has had, up to now.

        Messages come oldest first, without a subscription, from the server's memory and its
        journal; what is missing is a `Gap` at its place. The loop ends when it has what
        was the newest message as it began. Pages of up to 1,000 messages and 1 MiB are read as the
        loop comes to them, each with the retries of `publish`.

        Args:
            last, since, position: where to begin, as for `subscribe`; without any of them, with the
                oldest message that there is.
            limit: messages at most; None for all.
            headers: True for messages with the headers that they were published with.

        Raises:
            ValueError: two arguments say where to begin, or one has a wrong value.
            TypeError: an argument has a wrong type.
        """
        if sum(each is not None for each in (last, since, position)) > 1:
            raise ValueError("last, since and position each say where to begin; give one of them.")
        path_of(topic)
        count = None if last is None else check_count("last", last, minimum=0)
        walk = Walk(
            beginning_of(count, since_text(since)),
            HEADERS_OPTION if check_flag("headers", headers) else {},
            None if position is None else position_of(position),
            None if limit is None else check_count("limit", limit),
        )
        return History(self._session, self._topics, topic, walk)

    async def topics(self) -> AsyncIterator[ListedTopic]:
        """Yield the topics that have messages and that may be subscribed to, by name.

        Raises:
            Refused, Unreachable, BadAnswer: as from `publish`.
        """
        after: str | None = None
        while True:
            page = await self.topics_page(after)
            for each in page.topics:
                yield each
            if page.next is None:
                return
            after = page.next

    async def topic(
        self, topic: str, *, limit: int = MAX_LIMIT, after: str | None = None
    ) -> TopicInfo:
        """Return a topic's newest position, its counts, and the ids of its readers.

        Args:
            limit: ids of readers at most, 1 to 1,000.
            after: the ``presence.next`` of the page of ids before; None for the first page.

        Raises:
            Refused: the server refused, such as with 404 for a topic that does not exist.
            Unreachable, BadAnswer: as from `publish`.
        """
        check_count("limit", limit)
        check_after(after)
        return await self._topics.one(topic, limit, after)

    async def clear(self, topic: str) -> Position:
        """Clear a topic: no reader is given a message of before any more.

        It is asked for once, without retries, since another time it would clear what was published
        meanwhile.

        Returns:
            The position at which the topic's new epoch begins.

        Raises:
            Refused: the server refused, such as with 403 without the permission to clear.
            Unreachable: there was no answer; with ``may_have_arrived`` the topic may be cleared.
            BadAnswer: the answer is not a clevrd server's.
        """
        return await self._topics.clear(topic)

    async def publish_encoded(
        self, topic: str, data: bytes, fields: dict[str, object]
    ) -> Published:
        """Publish data that was checked already; called by the client without asyncio."""
        if "idempotency_key" not in fields:
            fields = {**fields, "idempotency_key": self._new_key()}
        return await self._http.publish(publish_body(topic, data, fields))

    async def topics_page(self, after: str | None) -> TopicsPage:
        """Return a page of topics; called by the client without asyncio."""
        return await self._topics.page(after)

    def _retries(self, what: str) -> Retries:
        return Retries(self._session, self._retry_for_s, self._clockwork, what)
