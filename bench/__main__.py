"""`python -m bench [NAME...]`: run scenarios, show and save their results, check the targets."""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from bench import build, machine, report, runs, servers
from bench import scenarios as _all_of_them  # noqa: F401 - importing registers them
from bench.build import CannotBuild
from bench.generator import GeneratorFailed
from bench.results import Outcome, Record, Target, exactly
from bench.servers import CannotStart

EXIT_TARGET_FAILED = 1
EXIT_CANNOT_RUN = 2


def parse_arguments() -> argparse.Namespace:
    """Return the command line; without names it has every scenario that is not separate."""
    listing = "\n".join(f"  {name:<14} {runs.about(name)}" for name in runs.SCENARIOS)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Measure clevrd. Scenarios:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios to run (default: all)")
    parser.add_argument(
        "--results", type=Path, default=report.RESULTS, help="where to keep results"
    )
    parser.add_argument("--minutes", type=float, default=60, help="length of the soak")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(runs.SCENARIOS)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    arguments.names = arguments.names or [n for n in runs.SCENARIOS if n not in runs.SEPARATE]
    return arguments


def record_of(name: str, outcome: Outcome) -> Record:
    """Return an outcome with the machine, the versions and the command."""
    # A subject may be a variant of a server, as in "clevrd 32 pipelined".
    subjects = {figure.subject.replace(",", " ").split()[0] for figure in outcome.figures}
    return Record(
        scenario=name,
        about=runs.about(name),
        command=f"python -m bench {name}",
        taken=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        machine=machine.describe(),
        servers={kind.name: kind.version() for kind in servers.ALL if kind.name in subjects},
        outcome=outcome,
    )


def run_one(name: str, settings: runs.Settings, results: Path) -> Outcome:
    """Run a scenario, show its outcome and save it."""
    began = time.monotonic()
    try:
        outcome = runs.SCENARIOS[name](settings)
    except (CannotStart, GeneratorFailed) as error:
        # This scenario has failed; the others still run.
        outcome = Outcome(targets=[Target(f"{name} could run: {error}", [exactly("ran", 0, 1)])])
    report.show(name, runs.about(name), outcome, time.monotonic() - began)
    report.save(record_of(name, outcome), results)
    report.draw(outcome, results)
    return outcome


def run_all(names: list[str], settings: runs.Settings, results: Path) -> int:
    """Run scenarios one after the other; return the exit code."""
    build.build_all()
    began = time.monotonic()
    outcomes = [run_one(name, settings, results) for name in names]
    report.show_targets(target for outcome in outcomes for target in outcome.targets)
    sys.stdout.write(f"\n{len(names)} scenarios in {time.monotonic() - began:.0f} s\n")
    return 0 if all(outcome.holds for outcome in outcomes) else EXIT_TARGET_FAILED


def main() -> int:
    """Run the scenarios of the command line; print one line if they can't be run."""
    arguments = parse_arguments()
    try:
        settings = runs.Settings(soak_minutes=arguments.minutes)
        return run_all(arguments.names, settings, arguments.results)
    except CannotBuild as error:
        sys.stderr.write(f"bench: {error}\n")
        return EXIT_CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
