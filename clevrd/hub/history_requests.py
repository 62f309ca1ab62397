"""Requests to a history, each made once for all that want its answer, and their order. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from clevrd.core.portions import Portion
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError
from clevrd.hub.history_page import Page

# Called with the page, or with the reason why there is none.
PageWaiter = Callable[[Page | ClevrdError], None]
# The same for an offset.
OffsetWaiter = Callable[[int | ClevrdError], None]


class PageRequest:
    """A page that is asked for, and who waits for it."""

    __slots__ = ("after", "max_bytes", "max_messages", "topic", "waiters")

    def __init__(self, topic: Topic, after: int, max_messages: int, max_bytes: int) -> None:
        self.topic = topic
        self.after = after
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.waiters: list[PageWaiter] = []

    def answer(self, result: Page | ClevrdError) -> None:
        """Tell all that wait."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter(result)


class LookUp:
    """An id whose place is asked for, and who waits for it."""

    __slots__ = ("id_us", "topic", "waiters")

    def __init__(self, topic: Topic, id_us: int) -> None:
        self.topic = topic
        self.id_us = id_us
        self.waiters: list[OffsetWaiter] = []

    def answer(self, found: int | ClevrdError) -> None:
        """Tell all that wait."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter(found)


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
