"""Subscriptions: the messages and gaps of topics, in order, across lost connections.

Nothing is buffered beyond one connection's read buffer, 64 KiB, but for what comes while ``async
with`` waits for several greetings: whoever consumes slowly is a slow reader to the server. What is
asked for, and what frames mean, is the feeds' (feeds.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from clevrd.client.backoff import STEADY_S, Clockwork, comes_back, delay_s, going_away_s
from clevrd.client.errors import BadAnswer, ClientError, Closed, Misuse
from clevrd.client.feeds import Feed
from clevrd.client.position import Position
from clevrd.client.session import ANSWER_TIMEOUT_S, Session, Socket
from clevrd.client.values import UNREADABLE
from clevrd.client.wire import CONTROL_PROTOCOL, Gap, Message

log = logging.getLogger(__name__)


class Subscription:
    """An async iterator of `Message` and `Gap`; made by `Client.subscribe`.

    ``async with`` connects when it is entered, so that what is published after that is not missed,
    and closes when it is left; `open` and `close` do the same. A loop over it begins and ends as it
    likes meanwhile.

    ``async for`` alone connects at its first step, and lets the connection go when the loop is
    left: by its end, a ``break``, an exception, a cancellation. Another loop over it goes on behind
    what was handed out. With loops inside each other the outermost lets go.
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
        # The wait before the next connection; None before the first.
        self._delay_s: float | None = None
        # True once its user has closed it, or the server for good.
        self._is_over = False
        # True while its user, who has opened it, is to close it too; loops leave it open.
        self._is_opened = False
        # It has been subscribed, so that another connection is a return.
        self._was_greeted = False
        # A task waits for the next item.
        self._is_read = False
        # Plain loops that are under way; changed by PlainLoop only.
        self._loops = 0

    def __del__(self) -> None:
        """Close what nobody holds any more, as nobody else can."""
        if self._socket is not None:
            self._session.abandon(self._socket)

    @property
    def only_topic(self) -> str | None:
        """The topic, where it is only one."""
        return self._feed.only_topic

    @property
    def position(self) -> Position | None:
        """Of one topic: up to where everything was handed out; None before the server has told it.

        Stored, and given to `Client.subscribe` later, it makes a subscription go on behind what
        this one has handed out. With several topics or a pattern it is None: see `positions`.
        """
        topic = self.only_topic
        return None if topic is None else self.positions.get(topic)

    @property
    def positions(self) -> dict[str, Position]:
        """By topic: up to where everything was handed out, as far as the server has told it.

        To be stored and given back as `position` is. A topic that a pattern brought stays among
        them; of such topics the 1,000 heard of last are known.
        """
        return self._feed.positions()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now, as far as was noticed."""
        return self._socket is not None and self._feed.is_greeted

    async def open(self) -> Self:
        """Connect, and be subscribed to all topics and patterns; raises as `__anext__`.

        Where more than 1 MiB of messages comes before the last of several topics is subscribed,
        those are taken first, and the rest follows while items are taken.
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
            # Nobody leaves a block that was not entered.
            self.leave()
            raise
        finally:
            self._is_read = False
        return self

    def keep(self) -> None:
        """Leave the connection open behind loops, as one that is opened; connects nowhere yet."""
        self._is_opened = True

    async def close(self) -> None:
        """Close the connection; who waits for the next item is told that there is none."""
        self._is_over = True
        await self._drop_socket()

    async def aclose(self) -> None:
        """Close, by the name that contextlib.aclosing uses."""
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
        """Return what a loop reads: itself, or where it is not opened what lets go of it.

        Raises:
            Misuse: it has ended.
        """
        self._raise_over()
        return self if self._is_opened else _PlainLoop(self)

    async def __anext__(self) -> Message | Gap:
        """Return the next message or gap, whatever connections that takes.

        A wait that is cancelled, by a timeout for instance, loses nothing.

        Raises:
            Refused, Closed: the server said not to come back, in its words.
            Unreachable: the very first connection failed.
            BadAnswer: what came is not a message.
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
        """Note that a task opens or reads it, which one at a time may; each would connect."""
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
        """Return where the topic of ``item``, the last that was handed out, stood before it."""
        return self._feed.before(item)

    # --- frames ---

    async def _receive(
        self, socket: Socket, take: Callable[[bytes], Message | Gap | None]
    ) -> Message | Gap | None:
        """Return what ``take`` makes of the next frame; None also when the connection is lost."""
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
        """Try to connect once, in its time; raises when that is hopeless."""
        try:
            await self._wait()
            await self._open()
        except ClientError as error:
            await self._lose(error)
        if self._is_over:
            await self._drop_socket()

    async def _wait(self) -> None:
        """Wait as long as the last loss asks for."""
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
        socket = await self._session.websocket(self._feed.path, query, (CONTROL_PROTOCOL,))
        self._socket = socket
        commands = self._feed.begin(socket.protocol)
        if commands:
            self._session.send_aside(socket, commands)

    async def _lose(self, error: ClientError) -> None:
        """Take note that there is no connection; raises ``error`` when there is to be none."""
        if self._is_over:
            return
        if isinstance(error, Misuse):
            raise error
        if isinstance(error, Closed):
            # Only what was open can have been steady: a connect may time out for as long.
            if self._clock() - self._connected_s >= STEADY_S:
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
        """Let the connection go, as a plain loop does; another loop goes on where it was."""
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
    """What ``async for`` reads of a subscription that is not opened: lets go of it in the end.

    A loop that is left by ``break``, ``return`` or an exception in its body drops its iterator and
    says nothing, so `__del__` has to do it. A wait that fails or is cancelled does it here: its
    traceback, which the task keeps, keeps the iterator too.
    """

    __slots__ = ("_is_under_way", "_items")

    def __init__(self, items: Subscription) -> None:
        self._items = items
        self._is_under_way = False

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Message | Gap:
        """Return the next message or gap; raises as that of the subscription."""
        if not self._is_under_way:
            self._is_under_way = True
            self._items._loops += 1
        try:
            return await anext(self._items)
        except BaseException:
            self._leave()
            raise

    def __del__(self) -> None:
        """Let go, where nobody has done so yet."""
        self._leave()

    def _leave(self) -> None:
        if not self._is_under_way:
            return
        self._is_under_way = False
        items = self._items
        items._loops -= 1
        if not (items._loops or items._is_opened):
            items.leave()
