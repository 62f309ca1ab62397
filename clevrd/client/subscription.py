"""Subscriptions: the messages and gaps of topics, in order, across lost connections.

Nothing is buffered beyond one connection's read buffer, 64 KiB, but for what comes while ``async
with`` waits for several greetings: whoever consumes slowly is a slow reader to the server. What is
asked for, and what frames mean, is the feeds' (feeds.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

from clevrd.client.backoff import STEADY_S, Clockwork, comes_back, delay_s, going_away_s
from clevrd.client.errors import BadAnswer, ClientError, Closed
from clevrd.client.feeds import Feed
from clevrd.client.position import Position
from clevrd.client.session import ANSWER_TIMEOUT_S, TEXT, Session, Socket, end_of
from clevrd.client.wire import CONTROL_PROTOCOL, UNREADABLE, Gap, Message

log = logging.getLogger(__name__)


class Subscription:
    """An async iterator of `Message` and `Gap`; made by `Client.subscribe`.

    ``async for`` alone connects at its first step. ``async with`` connects when it is entered, so
    that what is published after that is not missed, and closes when it is left.
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
        # To be waited before the next connection; None before the first.
        self._delay_s: float | None = None
        # Closed by its user, or for good by the server.
        self._is_over = False

    def __del__(self) -> None:
        """Close after a ``break`` out of a plain ``async for``, as nobody else can."""
        if self._socket is not None:
            self._session.abandon(self._socket)

    @property
    def position(self) -> Position | None:
        """Of one topic: up to where everything was handed out; None before the server has told it.

        Stored, and given to `Client.subscribe` later, it makes a subscription go on behind what
        this one has handed out. With several topics or a pattern it is None: see `positions`.
        """
        topic = self._feed.only_topic
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

    async def __aenter__(self) -> Self:
        """Connect, and be subscribed to all topics and patterns; raises as `__anext__`.

        Where more than 1 MiB of messages comes before the last of several topics is subscribed,
        those are taken first, and the rest follows while items are taken.
        """
        while not (self._is_over or self.is_connected or self._feed.is_full):
            if self._socket is None:
                await self._connect()
            else:
                await self._receive(self._socket, self._feed.greet)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        await self.aclose()

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Message | Gap:
        """Return the next message or gap, whatever connections that takes.

        A wait that is cancelled, by a timeout for instance, loses nothing.

        Raises:
            Refused, Closed: the server said not to come back, in its words.
            Unreachable: the very first connection failed.
            BadAnswer: what came is not a message.
        """
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

    async def aclose(self) -> None:
        """Close the connection; who waits for the next item is told that there is none."""
        self._is_over = True
        await self._drop_socket()

    # --- frames ---

    async def _receive(
        self, socket: Socket, take: Callable[[bytes], Message | Gap | None]
    ) -> Message | Gap | None:
        """Return what ``take`` makes of the next frame; None also when the connection is lost."""
        try:
            frame = await socket.receive(None if self._feed.is_greeted else ANSWER_TIMEOUT_S)
            if frame.type is not TEXT:
                raise end_of(frame, socket.close_code)
            return take(frame.data)
        except TimeoutError:
            await self._lose(Closed(1006, "no greeting"))
        except UNREADABLE as error:
            sentence = f"{self._session.name} sent what is not a message ({error})."
            await self._lose(BadAnswer(sentence))
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
            # Who asks again waits for the rest.
            self._delay_s = max(0.0, self._delay_s - (self._clock() - started_s))
            raise
        self._delay_s = None

    async def _open(self) -> None:
        if self._session.is_closed:
            self._is_over = True
            return
        self._connected_s = self._clock()
        query = self._feed.query(is_return=self._attempt > 0)
        socket = await self._session.websocket(self._feed.path, query, (CONTROL_PROTOCOL,))
        self._socket = socket
        commands = self._feed.begin(socket.protocol)
        if commands:
            self._session.send_aside(socket, commands)

    async def _lose(self, error: ClientError) -> None:
        """Take note that there is no connection; raises ``error`` when there is to be none."""
        if self._is_over:
            return
        if isinstance(error, Closed):
            # Only what was open can have been steady: a connect may time out for as long.
            if self._clock() - self._connected_s >= STEADY_S:
                self._attempt = 0
            error.retry_after_s = going_away_s(self._feed.away_ms)
        if self._session.is_closed:
            await self.aclose()
            return
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

    async def _drop_socket(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            await self._session.drop(socket)
