"""What a journal holds: how fast a reader has all of it, and how soon a daemon with it serves."""

import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Final

import msgspec

from bench import engines, machine, runs, servers
from bench.results import Figure, Outcome, Target, at_least, at_most, median, ratio
from bench.scenarios.journal import node_kind, placed
from bench.servers import Kind

MESSAGES: Final = 300_000
MIN_PER_S: Final = 300_000
# A ring that holds all of them.
RING_BYTES: Final = 512 << 20
_READING_S: Final = 180.0

TOPICS: Final = 1_000_000
STARTS: Final = 3
MAX_START_S: Final = 10.0
_FILLING_S: Final = 600.0
_START_TIMEOUT_S: Final = 120.0


class CaughtUp(msgspec.Struct, frozen=True):
    """What `bench.peers.catch_up` prints."""

    wrong: int
    seconds: list[float]
    cpu_s: list[float]


@runs.scenario("catch-up")
def catch_up(_settings: runs.Settings) -> Outcome:
    """One reader of 300,000 messages from the first on: out of SQLite, beside out of the ring."""
    with placed(engines.SQLITE) as setting:
        stored = _caught_up(node_kind(setting))
    rings = ("--ring-messages", str(MESSAGES), "--ring-bytes", str(RING_BYTES))
    kept = _caught_up(node_kind("", *rings))
    outcome = Outcome()
    for name, found in (("clevrd, sqlite", stored), ("clevrd, ring", kept)):
        outcome.figures += [
            Figure(name, "messages", "/s", [MESSAGES / each for each in found.seconds]),
            Figure(name, "CPU a message", "us", [each * 1e6 / MESSAGES for each in found.cpu_s]),
        ]
    times = [ratio(one, other) or 0 for one, other in zip(stored.cpu_s, kept.cpu_s, strict=True)]
    outcome.figures.append(Figure("clevrd, sqlite", "CPU, times that out of the ring", "x", times))
    fastest = median([MESSAGES / each for each in stored.seconds])
    outcome.targets += [
        Target("catch-up from SQLite", [at_least("messages/s", fastest, MIN_PER_S)]),
        Target("catch-up, in order", [at_most("faults", stored.wrong + kept.wrong, 0)]),
    ]
    return outcome


def _caught_up(kind: Kind) -> CaughtUp:
    """Fill a fresh daemon and read from it, on the load's core."""
    with servers.serving(kind) as server, machine.pinned_to(machine.cores().load):
        command = servers.python_module("bench.peers.catch_up", "--port", str(server.port))
        done = subprocess.run(  # noqa: S603 - our own script
            [*command, "--pid", str(server.pid), "--messages", str(MESSAGES)],
            capture_output=True,
            check=True,
            timeout=_READING_S,
            cwd=servers.ROOT,
        )
    return msgspec.json.decode(done.stdout, type=CaughtUp)


@runs.scenario("journal-start", is_separate=True)
def journal_start(_settings: runs.Settings) -> Outcome:
    """A start with 1,000,000 topics in SQLite, beside one without any: how soon does it serve?"""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        full, empty = str(Path(name) / "full"), str(Path(name) / "empty")
        command = servers.python_module("bench.peers.many_topics", full, "--topics", str(TOPICS))
        subprocess.run(command, check=True, timeout=_FILLING_S, cwd=servers.ROOT)  # noqa: S603 - our own script
        starts = [_start(full) for _ in range(STARTS)]
        others = [_start(empty) for _ in range(STARTS)]
    seconds, sizes = zip(*starts, strict=True)
    empty_s, empty_sizes = zip(*others, strict=True)
    each_bytes = [(size - other) / TOPICS for size, other in zip(sizes, empty_sizes, strict=True)]
    return Outcome(
        figures=[
            Figure("clevrd", "1,000,000 topics, serves after", "s", list(seconds)),
            Figure("clevrd", "empty, serves after", "s", list(empty_s)),
            Figure("clevrd", "memory of a topic", "B", each_bytes),
        ],
        targets=[
            Target("start with 1,000,000 topics", [at_most("s", median(seconds), MAX_START_S)])
        ],
    )


def _start(journal: str) -> tuple[float, int]:
    """Start a daemon; return the seconds until it serves, and its resident set then.

    Its address is taken before the journal is read, so that clients wait and are not refused.
    """
    begun = time.perf_counter()
    with servers.serving(node_kind(journal), _START_TIMEOUT_S) as server:
        url = f"http://127.0.0.1:{server.port}/health/ready"
        with urllib.request.urlopen(url, timeout=_START_TIMEOUT_S) as response:
            response.read()
        return time.perf_counter() - begun, server.rss_bytes()
