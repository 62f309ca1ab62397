"""What a load script on aiohttp's own client sees: that is what users write."""

import subprocess

import msgspec

from bench import machine, runs, servers
from bench.results import Figure, Outcome, Target, at_most
from bench.servers import Kind

TIMES = 2
TIMEOUT_S = 60


class Seen(msgspec.Struct, frozen=True):
    """What the script prints."""

    missing: int
    out_of_order: int
    p50: float
    p99: float


def run_script(kind: Kind) -> Seen:
    """Run the script on the load's core, against a fresh server."""
    module = "bench.peers.python_load"
    with servers.serving(kind) as server, machine.pinned_to(machine.cores().load):
        command = servers.python_module(module, "--url", f"http://127.0.0.1:{server.port}")
        done = subprocess.run(  # noqa: S603 - our own script
            command, capture_output=True, check=True, timeout=TIMEOUT_S, cwd=servers.ROOT
        )
    return msgspec.json.decode(done.stdout, type=Seen)


@runs.scenario("aiohttp-client")
def aiohttp_client(_settings: runs.Settings) -> Outcome:
    """50 readers and a publisher at 100/s on aiohttp's client: complete, in order, and how late?"""
    outcome = Outcome()
    for kind in (servers.CLEVRD, servers.NAIVE):
        seen = [run_script(kind) for _ in range(TIMES)]
        outcome.figures += [
            Figure(kind.name, "p50", "ms", [one.p50 for one in seen]),
            Figure(kind.name, "p99", "ms", [one.p99 for one in seen]),
        ]
        if kind is servers.CLEVRD:
            faults = sum(one.missing + one.out_of_order for one in seen)
            outcome.targets.append(Target("aiohttp's client", [at_most("faults", faults, 0)]))
    return outcome
