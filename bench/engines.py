"""The engines of a journal that are measured: where each keeps its log, and its own client.

Another engine joins with a row in `ALL`, and its client with one in `bench.peers.log_client`.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import machine, servers


@dataclass(frozen=True)
class Engine:
    """One engine.

    place: keeps a log ready in an empty directory meanwhile, and gives the setting ``journal``.
    nodes: how many daemons are measured on one log, each number by itself.
    missing: returns why the engine can't run here, else "".
    """

    name: str
    place: Callable[[Path], AbstractContextManager[str]]
    nodes: tuple[int, ...]
    missing: Callable[[], str] = str


@contextmanager
def sqlite_place(directory: Path) -> Iterator[str]:
    """Give a directory, which the daemon makes."""
    yield str(directory / "journal")


@contextmanager
def redis_place(directory: Path) -> Iterator[str]:
    """Run a redis-server on the load's core, with a file that it syncs each second."""
    port = servers.free_port()
    words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
    with running(["redis-server", *words, "--appendonly", "yes"], port, directory / "redis.log"):
        yield f"redis://127.0.0.1:{port}"


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run an engine's server on the load's core, once it listens on ``port``."""
    with log.open("wb") as output, machine.pinned_to(machine.cores().load):
        process = subprocess.Popen(  # noqa: S603 - commands of this module
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent
        )
    try:
        servers.wait_until_listening(process, port, log)
        # It may listen before it takes commands.
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def missing_redis() -> str:
    """Return why Redis can't run here."""
    return "" if shutil.which("redis-server") else "redis-server is not installed"


SQLITE = Engine("sqlite", sqlite_place, nodes=(1,))
REDIS = Engine("redis", redis_place, nodes=(1, 2), missing=missing_redis)
ALL = (SQLITE, REDIS)
