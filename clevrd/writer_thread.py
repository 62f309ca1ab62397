"""WriterThread: hands bytes to a blocking write in a thread of its own.

A pipe that no one reads, a stopped terminal or a disk that hangs blocks this thread and nothing
else. The owner says how bytes are written.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

# Most bytes of one write: the capacity of a Linux pipe (pipe(7)).
WRITE_BYTES: Final = 65_536
# How often a write is tried again on a full descriptor that another process made non-blocking.
_FULL_POLL_S: Final = 1.0


class WriterThread:
    """Hands data to ``deliver``, in order, in a daemon thread that the first `put` starts.

    `put` never waits, and may be called from a signal handler, which SimpleQueue allows.
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
        "lost",
    )

    def __init__(
        self,
        name: str,
        deliver: Callable[[bytes], object],
        moved: Callable[[], object] = lambda: None,
    ) -> None:
        """Args: moved: called in the thread after each delivery."""
        self._name = name
        self._deliver = deliver
        self._moved = moved
        # Data to deliver, and events; an event is set when all data before it is delivered.
        self._queue: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        # Bytes put, changed by the owner's thread alone, and bytes delivered, changed by the
        # writer's thread alone; so no lock is needed.
        self._put_bytes = 0
        self._done_bytes = 0
        # _done_bytes when the last flush was given up; -1 if none was.
        self._stuck_at = -1
        self._thread: threading.Thread | None = None
        # Pieces of data that could not be delivered because memory had run out; rises in _run.
        self.lost = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes that were put and are not delivered yet, with the bytes being delivered."""
        return self._put_bytes - self._done_bytes

    def put(self, data: bytes) -> None:
        """Have ``data`` delivered; the owner has to bound how much waits."""
        size_bytes = self._put_bytes + len(data)
        self._put_bytes = size_bytes
        self._queue.put(data)
        if self._thread is None:
            # The thread is stored before it starts, so that a `put` in a signal handler starts no
            # second one.
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def flush(self, timeout_s: float) -> bool:
        """Wait ``timeout_s`` at most until all data is delivered; return whether it is.

        If an earlier flush was given up and no data was delivered since, this one does not wait.
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
                try:
                    self._deliver(b"".join(parts))
                except MemoryError:
                    # Without its thread the writer would deliver nothing any more.
                    self.lost += len(parts)
                self._done_bytes += size_bytes
                self._moved()
            for event in events:
                event.set()

    def _take(self) -> tuple[list[bytes], int, list[threading.Event]]:
        """Wait for data; return as many parts as one write may have, their size, and the events."""
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
    """Write ``data``, however long that takes; return the bytes written and the error, if any."""
    written = 0
    while written < len(data):
        try:
            written += os.write(descriptor, data[written : written + WRITE_BYTES])
        except BlockingIOError:
            select.select([], [descriptor], [], _FULL_POLL_S)
        except OSError as error:
            return written, error
    return written, None
