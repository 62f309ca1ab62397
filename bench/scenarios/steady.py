"""Steady load: what a small installation sees all day."""

from bench import runs, servers
from bench.generator import Option
from bench.results import Outcome, Target, at_most

LOAD: dict[str, Option] = {
    "subs": 100,
    "pub_kind": "http",
    "pubs": 8,
    "rate": 1000,
    # Not timed: the first publishes of a process pay for its caches.
    "warmup": 0.5,
}


@runs.scenario("steady")
def steady(_settings: runs.Settings) -> Outcome:
    """100 subscribers at 1,000 publishes/s over HTTP: complete, in order, and how late?"""
    clevrd, naive = runs.of_kinds(servers.CLEVRD, servers.NAIVE)
    ours = [runs.run(clevrd, **LOAD, seconds=10)]
    theirs = [runs.run(naive, **LOAD, seconds=3, drain=2)]
    return Outcome(
        figures=[figure for these in (ours, theirs) for figure in runs.delivery_figures(these)],
        targets=[
            Target(
                "100 readers at 1,000 HTTP publishes/s",
                [runs.unclean(ours), at_most("p99 ms", runs.p99(ours), 5.0)],
            )
        ],
    )
