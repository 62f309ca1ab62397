"""HistoryReaders: readers that begin before their topic's ring, until they have reached it.

Such a reader is joined, and takes turns with all readers that catch up (`readers`). It is handed
messages from pages (`history_pages`) as long as its transport has room, and then joins the ring at
the place that it has reached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from clevrd.core.beginning import HistoryBeginning, ResolvedBeginning
from clevrd.core.notices import EXPIRED, RETENTION, Gap
from clevrd.core.subscriber import NOT_BEGUN, Subscriber
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, JournalUnavailable
from clevrd.hub.history_page import Page
from clevrd.hub.history_pages import MAX_PAGE_BYTES, MIN_PAGE_BYTES, HistoryPages
from clevrd.hub.readers import Asked, Readers
from clevrd.journal.base import History

log = logging.getLogger(__name__)

# Bytes that a reader is handed in one write, as by `readers`.
_WRITE_BYTES: Final = 65_536

# How long a history that can't be read is asked again, and when: the wait doubles up to the second
# figure.
GIVE_UP_S: Final = 30.0
RETRY_S: Final = 0.1
MAX_RETRY_S: Final = 2.0

# The close code and the reason of a reader whose history could not be read for so long.
CLOSE_UNAVAILABLE: Final = 1013
UNAVAILABLE: Final = "unavailable"


class OlderMessages(msgspec.Struct, frozen=True):
    """Messages for a reader that does not stay."""

    start: ResolvedBeginning
    # The first one follows ``start.after``, and none is missing between them.
    frames: list[bytes]


class _Reading:
    """One reader's place in a history."""

    __slots__ = (
        "_owner",
        "asked",
        "failing_since_s",
        "found_after",
        "is_exact",
        "is_waiting",
        "page",
        "page_bytes",
        "reader",
        "retry",
        "start",
        "topic",
        "wait_s",
    )

    def __init__(
        self,
        owner: HistoryReaders,
        topic: Topic,
        reader: Subscriber,
        start: HistoryBeginning,
        asked: Asked,
    ) -> None:
        self._owner = owner
        self.topic = topic
        self.reader = reader
        self.start = start
        self.asked = asked
        # The offset that the first message follows, as asked for; None while it is looked up.
        self.found_after = start.after if start.below_id_us is None else None
        # The page in whose middle it is; a reader that stalls gives it back.
        self.page: Page | None = None
        # Bytes of the pages that it asks for: more while it takes whole ones.
        self.page_bytes = MIN_PAGE_BYTES
        # The last page did not reach the reader: the next one has to begin there.
        self.is_exact = False
        # It waits for a page, or for what was looked up.
        self.is_waiting = False
        # Since when the history can't be read, on the loop's clock; None while it can.
        self.failing_since_s: float | None = None
        self.wait_s = RETRY_S
        self.retry: asyncio.TimerHandle | None = None

    def hold(self, page: Page | None) -> None:
        """Be in the middle of ``page``, and of no other."""
        if page is self.page:
            return
        if self.page is not None:
            self.page.users -= 1
        if page is not None:
            page.users += 1
        self.page = page

    def page_ready(self, result: Page | ClevrdError) -> None:
        """Go on with the page that was asked for."""
        if not self._owner.is_read_by(self):
            return
        self.is_waiting = False
        if isinstance(result, ClevrdError):
            self._owner.failed(self, result)
            return
        if not self.reader.is_blocked:
            # So that it is still there when it is the reader's turn.
            self.hold(result)
        self._owner.go_on(self)

    def looked_up(self, found: int | ClevrdError) -> None:
        """Go on behind the message that was asked for."""
        if not self._owner.is_read_by(self):
            return
        self.is_waiting = False
        if isinstance(found, ClevrdError):
            self._owner.failed(self, found)
            return
        self.found_after = _not_cleared(self.topic, found)
        self._owner.go_on(self)


