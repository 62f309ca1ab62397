"""Shows outcomes on a terminal and saves them as files. results.py explains them."""

import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from bench import chart
from bench.results import Figure, Outcome, Record, Target

RESULTS = Path(__file__).parent / "results"


def number(value: float) -> str:
    """Return a number with three digits or more, as text."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def spread(figure: Figure) -> str:
    """Return the range over several runs, "" for a single one."""
    low, high = figure.spread
    return f"[{number(low)} .. {number(high)}]" if len(figure.values) > 1 else ""


def figure_line(figure: Figure, previous: Figure | None) -> str:
    """Return one line of the table; a note that repeats is shown once."""
    value = f"{number(figure.value)} {figure.unit}"
    is_said = previous is not None and previous.note == figure.note
    note = f"  ({figure.note})" if figure.note and not is_said else ""
    line = f"  {figure.subject:<22} {figure.name:<34} {value:>14}  {spread(figure)}{note}"
    return line.rstrip()


def target_line(target: Target) -> str:
    """Return whether a target holds, and by which comparisons."""
    verdict = "holds" if target.holds else "FAILS"
    said = "; ".join(str(check) for check in target.checks)
    if target.ratios:
        said += "; or " + ", ".join(str(check) for check in target.ratios)
    return f"  {verdict}  {target.name}: {said}"


def show(name: str, about: str, outcome: Outcome, took_s: float) -> None:
    """Print a scenario's figures and targets."""
    lines = [f"{name}: {about} [{took_s:.0f} s]"]
    before = [None, *outcome.figures]
    lines += [figure_line(one, last) for last, one in zip(before, outcome.figures, strict=False)]
    lines += [f"  skipped  {line}" for line in outcome.skipped]
    lines += [target_line(target) for target in outcome.targets]
    sys.stdout.write("\n".join(lines) + "\n\n")
    sys.stdout.flush()


def show_targets(targets: Iterable[Target]) -> None:
    """Print the table of all targets."""
    sys.stdout.write("targets\n" + "\n".join(target_line(target) for target in targets) + "\n")


def save(record: Record, directory: Path = RESULTS) -> Path:
    """Write a scenario's results file; return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{record.scenario}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return path


# Name of a chart -> its file and the labels of its axes.
CHARTS = {
    "p99 ms by rate, 100 readers": ("latency.svg", "messages/s published", "p99, ms"),
    "deliveries/s by readers": ("deliveries.svg", "readers of one topic", "deliveries/s"),
}


def draw(outcome: Outcome, directory: Path = RESULTS) -> None:
    """Write the charts for which an outcome has series."""
    for title, (file_name, x_label, y_label) in CHARTS.items():
        lines = [series for series in outcome.series if series.chart == title]
        if lines:
            (directory / file_name).write_text(chart.svg(title, x_label, y_label, lines))
