"""Standard output for commands with a loop; the others' is in `lines`."""

from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from clevrd.writer_thread import WriterThread, write_all

STDOUT: Final = 1
# Bytes that may wait for a slow reader of standard output before `Output.write` waits too.
MAX_QUEUED_BYTES: Final = 262_144


class Output:
    """Standard output for a loop: `write` waits while it is full, and the loop does not.

    So pings are answered and a stop signal works although the next program of a pipe is slow. All
    data is written in order, and no data is dropped.
    """

    def __init__(self, descriptor: int = STDOUT) -> None:
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._writer = WriterThread("clevrd-output", self._deliver, self._tell)
        # Set by the writer, through the loop, when data was written or can't be.
        self._moved = asyncio.Event()
        self._error: OSError | None = None
        # True when the program that reads has ended, or the terminal is closed.
        self.is_gone = False

    async def write(self, data: bytes) -> None:
        """Have ``data`` written; wait while more than MAX_QUEUED_BYTES wait.

        Raises:
            OSError: earlier data could not be written.
        """
        self._writer.put(data)
        await self._until_queued(MAX_QUEUED_BYTES)

    async def finish(self) -> None:
        """Return when all data is written.

        Raises:
            OSError: data could not be written.
        """
        await self._until_queued(0)

    def watch(self, on_gone: Callable[[], object]) -> None:
        """Call ``on_gone`` once no program can read the output, even if none is written.

        Without this, `head -1` has its line and ends, while the command waits for the next message,
        perhaps for ever.
        """

        def notice() -> None:
            self.is_gone = True
            on_gone()

        def wait() -> None:
            # The loop's selector is of no use here: it would wake all the time for a descriptor
            # that can be written to, and it can't wait for a file.
            poll = select.poll()
            poll.register(self._descriptor, 0)
            if any(what & (select.POLLERR | select.POLLHUP) for _, what in poll.poll()):
                with suppress(RuntimeError):  # the loop is closed: everything was written
                    self._loop.call_soon_threadsafe(notice)

        threading.Thread(target=wait, name="clevrd-output-gone", daemon=True).start()

    async def _until_queued(self, at_most_bytes: int) -> None:
        while self._error is None and self._writer.queued_bytes > at_most_bytes:
            self._moved.clear()
            await self._moved.wait()
        if self._error is not None:
            raise self._error

    # --- in the writer's thread ------------------------------------------------------------------

    def _deliver(self, data: bytes) -> None:
        if self._error is None:
            self._error = write_all(self._descriptor, data)[1]

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: interrupted meanwhile
            self._loop.call_soon_threadsafe(self._moved.set)
