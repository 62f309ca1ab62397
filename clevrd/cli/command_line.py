"""What can be typed, and what becomes of it: a command is run, and fails with one line.

What went wrong is one line on standard error (one for each wrong setting), never a traceback.
A command's own modules are imported when it is run, so that none waits for another's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Final, NoReturn

from clevrd import logs, signals
from clevrd.argv import with_command
from clevrd.cli.failures import EXIT_FAILED, EXIT_USAGE, CommandFailed, UsageError
from clevrd.errors import CannotStart, ConfigError, InvalidRequest

_COMMANDS: Final = {
    "serve": "Run the daemon (the default).",
    "publish": "Publish one message, or one for each line.",
    "subscribe": "Print topics' messages, one JSON line each.",
    "health": "Ask the daemon of these settings whether it is well; for health checks.",
    "checkconfig": "Print every setting and its source.",
    "version": "Print the version.",
}

# Each command is a module with two functions, add_arguments(parser) and run(options): the one of
# its name in this package, or this one, which `entry` runs without anything of the package.
_MODULES: Final = {"health": "clevrd.health_check"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    """
    try:
        return _run_and_explain(sys.argv[1:] if argv is None else argv)
    finally:
        logs.stderr.flush(logs.FLUSH_S)


def _run_and_explain(argv: Sequence[str]) -> int:
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who read standard output (head, say) has what it wanted.
        _discard_stdout()
        return 0
    except KeyboardInterrupt as stop:
        return signals.interrupted_code(stop)
    except (ConfigError, CannotStart, CommandFailed) as error:
        logs.say(str(error))
        return error.exit_code
    except InvalidRequest as error:  # a topic that no server would take
        logs.say(str(error))
        return EXIT_USAGE
    except OSError as error:
        _discard_stdout()
        logs.say(f"Standard input or output failed: {error.strerror}.")
        return EXIT_FAILED


def _run(argv: Sequence[str]) -> int:
    try:
        options = _parser().parse_args(with_command(argv))
    except SystemExit as finished:  # --help
        return int(finished.code or 0)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _discard_stdout() -> None:
    """Send what is left in the buffer nowhere: Python flushes again at exit, and would complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage: one line is what scripts and people read."""
        raise UsageError(f"{message} (try: {self.prog} --help)")


class CommandParser(_Parser):
    """Of one command, whose options may stand between its arguments: publish t --key k 1.

    argparse takes what may be left out for left out as soon as an option comes, unless it is asked
    to parse intermixed, which it does by parsing twice. The command is filled in at the first time.
    """

    # Of the module that says what the command takes, and does it; None for one without arguments.
    module = ""
    _is_asked = False

    def parse_known_args(  # type: ignore[override]  # its overloads differ in the namespace alone
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse ``args``; the second time, from within the first, as argparse does."""
        if self._is_asked:
            return super().parse_known_args(args, namespace)
        self._is_asked = True
        command = import_module(self.module)
        command.add_arguments(self)
        self.set_defaults(command=command.run)
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_asked = False


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clevrd",
        description="A real-time event streaming daemon and its client.",
        epilog="Without a command, clevrd serves; see clevrd serve --help for its settings.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.module = _MODULES.get(name, f"clevrd.cli.{name}")
    return parser
