"""The command line: parses the arguments, runs one command, and reports its failure.

A failure is one line on standard error (or one for each wrong setting), never a traceback. A
command's own modules are imported only when it is run, so that no command waits for another's.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
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
    "history": "Print the messages that a topic has had, and end.",
    "health": "Ask the daemon of these settings whether it is well; for health checks.",
    "top": "Show who is slow, who is loud, and whether the daemon of these settings is well.",
    "checkconfig": "Print every setting and its source.",
    "doctor": "Look at the machine and the settings, and say what to change.",
    "cert": "Make a certificate for a try of TLS.",
    "key": "Make an API key, or the digest of one.",
    "token": "Make a JSON Web Token, or look at one.",
    "journal": "Look at a journal, check it, copy it, and take messages out or in.",
    "completion": "Print what a shell needs to complete these commands.",
    "version": "Print the version.",
    "help": "Show what a command takes.",
}

# Commands that are a word and a second one.
_SECOND_WORDS: Final = {
    "key": {
        "new": "Make a key: prints its secret once, and what to paste into the file.",
        "digest": "Print the digest of a secret, read from standard input.",
    },
    "token": {
        "new": "Make a token, signed with a secret or a private key.",
        "show": "Show what a token says, read from standard input.",
    },
    "journal": {
        "stat": "Show how much a journal has, and since when.",
        "verify": "Compare all that a journal has with its checksums.",
        "export": "Print a journal's messages, one JSON line each.",
        "import": "Append messages, one JSON line each, to a journal that no daemon has open.",
        "backup": "Copy a journal, which a daemon may have open.",
    },
}

# Each command is a module with two functions, add_arguments(parser) and run(options): the module of
# its name in this package (key_new for key new), except for health, which `entry` runs without this
# package: this parser knows its options for documents alone.
_MODULES: Final = {"health": "clevrd.health_check"}

# Flags of other programs -> the flags here that may be meant; the first one that the command has is
# suggested.
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
    **dict.fromkeys(("--expire", "--expires", "--expires-in", "--lifetime"), ("--ttl",)),
    **dict.fromkeys(("--subscriber-id", "--client-id", "--name"), ("--id",)),
    **dict.fromkeys(("--offset", "--after", "--from"), ("--position", "--since")),
    **dict.fromkeys(("--count", "--max"), ("--limit",)),
}
# Flags by which other programs wait for what comes; clevrd history ends.
_FOLLOWING: Final = frozenset({"--follow", "-f", "--tail"})
# argparse's sentence about a word that is none of its choices, which its versions quote or not.
_CHOICES: Final = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
# Flags by which other programs take a secret.
_SECRETS: Final = frozenset({"--token", "--api-key", "--apikey", "--secret", "--bearer"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments after the program's name; None for the process's own.
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
        # The program that read standard output, such as head, has ended: that is no failure.
        _discard_stdout()
        return 0
    except KeyboardInterrupt as stop:
        return signals.interrupted_code(stop)
    except (ConfigError, CannotStart, CommandFailed) as error:
        logs.say(str(error), is_failure=True)
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
    """Return the sentence about ``words``, which no option takes, with a suggestion."""
    known = list(flags)
    sentence = f"unrecognized arguments: {' '.join(words)}"
    name = words[0].partition("=")[0]
    if name == "--topic":
        return f"{sentence}; a topic stands without a flag"
    if name in _FOLLOWING and "--position" in known:
        return f"{sentence}; clevrd subscribe follows a topic"
    meant: list[str] = [flag for flag in _OTHER_NAMES.get(name, ()) if flag in known]
    meant += difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if name in _SECRETS and "--key-file" in known:
        # The words are not repeated: they hold the secret.
        return (
            f"unrecognized argument: {name}; a key or token is not for the command line, which all"
            " users see: take --key-file FILE or the variable CLEVRD_KEY"
        )
    if not meant:
        return sentence
    example = " HOST:PORT" if meant[0] == "--address" else ""
    return f"{sentence}; did you mean {meant[0]}{example}?"


def _meant_word(message: str) -> str:
    """Return a suggestion behind argparse's sentence about a word that is none of its choices."""
    if not (found := _CHOICES.search(message)):
        return ""
    close = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _discard_stdout() -> None:
    """Discard the rest of the buffer, since Python would flush it again at exit, and fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage: scripts and people read one line."""
        raise UsageError(f"{message}{_meant_word(message)} (try: {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        """Print the help; raise if that fails, which argparse's own method hides."""
        (sys.stdout if file is None else file).write(self.format_help())


class CommandParser(_Parser):
    """Parser of one command, whose options may stand between its arguments.

    In `publish t --key k 1` argparse would take an optional argument for missing as soon as an
    option comes. Parsing intermixed avoids this, and parses twice. The command's arguments are
    added when it is first parsed.
    """

    # Name of the module that has the command's arguments and runs it; empty where a second word
    # chooses the command.
    module = ""
    _is_asked = False

    def __init__(self, **options: Any) -> None:
        # All options of the command, for suggestions.
        self.flags: list[str] = []
        super().__init__(**options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument, and note its options."""
        self.flags += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **options)

    def fill_in(self) -> None:
        """Add the command's arguments, which imports its module."""
        command = import_module(self.module)
        command.add_arguments(self)
        self.set_defaults(command=command.run, parser=self)

    def parse_known_args(  # type: ignore[override]  # its overloads differ in the namespace alone
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse ``args``; argparse calls this again from within the first call."""
        if self._is_asked or not self.module:
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
    """Return the parser and its commands' parsers, with all arguments, for documents."""
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
    # The option stands here for the help text; `argv` turns it into the command version.
    parser.add_argument("-V", "--version", action="store_true", help="print the version")
    parsers: list[CommandParser] = []
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name not in _SECOND_WORDS:
            command.module = _MODULES.get(name, f"clevrd.cli.{name}")
            parsers.append(command)
            continue
        seconds = command.add_subparsers(
            metavar="COMMAND", required=True, parser_class=CommandParser
        )
        for second, text_of_it in _SECOND_WORDS[name].items():
            under = seconds.add_parser(
                second, help=text_of_it, description=text_of_it, allow_abbrev=False
            )
            under.module = f"clevrd.cli.{name}_{second}"
            parsers.append(under)
    return parser, parsers
