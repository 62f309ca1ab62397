"""clevrd version: prints the version."""

from __future__ import annotations

import argparse

from clevrd import __version__
from clevrd.cli.lines import print_line


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Add no argument."""


def run(_: argparse.Namespace) -> int:
    """Print the version."""
    print_line(f"clevrd {__version__}")
    return 0
