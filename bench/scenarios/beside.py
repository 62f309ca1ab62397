"""Readers beside a publisher of large batches: how long do they wait for what others send?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from bench import generator, runs, servers
from bench.generator import Option
from bench.results import Outcome, Target, at_most
from bench.runs import Run
from bench.servers import Server

# As many as a batch may have, and messages a second in them.
PER_BATCH: Final = 10_000
BATCH_RATE: Final = 50_000
SECONDS: Final = 4
ROUNDS: Final = 3
LOAD: Final[dict[str, Option]] = {
    "subs": 20,
    "rate": 1_000,
    "pub_kind": "ws",
    "pubs": 1,
    "seconds": SECONDS,
    "warmup": 0.5,
}


@runs.scenario("beside-batches")
def beside_batches(_settings: runs.Settings) -> Outcome:
    """20 readers at 1,000/s, alone and beside 50,000/s in batches of 10,000: how late?"""
    found: dict[str, list[Run]] = {"clevrd alone": [], "clevrd, batches": []}
    for _ in range(ROUNDS):
        for name, measured in found.items():
            with servers.serving(servers.CLEVRD) as server:
                if name == "clevrd alone":
                    measured.append(_measure(name, server))
                else:
                    with _batches(server):
                        measured.append(_measure(name, server))
    beside = found["clevrd, batches"]
    return Outcome(
        figures=[
            figure
            for these in found.values()
            for figure in runs.latency_figures(these, lambda report: report.fast.latency_ms)
        ],
        targets=[
            Target(
                "readers beside batches of 10,000",
                [runs.unclean(beside), at_most("p99 ms", runs.p99(beside), 5.0)],
            )
        ],
    )


def _measure(name: str, server: Server) -> Run:
    load = generator.start({**LOAD, **server.options()})
    return Run(name, load.report(), load.command)


@contextmanager
def _batches(server: Server) -> Iterator[None]:
    """Have batches published meanwhile, to a topic that nobody reads."""
    load = generator.start(
        {
            **server.options(),
            "subs": 0,
            "topics": 1,
            "prefix": "bulk",
            "pub_kind": "batch",
            "pub_path": "/publish/batch",
            "pubs": 1,
            "batch": PER_BATCH,
            "rate": BATCH_RATE,
            "seconds": 3 * SECONDS,
        }
    )
    try:
        load.wait_for("publishing")
        yield
    finally:
        load.process.kill()
        load.process.communicate()
