"""A planned restart under 10,000 readers: when they leave and come back, and what is lost."""

import http.client
import json
import resource
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import msgspec

from bench import machine, runs, servers
from bench.generator import GeneratorFailed
from bench.results import Figure, Outcome, Target, at_least, at_most, exactly
from bench.servers import Kind

READERS = 10_000
RATE = 0.5
STOP_S = 60.0
LIMIT_S = 90.0


class Seen(msgspec.Struct, frozen=True):
    """What the readers and the publisher print."""

    back: int
    missing: int
    out_of_order: int
    gaps: int
    left_in_100_ms: int
    asked_in_100_ms: int
    came_in_100_ms: int
    asked: int
    seconds: float


class Publisher(threading.Thread):
    """Publishes at a rate over one connection, and again what is refused or not answered."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._is_over = threading.Event()
        self.acknowledged = 0
        self.longest_gap_s = 0.0

    def run(self) -> None:
        """Publish until `stop`."""
        body = json.dumps({"topic": "t", "data": "x" * 100}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        last_s = time.monotonic()
        while not self._is_over.wait(1 / RATE):
            try:
                connection.request("POST", "/publish", body)
                answer = json.loads(connection.getresponse().read())
            except (OSError, http.client.HTTPException):
                # The next request opens a new connection.
                connection.close()
                continue
            if answer["success"]:
                now_s = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
                last_s, self.acknowledged = now_s, answer["offset"]

    def stop(self) -> None:
        """End after the message under way."""
        self._is_over.set()
        self.join()


def restarting_command(port: int, directory: Path) -> list[str]:
    """Return the command of a daemon whose topics go on in the next one."""
    state = directory / "state"
    state.mkdir(exist_ok=True)
    return [*servers.clevrd_command(port, directory), "--state-dir", str(state)]


RESTARTING = Kind("clevrd", restarting_command, version=servers.CLEVRD.version)


@runs.scenario("drain")
def drain(_settings: runs.Settings) -> Outcome:
    """10,000 readers are sent away by a stop and come back to the next daemon: how, how fast?"""
    seen, publisher, stop_s = restarted()
    figures = {
        "stop took": ("s", stop_s),
        "all back after": ("s", seen.seconds),
        "left in the busiest 100 ms": ("", float(seen.left_in_100_ms)),
        "asked in the busiest 100 ms": ("", float(seen.asked_in_100_ms)),
        "came in the busiest 100 ms": ("", float(seen.came_in_100_ms)),
        "tries for each that came": ("", seen.asked / READERS),
        "longest time without a publish": ("s", publisher.longest_gap_s),
    }
    return Outcome(
        figures=[Figure("clevrd", name, unit, [value]) for name, (unit, value) in figures.items()],
        targets=[
            Target(
                "a restart under 10,000 readers loses nothing",
                [
                    exactly("back", seen.back, READERS),
                    exactly("missing", seen.missing + seen.gaps, 0),
                    exactly("out of order", seen.out_of_order, 0),
                    at_least("messages", publisher.acknowledged, 1),
                ],
            ),
            Target(
                "no herd: at most 4,000 a second leave or come",
                [
                    at_most("left in 100 ms", seen.left_in_100_ms, 400),
                    at_most("asked in 100 ms", seen.asked_in_100_ms, 400),
                ],
            ),
        ],
    )


def restarted() -> tuple[Seen, Publisher, float]:
    """Restart a daemon under the readers; return what they saw, and how long its stop took."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    port = servers.free_port()
    with tempfile.TemporaryDirectory(prefix="bench-drain-") as name:
        directory = Path(name)
        log = directory / "log"
        daemon = servers.spawn(RESTARTING, port, directory)
        try:
            servers.wait_until_listening(daemon, port, log)
            with machine.pinned_to(machine.cores().load):
                load = subprocess.Popen(  # noqa: S603 - our own script
                    servers.python_module(
                        *("bench.peers.drain_load", "--port", str(port)),
                        *("--readers", str(READERS), "--limit", str(LIMIT_S)),
                    ),
                    stdout=subprocess.PIPE,
                    stdin=subprocess.PIPE,
                    text=True,
                    cwd=servers.ROOT,
                )
            publisher = Publisher(port)
            with load:
                try:
                    assert load.stdout is not None  # noqa: S101 - it is a pipe
                    if "all are in" not in load.stdout.readline():
                        raise GeneratorFailed("the readers could not connect")
                    publisher.start()
                    began_s = time.monotonic()
                    daemon.send_signal(signal.SIGTERM)
                    daemon.wait(STOP_S)
                    stop_s = time.monotonic() - began_s
                    daemon = servers.spawn(RESTARTING, port, directory)
                    load.stdout.readline()
                    publisher.stop()
                    told, _ = load.communicate(f"{publisher.acknowledged}\n", timeout=LIMIT_S)
                    seen = msgspec.json.decode(told, type=Seen)
                finally:
                    load.kill()
        finally:
            daemon.kill()
            daemon.wait()
    return seen, publisher, stop_s
