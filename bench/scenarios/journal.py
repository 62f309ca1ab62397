"""A journal beside none: what it costs that messages outlive a power cut."""

from typing import Final

from bench import runs, servers
from bench.generator import Option, Report
from bench.results import Figure, Outcome, Target, at_least, at_most, ratio
from bench.runs import Run, Variant

STEADY: Final[dict[str, Option]] = {
    "subs": 1,
    "pub_kind": "ws",
    "pubs": 1,
    "seconds": 3,
    "warmup": 0.5,
}
RATES: Final = (1_000, 20_000)
ROUNDS: Final = 3
# CPU that a journaled message may cost at 20,000/s, and the p99 of a quiet machine at 1,000/s.
MAX_CPU_US: Final = 12.0
MAX_P99_MS: Final = 3.0
BATCHES: Final[dict[str, Option]] = {
    "subs": 1,
    "pub_kind": "batch",
    "pub_path": "/publish/batch",
    "batch": 500,
    "pubs": 4,
    "rate": 0,
    "seconds": 3,
    "warmup": 0.5,
    "drain": 5,
}
MIN_BATCHED: Final = 100_000


@runs.scenario("journal")
def journal(_settings: runs.Settings) -> Outcome:
    """A message's latency and CPU with a journal and without one, and batches as fast as may be."""
    outcome = Outcome()
    for rate in RATES:
        plain, journaled = (Variant(f"{kind.name} at {rate:,}/s", kind) for kind in _KINDS)
        found = runs.in_turn([plain, journaled], ROUNDS, **STEADY, rate=rate)
        for these in found.values():
            outcome.figures += runs.latency_figures(these, lambda r: r.fast.latency_ms)
            outcome.figures.append(runs.figure("CPU a message", "us", these, _cpu_us))
        without, with_it = found.values()
        outcome.figures.append(
            Figure(
                journaled.name,
                "CPU of that without a journal",
                "x",
                [
                    ratio(_cpu_us(one.report), _cpu_us(other.report)) or 0
                    for one, other in zip(with_it, without, strict=True)
                ],
            )
        )
        outcome.targets.append(_target(rate, with_it))
    batched = [runs.run(Variant(f"{kind.name}, batches", kind), **BATCHES) for kind in _KINDS]
    for one in batched:
        outcome.figures.append(runs.figure("publishes", "/s", [one], lambda r: r.publish.per_s))
        outcome.figures.append(runs.figure("CPU a message", "us", [one], _cpu_us))
    outcome.targets.append(
        Target(
            "journaled batches, fsync before the answer",
            [
                runs.unclean(batched[1:]),
                at_least("messages/s", batched[1].report.publish.per_s, MIN_BATCHED),
            ],
        )
    )
    return outcome


_KINDS: Final = (servers.CLEVRD, servers.JOURNAL)


def _cpu_us(report: Report) -> float:
    return report.cpu.server_s * 1e6 / max(report.publish.messages, 1)


def _target(rate: int, these: list[Run]) -> Target:
    bound = (
        at_most("p99 ms", runs.p99(these), MAX_P99_MS)
        if rate == min(RATES)
        else at_most("us of CPU a message", runs.middle(these, _cpu_us), MAX_CPU_US)
    )
    return Target(f"journaled, one reader, {rate:,}/s", [runs.unclean(these), bound])
