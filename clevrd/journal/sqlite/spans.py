"""Spans: which part of a topic's history each segment has, as far as it was looked up."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec

from clevrd.journal.sqlite.segments import Names, Segment

# Segments and topics for which it is remembered what the one has of the other; 150 bytes each. A
# segment that has to be opened for it costs 0.3 ms.
MAX_SPANS: Final = 100_000


class Span(msgspec.Struct, frozen=True, gc=False):
    """The part of a topic's history that one segment has."""

    segment: Segment
    topic_id: int
    # Offsets of its oldest message and of its newest one, and the oldest one's id.
    first: int
    last: int
    first_id_us: int
    # The segment was not written to any more: there is no newer one behind ``last``.
    is_final: bool


class KnownSpans:
    """The spans that were looked up, for any thread; topics not asked for longest go first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Topic -> number of a segment -> what it has of the topic, or had while it was written to.
        self._by_topic: OrderedDict[Names, dict[int, Span | None]] = OrderedDict()
        # All that are in it.
        self._count = 0

    def find(
        self, names: Names, segment: Segment, after: int, look_up: Callable[[], Span | None]
    ) -> Span | None:
        """Return what a segment has of a topic; have it looked up where it is not known.

        Args:
            after: what is remembered of a segment that was written to will do if it has messages
                behind this offset: a reader that catches up asks for the same with each page.
        """
        is_final, number = segment.is_final, segment.number
        with self._lock:
            known = self._by_topic.get(names)
            if known is not None and number in known:
                span = known[number]
                if span is None or span.is_final or span.last > after:
                    self._by_topic.move_to_end(names)
                    return span
        span = look_up()
        if is_final or span is not None:
            with self._lock:
                self._note(names, number, span)
        return span

    def _note(self, names: Names, number: int, span: Span | None) -> None:
        known = self._by_topic.setdefault(names, {})
        self._count += number not in known
        known[number] = span
        self._by_topic.move_to_end(names)
        while self._count > MAX_SPANS:
            _, forgotten = self._by_topic.popitem(last=False)
            self._count -= len(forgotten)
