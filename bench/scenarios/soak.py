"""Endurance: hours of steady load with readers coming and going, and what leaks."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import generator, runs, servers
from bench.generator import Load, Option
from bench.results import Figure, Outcome, Target, at_most
from bench.runs import Run
from bench.servers import Server

STEADY: dict[str, Option] = {"subs": 100, "pub_kind": "http", "pubs": 8, "rate": 1000, "warmup": 5}
# One batch of readers that come, take what there is for a while, and leave.
VISITORS: dict[str, Option] = {"subs": 200, "pub_kind": "none", "hold": 2, "connect_window": 1}
SAMPLE_EVERY_S = 5.0
# Caches and the allocator settle in this first part; what grows after it is a leak.
SETTLING = 0.2
MB_PER_HOUR_LIMIT = 1.0


@dataclass(frozen=True)
class Sample:
    """The daemon's resources at one moment."""

    at_s: float
    rss_bytes: int
    descriptors: int


def sample(server: Server, began: float) -> Sample:
    """Return what the daemon holds now."""
    descriptors = sum(1 for _ in Path(f"/proc/{server.pid}/fd").iterdir())
    return Sample(time.monotonic() - began, server.rss_bytes(), descriptors)


def slope(samples: Sequence[Sample], take: Callable[[Sample], float]) -> float:
    """Return the growth a second, by least squares over what follows the settling."""
    kept = samples[int(len(samples) * SETTLING) :]
    if len(kept) < 2:
        return 0.0
    times = [one.at_s for one in kept]
    return statistics.linear_regression(times, [take(one) for one in kept]).slope


def watch(server: Server, steady: Load, visitors: dict[str, Option]) -> list[Sample]:
    """Send visitors, batch after batch, and sample between them until the steady load ends."""
    began = time.monotonic()
    samples: list[Sample] = []
    while steady.process.poll() is None:
        generator.start(visitors).report()
        # After each batch: its connections are to be gone, so the count is comparable.
        time.sleep(SAMPLE_EVERY_S)
        if steady.process.poll() is None:
            samples.append(sample(server, began))
    return samples


@runs.scenario("soak", is_separate=True)
def soak(settings: runs.Settings) -> Outcome:
    """An hour (--minutes) of steady load and passing readers: nothing lost, nothing grows?"""
    with servers.serving(servers.CLEVRD) as server:
        seconds = settings.soak_minutes * 60
        steady = generator.start({**STEADY, **server.options(), "seconds": seconds})
        samples = watch(server, steady, {**VISITORS, **server.options()})
        found = [Run("clevrd", steady.report(), steady.command)]
    return outcome_of(found, samples)


def outcome_of(found: Sequence[Run], samples: Sequence[Sample]) -> Outcome:
    """Return the figures and the promise of an hour without growth."""
    mb_per_hour = slope(samples, lambda one: one.rss_bytes) * 3600 / 1e6
    descriptors_per_hour = slope(samples, lambda one: one.descriptors) * 3600
    return Outcome(
        figures=[
            *runs.delivery_figures(found),
            Figure("clevrd", "growth of memory", "MB/h", [mb_per_hour]),
            Figure("clevrd", "growth of descriptors", "/h", [descriptors_per_hour]),
            Figure("clevrd", "resident set", "MB", [one.rss_bytes / 1e6 for one in samples]),
        ],
        targets=[
            Target(
                "soak",
                [
                    runs.unclean(found),
                    at_most("MB/h", mb_per_hour, MB_PER_HOUR_LIMIT),
                    at_most("descriptors/h", descriptors_per_hour, 1.0),
                ],
            )
        ],
    )
