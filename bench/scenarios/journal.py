"""A journal beside none, and beside its engine alone: what it costs that messages outlive it."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from bench import engines, generator, machine, runs, servers
from bench.engines import Engine
from bench.generator import Option, Report
from bench.results import Figure, Outcome, Target, at_least, at_most, median, ratio
from bench.runs import Run
from bench.servers import Kind

STEADY: Final[dict[str, Option]] = {
    "subs": 1,
    "pub_kind": "ws",
    "pubs": 1,
    "seconds": 3,
    "warmup": 0.5,
}
RATES: Final = (1_000, 20_000)
ROUNDS: Final = 3
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
# How long an engine's own client may take.
_CLIENT_S: Final = 60.0


@dataclass(frozen=True)
class Bounds:
    """The promise for an engine with one node, on a quiet machine."""

    cpu_us: float
    p99_ms: float
    batched_per_s: float = 0.0


# CPU that a message at 20,000/s may cost more with the journal than without, in the same run; the
# p99 at 1,000/s; messages/s in batches. The message alone costs 13 to 40 us, as the machine goes.
BOUNDS: Final = {
    "sqlite": Bounds(12.0, 3.0, 100_000),
    "redis": Bounds(12.0, 3.0),
    "nats": Bounds(12.0, 5.0),
    "kafka": Bounds(16.0, 10.0),
}


class Alone(msgspec.Struct, frozen=True):
    """An engine's own client, as `bench.peers.log_client` prints it."""

    wrong: int
    p50: float
    p99: float
    cpu_us: float


@dataclass(frozen=True)
class Subject:
    """One way to keep messages: no engine, or an engine with so many nodes."""

    engine: Engine | None
    nodes: int = 1

    @property
    def name(self) -> str:
        """Its name in figures."""
        if self.engine is None:
            return servers.CLEVRD.name
        several = "" if self.nodes == 1 else f", {self.nodes} nodes"
        return f"{servers.CLEVRD.name}, {self.engine.name}{several}"


@runs.scenario("journal")
def journal(_settings: runs.Settings) -> Outcome:
    """Per engine and nodes: latency and CPU at 1,000/s and 20,000/s, and batches at their fastest.

    With two nodes the publisher is connected to one and the reader to the other.
    """
    outcome = Outcome()
    outcome.skipped += [f"{each.name}: {why}" for each in engines.ALL if (why := each.missing())]
    present = [each for each in engines.ALL if not each.missing()]
    subjects = [Subject(None)]
    subjects += [Subject(engine, nodes) for engine in present for nodes in engine.nodes]
    for rate in RATES:
        _at_rate(outcome, subjects, present, rate)
    for subject in subjects:
        batched = run(subject, BATCHES)
        outcome.figures.append(runs.figure("batches", "/s", [batched], lambda r: r.publish.per_s))
        outcome.figures.append(runs.figure("batches, CPU a message", "us", [batched], cpu_us))
        bounds = _bounds(subject)
        if bounds is not None and bounds.batched_per_s:
            fastest = at_least("messages/s", batched.report.publish.per_s, bounds.batched_per_s)
            outcome.targets.append(
                Target(f"{subject.name}, batches", [runs.unclean([batched]), fastest])
            )
    return outcome


def _at_rate(outcome: Outcome, subjects: list[Subject], present: list[Engine], rate: int) -> None:
    """Add the figures of all subjects at one rate, and of the engines alone."""
    found: dict[Subject, list[Run]] = {each: [] for each in subjects}
    alone: dict[str, list[Alone]] = {engine.name: [] for engine in present}
    for _ in range(ROUNDS):
        for subject in subjects:
            found[subject].append(run(subject, {**STEADY, "rate": rate}))
        for engine in present:
            alone[engine.name].append(run_alone(engine, rate))
    plain = [cpu_us(each.report) for each in found[subjects[0]]]
    for subject, these in found.items():
        at = f" at {rate:,}/s"
        outcome.figures += [
            msgspec.structs.replace(figure, name=figure.name + at)
            for figure in (
                *runs.latency_figures(these, lambda r: r.fast.latency_ms)[:2],
                runs.figure("CPU a message", "us", these, cpu_us),
            )
        ]
        costs = [cpu_us(each.report) for each in these]
        if subject.engine is None:
            outcome.targets.append(Target(subject.name + at, [runs.unclean(these)]))
            continue
        outcome.figures.append(
            _times("CPU, times that without a journal", subject, at, costs, plain)
        )
        own = alone[subject.engine.name]
        bare = [each.cpu_us for each in own]
        outcome.figures.append(_times("CPU, times its client's alone", subject, at, costs, bare))
        outcome.targets.append(_target(subject, rate, these, plain))
    for name, these_alone in alone.items():
        client = f"{name} alone"
        for figure_name, unit, values in (
            ("p50", "ms", [each.p50 for each in these_alone]),
            ("p99", "ms", [each.p99 for each in these_alone]),
            ("CPU a message", "us", [each.cpu_us for each in these_alone]),
        ):
            outcome.figures.append(Figure(client, f"{figure_name} at {rate:,}/s", unit, values))
        faults = at_most("faults", sum(each.wrong for each in these_alone), 0)
        outcome.targets.append(Target(f"{client} at {rate:,}/s", [faults]))


