"""HistoryPages: messages read from a history, a page at a time, and shared by all who want them.

A page is made of finished frames, as the ring is. Which pages a reader is handed is decided in
history_readers.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import accumulate
from typing import Any, Final

import msgspec

from clevrd.core.message import ExpiringMessage, KeyedMessage, Message, message_of
from clevrd.core.message_headers import headers_json, known_headers
from clevrd.core.message_ids import AlikeStamps, MessageIds
from clevrd.core.notices import DAMAGED, EXPIRED, RETENTION, Gap, GapReason
from clevrd.core.portions import Portion
from clevrd.core.recent_cache import FRAME_OVERHEAD_BYTES
from clevrd.core.server_frames import FrameEncoder, frame_with_headers
from clevrd.core.stream_forms import PLAIN_FRAMES, StreamForm, plain_message
from clevrd.core.topic import Topic
from clevrd.errors import ClevrdError, JournalUnavailable
from clevrd.journal.base import History, StoredRun
from clevrd.journal.records import plain_data
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
_MADE_AT_ONCE: Final = 100

# A page that nobody has asked for is forgotten after so long.
_UNUSED_S: Final = 5.0


class Page:
    """The messages that a history has of the offsets ``after + 1`` to ``upto``.

    ``offsets`` are those of ``frames``; the others are missing. Messages below ``kept_from`` are
    missing because they were given up, those above because they are damaged, or have expired.
    """

    __slots__ = (
        "_ends",
        "_has_headers",
        "_texts",
        "_until_us",
        "after",
        "expired",
        "frames",
        "kept_from",
        "offsets",
        "size_bytes",
        "upto",
        "used_s",
        "users",
    )

    def __init__(
        self,
        after: int,
        upto: int,
        kept_from: int,
        offsets: list[int],
        frames: list[bytes],
        until_us: dict[int, int] | None = None,
        *,
        has_headers: bool = False,
    ) -> None:
        """Make a page of ``frames``.

        Args:
            until_us: by offset, when messages expire, on the wall clock.
            has_headers: some of the messages have headers, which not every reader asks for.
        """
        self._has_headers = has_headers
        self.after = after
        self.upto = upto
        self.kept_from = kept_from
        self.offsets = offsets
        self.frames = frames
        # Messages that expire, and have not yet; empty for most pages. Changed by `expire` only, as
        # is ``expired``: offsets that are missing because they have, rising.
        self._until_us = until_us or {}
        self.expired: list[int] = []
        # Bytes up to the end of each frame.
        self._ends = ends = list(accumulate(map(len, frames)))
        # Form -> the messages in it, as far as somebody has asked for them.
        self._texts: dict[StreamForm, list[bytes]] = {}
        self.size_bytes = (ends[-1] if ends else 0) + FRAME_OVERHEAD_BYTES * len(frames)
        # Readers that are in the middle of it; changed by history_readers.
        self.users = 0
        # When somebody last asked for it, on the loop's clock.
        self.used_s = 0.0

    def holes(self, after: int, upto: int, topic: str) -> list[Gap]:
        """Return what tells that none of the offsets ``after + 1`` to ``upto`` comes."""
        given_up = min(max(after, self.kept_from - 1), upto)
        found: list[Gap] = []
        if given_up > after:
            found.append(Gap(topic, after + 1, given_up, given_up - after, RETENTION))
        for offset in self.expired_between(given_up, upto):
            if offset > given_up + 1:
                found.append(_gap(topic, given_up, offset - 1, DAMAGED))
            if found and found[-1].reason == EXPIRED and found[-1].last == offset - 1:
                before = (found.pop().first or offset) - 1
            else:
                before = offset - 1
            found.append(_gap(topic, before, offset, EXPIRED))
            given_up = offset
        if upto > given_up:
            found.append(_gap(topic, given_up, upto, DAMAGED))
        return found

    def expired_between(self, after: int, upto: int) -> list[int]:
        """Return the offsets behind ``after``, up to ``upto``, of messages that have expired."""
        if not self.expired:
            return self.expired
        begin, end = bisect_right(self.expired, after), bisect_right(self.expired, upto)
        return self.expired[begin:end]

    def expire(self, wall_us: int) -> None:
        """Let go of the messages that have expired by now; nobody is in the middle of a step."""
        if not self._until_us or min(self._until_us.values()) > wall_us:
            return
        over = {offset for offset, until_us in self._until_us.items() if until_us <= wall_us}
        for offset in over:
            del self._until_us[offset]
        left = [place for place, offset in enumerate(self.offsets) if offset not in over]
        self.expired = sorted((*self.expired, *over))
        self.offsets = [self.offsets[place] for place in left]
        self.frames = [self.frames[place] for place in left]
        self._ends = list(accumulate(map(len, self.frames)))
        self._texts = {
            form: [texts[place] for place in left] for form, texts in self._texts.items()
        }

    def next_at(self, after: int) -> int:
        """Return the place in ``frames`` of the first message behind offset ``after``."""
        return bisect_right(self.offsets, after)

    def end_at(self, start: int, upto: int, max_messages: int, max_bytes: int) -> int:
        """Return where messages from place ``start`` on end that may be given together.

        None is after offset ``upto``. There is at least one where one may be given.
        """
        end = min(bisect_right(self.offsets, upto), start + max_messages)
        before_bytes = self._ends[start - 1] if start else 0
        fits = bisect_right(self._ends, before_bytes + max_bytes)
        return min(end, max(fits, start + 1))

    def is_whole(self, start: int, end: int) -> bool:
        """Return whether no message is missing between those from place ``start`` to ``end``."""
        return self.offsets[end - 1] - self.offsets[start] == end - 1 - start

    def run_end(self, start: int, end: int) -> int:
        """Return where the messages from place ``start`` on, ``end`` at most, have a hole first."""
        offsets = self.offsets
        if end <= start or self.is_whole(start, end):
            return end
        return next(
            place for place in range(start + 1, end) if offsets[place] != offsets[place - 1] + 1
        )

    def texts(self, form: StreamForm | None, epoch: str, start: int, end: int) -> list[bytes]:
        """Return messages in ``form``, each made once for all who read it here."""
        if form is None:
            if not self._has_headers:
                return self.frames[start:end]
            form = PLAIN_FRAMES
        spell = form.message
        if self._has_headers and not form.has_headers:
            spell = partial(plain_message, form)
        texts = self._texts.get(form)
        if texts is None:
            texts = self._texts[form] = [b""] * len(self.frames)
        spelled = epoch.encode()
        for place in range(start, end):
            if not texts[place]:
                texts[place] = spell(self.frames[place], spelled, self.offsets[place])
                self.size_bytes += len(texts[place])
        return texts[start:end]


# Called with the page, or with the reason why there is none.
Waiter = Callable[["Page | ClevrdError"], None]


class _Request:
    """A page that is asked for, and who waits for it."""

    __slots__ = ("after", "max_bytes", "max_messages", "topic", "waiters")

    def __init__(self, topic: Topic, after: int, max_messages: int, max_bytes: int) -> None:
        self.topic = topic
        self.after = after
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.waiters: list[Waiter] = []


class _LookUp:
    """An id whose place is asked for, and who waits for it."""

    __slots__ = ("id_us", "topic", "waiters")

    def __init__(self, topic: Topic, id_us: int) -> None:
        self.topic = topic
        self.id_us = id_us
        self.waiters: list[Callable[[int | ClevrdError], None]] = []


class _Line(msgspec.Struct, frozen=True, gc=False):
    data: msgspec.Raw
    key: str | None = None
    ttl_s: int | float | None = None
    # Empty for none.
    headers: msgspec.Raw = msgspec.Raw(b"")


class _Making:
    """A page whose frames are being made."""

    __slots__ = (
        *("_at", "_data", "_encoder", "_frames", "_has_headers", "_ids", "_kept_from"),
        *("_lines", "_offsets", "_place", "_runs", "_until_us", "request"),
    )

    def __init__(
        self,
        request: _Request,
        runs: list[StoredRun],
        kept_from: int,
        encoder: FrameEncoder,
    ) -> None:
        self.request = request
        self._runs = runs
        self._kept_from = kept_from
        self._encoder = encoder
        self._ids = MessageIds()
        # The run that is next, and the place in it.
        self._place = 0
        self._at = 0
        # The data of the run's messages where they have nothing else, and otherwise its lines.
        self._data: list[bytes] = []
        self._lines: list[_Line | None] = []
        self._offsets: list[int] = []
        self._frames: list[bytes] = []
        self._until_us: dict[int, int] = {}
        # Some of the messages have headers.
        self._has_headers = False

    def make_some(self) -> int:
        """Make frames of the next messages; return how many, 0 when all are made."""
        if self._place == len(self._runs):
            return 0
        run, at = self._runs[self._place], self._at
        if not at:
            self._data = plain_data(run.lines, run.count, self.request.topic.name)
            self._lines = [] if self._data else _read_lines(run)
        count = min(_MADE_AT_ONCE, run.count - at)
        if self._data:
            first_us = run.id_us + at * run.id_step
            stamps = self._ids.spell_alike(first_us, count, run.id_step, run.time_us)
            count = len(stamps.digits)
            self._make_plain(run.offset + at, self._data[at : at + count], stamps)
        else:
            self._make(run, at, self._lines[at : at + count])
        self._at += count
        if self._at == run.count:
            self._place, self._at = self._place + 1, 0
        return count

    def _make_plain(self, first: int, data: list[bytes], stamps: AlikeStamps) -> None:
        """Make frames of messages that have nothing but ``data``, from offset ``first`` on."""
        topic = self.request.topic
        self._offsets += range(first, first + len(data))
        self._frames += self._encoder.plain_frames(topic.name, topic.tenant, data, first, stamps)

    def _make(self, run: StoredRun, at: int, lines: list[_Line | None]) -> None:
        """Make frames of the messages ``lines``, the first of which is the run's ``at``."""
        topic, first = self.request.topic, run.offset + at
        name, tenant = topic.name, topic.tenant
        first_us = run.id_us + at * run.id_step
        stamps = self._ids.spell_run(first_us, len(lines), run.id_step, run.time_us)
        messages = [
            Message(stamp[0], name, tenant, line.data, stamp[1], offset)
            if line.key is None and line.ttl_s is None
            else _message(stamp, name, tenant, line, offset)
            for offset, (line, stamp) in enumerate(zip(lines, stamps, strict=True), first)
            if line is not None
        ]
        if len(messages) == len(lines):
            self._offsets += range(first, first + len(lines))
        else:
            self._offsets += [each.offset for each in messages]
            for offset, line in enumerate(lines, first):
                if line is None:
                    log.error("stored message is damaged topic=%s offset=%d", name, offset)
        for each in messages:
            if isinstance(each, ExpiringMessage):
                id_us = run.id_us + (each.offset - run.offset) * run.id_step
                self._until_us[each.offset] = id_us + int(each.ttl_s * 1e6)
        if not messages:
            return
        frames = self._encoder.frames(messages)
        for place, line in enumerate(each for each in lines if each is not None):
            if line.headers and (headers := known_headers(bytes(line.headers))):
                frames[place] = frame_with_headers(frames[place], headers_json(headers))
                self._has_headers = True
        self._frames += frames

    def page(self, limit: int) -> Page:
        """Return the page, which reaches ``limit`` at least where the history has no more."""
        runs, after = self._runs, self.request.after
        upto = runs[-1].offset + runs[-1].count - 1 if runs else max(limit, after + 1)
        return Page(
            *(after, upto, self._kept_from, self._offsets, self._frames, self._until_us),
            has_headers=self._has_headers,
        )


