"""Many topics at once."""

from bench import runs, servers
from bench.generator import Option
from bench.results import Outcome, Target, at_most

LOAD: dict[str, Option] = {
    "subs": 10_000,
    "topics": 100,
    "rate": 500,
    "pub_kind": "http",
    "pubs": 4,
    "seconds": 4,
    "warmup": 0.5,
    "connect_window": 256,
}


@runs.scenario("topics")
def topics(_settings: runs.Settings) -> Outcome:
    """100 topics x 100 readers, 50,000 deliveries/s in all: nothing misrouted, and how late?"""
    (clevrd,) = runs.of_kinds(servers.CLEVRD)
    ours = [runs.run(clevrd, **LOAD)]
    return Outcome(
        figures=runs.delivery_figures(ours),
        targets=[
            Target(
                "100 topics x 100 readers at 50,000 deliveries/s",
                [runs.unclean(ours), at_most("p99 ms", runs.p99(ours), 5.0)],
            )
        ],
    )
