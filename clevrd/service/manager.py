"""ServiceManager: tells systemd the state of this process, a sentence, and that its loop runs.

Each is a datagram of NAME=value lines (sd_notify(3), sd_watchdog_enabled(3)); no library is needed.
Where nobody takes them, that has a line in the log, and the daemon serves all the same.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from clevrd.service.variables import whole_number

log = logging.getLogger(__name__)

# How often systemd is asked for more time while the state is read or saved, and how much for.
EXTEND_EVERY_S: Final = 5.0
EXTEND_BY_S: Final = 30.0
# How long that goes on at most: a disk that hangs is no reason to wait for ever.
EXTEND_AT_MOST_S: Final = 3600.0
# The shortest time of a watchdog that is taken. A shorter one is a mistake: any pause would end the
# daemon, which would do nothing else than to tell.
LEAST_WATCHDOG_S: Final = 0.2
# How soon lines that found systemd's queue full are sent again.
RESEND_S: Final = 0.25
# How often the sentence in `systemctl status` is renewed.
STATUS_EVERY_S: Final = 10.0
# Longest status; the protocol allows more, and a terminal shows less.
MAX_STATUS_CHARS: Final = 200

# The queue of the receiver is full, or memory is short for a moment.
_FOR_A_MOMENT: Final = {errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM}


class ServiceManager:
    """Tells systemd what the daemon does; without a NOTIFY_SOCKET every method does nothing.

    Nothing here waits. Lines that find the queue full are kept, the newest of each name, and sent
    again until they are taken.
    """

    def __init__(
        self, address: str | bytes | None, loop: asyncio.AbstractEventLoop, watchdog_s: float = 0.0
    ) -> None:
        """Prepare to tell.

        Args:
            address: of the socket of datagrams; None for nobody to tell.
            watchdog_s: within what time systemd wants to hear of the loop; 0 for never.
        """
        self._address = address
        self._loop = loop
        self._watchdog_s = watchdog_s
        # None before the first line, and where there is nobody to tell.
        self._socket: socket.socket | None = None
        # Lines by name that were not taken yet.
        self._unsent: dict[str, str] = {}
        self._has_failed = False
        self._resending: asyncio.TimerHandle | None = None
        self._extending: asyncio.TimerHandle | None = None
        self._watching: asyncio.TimerHandle | None = None

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str], pid: int, loop: asyncio.AbstractEventLoop
    ) -> ServiceManager:
        """Return what the process ``pid`` tells, as its environment says; log what is wrong."""
        address = _notify_address(environ.get("NOTIFY_SOCKET", ""))
        return cls(address, loop, _watchdog_s(environ, pid) if address is not None else 0.0)

    @property
    def is_told(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address is not None

    def tell(self, **fields: str) -> None:
        """Send ``fields``, one line each; never wait for it, and never raise."""
        if self._address is None:
            return
        self._unsent.update(fields)
        self._send(self._address)

    def status(self, sentence: str) -> None:
        """Show ``sentence`` in `systemctl status`."""
        self.tell(STATUS=_one_line(sentence))

    def ready(self, sentence: str) -> None:
        """Say that the daemon serves, and from now on that its loop runs."""
        self.stop_extending()
        self.tell(READY="1", STATUS=_one_line(sentence))
        if self._watchdog_s and self._watching is None and self.is_told:
            self._feed_watchdog()

    def reloading(self) -> None:
        """Say that the configuration is read again; `reloaded` ends that."""
        # The kernel's monotonic clock: systemd compares it with the time of its signal.
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell(RELOADING="1", MONOTONIC_USEC=str(now_us))

    def reloaded(self) -> None:
        """Say that the daemon goes on serving."""
        self._unsent.pop("RELOADING", None)
        self.tell(READY="1")

    def stopping(self, within_s: float) -> None:
        """Say that the daemon stops, and that this takes ``within_s`` at most."""
        self.tell(
            STOPPING="1",
            STATUS="Stopping: readers are sent away, then topics are saved.",
            EXTEND_TIMEOUT_USEC=_in_us(within_s),
        )

    @contextmanager
    def extending(self, sentence: str, at_most_s: float = EXTEND_AT_MOST_S) -> Iterator[None]:
        """Have systemd wait while the block runs, ``at_most_s``; it may be left by `ready`."""
        self.status(sentence)
        self._extend(self._loop.time() + at_most_s)
        try:
            yield
        finally:
            self.stop_extending()

    def stop_extending(self) -> None:
        """Ask for no more time."""
        if self._extending is not None:
            self._extending.cancel()
            self._extending = None

    def close(self) -> None:
        """Tell nothing more."""
        self.stop_extending()
        for handle in (self._resending, self._watching):
            if handle is not None:
                handle.cancel()
        self._resending = self._watching = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._address = None

    def _extend(self, end_s: float) -> None:
        self._extending = None
        if not self.is_told or self._loop.time() >= end_s:
            return
        self.tell(EXTEND_TIMEOUT_USEC=_in_us(EXTEND_BY_S))
        self._extending = self._loop.call_later(EXTEND_EVERY_S, self._extend, end_s)

    def _feed_watchdog(self) -> None:
        """Say that the loop runs, at half of the time within which that has to be said."""
        self.tell(WATCHDOG="1")
        self._watching = self._loop.call_later(self._watchdog_s / 2, self._feed_watchdog)

    def _send(self, address: str | bytes) -> None:
        # WATCHDOG=1 and others are one datagram, which is taken whole or not at all.
        data = "".join(f"{name}={value}\n" for name, value in self._unsent.items()).encode()
        try:
            if self._socket is None:
                self._socket = socket.socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
                )
            self._socket.sendto(data, address)
        except OSError as error:
            if error.errno in _FOR_A_MOMENT:
                self._send_again_soon()
                return
            self._unsent.clear()
            if not self._has_failed:
                self._has_failed = True
                reason = error.strerror or str(error)
                log.warning("systemd can't be told reason=%s hint=%r", reason, "NOTIFY_SOCKET")
        else:
            self._has_failed = False
            self._unsent.clear()

    def _send_again_soon(self) -> None:
        if self._resending is None:
            self._resending = self._loop.call_later(RESEND_S, self._resend)

    def _resend(self) -> None:
        self._resending = None
        if self._unsent and self._address is not None:
            self._send(self._address)


def _one_line(sentence: str) -> str:
    return " ".join(sentence.split())[:MAX_STATUS_CHARS]


def _in_us(seconds: float) -> str:
    return str(round(seconds * 1_000_000))


def _notify_address(text: str) -> str | bytes | None:
    """Return the address that NOTIFY_SOCKET names; None without one that can be spoken to."""
    if not text:
        return None
    # sd_notify(3): a path, or a name in the abstract namespace behind an @.
    if text.startswith("@") and len(text) > 1:
        return b"\0" + os.fsencode(text[1:])
    if text.startswith("/"):
        return text
    log.warning(
        "systemd is told nothing: NOTIFY_SOCKET is neither a path nor an @name value=%.100r", text
    )
    return None


def _watchdog_s(environ: Mapping[str, str], pid: int) -> float:
    """Return the time within which systemd wants to hear of the loop; 0 for never."""
    text = environ.get("WATCHDOG_USEC", "")
    if not text or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    number = whole_number(text)
    if not number:
        log.warning("no watchdog: WATCHDOG_USEC is no whole number above 0 value=%.100r", text)
        return 0.0
    if number < LEAST_WATCHDOG_S * 1_000_000:
        log.warning(
            "watchdog is told less often: WATCHDOG_USEC is too short value=%d least=%d",
            number,
            LEAST_WATCHDOG_S * 1_000_000,
        )
    return max(number / 1_000_000, LEAST_WATCHDOG_S)
