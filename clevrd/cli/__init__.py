"""The command line: serve, publish, subscribe, health, checkconfig, version. No protocol here."""

from clevrd.cli.command_line import main

__all__ = ["main"]