def _times(name: str, subject: Subject, at: str, costs: list[float], others: list[float]) -> Figure:
    values = [ratio(one, other) or 0 for one, other in zip(costs, others, strict=True)]
    return Figure(subject.name, name + at, "x", values)


def _bounds(subject: Subject) -> Bounds | None:
    if subject.engine is None or subject.nodes > 1:
        return None
    return BOUNDS.get(subject.engine.name)


def _target(subject: Subject, rate: int, these: list[Run], plain: list[float]) -> Target:
    """Return the promise at a rate; with several nodes that all arrives, once and in order.

    Args:
        plain: CPU of a message without a journal, in the same rounds.
    """
    checks = [runs.unclean(these)]
    bounds = _bounds(subject)
    if bounds is not None and rate == min(RATES):
        checks.append(at_most("p99 ms", runs.p99(these), bounds.p99_ms))
    elif bounds is not None:
        added = [cpu_us(each.report) - bare for each, bare in zip(these, plain, strict=True)]
        checks.append(at_most("us of CPU more than without", median(added), bounds.cpu_us))
    return Target(f"{subject.name}, {rate:,}/s", checks)


def cpu_us(report: Report) -> float:
    """Return the CPU of all nodes for each message that was published."""
    return report.cpu.server_s * 1e6 / max(report.publish.messages, 1)


# --- runs ----------------------------------------------------------------------------------------


def run(subject: Subject, options: dict[str, Option]) -> Run:
    """Start a fresh engine and nodes, put the load on them, and return the run."""
    with ExitStack() as stack:
        setting = ""
        if subject.engine is not None:
            setting = stack.enter_context(placed(subject.engine))
        nodes = [
            stack.enter_context(servers.serving(node_kind(setting))) for _ in range(subject.nodes)
        ]
        pids = ",".join(str(node.pid) for node in nodes)
        others: dict[str, Option] = {
            "server_pids": pids,
            "pub_target": f"127.0.0.1:{nodes[-1].port}",
        }
        load = generator.start({**options, **nodes[0].options(), **others})
        return Run(subject.name, load.report(), load.command)


@contextmanager
def placed(engine: Engine) -> Iterator[str]:
    """Keep a fresh log ready, and give the setting ``journal``."""
    with (
        tempfile.TemporaryDirectory(prefix=f"bench-{engine.name}-") as name,
        engine.place(Path(name)) as setting,
    ):
        yield setting


def node_kind(journal: str, *words: str) -> Kind:
    """Return a daemon with a journal, or without one where it is empty."""

    def command(port: int, directory: Path) -> list[str]:
        own = ["--journal", journal] if journal else []
        return [*servers.clevrd_command(port, directory), *own, *words]

    return Kind("clevrd", command, options=servers.OURS)


def run_alone(engine: Engine, rate: int) -> Alone:
    """Run the engine's own client on the server's core, against a fresh log."""
    with placed(engine) as setting, machine.pinned_to(machine.cores().server):
        command = servers.python_module("bench.peers.log_client", engine.name, setting)
        done = subprocess.run(  # noqa: S603 - our own script
            [*command, "--rate", str(rate), "--seconds", str(STEADY["seconds"])],
            capture_output=True,
            check=True,
            timeout=_CLIENT_S,
            cwd=servers.ROOT,
        )
    return msgspec.json.decode(done.stdout, type=Alone)
