"""Hostile clients: how long does an honest one wait because of them?

The honest one publishes on a kept connection, every few milliseconds and one request at a time, and
now and then opens a new one; a wait is from sending to the answer. The same is measured without
an attack in the same run, right before each: what the machine adds stands beside it.
"""

import json
import os
import resource
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench import machine, runs, servers
from bench.results import Figure, Outcome, Target, at_most
from bench.servers import Server

# What one client may make another wait (docs/guarantees.md).
WAIT_LIMIT_MS = 50.0
QUIET_S = 1.0
ATTACK_S = 3.0
PAUSE_S = 0.003
REQUESTS_PER_CONNECTION = 10
# Topics that searches and figures go over.
TOPICS = 9_000

# Attacks of connections that come all at once, with one request each. A client that opens another
# one waits in the kernel's queue behind these, each of which costs a turn of the loop and more. A
# client that is connected waits for none of that, so it has a target of its own.
AT_ONCE = ("handshakes", "streams")

# Attack -> connections.
ATTACKS: dict[str, tuple[int, ...]] = {
    "nested": (1, 20),
    "brackets": (1, 20),
    "flat": (1, 20),
    "batches": (1, 20),
    "chunks": (1, 20),
    "frames": (1, 20),
    "publishes": (1, 20),
    "patterns": (1, 20),
    "metrics": (1, 20),
    "polls": (1, 20),
    "handshakes": (10_000,),
    "streams": (3_000,),
}


@dataclass
class Waits:
    """How long an honest client waited for each answer, in milliseconds."""

    kept: list[float] = field(default_factory=list)
    opened: list[float] = field(default_factory=list)

    @property
    def longest_ms(self) -> float:
        """Return the longest of all."""
        return max(self.kept + self.opened)

    @property
    def longest_kept_ms(self) -> float:
        """Return the longest over the connection that was open before."""
        return max(self.kept)

    @property
    def p99_ms(self) -> float:
        """Return what one in a hundred exceeds."""
        return statistics.quantiles(self.kept + self.opened, n=100)[98]


@runs.scenario("attacks")
def attacks(_settings: runs.Settings) -> Outcome:
    """What an honest publisher waits while others, on 1 and 20 connections, send what is costly."""
    _allow_descriptors()
    outcome = Outcome()
    for name, counts in ATTACKS.items():
        for connections in counts:
            quiet, under = _measure(name, connections)
            subject = f"{name} x {connections:,}"
            note = f"quiet right before: longest {quiet.longest_ms:.1f}, p99 {quiet.p99_ms:.2f}"
            outcome.figures += [
                Figure(subject, "longest wait", "ms", [under.longest_ms], note),
                Figure(subject, "p99 of the wait", "ms", [under.p99_ms]),
            ]
            waits = {"": under.longest_ms}
            if name in AT_ONCE:
                waits = {", connected": under.longest_kept_ms, ", connecting": max(under.opened)}
                outcome.figures.append(
                    Figure(subject, "longest wait, connected", "ms", [under.longest_kept_ms])
                )
            for which, longest_ms in waits.items():
                added_ms = longest_ms - quiet.longest_ms
                check = at_most("ms beyond the longest without it", added_ms, WAIT_LIMIT_MS)
                claim = f"one client waits for others: {subject}{which}"
                outcome.targets.append(Target(claim, [check]))
    return outcome


def _allow_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _measure(name: str, connections: int) -> tuple[Waits, Waits]:
    """Return an honest client's waits without the attack, then with it, on a fresh server."""
    with servers.serving(servers.CLEVRD) as server, machine.pinned_to(machine.cores().load):
        _fill(server)
        quiet = _wait_as_one(server, QUIET_S)
        with _attacker(server, name, connections):
            return quiet, _wait_as_one(server, ATTACK_S)


def _fill(server: Server) -> None:
    """Make the topics, and one with a thousand messages."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        for topics in (range(TOPICS), ["hot"] * 1_000):
            lines = [
                json.dumps({"topic": each if isinstance(each, str) else f"t.{each}", "data": "x"})
                for each in topics
            ]
            body = "\n".join(lines).encode()
            head = f"POST /publish/batch HTTP/1.1\r\nHost: b\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            _read_answer(client)


@contextmanager
def _attacker(server: Server, name: str, connections: int) -> Iterator[None]:
    """Run the attack beside what is done meanwhile, at the lowest priority on the load's core."""
    command = servers.python_module("bench.peers.attacker")
    command += ["--port", str(server.port), "--attack", name, "--connections", str(connections)]
    command += ["--seconds", str(ATTACK_S + 1)]
    process = subprocess.Popen(  # noqa: S603 - commands of this package
        command,
        stdout=subprocess.DEVNULL,
        cwd=servers.ROOT,
        # Nothing else runs in this process that a fork could break.
        preexec_fn=lambda: os.nice(19),
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait_as_one(server: Server, seconds: float) -> Waits:
    """Publish one by one for so long; return how long each answer took."""
    waits = Waits()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        begun = time.perf_counter()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            _publish(client)
            waits.opened.append((time.perf_counter() - begun) * 1e3)
            for _ in range(REQUESTS_PER_CONNECTION):
                time.sleep(PAUSE_S)
                begun = time.perf_counter()
                _publish(client)
                waits.kept.append((time.perf_counter() - begun) * 1e3)
    return waits


def _publish(client: socket.socket) -> None:
    body = b'{"topic":"honest","data":1}'
    head = b"POST /publish HTTP/1.1\r\nHost: b\r\nContent-Length: %d\r\n\r\n" % len(body)
    client.sendall(head + body)
    answer = _read_answer(client)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"an honest publish was refused: {answer[:200]!r}")


def _read_answer(client: socket.socket) -> bytes:
    """Return one whole answer."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += client.recv(65_536)
    head, _, body = answer.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
    while len(body) < size:
        body += client.recv(1 << 20)
    return answer
