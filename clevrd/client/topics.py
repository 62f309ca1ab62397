"""Topics: which there are, one of them, its messages page by page, and clearing it; over HTTP.

Shapes: docs/wire.md. Reading a topic from a place to its end: history.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import msgspec

from clevrd.client.arguments import path_of
from clevrd.client.errors import Refused, Unreachable
from clevrd.client.position import Position
from clevrd.client.retries import Retries
from clevrd.client.session import MAX_MESSAGE_BYTES, Session
from clevrd.client.values import UNREADABLE
from clevrd.client.wire import Gap

T = TypeVar("T")

# Entries of a page, at most, that a server takes as the option limit.
MAX_LIMIT: Final = 1_000
# Bytes of a page of messages: a MiB, or one larger message, and what stands around them.
_PAGE_BYTES: Final = MAX_MESSAGE_BYTES + 4096
# Bytes of a page of topics, or of one with its ids: each has a name of 255 bytes at most, in which
# JSON doubles some characters.
_LIST_BYTES: Final = 1 << 20


class ListedTopic(msgspec.Struct, frozen=True):
    """A topic that has messages; made by `Client.topics`."""

    topic: str
    epoch: str
    # The newest message's.
    offset: int
    subscribers: int = 0


class PresentId(msgspec.Struct, frozen=True):
    """A ``subscriber_id`` that readers of a topic gave, and how many connections have it."""

    id: str
    connections: int = 1


class Presence(msgspec.Struct, frozen=True):
    """The readers of a topic that gave an id: a page of their ids, in order."""

    ids: tuple[PresentId, ...] = ()
    # All ids, on this page or not.
    count: int = 0
    # The ``after`` of the next page; None on the last one.
    next: str | None = None


class TopicInfo(msgspec.Struct, frozen=True):
    """One topic as the node that was asked sees it; made by `Client.topic`."""

    topic: str
    epoch: str
    # The newest message's; 0 before the first.
    offset: int
    tenant_id: str = ""
    created_at: str = ""
    subscribers: int = 0
    lagging: int = 0
    slow: int = 0
    # Offset of the oldest message in memory (None without one), and how many there are; a journal
    # reaches further back.
    oldest_offset: int | None = None
    held_messages: int = 0
    held_bytes: int = 0
    delivered: int = 0
    dropped: int = 0
    presence: Presence = Presence()


class TopicsPage(msgspec.Struct, frozen=True):
    """A page of topics, by name."""

    topics: list[ListedTopic]
    next: str | None = None


class MessagesPage(msgspec.Struct, frozen=True):
    """A page of one topic's messages."""

    messages: list[msgspec.Raw]
    # The position behind the page.
    epoch: str
    offset: int
    # The messages that are missing before the first of the page; None without any.
    gap: Gap | None = None


class _Cleared(msgspec.Struct, frozen=True):
    epoch: str
    offset: int
    success: bool


_decode_topics = msgspec.json.Decoder(TopicsPage).decode
_decode_topic = msgspec.json.Decoder(TopicInfo).decode
_decode_messages = msgspec.json.Decoder(MessagesPage).decode
_decode_cleared = msgspec.json.Decoder(_Cleared).decode


class Topics:
    """Asks a server about topics, again while failures may pass."""

    def __init__(self, session: Session, retries: Retries) -> None:
        self._session = session
        self._retries = retries

    async def page(self, after: str | None) -> TopicsPage:
        """Return the topics behind the name ``after``."""
        query = {"limit": str(MAX_LIMIT)} | ({} if after is None else {"after": after})
        return await self._get("/topics", query, _LIST_BYTES, _decode_topics)

    async def one(self, topic: str, limit: int, after: str | None) -> TopicInfo:
        """Return one topic, with ``limit`` ids of readers behind the id ``after``."""
        query = {"limit": str(limit)} | ({} if after is None else {"after": after})
        return await self._get(path_of(topic), query, _LIST_BYTES, _decode_topic)

    async def messages(self, topic: str, query: Mapping[str, str]) -> MessagesPage:
        """Return a page of messages."""
        path = f"{path_of(topic)}/messages"
        return await self._get(path, query, _PAGE_BYTES, _decode_messages)

    async def clear(self, topic: str) -> Position:
        """Clear a topic, and return the position with which its new epoch begins.

        The request is sent once: a second one would clear what was published after the first.
        """
        content = await self._session.request("DELETE", f"{path_of(topic)}/messages", {})
        cleared = self._read(content, _decode_cleared)
        return Position(cleared.epoch, cleared.offset)

    async def _get(
        self, path: str, query: Mapping[str, str], max_bytes: int, decode: Callable[[bytes], T]
    ) -> T:
        offers = self._retries.offers()
        while True:
            try:
                content = await self._session.request("GET", path, query, max_bytes)
            except (Refused, Unreachable) as error:
                await self._retries.pause(offers, error)
            else:
                return self._read(content, decode)

    def _read(self, content: bytes, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(content)
        except UNREADABLE as error:
            raise self._session.not_clevrd(200) from error
