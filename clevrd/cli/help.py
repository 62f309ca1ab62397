"""clevrd help: lists its own argument. `argv` turns the command itself into COMMAND --help."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for a command's name."""
    parser.add_argument("name", nargs="?", metavar="COMMAND", help="the command to explain")


def run(_: argparse.Namespace) -> int:
    """Do nothing: `argv.with_command` replaces this command by --help."""
    return 0
