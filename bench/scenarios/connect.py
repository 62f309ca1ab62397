"""Connecting: a storm of readers, readers one after the other, and what an idle one costs."""

import time
from collections.abc import Sequence

from bench import generator, runs, servers
from bench.generator import Option, Report
from bench.results import Figure, Outcome, Target, at_least, at_most, ratio
from bench.runs import Run, Variant
from bench.servers import Kind

READERS = 10_000
SETTLE_S = 0.5
HOLD: dict[str, Option] = {
    "subs": READERS,
    "connect_window": 0,
    "connect_timeout": 30,
    "hold": SETTLE_S + 0.5,
}


@runs.scenario("storm")
def storm(_settings: runs.Settings) -> Outcome:
    """10,000 readers at once: until all are in, and the memory each holds while idle."""
    outcome = Outcome()
    kinds = (servers.CLEVRD, servers.NAIVE, servers.NCHAN, servers.NATS)
    for one in runs.installed(outcome, *kinds):
        found, idle_bytes = crowd(one.kind)
        outcome.figures += [
            runs.figure("all in after", "s", [found], lambda report: report.connect.seconds),
            Figure(one.name, "memory per idle reader", "KB", [idle_bytes / 1000]),
        ]
        if one.kind is servers.CLEVRD:
            outcome.targets += [
                Target("10,000 connects at once: all are in", [runs.unclean([found])]),
                Target(
                    "memory per idle reader",
                    [at_most("KB", idle_bytes / 1000, 3.0)],
                ),
            ]
    return outcome


def crowd(kind: Kind) -> tuple[Run, float]:
    """Connect READERS at once and leave them idle; return the run and the bytes each costs."""
    with servers.serving(kind) as server:
        before = server.rss_bytes()
        load = generator.start({**HOLD, **server.options(), "pub_kind": "none"})
        load.wait_for("connected")
        time.sleep(SETTLE_S)
        grown = server.rss_bytes() - before
        return Run(kind.name, load.report(), load.command), grown / READERS


ONE_BY_ONE: dict[str, Option] = {"subs": 2000, "connect_window": 1}


@runs.scenario("connect")
def connect(_settings: runs.Settings) -> Outcome:
    """2,000 readers, each connecting when the one before is in: how many a second?"""
    outcome = Outcome()
    kinds = (servers.CLEVRD, servers.NAIVE, servers.NCHAN, servers.NATS)
    variants = [
        Variant(one.name, one.kind, {"pub_kind": "none"}) for one in runs.installed(outcome, *kinds)
    ]
    found = runs.in_turn(variants, 2, **ONE_BY_ONE)
    outcome.figures = [figure for these in found.values() for figure in connect_figures(these)]
    ours, naive = (runs.middle(found[name], rate_of) for name in ("clevrd", "naive"))
    our_cpu, naive_cpu = (runs.middle(found[name], cpu_us_of) for name in ("clevrd", "naive"))
    whole = runs.unclean(found["clevrd"])
    outcome.targets.append(
        Target(
            "readers connecting, one after the other",
            [whole, at_least("x aiohttp's WebSocketResponse", ratio(ours, naive), 2.0)],
            # Each connect waits for the client's core as well, which a slow machine has less of.
            [whole, at_least("x the connects for the same CPU", ratio(naive_cpu, our_cpu), 2.0)],
        )
    )
    return outcome


def rate_of(report: Report) -> float:
    """Return the connects a second."""
    return report.connect.per_s


def connect_figures(these: Sequence[Run]) -> list[Figure]:
    """Return the rate of connects and what each cost."""
    return [
        runs.figure("connects", "/s", these, rate_of),
        runs.figure("server CPU per connect", "us", these, cpu_us_of),
    ]


def cpu_us_of(report: Report) -> float:
    """Return the server's CPU for each connect."""
    return report.cpu.server_s * 1e6 / max(report.connect.established, 1)
