"""Publishing: messages a second by each way of publishing, with one reader that checks."""

from bench import runs, servers
from bench.generator import Option
from bench.results import Outcome, Point, Series, Target, at_least, at_most, ratio
from bench.runs import Run, Variant

CLOSED: dict[str, Option] = {
    "subs": 1,
    "pub_kind": "http",
    "rate": 0,
    "seconds": 1.2,
    "warmup": 0.3,
}
# A request that only aiohttp answers: what follows on its connection is aiohttp's, too.
THROUGH_AIOHTTP: dict[str, Option] = {"preface": "/health/live"}


@runs.scenario("publish-http")
def publish_http(_settings: runs.Settings) -> Outcome:
    """Single publishes over HTTP, as fast as answers come: 1, 32 and 256 connections, pipelined."""
    outcome = Outcome()
    variants = [
        Variant("clevrd 1", servers.CLEVRD, {"pubs": 1}),
        Variant("clevrd 32", servers.CLEVRD, {"pubs": 32}),
        Variant("clevrd 32 by aiohttp", servers.CLEVRD, {"pubs": 32, **THROUGH_AIOHTTP}),
        Variant("clevrd 32 pipelined", servers.CLEVRD, {"pubs": 32, "depth": 16}),
        Variant("clevrd 256", servers.CLEVRD, {"pubs": 256}),
        Variant("naive 32", servers.NAIVE, {"pubs": 32}),
    ]
    variants += [
        Variant(f"{one.name} 32", one.kind, {"pubs": 32})
        for one in runs.installed(outcome, servers.NCHAN)
    ]
    found = runs.in_turn(variants, 2, **CLOSED)
    for these in found.values():
        outcome.figures.append(runs.figure("publishes", "/s", these, lambda r: r.publish.per_s))
        outcome.figures.append(
            runs.figure("answer p99", "ms", these, lambda r: r.publish.answer_ms.p99)
        )
    outcome.targets.append(http_target(found))
    return outcome


def http_target(found: dict[str, list[Run]]) -> Target:
    """Return the promise for single publishes over 32 keep-alive connections."""
    ours, by_aiohttp, naive = (
        runs.middle(found[name], lambda report: report.publish.per_s)
        for name in ("clevrd 32", "clevrd 32 by aiohttp", "naive 32")
    )
    faster = at_least("x through aiohttp's router", ratio(ours, by_aiohttp), 3.0)
    whole = runs.unclean(found["clevrd 32"])
    return Target(
        "HTTP publish, 32 keep-alive connections",
        [whole, faster, at_least("publishes/s", ours, 50_000)],
        # 50,000 is promised of a machine on which the naive app reaches 20,000.
        [whole, faster, at_least("x the naive app", ratio(ours, naive), 2.5)],
    )


SOCKET: dict[str, Option] = {"subs": 1, "pub_kind": "ws", "pubs": 1, "seconds": 2, "warmup": 0.3}
SOCKET_RATES = (50_000, 100_000, 150_000, 200_000, 250_000, 300_000, 350_000, 400_000)
# Beyond this it is queueing, not delivering: where the knee is.
KNEE_P99_MS = 10.0


def knee(points: list[Point]) -> float:
    """Return the highest rate that was kept up with, complete and within KNEE_P99_MS."""
    return max((point.x for point in points if point.is_clean and point.y < KNEE_P99_MS), default=0)


@runs.scenario("publish-ws")
def publish_ws(_settings: runs.Settings) -> Outcome:
    """One publish socket, one topic, one reader: latency up a ladder of rates until it breaks."""
    outcome = Outcome()
    clevrd = Variant("clevrd", servers.CLEVRD)
    points: list[Point] = []
    steady = [runs.run(clevrd, **SOCKET, rate=100_000) for _ in range(3)]
    for rate in SOCKET_RATES:
        one = runs.run(clevrd, **SOCKET, rate=rate, drain=2)
        points.append(runs.latency_point(one, rate))
        if not points[-1].is_clean or points[-1].y > KNEE_P99_MS:
            break
    outcome.figures += runs.delivery_figures(steady)
    naive = [runs.run(Variant("naive", servers.NAIVE), **SOCKET, rate=0, window=64)]
    outcome.figures.append(runs.figure("deliveries at most", "/s", naive, lambda r: r.fast.per_s))
    outcome.series.append(Series("publish socket, 1 reader", "clevrd", points))
    outcome.targets += [
        Target(
            "WebSocket publish at 100,000/s, one reader",
            [runs.unclean(steady), at_most("p99 ms", runs.p99(steady), 5.0)],
        ),
        Target("WebSocket publish, the knee", [at_least("messages/s", knee(points), 200_000)]),
    ]
    return outcome


@runs.scenario("publish-batch")
def publish_batch(_settings: runs.Settings) -> Outcome:
    """Batches of 500 lines over two connections at 300,000 messages/s, one reader."""
    batches = Variant(
        "clevrd", servers.CLEVRD, {"pub_kind": "batch", "pub_path": "/publish/batch", "batch": 500}
    )
    load: dict[str, Option] = {"subs": 1, "pubs": 2, "seconds": 2, "warmup": 0.3, "drain": 2}
    ours = [runs.run(batches, **load, rate=300_000) for _ in range(3)]
    most = [runs.run(Variant("clevrd at most", batches.kind, batches.options), **load, rate=0)]
    return Outcome(
        figures=[
            *runs.delivery_figures(ours),
            runs.figure("publishes", "/s", most, lambda report: report.publish.per_s),
        ],
        targets=[
            Target(
                "batches at 300,000 messages/s",
                [
                    runs.unclean(ours),
                    at_least(
                        "messages/s", runs.middle(ours, lambda r: r.publish.per_s), 0.99 * 300_000
                    ),
                ],
            )
        ],
    )
