"""HistoryPages: messages read from a history, a page at a time, each for all who want it.

Nothing but asking is here: `page_making` makes the frames of what a history answers, and
`page_cache` keeps them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

from clevrd.core.server_frames import FrameEncoder
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, JournalUnavailable
from clevrd.hub.history_page import Page
from clevrd.hub.history_requests import (
    LookUp,
    OffsetWaiter,
    PageRequest,
    PageWaiter,
    WaitingRequests,
)
from clevrd.hub.page_cache import PageCache
from clevrd.hub.page_making import PageMaking
from clevrd.journal.base import History, StoredRun
from clevrd.scheduling.turn_queue import TurnQueue

log = logging.getLogger(__name__)

# A page has no more, but for a single larger message. The bytes are asked for by the reader. The
# largest pages may have more messages: SQLite splits a record for each page anew, which at 1,000
# messages a page takes 2.9 us a message, and at 4,000 less than half of that.
PAGE_MESSAGES: Final = 1_000
MOST_PAGE_MESSAGES: Final = 4_000
MIN_PAGE_BYTES: Final = 65_536
MAX_PAGE_BYTES: Final = 1_048_576

# Readers that come back to places close to each other are given the same pages: these begin at
# multiples of this. A page that does not reach the reader, for its bytes, begins at the reader.
_ALIGNED: Final = 64

# Requests that the history has at once; others wait, portion by portion.
MAX_REQUESTS: Final = 64
# How long a history may take for one answer.
REQUEST_TIMEOUT_S: Final = 10.0

# Messages that are made into frames in one turn of the loop, at about 2 us each.
MADE_PER_TURN: Final = 1_000


class HistoryPages:
    """Pages of one history that are there, are being read, or wait to be read."""

    def __init__(
        self,
        source: History,
        max_bytes: int,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[], None],
        wall_us: Callable[[], int],
    ) -> None:
        """Read pages of ``source``.

        Args:
            max_bytes: see `PageCache`.
            wall_us: the wall clock, microseconds since 1970, by which messages expire.
        """
        self.wall_us = wall_us
        self._source = source
        self._loop = loop
        self._on_error = on_error
        self._encoder = FrameEncoder()
        self.kept = PageCache(max_bytes, loop, wall_us, self._begin_requests)
        # By topic and beginning, requests that are not answered yet.
        self._open: dict[tuple[Topic, int], PageRequest] = {}
        self._look_ups: dict[tuple[Topic, int], LookUp] = {}
        self._waiting = WaitingRequests()
        # Requests that the history has now.
        self._requests = 0
        self._making: deque[tuple[PageRequest, PageMaking]] = deque()
        self._queue = TurnQueue(MADE_PER_TURN, self._make_next, loop, on_error)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    def request(
        self, topic: Topic, after: int, max_bytes: int, waiter: PageWaiter, *, is_exact: bool
    ) -> None:
        """Read the page with what follows offset ``after``; call ``waiter`` when it is there.

        Args:
            is_exact: the page begins there, and not before: one that did had not reached so far.
        """
        begin = after if is_exact else after - after % _ALIGNED
        request = self._open.get((topic, begin))
        if request is None:
            # The ring has what follows.
            most = max(after + 1, topic.first - 1) - begin
            bound = PAGE_MESSAGES if max_bytes < MAX_PAGE_BYTES else MOST_PAGE_MESSAGES
            request = PageRequest(topic, begin, min(most, bound), max_bytes)
            self._open[topic, begin] = request
            self._wait(request)
        request.waiters.append(waiter)

    def look_up(self, topic: Topic, id_us: int, waiter: OffsetWaiter) -> None:
        """Find the newest message with an id below ``id_us``; call ``waiter`` with its offset."""
        look_up = self._look_ups.get((topic, id_us))
        if look_up is None:
            look_up = self._look_ups[topic, id_us] = LookUp(topic, id_us)
            self._wait(look_up)
        look_up.waiters.append(waiter)

    def stop(self) -> None:
        """Ask for nothing, and set no timer, any more."""
        self._is_stopped = True
        for task in self._tasks:
            task.cancel()
        over = JournalUnavailable("The daemon is stopping; come back in a moment.")
        for request in list(self._open.values()):
            self._end(request, over)
        for look_up in list(self._look_ups.values()):
            self._found(look_up, over)
        self.kept.stop()

    def _wait(self, request: PageRequest | LookUp) -> None:
        self._waiting.put(request)
        self._begin_requests()

    def _begin_requests(self) -> None:
        """Ask the history for what waits, portion by portion, as far as there is room."""
        while self._waiting and self._requests < MAX_REQUESTS and not self._is_stopped:
            if self.kept.is_overfull and self._requests:
                # Readers give their pages back when they have had them.
                return
            request = self._waiting.next()
            self._requests += 1
            if isinstance(request, PageRequest):
                self._spawn(self._read(request))
            else:
                self._spawn(self._find(request))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error()
            log.error("reading a history failed", exc_info=error)

    async def _read(self, request: PageRequest) -> None:
        topic, where, kept_from = request.topic, _place_of(request.topic), 0
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                runs = await self._source.page(
                    *where, request.after, request.max_messages, request.max_bytes
                )
                if _has_holes(runs, request.after):
                    extent = await self._source.extent(*where)
                    kept_from = topic.first if extent is None else min(extent.first, topic.first)
        except Exception as error:
            self._end(request, _reason(error))
        else:
            making = PageMaking(topic, request.after, runs, kept_from, self._encoder)
            self._making.append((request, making))
            self._queue.work_soon()
        finally:
            self._requests -= 1
            self._begin_requests()

    async def _find(self, look_up: LookUp) -> None:
        topic = look_up.topic
        found: int | ClevrdError
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                found = await self._source.last_before(*_place_of(topic), look_up.id_us)
        except Exception as error:
            found = _reason(error)
        finally:
            self._requests -= 1
            self._begin_requests()
        self._found(look_up, found)

    def _found(self, look_up: LookUp, found: int | ClevrdError) -> None:
        self._look_ups.pop((look_up.topic, look_up.id_us), None)
        look_up.answer(found)

    def _make_next(self) -> int | None:
        """Make some frames of the next page; pages take turns."""
        if not self._making:
            return None
        request, making = self._making.popleft()
        made = making.make_some()
        if made:
            self._making.append((request, making))
            return made
        page = making.page(request.topic.first - 1)
        self.kept.keep(request.topic, page)
        self._end(request, page)
        return 1

    def _end(self, request: PageRequest, result: Page | ClevrdError) -> None:
        self._open.pop((request.topic, request.after), None)
        request.answer(result)


def _place_of(topic: Topic) -> tuple[str, str, str]:
    """Return how a history knows ``topic``."""
    partition_epoch = "" if topic.journal is None else topic.journal.partition_epoch
    return partition_epoch, topic.tenant, topic.name


def _has_holes(runs: list[StoredRun], after: int) -> bool:
    """Return whether any message is missing between offset ``after`` and the last one."""
    if not runs:
        return True
    upto = runs[-1].offset + runs[-1].count - 1
    return upto - after != sum(each.count for each in runs)


def _reason(error: Exception) -> ClevrdError:
    """Return why the history gave no answer, as its readers may be told."""
    if isinstance(error, ClevrdError):
        return error
    if not isinstance(error, TimeoutError):
        log.error("history can't be read", exc_info=error)
    return JournalUnavailable("The history can't be read at the moment; come back in a moment.")
