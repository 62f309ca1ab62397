"""The client without asyncio: the same names and arguments, and calls that wait.

This client runs the client for asyncio in an event loop in a thread of its own, so both behave the
same. How to use it: docs/python.md.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from inspect import isawaitable
from itertools import islice
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar
from weakref import finalize

from clevrd.client.arguments import check_count, check_items, check_timeout, publish_fields
from clevrd.client.client import Client as AsyncClient
from clevrd.client.credential import Token
from clevrd.client.errors import (
    BadAnswer,
    BadData,
    BadRecord,
    BadUrl,
    ClientError,
    Closed,
    Misuse,
    NoToken,
    Refused,
    Unauthorized,
    Unreachable,
)
from clevrd.client.history import History as AsyncHistory
from clevrd.client.intake import Intake
from clevrd.client.loop_thread import LoopThread, Stopped
from clevrd.client.position import Position
from clevrd.client.publisher import MAX_IN_FLIGHT
from clevrd.client.publisher import Publisher as AsyncPublisher
from clevrd.client.publisher import Receipt as AsyncReceipt
from clevrd.client.publishing import RETRY_FOR_S
from clevrd.client.subscription import Subscription as AsyncSubscription
from clevrd.client.topics import MAX_LIMIT, ListedTopic, Presence, PresentId, TopicInfo
from clevrd.client.values import check_json, data_json
from clevrd.client.wire import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ITEMS,
    Gap,
    Message,
    Outgoing,
    Published,
    Refusal,
)

__all__ = [
    "RETRY_FOR_S",
    "BadAnswer",
    "BadData",
    "BadRecord",
    "BadUrl",
    "Client",
    "ClientError",
    "Closed",
    "Gap",
    "History",
    "ListedTopic",
    "Message",
    "Misuse",
    "NoToken",
    "Outgoing",
    "Position",
    "Presence",
    "PresentId",
    "Published",
    "Publisher",
    "Receipt",
    "Refusal",
    "Refused",
    "Subscription",
    "TopicInfo",
    "Unauthorized",
    "Unreachable",
]

T = TypeVar("T")

# Seconds for closing connections in order after Ctrl-C, or after any other error.
HASTY_CLOSE_S: Final = 1.0


class _Running(NamedTuple):
    """An opened client: its loop's thread, and the asyncio client in it."""

    thread: LoopThread
    client: AsyncClient

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Return ``work``'s result; raises Misuse and Unreachable besides ``work``'s errors."""
        if self.thread.is_inside:
            work.close()
            raise Misuse("The client's own thread can't wait for itself.")
        try:
            return self.thread.run(work, timeout_s)
        except Stopped as error:
            sentence = (
                "The client was closed before the answer."
                if error.has_begun
                else "The client was closed before the call."
            )
            raise Unreachable(sentence, may_have_arrived=error.has_begun) from None


def _in_thread(token: Token | None) -> Token | None:
    """Return a function that calls ``token`` in a thread, since the client's own must not wait."""
    if not callable(token):
        return token
    called = token

    async def ask() -> str:
        answer: str | Awaitable[str] = await asyncio.to_thread(called)
        return await answer if isawaitable(answer) else answer

    return ask


