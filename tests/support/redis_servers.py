"""Real Redis servers and Sentinels, started by tests on free ports. No daemon here.

`make redis` installs them; without them the tests are skipped, and fail where CI=true. REDIS_SERVER
names another server, such as a valkey-server.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from redis import Redis
from redis.exceptions import RedisError
from server_process import ServerProcess

START_S = 10.0


def need(name: str = "redis-server") -> list[str]:
    """Return how ``name``, a tool on PATH, is called; without it skip the test, or fail if CI=true.

    The server that REDIS_SERVER names is its own Sentinel, too.
    """
    if other := os.environ.get("REDIS_SERVER"):
        return [other] if name == "redis-server" else [other, "--sentinel"]
    if shutil.which(name) is None:
        reason = f"there is no {name}; on Debian: apt-get install redis-server redis-sentinel"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return [name]


def need_waitaof() -> None:
    """Skip the test unless the server can say what is on its disk: Redis 7.2, or Valkey."""
    said = subprocess.run([*need(), "--version"], capture_output=True, text=True, timeout=10).stdout
    version = re.search(r"v=(\d+)\.(\d+)", said)
    assert version is not None, said
    if (int(version[1]), int(version[2])) < (7, 2):
        pytest.skip(f"{said.split(' sha')[0]} has no WAITAOF; REDIS_SERVER names another one")


class RedisServer(ServerProcess):
    """One redis-server with a folder of its own; it can be killed, paused and started again."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        """Make a server; `start` starts it.

        Args:
            options: what its configuration has beyond the least, as on the command line.
        """
        self._tool = need()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.options = options
        # How the test's own client connects.
        self.client_options: dict[str, Any] = {}

    @property
    def url(self) -> str:
        """The URL for a journal."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def client(self) -> Redis:
        """A client that this project did not write."""
        return Redis(
            host="127.0.0.1",
            port=self.port,
            socket_timeout=5,
            **self.client_options,
        )

    def command(self) -> list[str]:
        """Return how the server is started."""
        return [
            *(*self._tool, "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--dir", str(self.folder), "--save", "", "--appendonly", "yes"),
            *("--logfile", str(self.folder / "log"), *self.options),
        ]

    def start(self) -> RedisServer:
        """Start it, and wait until it answers; it has the data of its folder."""
        self._process = subprocess.Popen(
            self.command(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        self.wait()
        return self

    def wait(self) -> None:
        """Wait until it answers."""
        until_s = time.monotonic() + START_S
        while True:
            try:
                with self.client as client:
                    client.ping()
                return
            except RedisError:
                if time.monotonic() > until_s or self.process.poll() is not None:
                    log = (
                        (self.folder / "log").read_text() if (self.folder / "log").exists() else ""
                    )
                    raise AssertionError(f"redis-server does not answer\n{log[-2000:]}") from None
                time.sleep(0.02)

    def forget(self) -> None:
        """Remove its data, when it does not run."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    """Have a server run for a while."""
    server = RedisServer(folder, *options)
    try:
        yield server.start()
    finally:
        server.kill()


class Sentinel(RedisServer):
    """One Sentinel."""

    def __init__(self, folder: Path, primary: RedisServer, quorum: int = 2) -> None:
        """Args: primary: what it watches, as ``mymaster``; quorum: Sentinels that have to agree."""
        super().__init__(folder)
        self._tool = need("redis-sentinel")
        self._config = folder / "sentinel.conf"
        self._config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/log\n"
            f"sentinel monitor mymaster 127.0.0.1 {primary.port} {quorum}\n"
            "sentinel down-after-milliseconds mymaster 500\n"
            "sentinel failover-timeout mymaster 3000\n"
        )

    def command(self) -> list[str]:
        """Return how the Sentinel is started."""
        return [self._tool[0], str(self._config), *self._tool[1:]]


@contextmanager
def all_stopped(*servers: RedisServer) -> Iterator[None]:
    """Kill ``servers`` in the end."""
    try:
        yield
    finally:
        for server in servers:
            with suppress(OSError):
                server.kill()