class HistoryReaders:
    """All readers that read a history."""

    def __init__(
        self,
        source: History,
        max_bytes: int,
        readers: Readers,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[], None],
        wall_us: Callable[[], int],
    ) -> None:
        """Have no readers yet.

        Args:
            max_bytes: of all pages together.
            wall_us: the wall clock, microseconds since 1970, by which messages expire.
        """
        self._readers = readers
        self._loop = loop
        self.pages = HistoryPages(source, max_bytes, loop, on_error, wall_us)
        self._readings: dict[Subscriber, _Reading] = {}

    def __len__(self) -> int:
        """Return how many readers read a history."""
        return len(self._readings)

    def begin(
        self, topic: Topic, reader: Subscriber, start: HistoryBeginning, asked: Asked
    ) -> None:
        """Join ``reader`` to ``topic``, and hand it all messages from ``start`` on."""
        self._readings[reader] = _Reading(self, topic, reader, start, asked)
        self._readers.join_in_history(topic, reader)

    def unbegun(self, reader: Subscriber) -> Asked | None:
        """Return what a reader has asked for that was not told yet where it begins; else None."""
        reading = self._readings.get(reader)
        return None if reading is None or reader.cursor != NOT_BEGUN else reading.asked

    def forget(self, reader: Subscriber) -> None:
        """Know no more of a reader, which has left. Idempotent."""
        reading = self._readings.pop(reader, None)
        if reading is not None:
            reading.hold(None)
            if reading.retry is not None:
                reading.retry.cancel()

    def pause(self, reader: Subscriber) -> None:
        """Note that the reader's transport is full: others may need the memory of its page."""
        reading = self._readings.get(reader)
        if reading is not None:
            reading.hold(None)

    def stop(self) -> None:
        """Hand over nothing, and set no timer, any more."""
        for reader in list(self._readings):
            self.forget(reader)
        self.pages.stop()

    def go_on(self, reading: _Reading) -> None:
        """Give a reader its turn: what it has waited for is there."""
        reading.failing_since_s = None
        reading.wait_s = RETRY_S
        self._readers.catch_up_soon(reading.topic, reading.reader)

    def failed(self, reading: _Reading, error: ClevrdError) -> None:
        """Ask again later; a reader that has waited for too long is disconnected."""
        now_s = self._loop.time()
        if reading.failing_since_s is None:
            reading.failing_since_s = now_s
        reading.is_exact = False
        if now_s - reading.failing_since_s >= GIVE_UP_S:
            log.warning("history can't be read topic=%s reason=%s", reading.topic.name, error)
            self._readers.leave(reading.topic, reading.reader)
            reading.reader.sink.close(CLOSE_UNAVAILABLE, UNAVAILABLE)
            return
        reading.is_waiting = True
        reading.retry = self._loop.call_later(reading.wait_s, self._try_again, reading)
        reading.wait_s = min(2 * reading.wait_s, MAX_RETRY_S)

    def is_read_by(self, reading: _Reading) -> bool:
        """Return whether the reader still reads the history, from where it began then."""
        return self._readings.get(reading.reader) is reading

    def _try_again(self, reading: _Reading) -> None:
        reading.retry = None
        reading.is_waiting = False
        self._readers.catch_up_soon(reading.topic, reading.reader)

    # --- turns -----------------------------------------------------------------------------------

    def read_once(self, topic: Topic, reader: Subscriber) -> int:
        """Hand ``reader`` its next messages; return the bytes, 0 if it can go on only later.

        A reader that has all that lies before the ring joins the ring.
        """
        reading = self._readings.get(reader)
        # After `stop` there is none.
        if reading is None or reading.is_waiting:
            return 0
        has_begun = reader.cursor != NOT_BEGUN
        after = reader.cursor if has_begun else reading.found_after
        if after is None:
            self._look_up(reading)
            return 0
        # Messages that are not offered yet are offered to it in the ring.
        limit = min(topic.first - 1, topic.edge)
        page: Page | None = None
        if after < limit:
            page = self._page(reading, after)
            if page is None:
                return 0
        if not has_begun:
            start = resolve_in_history(topic.name, reading.start, min(after, limit), limit, page)
            reader.cursor = start.after
            self._readers.greet(topic, reader, start, reading.asked)
            return 1
        if page is None:
            self.forget(reader)
            topic.join_from_history(reader)
            return 1
        return self._hand_over(reading, page, limit)

    def _page(self, reading: _Reading, after: int) -> Page | None:
        """Return the page behind ``after``; None if it has to be waited for."""
        page = reading.page
        if page is not None:
            if page.after <= after < page.upto:
                page.expire(self.pages.wall_us())
                return page
            # A reader that takes whole pages is given larger ones.
            reading.page_bytes = min(2 * reading.page_bytes, MAX_PAGE_BYTES)
        page = self.pages.kept.find(reading.topic, after)
        reading.hold(page)
        if page is not None:
            reading.is_exact = False
            return page
        is_exact, reading.is_exact = reading.is_exact, True
        reading.is_waiting = True
        self.pages.request(
            reading.topic, after, reading.page_bytes, reading.page_ready, is_exact=is_exact
        )
        return None

    async def older(
        self, topic: Topic, start: HistoryBeginning, max_messages: int, max_bytes: int
    ) -> OlderMessages:
        """Return messages from ``start`` on, for a reader that does not stay.

        There may be none, if a gap is to be told first, or the ring has all that follows.

        Raises:
            JournalUnavailable: the history can't be read.
        """
        after = start.after
        if start.below_id_us is not None:
            after = await self._looked_up(topic, start.below_id_us)
        frames: list[bytes] = []
        resolved: ResolvedBeginning | None = None
        while len(frames) < max_messages and max_bytes > 0:
            limit = topic.first - 1
            page = await self._page_behind(topic, after, max_bytes) if after < limit else None
            if resolved is None:
                resolved = _without_front_hole(
                    topic.name,
                    resolve_in_history(topic.name, start, min(after, limit), limit, page),
                    page,
                    limit,
                )
                after = resolved.after
            if page is None:
                break
            begin = page.next_at(after)
            end = page.run_end(
                begin, page.end_at(begin, limit, max_messages - len(frames), max_bytes)
            )
            if end <= begin or page.offsets[begin] != after + 1:
                break
            part = page.frames[begin:end]
            frames += part
            max_bytes -= sum(map(len, part))
            after += len(part)
        found = resolved or ResolvedBeginning(after)
        if found.gap is not None and found.gap.reason == EXPIRED:
            topic.note_expired(found.gap.count or 0)
        return OlderMessages(found, frames)

    async def _looked_up(self, topic: Topic, id_us: int) -> int:
        found: asyncio.Future[int] = self._loop.create_future()
        self.pages.look_up(topic, id_us, partial(_settle, found))
        return _not_cleared(topic, await found)

    async def _page_behind(self, topic: Topic, after: int, max_bytes: int) -> Page:
        for is_exact in (False, True):
            page = self.pages.kept.find(topic, after)
            if page is None:
                found: asyncio.Future[Page] = self._loop.create_future()
                self.pages.request(
                    topic,
                    after,
                    max(MIN_PAGE_BYTES, min(max_bytes, MAX_PAGE_BYTES)),
                    partial(_settle, found),
                    is_exact=is_exact,
                )
                page = await found
            if page.after <= after < page.upto:
                return page
        raise JournalUnavailable("The history has moved on; come back in a moment.")

    def _look_up(self, reading: _Reading) -> None:
        below_id_us = reading.start.below_id_us
        if below_id_us is not None:
            reading.is_waiting = True
            self.pages.look_up(reading.topic, below_id_us, reading.looked_up)

    def _hand_over(self, reading: _Reading, page: Page, limit: int) -> int:
        """Write a reader's next messages, and the gaps between them; return the bytes."""
        topic, reader = reading.topic, reading.reader
        spelling, after = reader.spelling, reader.cursor
        start = page.next_at(after)
        end = page.end_at(start, limit, spelling.max_messages, _WRITE_BYTES)
        if end <= start:
            # Nothing more is kept of what lies before the page's end.
            upto = min(page.upto, limit)
            told = self._told(reader, page, after, upto)
            topic.note_missed(reader, len(page.expired_between(after, upto)))
            reader.cursor = upto
            if not told:
                return 1
            data = spelling.joined([told])
        else:
            texts = page.texts(reader.form, topic.epoch, start, end)
            offsets = page.offsets
            if offsets[start] != after + 1 or not page.is_whole(start, end):
                texts = self._with_gaps(reader, page, offsets[start:end], texts)
                topic.note_missed(reader, len(page.expired_between(after, offsets[end - 1])))
            topic.note_given(reader, offsets[end - 1], end - start)
            data = spelling.joined(texts)
        self._readers.count_written(len(data))
        reader.write(data)
        return len(data)

    def _with_gaps(
        self, reader: Subscriber, page: Page, offsets: list[int], texts: list[bytes]
    ) -> list[bytes]:
        """Return ``texts``, each behind what tells that messages before it are missing."""
        after = reader.cursor
        found = []
        for offset, text in zip(offsets, texts, strict=True):
            found.append(self._told(reader, page, after, offset - 1) + text)
            after = offset
        return found

    def _told(self, reader: Subscriber, page: Page, after: int, upto: int) -> bytes:
        """Return what tells a reader that messages behind ``after`` up to ``upto`` are missing."""
        if reader.gaps is None or after >= upto:
            return b""
        tell = reader.spelling.told
        return b"".join(tell(gap, gap.last) for gap in page.holes(after, upto, reader.gaps.topic))


