"""Results of a scenario: figures with their spread, and targets that hold or fail.

No running and no printing here: scenarios make these values, report.py shows them.
"""

import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec


class Figure(msgspec.Struct, frozen=True):
    """One measured number of one server.

    values: one for each run; `value` is their median.
    note: a warning to read before quoting the figure, such as lost messages; "" without one.
    command: the load generator's command line, if there was one.
    """

    subject: str
    name: str
    unit: str
    values: list[float]
    note: str = ""
    command: str = ""

    @property
    def value(self) -> float:
        """Return the median of the runs."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Return the lowest and the highest run."""
        return min(self.values), max(self.values)


class Check(msgspec.Struct, frozen=True):
    """One comparison of a target; the measured value is None if none was measured."""

    what: str
    measured: float | None
    sign: Literal["<=", ">=", "=="]
    limit: float

    @property
    def holds(self) -> bool:
        """True when there is a measured value, on the right side of the limit."""
        if self.measured is None:
            return False
        if self.sign == "==":
            return self.measured == self.limit
        return self.measured <= self.limit if self.sign == "<=" else self.measured >= self.limit

    def __str__(self) -> str:
        measured = "nothing" if self.measured is None else f"{self.measured:,.4g}"
        return f"{self.what} {measured} {self.sign} {self.limit:,.4g}"


def at_most(what: str, measured: float | None, limit: float) -> Check:
    """Return a check that the value does not exceed the limit."""
    return Check(what, measured, "<=", limit)


def at_least(what: str, measured: float | None, limit: float) -> Check:
    """Return a check that the value reaches the limit."""
    return Check(what, measured, ">=", limit)


def exactly(what: str, measured: float | None, wanted: float) -> Check:
    """Return a check that a count equals ``wanted``."""
    return Check(what, measured, "==", wanted)


class Target(msgspec.Struct, frozen=True):
    """A promise: all `checks` hold, or, on a machine too slow for them, all `ratios`."""

    name: str
    checks: list[Check]
    ratios: list[Check] = []

    @property
    def holds(self) -> bool:
        """True when the promise is kept."""
        by_ratio = bool(self.ratios) and all(check.holds for check in self.ratios)
        return all(check.holds for check in self.checks) or by_ratio


class Point(msgspec.Struct, frozen=True):
    """One point of a chart."""

    x: float
    y: float
    is_clean: bool = True


class Series(msgspec.Struct, frozen=True):
    """One line of a chart; `chart` says which."""

    chart: str
    name: str
    points: list[Point]


class Outcome(msgspec.Struct):
    """All results of one scenario."""

    figures: list[Figure] = []
    targets: list[Target] = []
    series: list[Series] = []
    skipped: list[str] = []

    @property
    def holds(self) -> bool:
        """True when no target failed."""
        return all(target.holds for target in self.targets)


class Record(msgspec.Struct):
    """A results file."""

    scenario: str
    about: str
    command: str
    taken: str
    machine: dict[str, str]
    servers: dict[str, str]
    outcome: Outcome


def ratio(measured: float, baseline: float) -> float | None:
    """Return measured / baseline; None if one of them is 0."""
    return measured / baseline if measured and baseline else None


def median(values: Sequence[float]) -> float:
    """Return the median; 0 of no values."""
    return statistics.median(values) if values else 0.0
