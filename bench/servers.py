"""The servers that are measured: clevrd, the floor, and the alternatives. Starts each.

Each server's protocol is given as options of the load generator (load/options.h).
"""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import clevrd
from bench import build, machine
from bench.generator import Option

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
NCHAN_MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
START_TIMEOUT_S = 15.0
# Bytes of data that make a delivered message 250 bytes: clevrd's envelope has 146 and some digits
# of the offset; a server without an envelope needs 250.
ENVELOPED = 102
BARE = 250


@dataclass(frozen=True)
class Kind:
    """One way to serve the same load.

    command: returns the command line, given a port and an empty directory of its own.
    options: the generator's options for this server.
    missing: returns why the server can't run here, else "".
    """

    name: str
    command: Callable[[int, Path], list[str]]
    options: Mapping[str, Option] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[], str] = str
    version: Callable[[], str] = str


@dataclass(frozen=True)
class Server:
    """A server that is listening."""

    kind: Kind
    pid: int
    port: int
    process: "subprocess.Popen[bytes]"

    def options(self) -> dict[str, Option]:
        """Return the generator's options to reach the server and to read its CPU time."""
        target: dict[str, Option] = {"target": f"127.0.0.1:{self.port}", "server_pids": self.pid}
        return {**target, **self.kind.options}

    def rss_bytes(self) -> int:
        """Return the server's resident set now."""
        return machine.rss_bytes(self.pid)


class CannotStart(Exception):
    """A server ended or did not listen in time; the message is its last line."""


def is_free(port: int) -> bool:
    """True when a server can listen on ``port``."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a port that nothing uses.

    The port is below those that Linux gives to clients (from 32768), since ten thousand connections
    of the run before still hold theirs for a minute.
    """
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
        if is_free(port):
            return port


def is_listening(port: int) -> bool:
    """True when a connect succeeds."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_listening(
    process: "subprocess.Popen[bytes]", port: int, log: Path, timeout_s: float = START_TIMEOUT_S
) -> None:
    """Wait until the server accepts; raise CannotStart when it ended or takes too long."""
    deadline = time.monotonic() + timeout_s
    while not is_listening(port):
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise CannotStart(" ".join(last) or "no message")
        time.sleep(0.02)


def spawn(kind: Kind, port: int, directory: Path) -> "subprocess.Popen[bytes]":
    """Start a server on its core, with its output in a file of its directory."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **kind.env}
    with (
        (directory / "log").open("wb") as log,
        machine.pinned_to(machine.cores().server),
    ):
        return subprocess.Popen(  # noqa: S603 - commands of this module
            kind.command(port, directory), stdout=log, stderr=log, env=env, cwd=directory
        )


@contextmanager
def serving(kind: Kind, timeout_s: float = START_TIMEOUT_S) -> Iterator[Server]:
    """Start a fresh server and end it afterwards, so that no run inherits another's state."""
    with tempfile.TemporaryDirectory(prefix=f"bench-{kind.name}-") as name:
        directory = Path(name)
        port = free_port()
        process = spawn(kind, port, directory)
        try:
            wait_until_listening(process, port, directory / "log", timeout_s)
            yield Server(kind, process.pid, port, process)
        finally:
            # A drain would only make the run take longer, since no state is to be kept.
            process.kill()
            process.wait()


def python_module(*words: str) -> list[str]:
    """Return a command that runs a module with this Python."""
    return [sys.executable, "-m", *words]


def filled_config(template: str, directory: Path, **values: object) -> str:
    """Write a peer's configuration to its directory; return its path."""
    text = (PEERS / template).read_text()
    for name, value in {"dir": directory, **values}.items():
        text = text.replace(f"@{name.upper()}@", str(value))
    target = directory / template
    target.write_text(text)
    return str(target)


def clevrd_command(port: int, _directory: Path) -> list[str]:
    """Return the daemon's command line, with the default settings."""
    return python_module("clevrd", "serve", "--address", f"127.0.0.1:{port}")


def naive_command(port: int, _directory: Path) -> list[str]:
    """Return the command of the naive aiohttp app."""
    return python_module("bench.peers.naive", "--port", str(port))


def broadcast_command(port: int, _directory: Path) -> list[str]:
    """Return the command of the `websockets.broadcast` server."""
    return python_module("bench.peers.broadcast", "--port", str(port))


def liar_command(port: int, _directory: Path) -> list[str]:
    """Return the command of the server that breaks its promises."""
    return python_module("bench.peers.liar", "--port", str(port))


def floor_command(port: int, _directory: Path) -> list[str]:
    """Return the command of the bare send() loop."""
    return [str(build.program("floor")), str(port)]


def nchan_command(port: int, directory: Path) -> list[str]:
    """Return nginx's command, with a configuration that needs nothing outside `directory`."""
    config = filled_config("nginx.conf", directory, port=port, module=NCHAN_MODULE)
    return ["nginx", "-p", str(directory), "-e", str(directory / "error.log"), "-c", config]


def nats_command(port: int, directory: Path) -> list[str]:
    """Return nats-server's command."""
    config = filled_config("nats.conf", directory, port=port, client_port=free_port())
    return ["nats-server", "-c", config]


def missing_nchan() -> str:
    """Return why nchan can't run here."""
    is_there = shutil.which("nginx") and NCHAN_MODULE.exists()
    return "" if is_there else "nginx with libnginx-mod-nchan is not installed"


def missing_nats() -> str:
    """Return why nats-server can't run here."""
    return "" if shutil.which("nats-server") else "nats-server is not installed"


@cache
def nchan_version() -> str:
    """Return the versions of nginx and of the module's package."""
    package = machine.first_line_of(["dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan"])
    return f"{machine.first_line_of(['nginx', '-v'])}, nchan {package}"


@cache
def nats_version() -> str:
    """Return nats-server's version."""
    return machine.first_line_of(["nats-server", "--version"])


OURS: Mapping[str, Option] = {"data_bytes": ENVELOPED, "offsets": 1}

CLEVRD = Kind("clevrd", clevrd_command, options=OURS, version=lambda: clevrd.__version__)

FLOOR = Kind(
    "floor",
    floor_command,
    options={"data_bytes": ENVELOPED},
    # The floor has a send buffer like the daemon's, so that the kernel does the same work for both.
    version=lambda: "bare send() loop in C",
)
NAIVE = Kind(
    "naive",
    naive_command,
    options={"data_bytes": ENVELOPED, "sub_path": "/subscribe?topic=%t"},
    version=lambda: f"aiohttp {machine.package_version('aiohttp')}, await ws.send_str in a loop",
)
BROADCAST = Kind(
    "websockets",
    broadcast_command,
    options={"data_bytes": BARE, "sub_path": "/subscribe?topic=%t", "pub_kind": "ws"},
    version=lambda: f"websockets {machine.package_version('websockets')}, websockets.broadcast",
)
NCHAN = Kind(
    "nchan",
    nchan_command,
    options={
        "data_bytes": BARE,
        "sub_path": "/sub?id=%t",
        "pub_path": "/pub?id=%t",
        "pub_body": "raw",
    },
    missing=missing_nchan,
    version=nchan_version,
)
NATS = Kind(
    "nats",
    nats_command,
    options={
        "data_bytes": BARE,
        "proto": "nats",
        "sub_path": "/",
        "pub_path": "/",
        "pub_body": "raw",
        "pub_kind": "ws",
    },
    missing=missing_nats,
    version=nats_version,
)
LIAR = Kind("liar", liar_command)
ALL = (CLEVRD, FLOOR, NAIVE, BROADCAST, NCHAN, NATS)