def _not_cleared(topic: Topic, after: int) -> int:
    """Return ``after``, or the offset behind which the topic's epoch begins where that is later."""
    return after if topic.journal is None else max(after, topic.journal.cleared)


def resolve_in_history(
    topic: str, start: HistoryBeginning, after: int, limit: int, page: Page | None
) -> ResolvedBeginning:
    """Return where a reader begins that asked for what follows ``after``.

    Args:
        limit: offset behind which the ring has all.
        page: what the history has behind ``after``; None where that is not needed.
    """
    holes: list[Gap] = []
    if page is not None:
        place = page.next_at(after)
        first = page.offsets[place] if place < len(page.offsets) else min(page.upto, limit) + 1
        holes = page.holes(after, min(first - 1, limit), topic)
    given_up = bool(holes) and holes[0].reason == RETENTION
    at = holes[0].last if given_up and holes[0].last is not None else after
    if start.gap is not None or not start.is_resumed:
        return ResolvedBeginning(at, gap=start.gap)
    if start.below_id_us is not None and given_up:
        # Nobody knows how many of the messages that were given up were asked for.
        return ResolvedBeginning(at, gap=Gap(topic, None, at, None, RETENTION))
    if holes:
        is_recovered = holes[0].reason == EXPIRED
        return ResolvedBeginning(holes[0].last or after, is_recovered, holes[0])
    return ResolvedBeginning(after, is_recovered=True)


def _without_front_hole(
    topic: str, start: ResolvedBeginning, page: Page | None, limit: int
) -> ResolvedBeginning:
    """Return ``start`` behind what is missing there, where nothing else is missing before that."""
    if page is None or start.gap is not None:
        return start
    begin = page.next_at(start.after)
    first = page.offsets[begin] if begin < len(page.offsets) else min(page.upto, limit) + 1
    holes = page.holes(start.after, min(first - 1, limit), topic)
    if not holes:
        return start
    is_recovered = start.is_recovered and holes[0].reason == EXPIRED
    return ResolvedBeginning(holes[0].last or start.after, is_recovered, holes[0])


def _settle(future: asyncio.Future[Any], result: object) -> None:
    """Give ``future`` its result, unless nobody waits for it any more."""
    if future.done():
        return
    if isinstance(result, ClevrdError):
        future.set_exception(result)
    else:
        future.set_result(result)
