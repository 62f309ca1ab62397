"""A noisy tenant beside a quiet one: what the quiet tenant's readers notice of it.

The noisy tenant has a thousand subscribers that never read, and goes on publishing messages of
64 KiB. Those are received, checked and put into a ring whoever reads them. So that stands beside
it as the floor: the same publishes, without a subscriber.
"""

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from bench import generator, runs, servers
from bench.generator import Option, Report
from bench.results import Figure, Outcome, Target, at_most, exactly, median, ratio
from bench.runs import Run
from bench.servers import Kind, Server

NOISY: Final = "noisy"
STALLED: Final = 1_000
LARGE_BYTES: Final = 65_536
# Messages of 64 KiB a second: with as many readers that read it would be 1.3 GB/s.
NOISY_RATE: Final = 20
# The smallest memory that may be set, 38 MiB of it for rings: the noisy tenant fills them before.
MEMORY_MB: Final = 64
FILLING: Final = 700
PER_BATCH: Final = 50
SECONDS: Final = 3
SETTLE_S: Final = 1.0
QUIET: Final[dict[str, Option]] = {
    "subs": 20,
    "rate": 2_000,
    "pub_kind": "ws",
    "pubs": 1,
    "seconds": SECONDS,
    "warmup": 0.5,
}
ROUNDS: Final = 5
LIMIT: Final = 1.1
SMALL: Final[Kind] = replace(servers.CLEVRD, env={"MAX_MEMORY_MB": str(MEMORY_MB)})
# Name of the variant -> subscribers of the noisy tenant that never read; None without that tenant.
VARIANTS: Final[Mapping[str, int | None]] = {
    "clevrd alone": None,
    "clevrd, floor": 0,
    "clevrd, neighbour": STALLED,
}


@dataclass(frozen=True)
class Beside:
    """A run of the quiet tenant's load, and what /metrics said then."""

    run: Run
    metrics: dict[str, Any]

    @property
    def ring_messages(self) -> int:
        """Return how many messages the quiet tenant's ring holds."""
        (topic,) = [each for each in self.metrics["topics"] if each["tenant_id"] != NOISY]
        held: int = topic["buffered_messages"]
        return held

    @property
    def slow_neighbours(self) -> int:
        """Return how many of the noisy tenant's subscribers are slow."""
        slow: int = self.metrics["slow_subscribers"]
        return slow

    @property
    def is_throttled(self) -> bool:
        """Return whether the quiet tenant's topic is throttled."""
        return any(
            not name.startswith(f"{NOISY}:")
            for name in self.metrics["throttler_metrics"]["throttled"]
        )


@runs.scenario("neighbour")
def neighbour(_settings: runs.Settings) -> Outcome:
    """20 readers at 2,000/s, alone and beside another tenant's 1,000 stalled readers of 64 KiB."""
    found: dict[str, list[Beside]] = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name, stalled in VARIANTS.items():
            found[name].append(_measure(name, stalled))
    alone, floor, beside = found.values()
    outcome = Outcome()
    for these in found.values():
        of_variant = [each.run for each in these]
        outcome.figures += runs.latency_figures(of_variant, lambda r: r.fast.latency_ms)
    for name, compared in (("floor", floor), ("neighbour", beside)):
        for what in ("p50", "p99"):
            outcome.figures.append(
                Figure(
                    f"clevrd, {name}", f"{what} of that alone", "x", _ratios(compared, alone, what)
                )
            )
    sent = int(QUIET["rate"]) * SECONDS
    outcome.targets.append(
        Target(
            f"a quiet tenant beside {STALLED:,} stalled readers of {LARGE_BYTES:,} bytes",
            [
                runs.unclean([each.run for each in [*alone, *beside]]),
                exactly("shortest ring", min(each.ring_messages for each in beside), sent),
                exactly(
                    "least neighbours that are slow",
                    min(each.slow_neighbours for each in beside),
                    STALLED,
                ),
                at_most("times throttled", sum(each.is_throttled for each in beside), 0),
                at_most("x the p50 alone", median(_ratios(beside, alone, "p50")), LIMIT),
                at_most("x the p99 alone", median(_ratios(beside, alone, "p99")), LIMIT),
            ],
        )
    )
    return outcome


def _ratios(these: list[Beside], alone: list[Beside], what: str) -> list[float]:
    """Return a latency as a multiple of that of the run alone, round by round."""
    pairs = zip(these, alone, strict=True)
    return [
        ratio(_ms(one.run.report, what), _ms(other.run.report, what)) or 0 for one, other in pairs
    ]


def _ms(report: Report, what: str) -> float:
    latency = report.fast.latency_ms
    return latency.p50 if what == "p50" else latency.p99


def _measure(name: str, stalled: int | None) -> Beside:
    """Run the quiet tenant's load on a fresh server, beside a noisy tenant or without one."""
    with servers.serving(SMALL) as server:
        if stalled is None:
            return _quiet(name, server)
        _fill(server)
        with _noise(server, stalled):
            return _quiet(name, server)


def _quiet(name: str, server: Server) -> Beside:
    run = runs.run_on(server, runs.Variant(name, SMALL), **QUIET)
    return Beside(run, _ask(server, "GET", "/metrics"))


@contextmanager
def _noise(server: Server, stalled: int) -> Iterator[None]:
    """Have the noisy tenant subscribe and publish meanwhile."""
    with generator.meanwhile(
        {
            **server.options(),
            "stalled": stalled,
            "subs": 0,
            "topics": 1,
            "prefix": NOISY,
            "sub_path": f"/subscribe?topic=%t&tenant={NOISY}&buffer=10&last=10",
            "pub_kind": "ws",
            "pub_path": f"/publish?tenant={NOISY}",
            "pubs": 1,
            "data_bytes": LARGE_BYTES,
            "rate": NOISY_RATE,
            "seconds": 4 * SECONDS,
            "connect_window": 64,
        }
    ):
        # Until the buffers of all its subscribers are full, which is when they stall.
        time.sleep(SETTLE_S)
        yield


def _fill(server: Server) -> None:
    """Fill the rings with the noisy tenant's messages; its subscribers then stall as they join."""
    line = json.dumps({"topic": f"{NOISY}0", "data": "x" * LARGE_BYTES})
    body = "\n".join([line] * PER_BATCH).encode()
    headers = {"Content-Type": "application/x-ndjson", "X-Tenant-ID": NOISY}
    for _ in range(FILLING // PER_BATCH):
        _ask(server, "POST", "/publish/batch", body, headers)


def _ask(
    server: Server, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
) -> Any:
    """Return the JSON of an answer."""
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        client.request(method, path, body, dict(headers))
        return json.load(client.getresponse())
    finally:
        client.close()