class Client:
    """Publishes to one server and subscribes to it; use as ``with Client(url) as client``.

    Where no block fits, `open` and `close` do the same. Threads may share one client. In a forked
    process the client opens itself again; its subscriptions and publishers are the parent's, and
    raise. A client that is still open at the program's exit is closed.

    Arguments and their errors are those of clevrd.client.Client. A token function is called in a
    thread of its own, so it may wait.
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
    ) -> None:
        def make() -> AsyncClient:
            return AsyncClient(
                url,
                tenant,
                token=_in_thread(token),
                headers=headers,
                tls=tls,
                retry_for_s=retry_for_s,
            )

        self._make: Callable[[], AsyncClient] = make
        # This call checks the arguments now.
        make()
        # Guards the fields below; held by open and close.
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._is_closed = False
        self._last_resort: finalize[..., Client] | None = None
        self._repeated_messages = 0

    def open(self) -> Self:
        """Prepare for calls, without connecting; a second call does nothing."""
        self._leave_parent()
        with self._lock:
            if self._running is None:
                self._start()
            self._is_closed = False
        return self

    def close(self, timeout_s: float | None = None) -> None:
        """Close all connections and subscriptions, and end the thread.

        A second call does nothing.

        Args:
            timeout_s: seconds to wait for the end, which goes on without the caller afterwards.

        Raises:
            TypeError, ValueError: ``timeout_s`` is no duration; no connection is closed.
        """
        if timeout_s is not None:
            timeout_s = check_timeout("timeout_s", timeout_s)
        self._leave_parent()
        with self._lock:
            running, self._running = self._running, None
            self._is_closed = True
            if self._last_resort is not None:
                self._last_resort.detach()
        if running is not None:
            running.thread.stop(timeout_s)
            self._repeated_messages += running.client.repeated_messages

    def __enter__(self) -> Self:
        """Open."""
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; after an error, or Ctrl-C, wait for HASTY_CLOSE_S at most."""
        self.close(None if kind is None else HASTY_CLOSE_S)

    @property
    def repeated_messages(self) -> int:
        """Number of messages that may be there twice, as with clevrd.client.Client."""
        running = self._running
        now = running.client.repeated_messages if running is not None else 0
        return self._repeated_messages + now

    def publish(
        self,
        topic: str,
        data: Any,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Published:
        """Publish ``data`` and return the server's answer, as clevrd.client.Client does."""
        fields = publish_fields(topic, key, ttl_s, headers, idempotency_key)
        return self._publish(topic, data_json(data), fields)

    def publish_raw(
        self,
        topic: str,
        raw: bytes | bytearray | memoryview | str,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Published:
        """Publish data that is JSON already, as clevrd.client.Client does."""
        fields = publish_fields(topic, key, ttl_s, headers, idempotency_key)
        return self._publish(topic, check_json(raw), fields)

    def publish_batch(
        self,
        items: Iterable[Outgoing | tuple[str, Any]],
        *,
        max_items: int = MAX_BATCH_ITEMS,
        max_bytes: int = MAX_BATCH_BYTES,
    ) -> list[Published | Refusal]:
        """Publish many messages in few requests, as clevrd.client.Client does.

        Items are read in the calling thread, ``max_items`` at a time.
        """
        check_count("max_items", max_items)
        check_count("max_bytes", max_bytes)
        check_items(items)
        running = self._opened()
        results: list[Published | Refusal] = []
        waiting = iter(items)
        while batch := list(islice(waiting, max_items)):
            try:
                results += running.run(
                    running.client.publish_batch(batch, max_items=max_items, max_bytes=max_bytes)
                )
            except ClientError as error:
                error.results = results + error.results
                raise
        return results

    def publisher(self, *, max_in_flight: int = MAX_IN_FLIGHT) -> Publisher:
        """Return a stream of publishes over one WebSocket; use with ``with``."""
        running = self._opened()
        return Publisher(self, running, running.client.publisher(max_in_flight=max_in_flight))

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
        """Return an iterator of the topics' messages, and of the gaps between them.

        Arguments are those of clevrd.client.Client. Up to 64 items and 1 MiB are read ahead.
        """
        running = self._opened()
        items = running.client.subscribe(
            *topics,
            topic=topic,
            patterns=patterns,
            policy=policy,
            buffer=buffer,
            last=last,
            since=since,
            position=position,
            positions=positions,
            subscriber_id=subscriber_id,
            headers=headers,
            reconnect=reconnect,
        )
        return Subscription(self, running, items)

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
        """Return an iterator of the messages that the topic has had, up to now.

        Arguments are those of clevrd.client.Client.
        """
        running = self._opened()
        items = running.client.history(
            topic, last=last, since=since, position=position, limit=limit, headers=headers
        )
        return History(self, running, items)

    def topics(self) -> Iterator[ListedTopic]:
        """Yield the topics that have messages, as clevrd.client.Client does."""
        running = self._opened()
        after: str | None = None
        while True:
            page = running.run(running.client.topics_page(after))
            yield from page.topics
            if page.next is None:
                return
            after = page.next

    def topic(self, topic: str, *, limit: int = MAX_LIMIT, after: str | None = None) -> TopicInfo:
        """Return a topic's position, counts and readers, as clevrd.client.Client does."""
        running = self._opened()
        return running.run(running.client.topic(topic, limit=limit, after=after))

    def clear(self, topic: str) -> Position:
        """Clear a topic, as clevrd.client.Client does."""
        running = self._opened()
        return running.run(running.client.clear(topic))

    def _publish(self, topic: str, data: bytes, fields: dict[str, object]) -> Published:
        running = self._opened()
        return running.run(running.client.publish_encoded(topic, data, fields))

    def _opened(self) -> _Running:
        self._leave_parent()
        running = self._running
        if running is None:
            if self._is_closed:
                raise Misuse("Client is closed; open() it again, or make another one.")
            raise Misuse("Client is not open; use it in 'with', or open() it first.")
        return running

    def _start(self) -> None:
        client = self._make()
        thread = LoopThread("clevrd-client", client.close)
        thread.start()
        running = _Running(thread, client)
        running.run(running.client.open())
        self._running = running
        # A client that is freed without being closed is stopped then, without a wait, since it may
        # be freed in any thread.
        self._last_resort = finalize(self, thread.stop, 0)
        self._last_resort.atexit = False

    def _leave_parent(self) -> None:
        """Open again in a child process, where the parent's client is only a copy."""
        running = self._running
        if running is None or not running.thread.is_forked:
            return
        # A thread of the parent may have held the old lock at the fork.
        self._lock = threading.Lock()
        if self._last_resort is not None:
            self._last_resort.detach()
        self._start()


class Subscription:
    """An iterator of `Message` and `Gap`; made by `Client.subscribe`.

    ``with`` connects when it is entered and closes when it is left; `open` and `close` do the same.
    ``for`` alone connects at its first step and closes the connection when the loop is left, as
    with the subscription for asyncio. Threads may share one subscription: each item goes to one of
    them.
    """

    def __init__(self, client: Client, running: _Running, items: AsyncSubscription) -> None:
        # A reference to the client, which would be closed when it is freed.
        self._client = client
        self._running = running
        self._items = items
        self._intake = Intake(running.thread, items)
        # Guards _loops; reentrant, since a loop may be freed while the lock is held.
        self._lock = threading.RLock()
        self._loops = 0
        self._is_opened = False
        self._is_closed = False

    def __del__(self) -> None:
        """Close the connection of a subscription that is freed while it is open."""
        if self._is_opened and not self._is_closed:
            _close_aside(self._running, self._items)

    @property
    def position(self) -> Position | None:
        """The position up to which items were handed out, as in the subscription for asyncio."""
        topic = self._items.only_topic
        return None if topic is None else self.positions.get(topic)

    @property
    def positions(self) -> dict[str, Position]:
        """Topic -> position up to which items were handed out, as in the one for asyncio."""

        async def look() -> dict[str, Position]:
            return self._intake.positions()

        try:
            return self._running.thread.run(look())
        except Stopped:
            return self._intake.positions()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now; a lost one may not have been noticed yet."""
        return self._items.is_connected and not self._running.thread.is_forked

    def open(self) -> Self:
        """Connect and subscribe, as the subscription for asyncio does."""
        self._check()

        async def enter() -> None:
            await self._items.open()
            self._intake.begin()

        self._is_opened = True
        try:
            self._running.run(enter())
        except BaseException:
            # A block that was not entered has no exit that would close the connection.
            self._is_opened = False
            self._running.thread.call_soon(self._let_go)
            raise
        return self

    def close(self) -> None:
        """Close, and end the wait of a thread for an item. A second call does nothing."""
        self._is_closed = True
        self._intake.close()

        async def leave() -> None:
            self._intake.leave()
            await self._items.close()

        if not self._running.thread.is_forked:
            try:
                self._running.thread.run(leave())
            except Stopped:
                return

    def __enter__(self) -> Self:
        """Open."""
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; after an error without waiting for the server."""
        if kind is None:
            self.close()
            return
        self._is_closed = True
        self._intake.close()
        _close_aside(self._running, self._items)

    def __iter__(self) -> Iterator[Message | Gap]:
        """Return an iterator for one loop.

        Raises:
            Misuse: the subscription has ended.
        """
        self._check()
        return _Loop(self)

    def get(self, timeout_s: float | None = None) -> Message | Gap | None:
        """Return the next item; None if none comes within ``timeout_s``, or after `close`.

        Outside ``with`` this connects, and the connection stays until the subscription is closed.

        Raises:
            TypeError, ValueError: ``timeout_s`` is no duration.
            Refused, Closed, Unreachable, BadAnswer: as from the subscription for asyncio.
            Misuse: the subscription has ended.
        """
        if timeout_s is not None:
            timeout_s = check_timeout("timeout_s", timeout_s)
        self._check()
        if not self._is_opened:
            self._is_opened = True
            if not self._running.thread.call_soon(self._keep_reading):
                self._intake.close()
        return self._intake.take(timeout_s)

    def _let_go(self) -> None:
        self._intake.leave()
        self._items.leave()

    def _keep_reading(self) -> None:
        self._items.keep()
        self._intake.begin()

    def _check(self) -> None:
        if self._running.thread.is_forked:
            raise Misuse("The subscription was made before a fork; subscribe again in the child.")
        if not self._running.thread.is_running:
            raise Misuse("Client is closed; open() it again, or make another one.")
        if self._is_closed or self._intake.is_over:
            raise Misuse("The subscription has ended; subscribe again.")

    def _enter_loop(self) -> None:
        with self._lock:
            self._loops += 1
        if not self._running.thread.call_soon(self._intake.begin):
            self._intake.close()

    def _leave_loop(self) -> None:
        with self._lock:
            self._loops -= 1
            is_last = not self._loops
        if is_last and not self._is_opened:
            self._running.thread.call_soon(self._intake.leave)


def _close_aside(running: _Running, items: AsyncSubscription) -> None:
    """Close a subscription from any thread, without waiting for the end."""
    try:
        running.thread.submit(items.close())
    except Stopped:
        return


class _Loop:
    """The iterator of ``for``; closes a subscription that was not opened, in the end."""

    __slots__ = ("_is_under_way", "_items")

    def __init__(self, items: Subscription) -> None:
        self._items = items
        self._is_under_way = False

    def __iter__(self) -> Self:
        """Return this object."""
        return self

    def __next__(self) -> Message | Gap:
        """Return the next message or gap; Ctrl-C ends the wait at once."""
        if not self._is_under_way:
            self._is_under_way = True
            self._items._enter_loop()
        try:
            item = self._items._intake.take(None)
            if item is None:
                raise StopIteration
        except BaseException:
            self._leave()
            raise
        return item

    def __del__(self) -> None:
        """Leave the loop, unless that was done already."""
        self._leave()

    def _leave(self) -> None:
        if self._is_under_way:
            self._is_under_way = False
            self._items._leave_loop()


class History:
    """An iterator of a topic's past, `Message` and `Gap`; made by `Client.history`.

    Threads may share one: each item goes to one of them.
    """

    def __init__(self, client: Client, running: _Running, items: AsyncHistory) -> None:
        # A reference to the client, which would be closed when it is freed.
        self._client = client
        self._running = running
        self._items = items
        # Held while an item is taken, so that one thread reads the next page.
        self._lock = threading.Lock()

    @property
    def position(self) -> Position | None:
        """The position up to which items were handed out, as in the history for asyncio."""
        return self._items.position

    def __iter__(self) -> Self:
        """Return this object."""
        return self

    def __next__(self) -> Message | Gap:
        """Return the next message or gap, as the history for asyncio does."""
        if self._running.thread.is_forked:
            # A thread of the parent may have held the lock at the fork.
            raise Misuse("The history was made before a fork; make another one in the child.")
        walk = self._items.walk
        with self._lock:
            while (item := walk.take()) is None:
                if walk.is_over:
                    raise StopIteration
                self._running.run(self._items.read_page())
            return item


class Receipt:
    """One message on its way: `result` waits for the server's answer."""

    __slots__ = ("_receipt", "_running")

    def __init__(self, running: _Running, receipt: AsyncReceipt) -> None:
        self._running = running
        self._receipt = receipt

    def result(self, timeout_s: float | None = None) -> Published:
        """Wait for the server's answer and return it.

        Raises:
            TimeoutError: there was no answer within ``timeout_s``; the message stays on its way.
            Refused: the server does not take the message.
            Unreachable, Closed, BadAnswer: the stream failed before the answer.
        """

        async def wait() -> Published:
            return await self._receipt

        if timeout_s is not None:
            timeout_s = check_timeout("timeout_s", timeout_s)
        return self._running.run(wait(), timeout_s)


class Publisher:
    """A stream of publishes; use as ``with client.publisher() as publisher``.

    It works as clevrd.client.Publisher does. Threads may share one.
    """

    def __init__(self, client: Client, running: _Running, publisher: AsyncPublisher) -> None:
        # A reference to the client, which would be closed when it is freed.
        self._client = client
        self._running = running
        self._publisher = publisher

    def open(self) -> Self:
        """Connect; raise the first connection's error."""
        self._run(self._publisher.open())
        return self

    def close(self) -> None:
        """Wait until each message is answered, and close."""
        self._run(self._publisher.close())

    def __enter__(self) -> Self:
        """Open."""
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the answers, and close; after an error close at once."""
        self._run(self._publisher.__aexit__(kind, error, trace))

    def publish(
        self,
        topic: str,
        data: Any,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Receipt:
        """Send one message, and return once there is room for the next one."""
        sending = self._publisher.publish(
            topic, data, key=key, idempotency_key=idempotency_key, ttl_s=ttl_s, headers=headers
        )
        return Receipt(self._running, self._run(sending))

    def publish_raw(
        self,
        topic: str,
        raw: bytes | bytearray | memoryview | str,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        ttl_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Receipt:
        """Send one message whose data is JSON already; otherwise the same as `publish`."""
        sending = self._publisher.publish_raw(
            topic, raw, key=key, idempotency_key=idempotency_key, ttl_s=ttl_s, headers=headers
        )
        return Receipt(self._running, self._run(sending))

    def flush(self) -> None:
        """Wait until each message is answered; raise the stream's error if it has failed."""
        self._run(self._publisher.flush())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._running.thread.is_forked:
            work.close()
            raise Misuse("The publisher was made before a fork; make another one in the child.")
        return self._running.run(work)
