"""Parts of scenarios: the registry, runs against a fresh server, and figures of runs."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench import generator, servers
from bench.generator import Latency, Option, Report
from bench.results import Check, Figure, Outcome, Point, at_most, median
from bench.servers import Kind, Server


@dataclass(frozen=True)
class Settings:
    """Settings of a scenario that the command line may change."""

    soak_minutes: float = 60.0


Scenario = Callable[[Settings], Outcome]
SCENARIOS: dict[str, Scenario] = {}
# Scenarios that run only when they are named, since they take too long.
SEPARATE: set[str] = set()


def scenario(name: str, *, is_separate: bool = False) -> Callable[[Scenario], Scenario]:
    """Register a scenario; the first line of its docstring is the question that it answers."""

    def register(function: Scenario) -> Scenario:
        SCENARIOS[name] = function
        if is_separate:
            SEPARATE.add(name)
        return function

    return register


def about(name: str) -> str:
    """Return the question that a scenario answers."""
    return (SCENARIOS[name].__doc__ or "").splitlines()[0]


@dataclass(frozen=True)
class Variant:
    """A server and a load on it, under the name that their figures get."""

    name: str
    kind: Kind
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of the generator against a fresh server."""

    name: str
    report: Report
    command: list[str]


def run(variant: Variant, **options: Option) -> Run:
    """Start a fresh server, put the load on it, and return the run.

    A server's options replace the scenario's, and the variant's replace both.
    """
    with servers.serving(variant.kind) as server:
        return run_on(server, variant, **options)


def run_on(server: Server, variant: Variant, **options: Option) -> Run:
    """Put the load on a server that runs already, as `run` does, and return the run."""
    load = generator.start({**options, **server.options(), **variant.options})
    return Run(variant.name, load.report(), load.command)


def in_turn(variants: Sequence[Variant], times: int, **options: Option) -> dict[str, list[Run]]:
    """Run each variant `times` times, in turn, so that a disturbance meets all of them."""
    found: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    for _ in range(times):
        for variant in variants:
            found[variant.name].append(run(variant, **options))
    return found


def of_kinds(*kinds: Kind) -> list[Variant]:
    """Return variants that differ in the server only."""
    return [Variant(kind.name, kind) for kind in kinds]


def installed(outcome: Outcome, *kinds: Kind) -> list[Variant]:
    """Return variants of the kinds that can run here; note the others as skipped."""
    outcome.skipped += [f"{kind.name}: {why}" for kind in kinds if (why := kind.missing())]
    return of_kinds(*(kind for kind in kinds if not kind.missing()))


# A tenth of a core: the harness itself and an idle kernel use less.
QUIET = 0.1
# From this share on the generator may not have kept up, and its own queueing may be in the
# latencies.
SATURATED = 0.99


def note_of(report: Report) -> str:
    """Return the faults of a run and of its surroundings, "" without any."""
    notes = [report.complaint()]
    if report.load_utilisation > SATURATED:
        notes.append("load generator saturated")
    if report.disturbance > QUIET:
        notes.append(f"disturbed: others used {report.disturbance:.1f} cores")
    return "; ".join(note for note in notes if note)


def figure(name: str, unit: str, these: Sequence[Run], take: Callable[[Report], float]) -> Figure:
    """Return one figure over several runs of the same load."""
    notes = [note for one in these if (note := note_of(one.report))]
    return Figure(
        subject=these[0].name,
        name=name,
        unit=unit,
        values=[take(one.report) for one in these],
        note=notes[0] if notes else "",
        command=shlex.join(these[0].command),
    )


def latency_figures(these: Sequence[Run], take: Callable[[Report], Latency]) -> list[Figure]:
    """Return p50, p99, p99.9 and max of one latency."""
    return [
        figure("p50", "ms", these, lambda r: take(r).p50),
        figure("p99", "ms", these, lambda r: take(r).p99),
        figure("p99.9", "ms", these, lambda r: take(r).p999),
        figure("max", "ms", these, lambda r: take(r).max),
    ]


def delivery_figures(these: Sequence[Run]) -> list[Figure]:
    """Return the figures of every fan-out: rate, latency, CPU."""
    return [
        figure("deliveries", "/s", these, lambda r: r.fast.per_s),
        *latency_figures(these, lambda r: r.fast.latency_ms),
        figure("server CPU per delivery", "us", these, lambda r: r.cpu_us_per_delivery),
    ]


def middle(these: Sequence[Run], take: Callable[[Report], float]) -> float:
    """Return the median over runs."""
    return median([take(one.report) for one in these])


def p99(these: Sequence[Run]) -> float:
    """Return the median p99 of deliveries, in ms."""
    return middle(these, lambda report: report.fast.latency_ms.p99)


def unclean(these: Sequence[Run]) -> Check:
    """Return the check that each message came once and in order, and no request failed."""
    return at_most("runs with faults", sum(not one.report.is_clean for one in these), 0)


def latency_point(one: Run, rate: float) -> Point:
    """Return a point of the chart of latency against rate."""
    return Point(x=rate, y=one.report.fast.latency_ms.p99, is_clean=one.report.is_clean)
