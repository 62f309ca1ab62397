"""clevrd top: shows who is slow, who is loud and what is refused, and refreshes.

On a terminal it has the screen to itself; elsewhere it prints one view after the other.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from clevrd.cli.daemon_asking import Daemon, add_daemon, daemon_of
from clevrd.cli.failures import CommandFailed, NoServer
from clevrd.cli.lines import print_line
from clevrd.cli.top_text import cut, screen, shown
from clevrd.cli.values import count
from clevrd.health_options import seconds_in
from clevrd.metrics.top import TopView

INTERVAL_S: Final = 2.0
# The daemon looks once a second; so far apart are the two views that --once compares.
_ONCE_S: Final = 1.05
ROWS: Final = 10
_MAX_ROWS: Final = 100
_TIMEOUT_S: Final = 5.0
# Columns where nobody says how wide the output is.
_PLAIN_WIDTH: Final = 200
# Lines above the tables, and beside the rows of the five tables.
_OTHER_LINES: Final = 8 + 5 * 3

# The alternate screen of a terminal, without its cursor (ECMA-48, xterm).
_ENTER: Final = b"\x1b[?1049h\x1b[?25l"
_LEAVE: Final = b"\x1b[?25h\x1b[?1049l"
_HOME: Final = b"\x1b[H"
_END_OF_LINE: Final = b"\x1b[K\r\n"
_END_OF_SCREEN: Final = b"\x1b[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_daemon(parser)
    parser.add_argument(
        "--interval",
        type=_interval,
        default=INTERVAL_S,
        metavar="SECONDS",
        help="how often it looks, 1 s at least (default %(default)g)",
    )
    parser.add_argument(
        "--rows",
        type=_rows,
        metavar="N",
        help=f"rows of each table, 1 to {_MAX_ROWS} (default {ROWS}, or what the terminal has room"
        " for)",
    )
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print each view as the daemon's JSON on one line (docs/wire.md, GET /admin/top)",
    )


def run(options: argparse.Namespace) -> int:
    """Show the daemon until a signal ends it, or once, and return the exit code."""
    daemon = daemon_of(options, _TIMEOUT_S)
    target = f"/admin/top?n={options.rows or (_MAX_ROWS if options.json else ROWS)}"
    if options.json:
        return _print_json(daemon, target, options)
    if options.once:
        before = _view(daemon, target)
        time.sleep(_ONCE_S)
        _print_plain(daemon, before, _view(daemon, target), options.rows or ROWS)
        return 0
    if sys.stdout.isatty():
        return _refresh(daemon, options)
    return _print_again_and_again(daemon, target, options)


def _print_json(daemon: Daemon, target: str, options: argparse.Namespace) -> int:
    while True:
        body = daemon.get(target)
        _decoded(body, daemon)
        sys.stdout.buffer.write(body + b"\n")
        sys.stdout.buffer.flush()
        if options.once:
            return 0
        time.sleep(options.interval)


def _print_again_and_again(daemon: Daemon, target: str, options: argparse.Namespace) -> int:
    before: TopView | None = None
    while True:
        now = _view(daemon, target)
        if before is not None:
            print_line("")
        _print_plain(daemon, before, now, options.rows or ROWS)
        before = now
        time.sleep(options.interval)


def _print_plain(daemon: Daemon, before: TopView | None, now: TopView, rows: int) -> None:
    for line in screen(now, before, daemon.name, rows, _PLAIN_WIDTH):
        print_line(line)
    sys.stdout.buffer.flush()


def _refresh(daemon: Daemon, options: argparse.Namespace) -> int:
    """Show the view on a terminal, again and again; a daemon that is away may come back."""
    # A daemon that was never there is the command's failure, and not a screen that says so.
    before: TopView | None = None
    now = _view(daemon, f"/admin/top?n={ROWS}")
    with _whole_screen():
        while True:
            width, height = os.get_terminal_size(sys.stdout.fileno())
            rows = options.rows or max(1, min(_MAX_ROWS, (height - _OTHER_LINES) // 5))
            lines = list(screen(now, before, daemon.name, rows, width))
            _draw(lines[: max(1, height - 1)])
            time.sleep(options.interval)
            try:
                before, now = now, _view(daemon, f"/admin/top?n={rows}")
            except (NoServer, CommandFailed) as error:
                _draw([cut(shown(f"{error} Asking again."), width), *lines[: height - 2]])


def _draw(lines: list[str]) -> None:
    text = _END_OF_LINE.join(line.encode(errors="backslashreplace") for line in lines)
    sys.stdout.buffer.write(_HOME + text + _END_OF_LINE + _END_OF_SCREEN)
    sys.stdout.buffer.flush()


@contextmanager
def _whole_screen() -> Iterator[None]:
    sys.stdout.buffer.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.buffer.write(_LEAVE)
        sys.stdout.buffer.flush()


def _view(daemon: Daemon, target: str) -> TopView:
    return _decoded(daemon.get(target), daemon)


def _decoded(body: bytes, daemon: Daemon) -> TopView:
    try:
        return msgspec.json.decode(body, type=TopView)
    except msgspec.DecodeError as error:
        raise NoServer(
            f"{daemon.name} answered, but not as this version of clevrd does; check the address."
        ) from error


def _interval(text: str) -> float:
    seconds = seconds_in(text)
    if seconds is None or seconds < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 3600")
    return seconds


def _rows(text: str) -> int:
    number = count(text)
    if number > _MAX_ROWS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MAX_ROWS}")
    return number
