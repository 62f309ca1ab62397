"""clevrd checkconfig: prints every setting, its value and the source of the value."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from clevrd import logs
from clevrd.cli.output import print_line
from clevrd.cli.settings import add_settings, load_settings, value_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting."""
    add_settings(parser)


def run(options: argparse.Namespace) -> int:
    """Print the settings that serve would use, and return the exit code."""
    loaded = load_settings(options)
    rows = [("setting", "value", "source")]
    for field, source in loaded.sources.items():
        rows.append((field, value_text(getattr(loaded.config, field)), source))
    for line in _columns(rows):
        print_line(line)
    for warning in loaded.warnings:
        logs.say(warning)
    return 0


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
