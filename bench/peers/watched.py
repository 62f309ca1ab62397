"""clevrd in a loop that never sleeps, and times each of its turns: what holds it, and how long.

SIGUSR1 makes it write the longest turn since the last one, in ms, to a file, and begin anew.
SIGUSR2 stops the hub's timers, so that what is found then is not theirs. A turn's time is its CPU
time: waiting for a CPU that others have is not counted.
"""

import argparse
import asyncio
import signal
import time
from pathlib import Path

import uvloop

from clevrd.config import Config
from clevrd.descriptors import raise_limit
from clevrd.server import Server, Setup
from clevrd.server.collector import collect_rarely, leave_out_what_is_there


class Watch:
    """Times turns by a callback in each of them, so that the loop never sleeps."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Path) -> None:
        self._loop = loop
        self._target = target
        self._began_s = time.thread_time()
        self._longest_s = 0.0

    def turn(self) -> None:
        """Note how long the turn before took."""
        now_s = time.thread_time()
        self._longest_s = max(self._longest_s, now_s - self._began_s)
        self._began_s = now_s
        self._loop.call_soon(self.turn)

    def tell(self) -> None:
        """Write the longest turn down, whole or not at all, and forget it."""
        part = self._target.with_suffix(".part")
        part.write_text(f"{self._longest_s * 1000:.3f}")
        part.rename(self._target)
        self._longest_s = 0.0
        self._began_s = time.thread_time()


async def serve(port: int, target: Path) -> None:
    """Serve until killed."""
    server = Server(Setup(Config(address=f"127.0.0.1:{port}")))
    collect_rarely()
    await server.start()
    leave_out_what_is_there()
    loop = asyncio.get_running_loop()
    watch = Watch(loop, target)
    loop.add_signal_handler(signal.SIGUSR1, watch.tell)
    loop.add_signal_handler(signal.SIGUSR2, server.hub.stop)
    watch.turn()
    await asyncio.Event().wait()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--target", type=Path, required=True)
    options = parser.parse_args()
    raise_limit()
    uvloop.run(serve(options.port, options.target))


if __name__ == "__main__":
    main()
