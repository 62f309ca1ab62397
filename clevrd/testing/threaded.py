"""DaemonThread: a daemon in a thread of its own, for tests without asyncio."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from clevrd.client import Message, Published
from clevrd.client.loop_thread import LoopThread
from clevrd.testing.daemon import DEFAULT_TENANT, RunningDaemon, SlowReader
from clevrd.testing.faults import TIMEOUT_S

T = TypeVar("T")

# How long a call of a test may take; a planned stop takes a second or two.
_CALL_TIMEOUT_S: Final = 30.0


class SlowReaderThread:
    """A subscriber that reads no message until `resume`."""

    def __init__(self, daemon: DaemonThread, reader: SlowReader) -> None:
        self._daemon = daemon
        self._reader = reader

    def resume(self) -> None:
        """Read on."""
        self._daemon.call(self._reader.resume())


class DaemonThread:
    """`RunningDaemon` without ``await``: its methods and their arguments are the same.

    Use `daemon_in_thread`, or the fixture ``clevrd_server``.
    """

    def __init__(self, daemon: RunningDaemon, thread: LoopThread) -> None:
        self._daemon = daemon
        self._thread = thread

    @property
    def url(self) -> str:
        """The daemon's URL; the same after a restart."""
        return self._daemon.url

    @property
    def ws_url(self) -> str:
        """The daemon's URL for WebSocket clients, without a path."""
        return self._daemon.ws_url

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the daemon's loop and return what it returns."""
        return self._thread.run(work, _CALL_TIMEOUT_S)

    def publish(self, topic: str, data: Any, *, tenant: str | None = None) -> Published:
        """Publish one message."""
        return self.call(self._daemon.publish(topic, data, tenant=tenant))

    def messages(self, topic: str, *, tenant: str = DEFAULT_TENANT) -> list[Message]:
        """Return the topic's recent messages, as they were published, oldest first."""
        return self.call(self._daemon.messages(topic, tenant=tenant))

    def wait_for_subscribers(
        self, topic: str, count: int = 1, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Wait until the topic has ``count`` subscribers or more; raises TimeoutError."""
        self.call(self._daemon.wait_for_subscribers(topic, count, timeout_s=timeout_s))

    def cut(self, topic: str | None = None) -> int:
        """Cut the topic's subscribers off, or every WebSocket and stream; return how many."""
        return self.call(self._daemon.cut(topic))

    def gap(self, topic: str, count: int = 1, *, tenant: str = DEFAULT_TENANT) -> None:
        """Let all readers of the topic lose its next ``count`` messages."""
        self.call(self._daemon.gap(topic, count, tenant=tenant))

    def restart(self, *, planned: bool = True) -> None:
        """Stop and start again on the same port, in order or as after a crash."""
        self.call(self._daemon.restart(planned=planned))

    def stop(self, *, planned: bool = True) -> None:
        """Stop until `start`."""
        self.call(self._daemon.stop(planned=planned))

    def start(self) -> None:
        """Start after a `stop`."""
        self.call(self._daemon.start())

    @contextmanager
    def slow_reader(
        self, topic: str, *, policy: str | None = None, buffer: int = 1, tenant: str | None = None
    ) -> Iterator[SlowReaderThread]:
        """Give a subscriber that does not read, as long as the block lasts."""
        reading = self._daemon.slow_reader(topic, policy=policy, buffer=buffer, tenant=tenant)
        reader = self.call(_entered(reading))
        try:
            yield SlowReaderThread(self, reader)
        finally:
            self.call(_left(reading))


async def _entered(reading: Any) -> SlowReader:
    reader: SlowReader = await reading.__aenter__()
    return reader


async def _left(reading: Any) -> None:
    await reading.__aexit__(None, None, None)


@contextmanager
def daemon_in_thread(**settings: Any) -> Iterator[DaemonThread]:
    """Run a daemon in a thread as long as the block lasts; settings as for `running_daemon`."""
    thread = LoopThread("clevrd", None)
    thread.start()
    try:
        running = RunningDaemon(**settings)
        daemon = DaemonThread(running, thread)
        daemon.call(running.__aenter__())
        try:
            yield daemon
        finally:
            daemon.call(running.__aexit__(None, None, None))
    finally:
        thread.stop(timeout_s=_CALL_TIMEOUT_S)
