"""Draws series as an SVG file: lines over two logarithmic axes. No measuring, no dependencies."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from bench.results import Point, Series

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 80, 150, 44, 56
# Colours that people who can't tell red from green still tell apart (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Axis:
    """A logarithmic scale from values to pixels."""

    low: float
    high: float
    from_px: float
    to_px: float

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.from_px + share * (self.to_px - self.from_px)

    def ticks(self) -> list[float]:
        """Return the powers of ten on the axis."""
        first, last = round(math.log10(self.low)), round(math.log10(self.high))
        return [10.0**power for power in range(first, last + 1)]


def axis_over(values: Iterable[float], from_px: float, to_px: float) -> Axis:
    """Return an axis of whole decades around the values."""
    known = [value for value in values if value > 0] or [1.0]
    low = 10.0 ** math.floor(math.log10(min(known)))
    high = 10.0 ** math.ceil(math.log10(max(known)))
    return Axis(low, high if high > low else low * 10, from_px, to_px)


def short(value: float) -> str:
    """Return a tick's label: 0.1, 10, 100k, 1M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """Return a text element."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return a grid line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="#d8d8d8"/>'


def grid(x: Axis, y: Axis) -> list[str]:
    """Return grid lines with their labels."""
    parts: list[str] = []
    for value in x.ticks():
        at = x.at(value)
        parts += [line(at, y.from_px, at, y.to_px), text(at, y.from_px + 18, short(value))]
    for value in y.ticks():
        at = y.at(value)
        parts += [
            line(x.from_px, at, x.to_px, at),
            text(x.from_px - 8, at + 4, short(value), "end"),
        ]
    return parts


def marker(x: float, y: float, colour: str, point: Point) -> str:
    """Return a dot, hollow if messages were lost or the server did not keep up."""
    fill = colour if point.is_clean else "#ffffff"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}"/>'


def curve(series: Series, colour: str, x: Axis, y: Axis) -> list[str]:
    """Return one line with its dots."""
    points = [point for point in series.points if point.x > 0 and point.y > 0]
    places = [(x.at(point.x), y.at(point.y)) for point in points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    drawn = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    dots = [marker(*place, colour, point) for place, point in zip(places, points, strict=True)]
    return [drawn, *dots]


def legend(index: int, name: str, colour: str) -> list[str]:
    """Return a line of the legend."""
    at = TOP + 12 + 22 * index
    left = WIDTH - RIGHT + 18
    square = f'<rect x="{left}" y="{at - 9}" width="12" height="12" fill="{colour}"/>'
    return [square, text(left + 20, at + 1, name, "start")]


def svg(title: str, x_label: str, y_label: str, lines: Sequence[Series]) -> str:
    """Return a chart as SVG text."""
    points = [point for series in lines for point in series.points]
    x = axis_over((point.x for point in points), LEFT, WIDTH - RIGHT)
    y = axis_over((point.y for point in points), HEIGHT - BOTTOM, TOP)
    middle_y = (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 24, title, "start", 'font-weight="bold"'),
        *grid(x, y),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label),
        text(18, middle_y, y_label, "middle", f'transform="rotate(-90 18 {middle_y:.0f})"'),
    ]
    for index, series in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        parts += [*curve(series, colour, x, y), *legend(index, series.name, colour)]
    return "\n".join([*parts, "</svg>", ""])
