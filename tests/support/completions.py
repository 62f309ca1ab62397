"""Writes the shell completion scripts that clevrd ships: python tests/support/completions.py.

shtab makes the scripts from the parsers, so that a shell needs neither when it completes.
test_cli.py compares the shipped scripts with the output of this program.
"""

from __future__ import annotations

from pathlib import Path

import shtab

from clevrd.cli.command_line import whole_parser
from clevrd.cli.completion import SHELLS
from clevrd.config import SETTINGS

SCRIPTS = Path(__file__).parents[2] / "clevrd" / "cli" / "completions"

# Kind of a value, by its name in the help, or by its option.
VALUES = {
    setting.flag: [word.strip() for word in setting.allowed.removeprefix("one of ").split(choice)]
    for setting in SETTINGS
    for choice in (",", " or ")
    if setting.allowed.startswith("one of " if choice == "," else "true or")
}
FILES = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY, "--state-dir": shtab.DIRECTORY}


def script(shell: str) -> str:
    """Return the script for ``shell``."""
    parser, commands = whole_parser()
    # The first words alone: a second word has a list of its own.
    names = list(dict.fromkeys(command.prog.split()[1] for command in commands))
    for command in commands:
        for action in command._actions:
            for name in (action.metavar, *action.option_strings):
                if name in FILES:
                    action.complete = FILES[name]  # type: ignore[attr-defined]  # shtab's way
                if name == "COMMAND":
                    action.choices = names
                if name in VALUES:
                    action.choices = VALUES[name]
    text: str = shtab.complete(parser, shell)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def main() -> None:
    """Write the scripts of all shells."""
    for shell in SHELLS:
        (SCRIPTS / f"clevrd.{shell}").write_text(script(shell), encoding="utf-8")


if __name__ == "__main__":
    main()
