"""Slow readers among fast ones: what the fast ones notice of them."""

from bench import runs, servers
from bench.generator import Option
from bench.results import Outcome, Target, at_most, ratio
from bench.runs import Variant

LOAD: dict[str, Option] = {
    "subs": 80,
    "rate": 10_000,
    "pub_kind": "ws",
    "pubs": 1,
    "seconds": 3,
    "warmup": 1,
}
P99_LIMIT = 1.2


@runs.scenario("slow-readers")
def slow_readers(_settings: runs.Settings) -> Outcome:
    """80 readers at 10,000/s, alone, with 20 that never read, and with 20 that read 1 KB/s."""
    variants = [
        Variant("clevrd alone", servers.CLEVRD),
        Variant("clevrd, 20 stalled", servers.CLEVRD, {"stalled": 20}),
        Variant("clevrd, 20 at 1 KB/s", servers.CLEVRD, {"slow": 20, "slow_bps": 1024}),
    ]
    found = runs.in_turn(variants, 3, **LOAD)
    alone, stalled = found["clevrd alone"], found["clevrd, 20 stalled"]
    times = ratio(runs.p99(stalled), runs.p99(alone))
    return Outcome(
        figures=[figure for these in found.values() for figure in runs.delivery_figures(these)],
        targets=[
            Target(
                "one reader in five stalled, the others' p99",
                [
                    runs.unclean([*alone, *stalled]),
                    at_most("x the p99 without them", times, P99_LIMIT),
                ],
            )
        ],
    )
