"""clevrd serve: runs the daemon and sets up its log."""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial
from importlib.util import find_spec

from clevrd import logs
from clevrd.cli.settings import add_settings, load_settings
from clevrd.config import LogFormat
from clevrd.errors import CannotStart
from clevrd.json_log import JsonFormatter

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting."""
    add_settings(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal stops the daemon, and return the exit code."""
    loaded = load_settings(options)
    logs.set_up_logging(loaded.config.log_level, _formatter(loaded.config.log_format))
    for warning in loaded.warnings:
        log.warning("setting ignored why=%s", warning)
    if find_spec("uvloop") is None:
        raise CannotStart(
            "The daemon needs uvloop, which is not installed; it has it on CPython for Linux and"
            " macOS. The client, clevrd.client, works without it."
        )
    # The import stands here so that a wrong setting is reported without waiting for the server's
    # modules.
    from clevrd.server.process import run as run_server

    return run_server(loaded, partial(load_settings, options))


def _formatter(log_format: LogFormat) -> logging.Formatter:
    for_journal = logs.is_journal(os.environ)
    if log_format == "json":
        return JsonFormatter(for_journal=for_journal)
    if logs.is_terminal():
        # https://no-color.org
        return logs.TerminalFormatter(has_colour=not os.environ.get("NO_COLOR"))
    return logs.EventFormatter(for_journal=for_journal)
