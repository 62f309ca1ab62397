"""The cost and the time of one delivery, against a program that does nothing but send."""

from collections.abc import Sequence

from bench import runs, servers
from bench.generator import Option
from bench.results import Check, Outcome, Target, at_most, ratio
from bench.runs import Run

# Of the floor's CPU. The sockets' own cost is in both, so the rest is what a daemon adds to it.
CPU_LIMIT = 1.4
LAST_READER_LIMIT = 1.5
PUBLISHER: dict[str, Option] = {"pub_kind": "http", "pubs": 1, "warmup": 0.5}


@runs.scenario("floor")
def floor(_settings: runs.Settings) -> Outcome:
    """Server CPU per delivery, 1,000 readers and one message at a time, against bare send()."""
    found = runs.in_turn(
        runs.of_kinds(servers.CLEVRD, servers.FLOOR), 3, subs=1000, rate=100, seconds=3, **PUBLISHER
    )
    ours, floors = found["clevrd"], found["floor"]
    return Outcome(
        figures=[figure for these in (ours, floors) for figure in runs.delivery_figures(these)],
        targets=[
            Target(
                "CPU per delivery, 1,000 readers, one message at a time",
                [runs.unclean(ours), of_floor_cpu(ours, floors)],
            )
        ],
    )


def of_floor_cpu(ours: Sequence[Run], floors: Sequence[Run]) -> Check:
    """Return the check of CPU per delivery as a multiple of the floor's."""
    mine, bare = (
        runs.middle(these, lambda report: report.cpu_us_per_delivery) for these in (ours, floors)
    )
    return at_most("x the floor's CPU", ratio(mine, bare), CPU_LIMIT)


@runs.scenario("last-reader")
def last_reader(_settings: runs.Settings) -> Outcome:
    """10,000 readers of one topic, five messages a second: how long until the last has it?"""
    found = runs.in_turn(
        runs.of_kinds(servers.CLEVRD, servers.FLOOR),
        2,
        subs=10_000,
        rate=5,
        seconds=4,
        connect_window=256,
        **PUBLISHER,
    )
    ours, floors = found["clevrd"], found["floor"]
    # The best of the runs: what disturbs a round only ever makes it longer.
    mine, bare = (min(one.report.last_reader_ms.p50 for one in these) for these in (ours, floors))
    figures = [
        runs.figure("time to the last reader, p50", "ms", these, lambda r: r.last_reader_ms.p50)
        for these in (ours, floors)
    ]
    return Outcome(
        figures=[*figures, *runs.delivery_figures(ours), *runs.delivery_figures(floors)],
        targets=[
            Target(
                "10,000 readers: every message to all, time to the last",
                [
                    runs.unclean(ours),
                    at_most("x the floor's time", ratio(mine, bare), LAST_READER_LIMIT),
                ],
            )
        ],
    )
