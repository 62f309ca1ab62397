"""The command line: a module for each command, and what they share. No protocol here."""

from clevrd.cli.command_line import main

__all__ = ["main"]
