"""Sends spans to a collector from a thread of its own: a bounded queue, and never in the way.

A collector that is away, slow or hangs costs spans, which are counted, and nothing else. The form
of what is sent, and its retries, are `exporter`'s.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from clevrd.tracing.spans import Span

log = logging.getLogger(__name__)

# Spans that wait: 8 MB. One more is dropped, and counted.
MAX_QUEUED: Final = 8_192
# Spans of one request: the library takes 60 us to spell each, and 4 ms to send them all.
BATCH: Final = 256
# How long the loop waits for the interpreter at most while the thread has it. With CPython's own 5
# ms the loop was late by 37 ms half of the time, with this by 2 (both on a machine full of work).
SWITCH_S: Final = 0.0005
# How long a span waits for others to be sent with it.
GATHER_S: Final = 1.0
# The thread works one part in so many of the time, since the loop waits whenever it does: some
# 1,000 spans a second.
SHARE: Final = 10
# How long a stop waits for what is queued to be sent, where the collector took the last batch.
FLUSH_S: Final = 2.0


class Exporter(Protocol):
    """Sends spans, in the sender's thread."""

    def send(self, spans: Sequence[Span]) -> str | None:
        """Return None once the collector has taken ``spans``, or else why it has not."""

    def end(self) -> None:
        """Send nothing more, and cut short what waits to be tried again; from any thread."""


class SpanSender:
    """Takes spans from the loop, and has an exporter send them."""

    def __init__(
        self,
        exporter: Exporter,
        endpoint: str,
        loop: asyncio.AbstractEventLoop,
        *,
        thread_s: Callable[[], float] = time.thread_time,
    ) -> None:
        """Start nothing before the first span.

        Args:
            endpoint: where spans go, for the log.
            thread_s: the time that the calling thread has worked.
        """
        self._exporter = exporter
        self._endpoint = endpoint
        self._loop = loop
        self._thread_s = thread_s
        # Appended to by the loop, and taken from by the thread.
        self._queue: deque[Span] = deque()
        # Set when the queue is no longer empty, and when it has a whole batch; both at the end.
        self._woken = threading.Event()
        self._is_enough = threading.Event()
        self._thread: threading.Thread | None = None
        # Set by `stop`: the thread sends what waits, and ends; or it ends at once.
        self._is_stopping = False
        self._is_abandoned = False
        self._ended: asyncio.Future[None] | None = None
        # Spans of the request under way; changed by the thread.
        self._under_way = 0
        # Spans that the collector took, and spans that it did not; changed by the thread.
        self._sent = 0
        self._refused = 0
        # Spans that found no room; changed by the loop.
        self._overflowed = 0
        # Whether the last request failed, and whether spans find no room: a change is logged once.
        self._is_failing = False
        self._is_full = False

    def counts(self) -> dict[str, int]:
        """Return the spans so far, by outcome."""
        return {"sent": self._sent, "dropped": self._refused + self._overflowed}

    def waiting(self) -> int:
        """Return how many spans wait."""
        return len(self._queue) + self._under_way

    def offer(self, span: Span) -> None:
        """Have ``span`` sent, or dropped where too many wait; never waits."""
        queue = self._queue
        if len(queue) >= MAX_QUEUED or self._is_stopping:
            self.drop()
            return
        queue.append(span)
        if len(queue) == 1:
            self._is_full = False
            self._wake()
        elif len(queue) == BATCH:
            self._is_enough.set()

    def drop(self, count: int = 1) -> None:
        """Count spans that are not sent, since there are too many."""
        self._overflowed += count
        if not self._is_full:
            self._is_full = True
            log.warning(
                "traces are too many, and spans are dropped endpoint=%s hint=%r",
                self._endpoint,
                "lower otel_sample_ratio",
            )

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="clevrd-traces", daemon=True)
            self._thread.start()
        self._woken.set()

    async def stop(self) -> None:
        """Send what waits, within FLUSH_S; without a wait where the collector is not there."""
        # The future is made first, because the thread may end as soon as it is told.
        ended = self._ended = self._loop.create_future()
        self._is_stopping = True
        if self._thread is not None:
            self._woken.set()
            self._is_enough.set()
            await asyncio.wait((ended,), timeout=0.0 if self._is_failing else FLUSH_S)
        self.abandon()
        if left := self.waiting():
            self._overflowed += left
            log.warning("spans not sent at the stop count=%d endpoint=%s", left, self._endpoint)

    def abandon(self) -> None:
        """End without sending what waits; the thread is not waited for."""
        self._is_stopping = self._is_abandoned = True
        self._woken.set()
        self._is_enough.set()
        self._exporter.end()

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        try:
            while not self._is_abandoned:
                self._woken.wait()
                self._woken.clear()
                if not self._is_stopping:
                    self._is_enough.wait(GATHER_S)
                while self._queue and not self._is_abandoned:
                    self._send_batch()
                if self._is_stopping:
                    break
                self._is_enough.clear()
        finally:
            self._tell_end()

    def _send_batch(self) -> None:
        queue = self._queue
        batch = [queue.popleft() for _ in range(min(BATCH, len(queue)))]
        self._under_way = len(batch)
        worked_s = self._thread_s()
        try:
            why = self._exporter.send(batch)
        except Exception as error:
            # Without its thread the sender would send nothing any more.
            why = f"{type(error).__name__}: {error}"
        worked_s = self._thread_s() - worked_s
        # The sums change first: a figure that is read in between counts a span twice rather than
        # never.
        if why is None:
            self._sent += len(batch)
        elif not self._is_abandoned:
            self._refused += len(batch)
        self._under_way = 0
        self._note(why)
        if not self._is_stopping:
            time.sleep((SHARE - 1) * worked_s)

    def _note(self, why: str | None) -> None:
        if why is None:
            if self._is_failing:
                self._is_failing = False
                log.warning("traces are taken again endpoint=%s", self._endpoint)
        elif not self._is_failing and not self._is_abandoned:
            self._is_failing = True
            log.warning(
                "traces are not taken, and spans are dropped endpoint=%s why=%r",
                self._endpoint,
                why,
            )

    def _tell_end(self) -> None:
        ended = self._ended
        if ended is None:
            return
        try:
            self._loop.call_soon_threadsafe(_settle, ended)
        except RuntimeError:
            # The loop is closed, and nobody waits.
            return


def _settle(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)
