"""Readers beside a publisher of large batches: how long do they wait for what others send?"""

from __future__ import annotations

from typing import Final

from bench import generator, runs, servers
from bench.generator import Option
from bench.results import Outcome, Target, at_most
from bench.runs import Variant

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


# Batches as large as they may be, to a topic that nobody reads, for longer than the readers stay.
BATCHES: Final[dict[str, Option]] = {
    "subs": 0,
    "topics": 1,
    "prefix": "bulk",
    "pub_kind": "batch",
    "pub_path": "/publish/batch",
    "pubs": 1,
    "batch": 10_000,
    "rate": 50_000,
    "seconds": 3 * SECONDS,
}
ALONE: Final = Variant("clevrd alone", servers.CLEVRD)
BESIDE: Final = Variant("clevrd, batches", servers.CLEVRD)


@runs.scenario("beside-batches")
def beside_batches(_settings: runs.Settings) -> Outcome:
    """20 readers at 1,000/s, alone and beside 50,000/s in batches of 10,000: how late?"""
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone.append(runs.run(ALONE, **LOAD))
        with (
            servers.serving(BESIDE.kind) as server,
            generator.meanwhile({**BATCHES, **server.options()}),
        ):
            beside.append(runs.run_on(server, BESIDE, **LOAD))
    return Outcome(
        figures=[
            figure
            for these in (alone, beside)
            for figure in runs.latency_figures(these, lambda report: report.fast.latency_ms)
        ],
        targets=[
            Target(
                "readers beside batches of 10,000",
                [runs.unclean(beside), at_most("p99 ms", runs.p99(beside), 5.0)],
            )
        ],
    )
