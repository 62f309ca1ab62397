"""clevrd help: what a command takes. `argv` reads it as COMMAND --help; this is what help shows."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a command."""
    parser.add_argument("name", nargs="?", metavar="COMMAND", help="the command to explain")


def run(_: argparse.Namespace) -> int:
    """Do nothing: `argv.with_command` has put --help in its place."""
    return 0
