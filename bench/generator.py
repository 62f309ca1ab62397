"""Runs the load generator and reads its report. The generator's options: load/options.h."""

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from bench import build, machine

Option = str | int | float
# Bound on the wait for a generator that hangs; the generator itself bounds its phases.
GRACE_S = 60.0


class Latency(msgspec.Struct, frozen=True):
    """A latency in milliseconds, over `count` events."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Connects(msgspec.Struct, frozen=True):
    """The result of a phase of connecting."""

    wanted: int
    established: int
    failed: int
    seconds: float
    per_s: float
    latency_ms: Latency


class Publishes(msgspec.Struct, frozen=True):
    """Messages that publishers sent, and the answers to them."""

    messages: int
    requests: int
    answered: int
    ok: int
    refused: int
    lost_connections: int
    seconds: float
    per_s: float
    lag_max_ms: float
    first_bad_status: int
    first_error: str
    answer_ms: Latency


class Deliveries(msgspec.Struct, frozen=True):
    """Messages that one kind of reader received; the counts of faults should be 0."""

    readers: int
    expected: int
    delivered: int
    missing: int
    holes: int
    duplicates: int
    reordered: int
    misrouted: int
    malformed: int
    offset_breaks: int
    reads: int
    mean_bytes: float
    seconds: float
    per_s: float
    latency_ms: Latency

    @property
    def faults(self) -> int:
        """Number of messages lost, repeated, out of order, misrouted or broken."""
        wrong = self.duplicates + self.reordered + self.misrouted + self.malformed
        return self.missing + wrong + self.offset_breaks


class Closes(msgspec.Struct, frozen=True):
    """Readers that the server closed, and the close codes."""

    readers: int
    codes: dict[str, int]


class Cpu(msgspec.Struct, frozen=True):
    """CPU seconds from the first publish until the last delivery, and the time between them.

    Without publishers the figures are those of the connecting.

    others_s: CPU seconds of all other processes of the machine, which disturbed the run.
    """

    server_s: float
    load_s: float
    others_s: float
    wall_s: float


class Report(msgspec.Struct, frozen=True):
    """All figures of one run of the generator."""

    connect: Connects
    publisher_connect: Connects
    publish: Publishes
    fast: Deliveries
    slow: Deliveries
    stalled_open: int
    closes: Closes
    last_reader_ms: Latency
    cpu: Cpu

    @property
    def is_clean(self) -> bool:
        """True when no connect or publish failed, and each message came once and in order."""
        connected = self.connect.failed + self.publisher_connect.failed == 0
        accepted = self.publish.refused + self.publish.lost_connections == 0
        return connected and accepted and self.fast.faults == 0

    @property
    def cpu_us_per_delivery(self) -> float:
        """Server CPU in microseconds for each message handed to a reader."""
        return self.cpu.server_s * 1e6 / max(self.fast.delivered + self.slow.delivered, 1)

    @property
    def load_utilisation(self) -> float:
        """Share of its core that the generator used; near 1 the generator was the bottleneck."""
        return self.cpu.load_s / max(self.cpu.wall_s, 1e-9)

    @property
    def disturbance(self) -> float:
        """CPU that other processes used meanwhile, in cores."""
        return self.cpu.others_s / max(self.cpu.wall_s, 1e-9)

    def complaint(self) -> str:
        """Return the faults of the run in a few words, "" without any."""
        counts = {
            "connects failed": self.connect.failed + self.publisher_connect.failed,
            "publishes refused": self.publish.refused,
            "publishers cut": self.publish.lost_connections,
            "readers cut": self.closes.readers,
            "missing": self.fast.missing,
            "duplicates": self.fast.duplicates,
            "reordered": self.fast.reordered,
            "misrouted": self.fast.misrouted,
            "malformed": self.fast.malformed,
            "offset breaks": self.fast.offset_breaks,
        }
        said = [f"{count} {what}" for what, count in counts.items() if count]
        return ", ".join(said) + (
            f" ({self.publish.first_error})" if self.publish.first_error else ""
        )


class GeneratorFailed(Exception):
    """The generator ended without a report; the message is its last line."""


@dataclass
class Load:
    """A generator that has been started, pinned to the load's core."""

    command: list[str]
    process: "subprocess.Popen[str]"

    def wait_for(self, phase: str) -> None:
        """Return when the generator enters a phase: connecting, connected, publishing or done."""
        stream = self.process.stderr
        assert stream is not None  # noqa: S101 - it was opened with a pipe
        for line in stream:
            if line.strip() == f"phase {phase}":
                return
        raise GeneratorFailed(f"ended before phase {phase}")

    def report(self) -> Report:
        """Wait for the generator's end and return its report."""
        out, err = self.process.communicate(timeout=GRACE_S * 60)
        if self.process.returncode:
            raise GeneratorFailed(err.strip().splitlines()[-1] if err.strip() else "no message")
        return msgspec.json.decode(out, type=Report)


def arguments(options: Mapping[str, Option]) -> list[str]:
    """Return the generator's command line options; here their names have _ for -."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def start(options: Mapping[str, Option]) -> Load:
    """Start the generator on the load's core."""
    words = arguments(options)
    path = build.program("load")
    with machine.pinned_to(machine.cores().load):
        process = subprocess.Popen(  # noqa: S603 - our own program
            [str(path), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    return Load(["load", *words], process)


@contextmanager
def meanwhile(options: Mapping[str, Option], phase: str = "publishing") -> Iterator[None]:
    """Run the generator, from the time when it enters ``phase`` on; its report is not wanted."""
    load = start(options)
    try:
        load.wait_for(phase)
        yield
    finally:
        load.process.kill()
        load.process.communicate()
