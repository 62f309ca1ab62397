"""Fan-out: one topic, 1 to 10,000 readers, up a ladder of rates, beside the alternatives."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench import runs, servers
from bench.generator import Option
from bench.results import Check, Figure, Outcome, Point, Series, Target, at_most, ratio
from bench.runs import Run, Variant
from bench.servers import Kind

LOAD: dict[str, Option] = {"pub_kind": "ws", "pubs": 1, "seconds": 1.6, "warmup": 0.4, "drain": 2}
# The alternatives without a publish socket take their publishes over plain HTTP.
OVER_HTTP: dict[str, Option] = {"pub_kind": "http", "pubs": 16}
PEERS = (servers.NATS, servers.NCHAN, servers.BROADCAST, servers.NAIVE)

# Rates at which each is tried, with 100 readers, until it breaks.
LADDERS: dict[str, tuple[int, ...]] = {
    "clevrd": (1000, 5000, 10_000, 20_000, 30_000, 40_000, 50_000),
    "nats": (1000, 5000, 10_000, 20_000, 30_000),
    "nchan": (500, 1000, 2000, 4000),
    "websockets": (500, 1000, 2000, 4000),
    "naive": (500, 1000, 2000, 4000),
}
# More than this at p99 and it is no longer real time: the ladder ends.
BROKEN_P99_MS = 50.0
CHART_RATES = "p99 ms by rate, 100 readers"
CHART_READERS = "deliveries/s by readers"


def variant_of(kind: Kind) -> Variant:
    """Return the kind with the way of publishing that suits it best."""
    has_socket = kind is not servers.NCHAN
    return Variant(kind.name, kind, {} if has_socket else OVER_HTTP)


def climb(variant: Variant, subs: int, rates: Sequence[int]) -> list[Point]:
    """Run up a ladder of rates; return the points up to and with the one at which it breaks."""
    points: list[Point] = []
    for rate in rates:
        points.append(runs.latency_point(runs.run(variant, **LOAD, subs=subs, rate=rate), rate))
        if not points[-1].is_clean or points[-1].y > BROKEN_P99_MS:
            break
    return points


@runs.scenario("ladder")
def ladder(_settings: runs.Settings) -> Outcome:
    """100 readers: latency as the rate rises, until each server breaks."""
    outcome = Outcome()
    for one in [*runs.of_kinds(servers.CLEVRD), *runs.installed(outcome, *PEERS)]:
        points = climb(variant_of(one.kind), 100, LADDERS[one.name])
        kept = [point.x for point in points if point.is_clean and point.y <= BROKEN_P99_MS]
        outcome.series.append(Series(CHART_RATES, one.name, points))
        outcome.figures.append(
            Figure(one.name, "highest rate kept up with", "/s", [max(kept, default=0.0)])
        )
    return outcome


# Messages under way at once: enough to keep a server busy, few enough that none drops any.
WINDOWS = {1: 512, 10: 256, 100: 64, 1000: 8, 10_000: 2}


@runs.scenario("capacity")
def capacity(_settings: runs.Settings) -> Outcome:
    """Deliveries a second at most, from 1 reader to 10,000, senders waiting for the readers."""
    outcome = Outcome()
    for one in [*runs.of_kinds(servers.CLEVRD), *runs.installed(outcome, *PEERS)]:
        points = []
        for subs, window in WINDOWS.items():
            # The largest is for us alone: the others would need a minute to say less.
            if subs == 10_000 and one.kind is not servers.CLEVRD:
                continue
            found = [full_speed(variant_of(one.kind), subs, window)]
            points.append(Point(subs, found[0].report.fast.per_s, found[0].report.is_clean))
            outcome.figures.append(
                runs.figure(f"deliveries, {subs:,} readers", "/s", found, lambda r: r.fast.per_s)
            )
        outcome.series.append(Series(CHART_READERS, one.name, points))
    return outcome


def full_speed(variant: Variant, subs: int, window: int) -> Run:
    """Publish as fast as the slowest reader allows."""
    load = {**LOAD, "seconds": 1.5}
    return runs.run(variant, **load, rate=0, subs=subs, window=window, connect_window=256)


@dataclass(frozen=True)
class Promise:
    """So many readers at such a rate, and the p99 that is promised of it."""

    subs: int
    rate: int
    p99_ms: float

    def __str__(self) -> str:
        return f"{self.subs} readers at {self.rate:,}/s"


PROMISES = (Promise(10, 50_000, 1.0), Promise(100, 10_000, 5.0), Promise(100, 30_000, 10.0))


@runs.scenario("fanout")
def fanout(_settings: runs.Settings) -> Outcome:
    """The promised loads, beside nats-server: 10 x 50,000/s, 100 x 10,000/s, 100 x 30,000/s."""
    outcome = Outcome()
    contenders = [*runs.of_kinds(servers.CLEVRD), *runs.installed(outcome, servers.NATS)]
    for promise in PROMISES:
        found = runs.in_turn(contenders, 2, **LOAD, subs=promise.subs, rate=promise.rate)
        outcome.figures += figures_of(promise, found)
        outcome.targets.append(target_of(promise, found))
    return outcome


def figures_of(promise: Promise, found: dict[str, list[Run]]) -> list[Figure]:
    """Return the figures of one load, each saying which load it was."""
    takes = (
        ("p50", "ms", lambda r: r.fast.latency_ms.p50),
        ("p99", "ms", lambda r: r.fast.latency_ms.p99),
        ("CPU/delivery", "us", lambda r: r.cpu_us_per_delivery),
    )
    return [
        runs.figure(f"{promise}: {name}", unit, these, take)
        for these in found.values()
        for name, unit, take in takes
    ]


def target_of(promise: Promise, found: dict[str, list[Run]]) -> Target:
    """Return the promise; on a slower machine, that nats-server is no faster."""
    ours = found["clevrd"]
    whole = runs.unclean(ours)
    mine = runs.p99(ours)
    beside: list[Check] = []
    if "nats" in found:
        beside = [at_most("p99 of nats-server's", ratio(mine, runs.p99(found["nats"])), 1.0)]
    absolute = at_most("p99 ms", mine, promise.p99_ms)
    return Target(str(promise), [whole, absolute, *beside], [whole, *beside] if beside else [])
