"""Subscriptions: a topic's messages and gaps, in order, across lost connections.

Nothing is buffered beyond one connection's read buffer, 64 KiB: whoever consumes slowly is a slow
reader to the server.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Final, Self

from clevrd.client.backoff import STEADY_S, Clockwork, comes_back, delay_s, going_away_s
from clevrd.client.errors import BadAnswer, ClientError, Closed, Refused, Unreachable
from clevrd.client.position import Position, Tracker
from clevrd.client.session import ANSWER_TIMEOUT_S, TEXT, Session, Socket, end_of
from clevrd.client.wire import (
    CONTROL_BEGINS,
    CONTROL_PROTOCOL,
    UNREADABLE,
    Gap,
    GoingAway,
    Message,
    Subscribed,
    read_control,
    read_message,
)

log = logging.getLogger(__name__)

# Asked for after a lost connection where there are no positions: the server's default for what it
# keeps of a topic.
RESUME_LAST: Final = 10_000


class Subscription:
    """An async iterator of `Message` and `Gap`; made by `Client.subscribe`.

    ``async for`` alone connects at its first step. ``async with`` connects when it is entered, so
    that what is published after that is not missed, and closes when it is left.
    """

    def __init__(
        self,
        session: Session,
        query: dict[str, str],
        position: Position | None,
        clockwork: Clockwork,
        *,
        reconnect: bool,
    ) -> None:
        self._session = session
        self._query = query
        self._tracker = Tracker(query["topic"], position)
        # The very first connection asks for a place in the past: a gap may come first.
        self._is_resumed = position is not None or "since" in query
        self._random, self._sleep, self._clock = clockwork
        self._reconnect = reconnect
        self._socket: Socket | None = None
        # This connection's beginning is known.
        self._is_greeted = False
        # The server of this connection tells positions and gaps.
        self._has_control = False
        # Epoch of the messages of this connection.
        self._epoch = ""
        # Behind a gap that was handed out first.
        self._waiting: Message | None = None
        self._attempt = 0
        self._connected_s = 0.0
        # To be waited before the next connection; None before the first.
        self._delay_s: float | None = None
        # What the server asks to stay away, after the close that it has announced.
        self._away_s = 0.0
        # Closed by its user, or for good by the server.
        self._is_over = False

    def __del__(self) -> None:
        """Close after a ``break`` out of a plain ``async for``, as nobody else can."""
        if self._socket is not None:
            self._session.abandon(self._socket)

    @property
    def position(self) -> Position | None:
        """Up to where everything was handed out; None before the server has told it.

        Stored, and given to `Client.subscribe` later, it makes a subscription go on behind what
        this one has handed out.
        """
        return self._tracker.position

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now, as far as was noticed."""
        return self._socket is not None and self._is_greeted

    async def __aenter__(self) -> Self:
        """Connect; raises as `__anext__`."""
        await self._connect()
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
        if self._waiting is not None:
            message, self._waiting = self._waiting, None
            return message
        while not self._is_over:
            socket = self._socket
            if socket is None or not self._is_greeted:
                await self._connect()
                continue
            frame = await socket.receive()
            if frame.type is TEXT:
                item = self._read(frame.data)
                if item is not None:
                    return item
            elif not self._is_over:
                await self._lose(end_of(frame, socket.close_code))
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Close the connection; who waits for the next item is told that there is none."""
        self._is_over = True
        await self._drop_socket()

    # --- frames ---

    def _read(self, text: bytes) -> Message | Gap | None:
        """Return what a text frame brings, None when that is nothing for the user."""
        has_control = self._has_control
        try:
            if has_control and text.startswith(CONTROL_BEGINS):
                return self._follow(text)
            message = read_message(text, self._epoch)
        except UNREADABLE as error:
            self._is_over = True
            raise self._not_a_message(error) from error
        if has_control:
            return message if self._tracker.take(message) else None
        return self._step(message) if self._tracker.is_new(message) else None

    def _follow(self, text: bytes) -> Gap | None:
        """Do what a control frame says."""
        match control := read_control(text):
            case Gap():
                self._tracker.miss(control)
                return control
            case GoingAway():
                self._away_s = going_away_s(control.reconnect_after_ms)
        return None

    def _step(self, message: Message) -> Message | Gap:
        gap = self._tracker.step(message)
        if gap is None:
            return message
        self._waiting = message
        return gap

    def _not_a_message(self, error: Exception) -> BadAnswer:
        return BadAnswer(f"{self._session.name} sent what is not a message ({error}).")

    # --- connections ---

    async def _connect(self) -> None:
        """Connect, as often as it takes; raises when that is hopeless."""
        while not self._is_over and not self.is_connected:
            try:
                if self._socket is None:
                    await self._wait()
                    await self._open()
                else:
                    await self._greet(self._socket)
            except (Refused, Unreachable, Closed, BadAnswer) as error:
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
        self._away_s = 0.0
        query = self._query_now()
        self._socket = await self._session.websocket("/subscribe", query, (CONTROL_PROTOCOL,))
        self._has_control = self._socket.protocol == CONTROL_PROTOCOL
        self._is_greeted = not self._has_control
        if not self._has_control:
            self._tracker.start_without_positions()
            self._epoch = ""

    async def _greet(self, socket: Socket) -> None:
        """Read the first frame, which says where this connection begins."""
        try:
            frame = await socket.receive(ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise Closed(1006, "no greeting") from None
        if frame.type is not TEXT:
            raise end_of(frame, socket.close_code)
        try:
            greeting = read_control(frame.data)
        except UNREADABLE as error:
            raise self._not_a_message(error) from error
        if not isinstance(greeting, Subscribed):
            raise BadAnswer(f"{self._session.name} did not begin with a position.")
        self._tracker.greet(greeting, is_resumed=self._is_resumed)
        self._epoch = greeting.epoch
        self._is_greeted = True

    def _query_now(self) -> dict[str, str]:
        """Return the query of the next connection: where this subscription stands."""
        tracker = self._tracker
        query = dict(self._query)
        if tracker.epoch:
            query.pop("last", None)
            query.pop("since", None)
            query |= {"offset": str(tracker.offset), "epoch": tracker.epoch}
            self._is_resumed = True
        elif self._attempt and "since" not in query:
            # Who wanted no past and has seen nothing has no place to resume from.
            wanted = self._query.get("last")
            if wanted != "0" or tracker.last_id:
                query["last"] = str(max(RESUME_LAST, int(wanted or 0)))
        return query

    async def _lose(self, error: ClientError) -> None:
        """Take note that there is no connection; raises ``error`` when there is to be none."""
        if isinstance(error, Closed):
            # Only what was open can have been steady: a connect may time out for as long.
            if self._clock() - self._connected_s >= STEADY_S:
                self._attempt = 0
            error.retry_after_s = self._away_s
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
            *(self._query["topic"], self._delay_s, error),
        )

    async def _drop_socket(self) -> None:
        socket, self._socket = self._socket, None
        self._is_greeted = False
        if socket is not None:
            await self._session.drop(socket)