def _read_lines(run: StoredRun) -> list[_Line | None]:
    """Return the lines of ``run``, with None for one that is damaged."""
    try:
        lines: list[_Line | None] = [*_line_decoder.decode_lines(run.lines)]
    except msgspec.MsgspecError:
        lines = []
    # A line that is damaged may look like several, or like a part of one.
    return (
        lines
        if len(lines) == run.count
        else [_read_line(each) for each in run.lines.split(b"\n")[:-1]]
    )


def _read_line(line: bytes) -> _Line | None:
    try:
        return _line_decoder.decode(line)
    except msgspec.MsgspecError:
        return None


def _message(stamp: tuple[str, str], topic: str, tenant: str, line: _Line, offset: int) -> Message:
    """Return a message with a key, a time to live, or both."""
    if line.ttl_s is not None:
        return message_of(stamp, topic, tenant, line.data, offset, line.key, line.ttl_s)
    message_id, timestamp = stamp
    return KeyedMessage(message_id, topic, tenant, line.data, timestamp, offset, line.key or "")


_line_decoder: Final = msgspec.json.Decoder(_Line)


class HistoryPages:
    """Pages that are there, are being read, or wait to be read."""

    def __init__(
        self,
        source: History,
        max_bytes: int,
        loop: asyncio.AbstractEventLoop,
        on_error: Callable[[], None],
        wall_us: Callable[[], int],
    ) -> None:
        """Keep pages of ``source``.

        Args:
            max_bytes: all pages together; more only for a page that nothing can be read without.
            wall_us: the wall clock, microseconds since 1970, by which messages expire.
        """
        self.wall_us = wall_us
        self._source = source
        self._max_bytes = max_bytes
        self._loop = loop
        self._on_error = on_error
        self._encoder = FrameEncoder()
        # By topic, in the order of their beginnings.
        self._by_topic: dict[Topic, list[Page]] = {}
        # All pages, the one unused for longest first, and their topics.
        self._pages: dict[Page, Topic] = {}
        self.size_bytes = 0
        # By topic and beginning, requests that are not answered yet.
        self._open: dict[tuple[Topic, int], _Request] = {}
        self._look_ups: dict[tuple[Topic, int], _LookUp] = {}
        # Requests that wait until the history has fewer, by portion; each portion in here has some.
        self._waiting: dict[Portion, deque[_Request | _LookUp]] = {}
        self.requests = 0
        self._making: deque[_Making] = deque()
        self._queue = TurnQueue(MADE_PER_TURN, self._make_next, loop, on_error)
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    def __len__(self) -> int:
        """Return how many pages are there."""
        return len(self._pages)

    def find(self, topic: Topic, after: int) -> Page | None:
        """Return the page with what follows offset ``after``; None if it is not there."""
        pages = self._by_topic.get(topic)
        if pages is None:
            return None
        place = bisect_right(pages, after, key=_begins)
        for page in pages[max(0, place - 2) : place][::-1]:
            if page.upto > after:
                page.used_s = self._loop.time()
                self._pages[page] = self._pages.pop(page)
                page.expire(self.wall_us())
                return page
        return None

    def request(
        self, topic: Topic, after: int, max_bytes: int, waiter: Waiter, *, is_exact: bool
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
            request = _Request(topic, begin, min(most, bound), max_bytes)
            self._open[topic, begin] = request
            self._wait(topic, request)
        request.waiters.append(waiter)

    def look_up(
        self, topic: Topic, id_us: int, waiter: Callable[[int | ClevrdError], None]
    ) -> None:
        """Find the newest message with an id below ``id_us``; call ``waiter`` with its offset."""
        look_up = self._look_ups.get((topic, id_us))
        if look_up is None:
            look_up = self._look_ups[topic, id_us] = _LookUp(topic, id_us)
            self._wait(topic, look_up)
        look_up.waiters.append(waiter)

    def drop_unused(self) -> None:
        """Forget all pages that no reader is in the middle of."""
        for page in list(self._pages):
            self._forget(page)

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
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None

    # --- requests --------------------------------------------------------------------------------

    def _wait(self, topic: Topic, request: _Request | _LookUp) -> None:
        waiting = self._waiting.get(topic.portion)
        if waiting is None:
            waiting = self._waiting[topic.portion] = deque()
        waiting.append(request)
        self._begin_requests()

    def _begin_requests(self) -> None:
        """Ask the history for what waits, portion by portion, as far as there is room."""
        while self._waiting and self.requests < MAX_REQUESTS and not self._is_stopped:
            if self.size_bytes > self._max_bytes and self.requests:
                # Readers give their pages back when they have had them.
                return
            portion = next(iter(self._waiting))
            waiting = self._waiting.pop(portion)
            request = waiting.popleft()
            if waiting:
                self._waiting[portion] = waiting
            self.requests += 1
            if isinstance(request, _Request):
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

    async def _read(self, request: _Request) -> None:
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
            self._making.append(_Making(request, runs, kept_from, self._encoder))
            self._queue.work_soon()
        finally:
            self.requests -= 1
            self._begin_requests()

    async def _find(self, look_up: _LookUp) -> None:
        topic = look_up.topic
        found: int | ClevrdError
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                found = await self._source.last_before(*_place_of(topic), look_up.id_us)
        except Exception as error:
            found = _reason(error)
        finally:
            self.requests -= 1
            self._begin_requests()
        self._found(look_up, found)

    def _found(self, look_up: _LookUp, found: int | ClevrdError) -> None:
        self._look_ups.pop((look_up.topic, look_up.id_us), None)
        waiters, look_up.waiters = look_up.waiters, []
        for waiter in waiters:
            waiter(found)

    def _make_next(self) -> int | None:
        """Make some frames of the next page; pages take turns."""
        if not self._making:
            return None
        making = self._making.popleft()
        made = making.make_some()
        if made:
            self._making.append(making)
            return made
        topic = making.request.topic
        page = making.page(topic.first - 1)
        page.expire(self.wall_us())
        self._keep(topic, page)
        self._end(making.request, page)
        return 1

    def _end(self, request: _Request, result: Page | ClevrdError) -> None:
        self._open.pop((request.topic, request.after), None)
        waiters, request.waiters = request.waiters, []
        for waiter in waiters:
            waiter(result)

    # --- what is kept ----------------------------------------------------------------------------

    def _keep(self, topic: Topic, page: Page) -> None:
        pages = self._by_topic.setdefault(topic, [])
        pages.insert(bisect_right(pages, page.after, key=_begins), page)
        page.used_s = self._loop.time()
        self._pages[page] = topic
        self.size_bytes = sum(each.size_bytes for each in self._pages)
        for each in list(self._pages):
            if self.size_bytes <= self._max_bytes:
                break
            if each is not page:
                self._forget(each)
        if self._sweep_timer is None and not self._is_stopped:
            self._sweep_timer = self._loop.call_later(_UNUSED_S, self._sweep)

    def _forget(self, page: Page) -> None:
        """Forget a page, unless a reader is in the middle of it."""
        if page.users:
            return
        topic = self._pages.pop(page)
        pages = self._by_topic[topic]
        pages.remove(page)
        if not pages:
            del self._by_topic[topic]
        self.size_bytes -= page.size_bytes

    def _sweep(self) -> None:
        self._sweep_timer = None
        unused_s = self._loop.time() - _UNUSED_S
        for page in list(self._pages):
            if page.used_s <= unused_s:
                self._forget(page)
        self._begin_requests()
        if self._pages:
            self._sweep_timer = self._loop.call_later(_UNUSED_S, self._sweep)


def _gap(topic: str, after: int, upto: int, reason: GapReason) -> Gap:
    return Gap(topic, after + 1, upto, upto - after, reason)


def _place_of(topic: Topic) -> tuple[str, str, str]:
    """Return how a history knows ``topic``."""
    partition_epoch = "" if topic.journal is None else topic.journal.partition_epoch
    return partition_epoch, topic.tenant, topic.name


def _begins(page: Page) -> int:
    return page.after


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
