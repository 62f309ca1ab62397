"""A server that a test runs as a process: it can be killed, paused, and let go on."""

from __future__ import annotations

import signal
import subprocess


class ServerProcess:
    """The process of a server; who inherits sets `_process` when it starts one."""

    _process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process."""
        assert self._process is not None
        return self._process

    def kill(self) -> None:
        """Kill it, as the kernel does."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(10)

    def pause(self) -> None:
        """Stop it, so that connections stay and nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on after `pause`."""
        self.process.send_signal(signal.SIGCONT)
