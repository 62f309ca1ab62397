"""PageMaking: the frames of a page, made of the lines that a history has. No loop here."""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from clevrd.core.message import ExpiringMessage, Message, message_of
from clevrd.core.message_headers import headers_json, known_headers
from clevrd.core.message_ids import AlikeStamps, MessageIds
from clevrd.core.server_frames import FrameEncoder, frame_with_headers
from clevrd.core.topic import Topic
from clevrd.hub.history_page import Page
from clevrd.journal.base import StoredRun
from clevrd.journal.records import StoredLine, plain_data

log = logging.getLogger(__name__)

# Messages that are made into frames in one step, at about 2 us each.
MADE_AT_ONCE: Final = 100

_line_decoder: Final = msgspec.json.Decoder(StoredLine)


class PageMaking:
    """A page whose frames are being made, in slices of a turn of the loop."""

    __slots__ = (
        *("_after", "_at", "_data", "_encoder", "_frames", "_has_headers", "_ids", "_kept_from"),
        *("_lines", "_offsets", "_place", "_runs", "_topic", "_until_us"),
    )

    def __init__(
        self,
        topic: Topic,
        after: int,
        runs: list[StoredRun],
        kept_from: int,
        encoder: FrameEncoder,
    ) -> None:
        """Begin the page behind offset ``after``.

        Args:
            kept_from: the offset of the oldest message that the history has not given up.
        """
        self._topic = topic
        self._after = after
        self._runs = runs
        self._kept_from = kept_from
        self._encoder = encoder
        self._ids = MessageIds()
        # The run that is next, and the place in it.
        self._place = 0
        self._at = 0
        # Its messages' data where they have nothing else, and otherwise its lines.
        self._data: list[bytes] = []
        self._lines: list[StoredLine | None] = []
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
            self._data = plain_data(run.lines, run.count, self._topic.name)
            self._lines = [] if self._data else _read_lines(run)
        count = min(MADE_AT_ONCE, run.count - at)
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
        topic = self._topic
        self._offsets += range(first, first + len(data))
        self._frames += self._encoder.plain_frames(topic.name, topic.tenant, data, first, stamps)

    def _make(self, run: StoredRun, at: int, lines: list[StoredLine | None]) -> None:
        """Make frames of the messages ``lines``, the first of which is the run's ``at``."""
        topic, first = self._topic, run.offset + at
        name, tenant = topic.name, topic.tenant
        first_us = run.id_us + at * run.id_step
        stamps = self._ids.spell_run(first_us, len(lines), run.id_step, run.time_us)
        messages = [
            Message(stamp[0], name, tenant, line.data, stamp[1], offset)
            if line.key is None and line.ttl_s is None
            else message_of(stamp, name, tenant, line.data, offset, line.key, line.ttl_s)
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
        runs, after = self._runs, self._after
        upto = runs[-1].offset + runs[-1].count - 1 if runs else max(limit, after + 1)
        return Page(
            *(after, upto, self._kept_from, self._offsets, self._frames, self._until_us),
            has_headers=self._has_headers,
        )


def _read_lines(run: StoredRun) -> list[StoredLine | None]:
    """Return the lines of ``run``, with None for one that is damaged."""
    try:
        lines: list[StoredLine | None] = [*_line_decoder.decode_lines(run.lines)]
    except msgspec.MsgspecError:
        lines = []
    # A line that is damaged may look like several, or like a part of one.
    return (
        lines
        if len(lines) == run.count
        else [_read_line(each) for each in run.lines.split(b"\n")[:-1]]
    )


def _read_line(line: bytes) -> StoredLine | None:
    try:
        return _line_decoder.decode(line)
    except msgspec.MsgspecError:
        return None
