"""What can be typed, and what becomes of it: a command is run, and fails with one line.

What went wrong is one line on standard error (one for each wrong setting), never a traceback.
A command's own modules are imported when it is run, so that none waits for another's.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, Final, NoReturn

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
    "completion": "Print what a shell needs to complete these commands.",
    "version": "Print the version.",
    "help": "Show what a command takes.",
}

# Each command is a module with two functions, add_arguments(parser) and run(options): the one of
# its name in this package, or this one, which `entry` runs without anything of the package.
_MODULES: Final = {"health": "clevrd.health_check"}

# Flags of other programs -> the flags here that may be meant; the first that the command has.
_OTHER_NAMES: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("--port", "-p", "--host", "-H", "--bind", "-b", "--listen", "--addr"),
        ("--address", "--url"),
    ),
    **dict.fromkeys(("--server", "-s", "--address"), ("--url",)),
    **dict.fromkeys(("--follow", "-f", "--tail", "-n"), ("--last",)),
    **dict.fromkeys(("--verbose", "-v", "--debug", "--quiet", "-q"), ("--log-level",)),
    **dict.fromkeys(("--memory", "--max-memory", "-m"), ("--max-memory-mb",)),
    **dict.fromkeys(("--string", "--message", "-m"), ("--text",)),
}


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
        options, unknown = _parser().parse_known_args(with_command(argv))
    except SystemExit as finished:  # --help
        return int(finished.code or 0)
    if unknown:
        options.parser.error(_unrecognized(unknown, options.parser.flags))
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _unrecognized(words: Sequence[str], flags: Iterable[str]) -> str:
    """Return the sentence about ``words``, which are no arguments, with what may be meant."""
    known = list(flags)
    sentence = f"unrecognized arguments: {' '.join(words)}"
    name = words[0].partition("=")[0]
    if name == "--topic":
        return f"{sentence}; a topic stands without a flag"
    meant: list[str] = [flag for flag in _OTHER_NAMES.get(name, ()) if flag in known]
    meant += difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not meant:
        return sentence
    example = " HOST:PORT" if meant[0] == "--address" else ""
    return f"{sentence}; did you mean {meant[0]}{example}?"


def _discard_stdout() -> None:
    """Send what is left in the buffer nowhere: Python flushes again at exit, and would complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage: one line is what scripts and people read."""
        raise UsageError(f"{message} (try: {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        """Print it; argparse's own says nothing where nobody can read it or the disk is full."""
        (sys.stdout if file is None else file).write(self.format_help())


class CommandParser(_Parser):
    """Of one command, whose options may stand between its arguments: publish t --key k 1.

    argparse takes what may be left out for left out as soon as an option comes, unless it is asked
    to parse intermixed, which it does by parsing twice. The command is filled in at the first time.
    """

    # Of the module that says what the command takes, and does it.
    module = ""
    _is_asked = False

    def __init__(self, **options: Any) -> None:
        # All that begins with a dash, for suggestions.
        self.flags: list[str] = []
        super().__init__(**options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Take one more argument."""
        self.flags += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **options)

    def fill_in(self) -> None:
        """Take what the command takes, which imports its module."""
        command = import_module(self.module)
        command.add_arguments(self)
        self.set_defaults(command=command.run, parser=self)

    def parse_known_args(  # type: ignore[override]  # its overloads differ in the namespace alone
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse ``args``; the second time, from within the first, as argparse does."""
        if self._is_asked:
            return super().parse_known_args(args, namespace)
        self._is_asked = True
        self.fill_in()
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_asked = False


def _parser() -> argparse.ArgumentParser:
    return _parsers()[0]


def whole_parser() -> tuple[argparse.ArgumentParser, list[CommandParser]]:
    """Return the parser, and those of its commands, with all their arguments: for documents."""
    parser, commands = _parsers()
    for command in commands:
        command.fill_in()
    return parser, commands


def _parsers() -> tuple[argparse.ArgumentParser, list[CommandParser]]:
    parser = _Parser(
        prog="clevrd",
        description="A real-time event streaming daemon and its client.",
        epilog="Without a command, clevrd serves; clevrd help COMMAND has a command's options.",
    )
    # For who looks here; `argv` reads it as the command.
    parser.add_argument("-V", "--version", action="store_true", help="print the version")
    parsers: list[CommandParser] = []
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.module = _MODULES.get(name, f"clevrd.cli.{name}")
        parsers.append(command)
    return parser, parsers
