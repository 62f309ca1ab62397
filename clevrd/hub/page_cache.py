"""PageCache: pages of histories that are kept for a while, for whoever asks for them next."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable
from typing import Final

from clevrd.core.topic import Topic
from clevrd.hub.history_page import Page

# A page that nobody has asked for is forgotten after so long.
_UNUSED_S: Final = 5.0


class PageCache:
    """Pages within a bound of bytes, of which the one unused for longest is forgotten first."""

    def __init__(
        self,
        max_bytes: int,
        loop: asyncio.AbstractEventLoop,
        wall_us: Callable[[], int],
        swept: Callable[[], None],
    ) -> None:
        """Have no pages yet.

        Args:
            max_bytes: all pages together; more only for a page that nothing can be read without.
            wall_us: the wall clock, microseconds since 1970, by which messages expire.
            swept: called when unused pages were forgotten, so that there may be room.
        """
        self._max_bytes = max_bytes
        self._loop = loop
        self._wall_us = wall_us
        self._swept = swept
        # By topic, in the order of their beginnings.
        self._by_topic: dict[Topic, list[Page]] = {}
        # All pages, the one unused for longest first, and their topics.
        self._topics: dict[Page, Topic] = {}
        self.size_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False

    def __len__(self) -> int:
        """Return how many pages are there."""
        return len(self._topics)

    @property
    def is_overfull(self) -> bool:
        """Whether readers are in the middle of so many pages that the bound is exceeded."""
        return self.size_bytes > self._max_bytes

    def find(self, topic: Topic, after: int) -> Page | None:
        """Return the page with what follows offset ``after``; None if it is not there."""
        pages = self._by_topic.get(topic)
        if pages is None:
            return None
        place = bisect_right(pages, after, key=_begins)
        for page in pages[max(0, place - 2) : place][::-1]:
            if page.upto > after:
                page.used_s = self._loop.time()
                self._topics[page] = self._topics.pop(page)
                page.expire(self._wall_us())
                return page
        return None

    def keep(self, topic: Topic, page: Page) -> None:
        """Keep a new page of ``topic``, and forget others where there is no room."""
        page.expire(self._wall_us())
        pages = self._by_topic.setdefault(topic, [])
        pages.insert(bisect_right(pages, page.after, key=_begins), page)
        page.used_s = self._loop.time()
        self._topics[page] = topic
        self.size_bytes = sum(each.size_bytes for each in self._topics)
        for each in list(self._topics):
            if not self.is_overfull:
                break
            if each is not page:
                self._forget(each)
        if self._timer is None and not self._is_stopped:
            self._timer = self._loop.call_later(_UNUSED_S, self._sweep)

    def drop_unused(self) -> None:
        """Forget all pages that no reader is in the middle of."""
        for page in list(self._topics):
            self._forget(page)

    def stop(self) -> None:
        """Set no timer any more."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget(self, page: Page) -> None:
        """Forget a page, unless a reader is in the middle of it."""
        if page.users:
            return
        topic = self._topics.pop(page)
        pages = self._by_topic[topic]
        pages.remove(page)
        if not pages:
            del self._by_topic[topic]
        self.size_bytes -= page.size_bytes

    def _sweep(self) -> None:
        self._timer = None
        unused_s = self._loop.time() - _UNUSED_S
        for page in list(self._topics):
            if page.used_s <= unused_s:
                self._forget(page)
        self._swept()
        if self._topics:
            self._timer = self._loop.call_later(_UNUSED_S, self._sweep)


def _begins(page: Page) -> int:
    return page.after
