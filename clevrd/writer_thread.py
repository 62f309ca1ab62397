"""WriterThread: writes to a descriptor beside everything else. What is written is its owner's.

A pipe that nobody reads, a stopped terminal or a disk that hangs holds this thread, and nothing
else.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

# Handed to one write at most: what a pipe of Linux holds (pipe(7)).
WRITE_BYTES: Final = 65_536
# How often a descriptor that somebody else made non-blocking is looked at while it takes nothing.
_FULL_POLL_S: Final = 1.0


class WriterThread:
    """Hands what was put to ``deliver``, in order, in a daemon thread that the first `put` starts.

    `put` never waits, and may be called from a signal handler: SimpleQueue is made for that.
    """

    __slots__ = (
        "_deliver",
        "_done_bytes",
        "_moved",
        "_name",
        "_put_bytes",
        "_queue",
        "_stuck_at",
        "_thread",
    )

    def __init__(
        self,
        name: str,
        deliver: Callable[[bytes], object],
        moved: Callable[[], object] = lambda: None,
    ) -> None:
        """Args: moved: called in the thread when `queued_bytes` has become less."""
        self._name = name
        self._deliver = deliver
        self._moved = moved
        # An event is set when everything before it is delivered.
        self._queue: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        # Changed by the owner's thread alone, and this one by the writer's alone: no lock.
        self._put_bytes = 0
        self._done_bytes = 0
        # Where the last flush that was given up found the writer; -1: none was.
        self._stuck_at = -1
        self._thread: threading.Thread | None = None

    @property
    def queued_bytes(self) -> int:
        """What was put and is not delivered yet; what is being delivered counts."""
        return self._put_bytes - self._done_bytes

    def put(self, data: bytes) -> None:
        """Have ``data`` delivered; how much may wait is the owner's to bound."""
        size_bytes = self._put_bytes + len(data)
        self._put_bytes = size_bytes
        self._queue.put(data)
        if self._thread is None:
            # Before it starts, so that a signal's handler that comes between starts no second one.
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is delivered, ``timeout_s`` at most; return whether it is.

        Where an earlier flush was given up and nothing moved since, none is waited for again.
        """
        if not self.queued_bytes:
            return True
        if self._stuck_at == self._done_bytes:
            return False
        delivered = threading.Event()
        self._queue.put(delivered)
        if delivered.wait(timeout_s):
            return True
        self._stuck_at = self._done_bytes
        return False

    def _run(self) -> None:
        while True:
            parts, size_bytes, events = self._take()
            if parts:
                self._deliver(b"".join(parts))
                self._done_bytes += size_bytes
                self._moved()
            for event in events:
                event.set()

    def _take(self) -> tuple[list[bytes], int, list[threading.Event]]:
        """Wait for the next parts; return as many as one write may have."""
        parts: list[bytes] = []
        events: list[threading.Event] = []
        size_bytes = 0
        item = self._queue.get()
        while True:
            if isinstance(item, bytes):
                parts.append(item)
                size_bytes += len(item)
            else:
                events.append(item)
            if size_bytes >= WRITE_BYTES:
                break
            try:
                item = self._queue.get_nowait()
            except Empty:
                break
        return parts, size_bytes, events


def write_all(descriptor: int, data: bytes) -> tuple[int, OSError | None]:
    """Write ``data`` however long that takes; return how much was written, and what ended it."""
    written = 0
    while written < len(data):
        try:
            written += os.write(descriptor, data[written : written + WRITE_BYTES])
        except BlockingIOError:
            select.select([], [descriptor], [], _FULL_POLL_S)
        except OSError as error:
            return written, error
    return written, None
