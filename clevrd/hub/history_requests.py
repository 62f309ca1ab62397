"""Requests to a history, each made once for all that want its answer, and their order. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from clevrd.core.portions import Portion
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.hub.history_page import Page

ResultT = TypeVar("ResultT")

# Called with the page, or with the reason why there is none.
PageWaiter = Callable[[Page | ClevrdError], None]
# Called with the offset, or with that reason.
OffsetWaiter = Callable[[int | ClevrdError], None]


class _Asked(Generic[ResultT]):
    """A question about a topic's history, and those that wait for its answer."""

    __slots__ = ("topic", "waiters")

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self.waiters: list[Callable[[ResultT | ClevrdError], None]] = []

    def answer(self, result: ResultT | ClevrdError) -> None:
        """Tell all that wait."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter(result)


class PageRequest(_Asked[Page]):
    """A page that is asked for."""

    __slots__ = ("after", "max_bytes", "max_messages")

    def __init__(self, topic: Topic, after: int, max_messages: int, max_bytes: int) -> None:
        super().__init__(topic)
        self.after = after
        self.max_messages = max_messages
        self.max_bytes = max_bytes


class LookUp(_Asked[int]):
    """An id whose place is asked for."""

    __slots__ = ("id_us",)

    def __init__(self, topic: Topic, id_us: int) -> None:
        super().__init__(topic)
        self.id_us = id_us


class WaitingRequests:
    """Requests that wait until the history has fewer; portions take turns."""

    __slots__ = ("_by_portion",)

    def __init__(self) -> None:
        # Each portion in here has some.
        self._by_portion: dict[Portion, deque[PageRequest | LookUp]] = {}

    def __bool__(self) -> bool:
        """Return whether any waits."""
        return bool(self._by_portion)

    def put(self, request: PageRequest | LookUp) -> None:
        """Have a request wait behind those of its topic's portion."""
        portion = request.topic.portion
        waiting = self._by_portion.get(portion)
        if waiting is None:
            waiting = self._by_portion[portion] = deque()
        waiting.append(request)

    def next(self) -> PageRequest | LookUp:
        """Return the first request of the portion whose turn it is; there is one."""
        portion = next(iter(self._by_portion))
        waiting = self._by_portion.pop(portion)
        request = waiting.popleft()
        if waiting:
            self._by_portion[portion] = waiting
        return request
