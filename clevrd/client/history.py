"""History: the messages that a topic has had, from a place in the past up to now, page by page.

No connection is held between pages. Messages that come later: subscription.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final, Self

from clevrd.client.errors import Misuse
from clevrd.client.position import Position
from clevrd.client.session import Session
from clevrd.client.topics import MAX_LIMIT, MessagesPage, Topics
from clevrd.client.values import UNREADABLE
from clevrd.client.wire import Gap, Message, read_message

# Query option for messages with their headers.
HEADERS_OPTION: Final = {"headers": "true"}
# Whole history of a topic, where nothing says where to begin.
_ALL: Final = {"since": "all"}


class Walk:
    """Where a history is read on, and what was read and not handed out yet. No I/O here."""

    __slots__ = ("_beginning", "_held", "_left", "_options", "head", "is_over", "position")

    def __init__(
        self,
        beginning: Mapping[str, str],
        options: Mapping[str, str],
        position: Position | None,
        limit: int | None,
    ) -> None:
        # Query options of every page.
        self._options = options
        # Query options for the place at which the next page begins.
        self._beginning = dict(beginning) if position is None else _query_of(position)
        # Messages that may still be read; None without a limit.
        self._left = limit
        # Items that wait to be handed out, each with the position behind it.
        self._held: deque[tuple[Message | Gap, Position]] = deque()
        # Position up to which items were handed out; None before a server has told one.
        self.position = position
        # The newest message's position when reading began, or when a new epoch was found; messages
        # behind it are not the history's. Set by the reader.
        self.head: Position | None = None
        # True when no more pages follow.
        self.is_over = False

    def query(self) -> dict[str, str]:
        """Return the query of the next page."""
        limit = MAX_LIMIT if self._left is None else min(MAX_LIMIT, self._left)
        return {**self._beginning, **self._options, "limit": str(limit)}

    def add(self, page: MessagesPage) -> None:
        """Take a page; raises one of UNREADABLE for what is no message."""
        messages = [read_message(bytes(raw), page.epoch) for raw in page.messages]
        end = Position(page.epoch, page.offset)
        if page.gap is not None:
            behind = messages[0].offset - 1 if messages else page.offset
            self._held.append((page.gap, Position(page.epoch, behind)))
        self._held.extend((each, Position(page.epoch, each.offset)) for each in messages)
        if not self._held:
            # Nothing is left to be handed out.
            self.position = end
            self.is_over = True
        if self._left is not None:
            self._left -= len(messages)
            self.is_over |= self._left <= 0
        self._beginning = _query_of(end)
        if self.head is not None and self.head.epoch != page.epoch:
            # The offsets of the head that was known can't be compared with these.
            self.head = None
        elif self.head is not None:
            self.is_over |= page.offset >= self.head.offset

    def take(self) -> Message | Gap | None:
        """Hand out the next item; None where the next page has to be read."""
        if not self._held:
            return None
        item, self.position = self._held.popleft()
        return item


class History:
    """An async iterator of a topic's past, `Message` and `Gap`; made by `Client.history`."""

    def __init__(self, session: Session, topics: Topics, topic: str, walk: Walk) -> None:
        self._session = session
        self._topics = topics
        self._topic = topic
        self.walk = walk
        # True while a task reads the next page.
        self._is_read = False

    @property
    def position(self) -> Position | None:
        """The position up to which items were handed out; None until the server has told one.

        `Client.subscribe` and `Client.history` go on behind it.
        """
        return self.walk.position

    def __aiter__(self) -> Self:
        """Return this object."""
        return self

    async def __anext__(self) -> Message | Gap:
        """Return the next message or gap, and read the next page where there is need.

        A wait that is cancelled, or that fails, loses no item: the next call reads that page again.

        Raises:
            Refused: the server refused, such as with 404 for a topic that does not exist.
            Unreachable, BadAnswer: as from `Client.publish`.
            Misuse: another task waits for the next item.
        """
        while (item := self.walk.take()) is None:
            if self.walk.is_over:
                raise StopAsyncIteration
            await self.read_page()
        return item

    async def read_page(self) -> None:
        """Read the next page into the walk; called by the client without asyncio, too."""
        if self._is_read:
            raise Misuse("Two tasks read one history at the same time; make one for each.")
        self._is_read = True
        try:
            if self.walk.head is None:
                info = await self._topics.one(self._topic, 1, None)
                self.walk.head = Position(info.epoch, info.offset)
            page = await self._topics.messages(self._topic, self.walk.query())
            try:
                self.walk.add(page)
            except UNREADABLE as error:
                raise self._session.not_clevrd(200) from error
        finally:
            self._is_read = False


def beginning_of(last: int | None, since: str | None) -> dict[str, str]:
    """Return the query options for the place at which a history begins."""
    if last is not None:
        return {"last": str(last)}
    return _ALL if since is None else {"since": since}


def _query_of(position: Position) -> dict[str, str]:
    return {"epoch": position.epoch, "offset": str(position.offset)}
