"""What TLS costs: the same load over it and without it, in turns.

The load is Python's (`peers/tls_load`), since the generator in C speaks no TLS. It is slower than
the server over TLS too, so the figures are the server's CPU for a delivery and for a publish, and
their ratios; latencies have the load's own encryption in them.
"""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from bench import machine, runs, servers
from bench.results import Check, Figure, Outcome, Target, at_most, median, ratio
from bench.servers import Kind

ROUNDS: Final = 3
TIMEOUT_S: Final = 60.0
# Of the server's CPU without TLS; measured: see results/tls.json.
DELIVERY_LIMIT: Final = 2.0
PUBLISH_LIMIT: Final = 2.0
# At most half of what the load keeps up with: otherwise each write carries more messages.
FAN_OUT: Final = ("--subs", "40", "--rate", "150", "--seconds", "2")
PUBLISHING: Final = ("--pubs", "16", "--seconds", "2")


class Seen(msgspec.Struct, frozen=True):
    """What the load prints."""

    published: int
    delivered: int
    missing: int
    faults: int
    p50: float
    p99: float
    server_s: float
    load_share: float

    @property
    def us_per_delivery(self) -> float:
        """Server CPU for each message handed to a reader, the publishes' included."""
        return self.server_s * 1e6 / max(self.delivered, 1)

    @property
    def us_per_publish(self) -> float:
        """Server CPU for each publish, with its delivery to one reader."""
        return self.server_s * 1e6 / max(self.published, 1)


@dataclass(frozen=True)
class Both:
    """Runs of one load, in turns: without TLS and over it."""

    plain: list[Seen]
    over_tls: list[Seen]

    def ratios(self, take: Callable[[Seen], float]) -> list[float]:
        """Return TLS as a multiple of without, round by round."""
        pairs = zip(self.over_tls, self.plain, strict=True)
        return [ratio(take(one), take(other)) or 0 for one, other in pairs]


def secure_command(port: int, directory: Path) -> list[str]:
    """Return the command of a daemon with a certificate of its own, for P-256."""
    # The import needs the package cryptography.
    from clevrd.tls.self_signed import self_signed

    made = self_signed(["localhost"], days=1)
    files = (directory / "cert.pem", directory / "key.pem")
    for path, content in zip(files, (made.certificate, made.key), strict=True):
        path.touch(mode=0o600)
        path.write_bytes(content)
    cert, key = map(str, files)
    return [
        *servers.clevrd_command(port, directory),
        *("--tls-cert-file", cert, "--tls-key-file", key),
    ]


PLAIN: Final[Kind] = servers.CLEVRD
SECURE: Final[Kind] = replace(servers.CLEVRD, command=secure_command)


@runs.scenario("tls")
def tls(_settings: runs.Settings) -> Outcome:
    """40 readers at 150/s, and publishes over 16 connections: the server's CPU over TLS."""
    fan_out, publishing = _both(FAN_OUT), _both(PUBLISHING)
    outcome = Outcome(
        figures=[
            *_figures("delivery", fan_out, lambda seen: seen.us_per_delivery),
            *_figures("publish", publishing, lambda seen: seen.us_per_publish),
        ]
    )
    for name, these in (("clevrd", fan_out.plain), ("clevrd over TLS", fan_out.over_tls)):
        outcome.figures += [
            Figure(name, "p50, the load's TLS included", "ms", [seen.p50 for seen in these]),
            Figure(name, "p99, the load's TLS included", "ms", [seen.p99 for seen in these]),
            Figure(name, "the load's share of its core", "", [seen.load_share for seen in these]),
        ]
    outcome.targets = [
        Target(
            "a delivery over TLS, 40 readers",
            [
                _unclean(fan_out),
                at_most("x the CPU without", median(fan_out.ratios(_of_delivery)), DELIVERY_LIMIT),
            ],
        ),
        Target(
            "a publish over TLS, 16 connections",
            [
                _unclean(publishing),
                at_most("x the CPU without", median(publishing.ratios(_of_publish)), PUBLISH_LIMIT),
            ],
        ),
    ]
    return outcome


def _of_delivery(seen: Seen) -> float:
    return seen.us_per_delivery


def _of_publish(seen: Seen) -> float:
    return seen.us_per_publish


def _figures(what: str, both: Both, take: Callable[[Seen], float]) -> list[Figure]:
    name = f"server CPU per {what}"
    return [
        Figure("clevrd", name, "us", list(map(take, both.plain))),
        Figure("clevrd over TLS", name, "us", list(map(take, both.over_tls))),
        Figure("clevrd over TLS", f"{name}, of that without", "x", both.ratios(take)),
    ]


def _unclean(both: Both) -> Check:
    """Return the check that each message came once and in order."""
    runs_with_faults = sum(bool(seen.missing or seen.faults) for seen in both.plain + both.over_tls)
    return at_most("runs with faults", runs_with_faults, 0)


def _both(options: tuple[str, ...]) -> Both:
    both = Both([], [])
    for _ in range(ROUNDS):
        both.plain.append(_run(PLAIN, *options))
        both.over_tls.append(_run(SECURE, *options, "--tls"))
    return both


def _run(kind: Kind, *options: str) -> Seen:
    """Run the load on its core, against a fresh server."""
    with servers.serving(kind) as server, machine.pinned_to(machine.cores().load):
        at = ("--port", str(server.port), "--pid", str(server.pid))
        command = servers.python_module("bench.peers.tls_load", *at, *options)
        done = subprocess.run(  # noqa: S603 - our own script
            command, capture_output=True, check=True, timeout=TIMEOUT_S, cwd=servers.ROOT
        )
    return msgspec.json.decode(done.stdout, type=Seen)
