"""Subscription: the messages and gaps of topics, in order, across lost connections.

Only one connection's read buffer is held, 64 KiB, so a slow consumer is a slow reader to the
server. One exception: messages that come while ``async with`` opens several topics are held. The
feeds (feeds.py) make the queries and read the frames.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from clevrd.client.backoff import (
    STEADY_S,
    STEADY_UNTIL_EXPIRED_S,
    Clockwork,
    comes_back,
    delay_s,
    going_away_s,
    is_expired,
)
from clevrd.client.errors import BadAnswer, ClientError, Closed, Misuse
from clevrd.client.feeds import Feed
from clevrd.client.position import Position
from clevrd.client.session import ANSWER_TIMEOUT_S, Session, Socket
from clevrd.client.values import UNREADABLE
from clevrd.client.wire import NOTICE_PROTOCOL, Gap, Message

log = logging.getLogger(__name__)


class Subscription:
    """An async iterator of `Message` and `Gap`; made by `Client.subscribe`.

    ``async with`` connects when it is entered, so that no message published after that is missed,
    and closes when it is left; `open` and `close` do the same. Loops over the subscription may
    begin and end within the block.

    ``async for`` alone connects at its first step, and closes the connection when the loop is left:
    by its end, a ``break``, an exception, a cancellation. Another loop goes on behind the items
    that were handed out. Where loops are nested, the outermost closes the connection.
    """

    def __init__(
        self, session: Session, feed: Feed, clockwork: Clockwork, *, reconnect: bool
    ) -> None:
        self._session = session
        self._feed = feed
        self._random, self._sleep, self._clock = clockwork
        self._reconnect = reconnect
        self._socket: Socket | None = None
        self._attempt = 0
        self._connected_s = 0.0
        # Seconds to wait before the next connection; None before the first, and once they were
        # waited.
        self._delay_s: float | None = None
        # True once the user has closed the subscription, or the server has ended it for good.
        self._is_over = False
        # True from `open` or `keep` until `leave`: the user closes the connection, and loops leave
        # it open.
        self._is_opened = False
        # True once the subscription was open, so that another connection is a return.
        self._was_greeted = False
        # True while a task opens the subscription or waits for the next item.
        self._is_read = False
        # Plain loops that are under way; changed by _PlainLoop only.
        self._loops = 0

    def __del__(self) -> None:
        """Close the connection of a subscription that is freed while it is open."""
        if self._socket is not None:
            self._session.abandon(self._socket)

    @property
    def only_topic(self) -> str | None:
        """The topic of a subscription to one topic; None for any other."""
        return self._feed.only_topic

    @property
    def position(self) -> Position | None:
        """The position up to which items were handed out; None until the server has told one.

        A stored position, given to `Client.subscribe` later, makes a subscription that goes on
        behind the items of this one. With several topics or a pattern this property is None: see
        `positions`.
        """
        topic = self.only_topic
        return None if topic is None else self.positions.get(topic)

    @property
    def positions(self) -> dict[str, Position]:
        """Topic -> position up to which items were handed out, where the server has told one.

        A stored dict, given to `Client.subscribe` later, is used as a stored `position` is. A topic
        that a pattern brought stays in the dict; the 1,000 topics of patterns heard of last are
        kept.
        """
        return self._feed.positions()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now; a lost one may not have been noticed yet."""
        return self._socket is not None and self._feed.is_greeted

    async def open(self) -> Self:
        """Connect, and subscribe to all topics and patterns; raises as `__anext__`.

        If more than 1 MiB of messages comes before the last topic is subscribed, this returns
        earlier, and the rest follows while items are taken.
        """
        self._raise_over()
        self._begin_to_read()
        self._is_opened = True
        try:
            while not (self._is_over or self.is_connected or self._feed.is_full):
                if self._socket is None:
                    await self._connect()
                else:
                    await self._receive(self._socket, self._feed.greet)
        except BaseException:
            # A block that was not entered has no exit that would close the connection.
            self.leave()
            raise
        finally:
            self._is_read = False
        return self

    def keep(self) -> None:
        """Leave the connection open behind loops, as after `open`, but without connecting now."""
        self._is_opened = True

    async def close(self) -> None:
        """Close the connection, and end the iteration of a task that waits for an item."""
        self._is_over = True
        await self._drop_socket()

    async def aclose(self) -> None:
        """Close; this is the name that contextlib.aclosing calls."""
        await self.close()

    async def __aenter__(self) -> Self:
        """Open."""
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()

    def __aiter__(self) -> AsyncIterator[Message | Gap]:
        """Return this object if it was opened, else an iterator that closes it in the end.

        Raises:
            Misuse: the subscription has ended.
        """
        self._raise_over()
        return self if self._is_opened else _PlainLoop(self)

    async def __anext__(self) -> Message | Gap:
        """Return the next message or gap, over as many connections as needed.

        A wait that is cancelled, by a timeout for instance, loses no item.

        Raises:
            Refused, Closed: the server said not to come back; the error has its words.
            Unreachable: the very first connection failed.
            BadAnswer: a frame is not clevrd's.
            Misuse: another task waits for the next item.
        """
        if self._is_over:
            raise StopAsyncIteration
        self._begin_to_read()
        try:
            return await self._next()
        finally:
            self._is_read = False

    def _begin_to_read(self) -> None:
        """Note that a task opens or reads the subscription; only one may at a time."""
        if self._is_read:
            raise Misuse(
                "Two tasks read one subscription at the same time; subscribe once for each, or let"
                " one read and fill a queue."
            )
        self._is_read = True

    async def _next(self) -> Message | Gap:
        while not self._is_over:
            item = self._feed.held()
            if item is not None:
                return item
            if self._socket is None:
                await self._connect()
                continue
            item = await self._receive(self._socket, self._feed.read)
            if item is not None:
                return item
        raise StopAsyncIteration

    def before(self, item: Message | Gap) -> Position | None:
        """Return the topic's position before ``item``, the last item that was handed out."""
        return self._feed.before(item)

    # --- frames ---

    async def _receive(
        self, socket: Socket, take: Callable[[bytes], Message | Gap | None]
    ) -> Message | Gap | None:
        """Return ``take``'s item for the next frame; None also after a lost connection."""
        try:
            timeout_s = None if self._feed.is_greeted else ANSWER_TIMEOUT_S
            return take(await self._session.receive(socket, timeout_s))
        except TimeoutError:
            await self._lose(Closed(1006, "no greeting"))
        except UNREADABLE:
            await self._lose(
                BadAnswer(
                    f"{self._session.name} sent what is not a message of clevrd's; check the URL,"
                    " and that no proxy changes what it passes on."
                )
            )
        except ClientError as error:
            await self._lose(error)
        return None

    # --- connections ---

    async def _connect(self) -> None:
        """Try to connect once, after the wait; raise when that is hopeless."""
        try:
            await self._wait()
            await self._open()
        except ClientError as error:
            await self._lose(error)
        if self._is_over:
            await self._drop_socket()

    async def _wait(self) -> None:
        """Wait out the delay that the last loss has set."""
        if self._delay_s is None:
            return
        started_s = self._clock()
        try:
            await self._sleep(self._delay_s)
        except asyncio.CancelledError:
            # The next call waits for the rest.
            self._delay_s = max(0.0, self._delay_s - (self._clock() - started_s))
            raise
        self._delay_s = None

    async def _open(self) -> None:
        if self._session.is_closed and self._was_greeted:
            self._is_over = True
            return
        self._connected_s = self._clock()
        query = self._feed.query(is_return=self._attempt > 0 or self._was_greeted)
        socket = await self._session.websocket(self._feed.path, query, (NOTICE_PROTOCOL,))
        self._socket = socket
        commands = self._feed.begin(socket.protocol)
        if commands:
            self._session.send_aside(socket, commands)
            self._session.renew_aside(socket)

    async def _lose(self, error: ClientError) -> None:
        """Note that the connection is lost; raise ``error`` when there is to be no other."""
        if self._is_over:
            return
        if isinstance(error, Misuse):
            raise error
        if is_expired(error) and self._socket is not None:
            self._session.drop_secret(self._socket)
        if isinstance(error, Closed):
            # Only a connection that was open can have been steady: a connect may take as long to
            # time out.
            steady_s = STEADY_UNTIL_EXPIRED_S if is_expired(error) else STEADY_S
            if self._clock() - self._connected_s >= steady_s:
                self._attempt = 0
            error.retry_after_s = going_away_s(self._feed.away_ms)
        if self._session.is_closed:
            await self.close()
            return
        self._was_greeted |= self._socket is not None and self._feed.is_greeted
        self._delay_s = delay_s(self._attempt, error, self._random())
        self._attempt += 1
        self._is_over = not (self._reconnect and self._session.was_reached and comes_back(error))
        await self._drop_socket()
        if self._is_over:
            raise error
        log.info(
            "subscription lost topic=%s delay_s=%.2f why=%s",
            *(self._feed.name, self._delay_s, error),
        )

    def leave(self) -> None:
        """Close the connection, as a plain loop does; another loop goes on where it was."""
        self._is_opened = False
        socket, self._socket = self._socket, None
        if socket is not None:
            self._was_greeted |= self._feed.is_greeted
            self._session.abandon(socket)

    def _raise_over(self) -> None:
        if self._is_over:
            raise Misuse("The subscription has ended; subscribe again.")

    async def _drop_socket(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            await self._session.drop(socket)


class _PlainLoop:
    """The iterator of ``async for`` over a subscription that was not opened; closes it in the end.

    A loop that is left by ``break``, ``return`` or an exception in its body only frees its
    iterator, so `__del__` has to close the connection. A wait that fails or is cancelled closes it
    here: the traceback, which the task keeps, keeps the iterator alive too.
    """

    __slots__ = ("_is_under_way", "_items")

    def __init__(self, items: Subscription) -> None:
        self._items = items
        self._is_under_way = False

    def __aiter__(self) -> Self:
        """Return this object."""
        return self

    async def __anext__(self) -> Message | Gap:
        """Return the next message or gap; raises as the subscription's own `__anext__`."""
        if not self._is_under_way:
            self._is_under_way = True
            self._items._loops += 1
        try:
            return await anext(self._items)
        except BaseException:
            self._leave()
            raise

    def __del__(self) -> None:
        """Close the connection, unless that was done already."""
        self._leave()

    def _leave(self) -> None:
        if not self._is_under_way:
            return
        self._is_under_way = False
        items = self._items
        items._loops -= 1
        if not (items._loops or items._is_opened):
            items.leave()
