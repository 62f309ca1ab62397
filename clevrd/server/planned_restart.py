"""PlannedRestart: topics come from the process before, and go to the next one, in a directory.

The directory with its lock is `restart/directory`'s, and the bytes in it are `restart/format`'s;
here is what the daemon's start and stop do with it, in a thread and within a time.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Final

from clevrd.hub import Hub
from clevrd.restart.directory import SaveReport, StateDir
from clevrd.scheduling.beside_loop import in_daemon_thread

log = logging.getLogger(__name__)

# Estimate of the time that saving the state takes: a slow disk's 100 MB/s, 20 us for each topic,
# and a second for the positions of topics whose messages no longer fit and for the last flush.
SAVE_BYTES_PER_S: Final = 100_000_000
SAVE_TOPIC_S: Final = 20e-6
SAVE_FINISH_S: Final = 1.0
# Time that saving may take beyond `shutdown_timeout_s`; the systemd unit allows 10 s beyond it
# (systemd/clevrd.service).
SAVE_GRACE_S: Final = 5.0


class PlannedRestart:
    """The state directory of a daemon; without one, each step of it does nothing.

    Args:
        path: of the directory; empty for none.
        shutdown_timeout_s: the time of a stop, saving included.
    """

    def __init__(
        self, path: str, hub: Hub, shutdown_timeout_s: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.directory = StateDir(path, loop.time) if path else None
        self._hub = hub
        self._shutdown_timeout_s = shutdown_timeout_s
        self._loop = loop

    @property
    def keeps_topics(self) -> bool:
        """Whether a stop now would save the topics: this process holds a directory."""
        return self.directory is not None and self.directory.is_open

    async def restore(self) -> None:
        """Take over the topics of the process before; their file stays until `use_up`.

        Raises:
            CannotStart: the directory can't be used.
        """
        directory = self.directory
        if directory is None:
            return
        began_s = self._loop.time()
        # The file is read beside the loop, so that a stop signal works meanwhile, in a thread that
        # a stop need not wait for.
        await _beside_loop(lambda: _open_and_read(directory, self._hub), self._loop)
        log.info(
            "state restored topics=%d ring_bytes=%d took_s=%.3f",
            len(self._hub.topics),
            self._hub.topics.ring_bytes,
            self._loop.time() - began_s,
        )

    async def use_up(self) -> None:
        """Remove the file that was read, before a message can be accepted.

        Read again after a crash, it would give out offsets a second time.

        Raises:
            CannotStart: the file can't be removed.
        """
        if self.directory is not None:
            await _beside_loop(self.directory.use_up, self._loop)

    def leave(self) -> None:
        """Give up the directory as it is. A second call does nothing."""
        if self.directory is not None:
            self.directory.close()

    def saving_takes_s(self) -> float:
        """Return the seconds of the shutdown kept for saving: an estimate, at most half of all."""
        if not self.keeps_topics:
            return 0.0
        topics = self._hub.topics
        wanted_s = SAVE_FINISH_S + topics.ring_bytes / SAVE_BYTES_PER_S
        return min(self._shutdown_timeout_s / 2, wanted_s + len(topics) * SAVE_TOPIC_S)

    async def save(self, end_s: float) -> None:
        """Save every topic's position, and as many messages as there is time for.

        Args:
            end_s: when the stop is to be over, on the loop's clock.
        """
        directory = self.directory
        if directory is None or not directory.is_open:
            return
        # A publish that the stop cut off may not add a message after its topic's position was
        # saved.
        self._hub.seal()
        began_s = self._loop.time()
        try:
            report = await self._save_beside(directory, end_s)
        except (OSError, TimeoutError) as error:
            reason = str(error) or "the disk took too long"
            log.error("state not saved reason=%r; every topic begins a new epoch", reason)
            # The thread may still be writing, so the lock is kept until the process ends.
            return
        log.info(
            "state saved topics=%d without_messages=%d bytes=%d took_s=%.3f",
            report.topics,
            report.without_messages,
            report.size_bytes,
            self._loop.time() - began_s,
        )
        directory.close()

    async def _save_beside(self, directory: StateDir, end_s: float) -> SaveReport:
        """Write the file in a thread; raises TimeoutError where the disk takes too long."""
        hub = self._hub
        left_s = max(end_s - self._loop.time(), 0.0)
        until_s = end_s - min(SAVE_FINISH_S, self._shutdown_timeout_s / 4)
        return await asyncio.wait_for(
            _beside_loop(lambda: directory.save(hub.last_id_us, hub.saved(), until_s), self._loop),
            left_s + SAVE_GRACE_S,
        )


def _open_and_read(directory: StateDir, hub: Hub) -> None:
    directory.open()
    directory.read(hub.restore)


_beside_loop = partial(in_daemon_thread, name="clevrd-state")
