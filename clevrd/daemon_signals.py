"""Signals of a running daemon: they stop it, have it reload, log its stacks, or are ignored.

The handlers are Python's, not the loop's: Python calls them between two steps of the code, so the
second stop and the stacks work even while the loop is blocked. A handler may interrupt any code, a
log call too; everything that a handler here calls allows that (`signal` in Python's documentation).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

from clevrd import logs
from clevrd.signals import STACKS, STOPS, STRAY, handle
from clevrd.stacks import stack_lines

log = logging.getLogger(__name__)

EXIT_FORCED: Final = 1


class DaemonSignals:
    """Handles the signals of this process, from `install` on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, reloads: bool = False) -> None:
        """Args: reloads: SIGHUP has the configuration read again, and does not stop the daemon."""
        self._loop = loop
        self._reloads = reloads
        # Called in a turn of the loop after SIGHUP; None until the daemon serves.
        self.on_reload: Callable[[], None] | None = None
        # The descriptors of this process that are its terminal.
        self._terminals = [number for number in (0, 1, 2) if os.isatty(number)]
        # Set when the daemon is to stop; set once, by the first stop signal.
        self.stopping = asyncio.Event()
        # True from the first stop signal on; `stopping` is set one turn of the loop later.
        self._is_told = False
        # The exit code of a further stop signal, once `finish` was called; None before.
        self._code: int | None = None

    def install(self) -> None:
        """Replace the handlers that `signals.set_for_start` installed."""
        for number in STOPS:
            handle(number, self._stop)
        for number in STRAY:
            signal.signal(number, self._ignore)
        signal.signal(STACKS, self._show_stacks)

    def finish(self, code: int) -> None:
        """Let a further stop signal end the process at once with ``code``, since all is done."""
        self._code = code
        # The interpreter gives signals their defaults back before it has ended. One that comes then
        # would kill the process, and its exit code would say that the stop had failed. Ignored ones
        # stay so, in every thread; a thread's mask would leave them to the others.
        for number in STOPS:
            atexit.register(signal.signal, number, signal.SIG_IGN)

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Stop in order at the first signal, at once at the second."""
        name = signal.Signals(number).name
        if number == signal.SIGHUP and self._reloads and not self._is_told and self._has_terminal():
            log.info("reloading signal=%s", name)
            self._loop.call_soon_threadsafe(self._reload)
            return
        if self._code is not None:
            exit_at_once(self._code)
        if not self._is_told:
            self._is_told = True
            log.info("stopping signal=%s; a second one stops at once", name)
            self._loop.call_soon_threadsafe(self.stopping.set)
        elif number == signal.SIGHUP:
            # A terminal that closes sends SIGHUP twice: itself, and through its shell.
            log.info("stopping already signal=%s", name)
        else:
            log.warning("stopping now signal=%s", name)
            exit_at_once(EXIT_FORCED)

    def _has_terminal(self) -> bool:
        """Whether the terminal is still there that the daemon was started on, if there was one.

        A terminal that is closed sends SIGHUP as well, and is none by then.
        """
        return all(map(os.isatty, self._terminals))

    def _reload(self) -> None:
        if self.on_reload is not None:
            self.on_reload()

    def _ignore(self, number: int, _: FrameType | None) -> None:
        log.info("signal ignored signal=%s", signal.Signals(number).name)

    def _show_stacks(self, number: int, frame: FrameType | None) -> None:
        log.info("stacks asked for signal=%s", signal.Signals(number).name)
        try:
            for line in stack_lines(asyncio.all_tasks(self._loop), frame):
                log.info("%s", line)
        except Exception:
            # An error must not leave this handler: it would be raised in the code that was
            # interrupted.
            log.exception("stacks can't be shown")


def exit_at_once(code: int) -> None:
    """End the process, whatever its threads do."""
    logs.stderr.flush(logs.HURRIED_FLUSH_S)
    os._exit(code)
