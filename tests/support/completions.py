"""Writes the shell completion scripts that clevrd ships: python tests/support/completions.py.

shtab makes them from the parsers, so that neither it nor the parsers are needed when a shell
completes. test_cli.py compares them with what this makes.
"""

from __future__ import annotations

from pathlib import Path

import shtab

from clevrd.cli.command_line import whole_parser
from clevrd.cli.completion import SHELLS
from clevrd.config import SETTINGS

SCRIPTS = Path(__file__).parents[2] / "clevrd" / "cli" / "completions"

# What a value is, by how help calls it, or by its option.
VALUES = {
    setting.flag: [word.strip() for word in setting.allowed.removeprefix("one of ").split(choice)]
    for setting in SETTINGS
    for choice in (",", " or ")
    if setting.allowed.startswith("one of " if choice == "," else "true or")
}
FILES = {"FILE": shtab.FILE, "--state-dir": shtab.DIRECTORY}


def script(shell: str) -> str:
    """Return the script for ``shell``."""
    parser, commands = whole_parser()
    names = [command.prog.split()[-1] for command in commands]
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
    """Write all of them."""
    for shell in SHELLS:
        (SCRIPTS / f"clevrd.{shell}").write_text(script(shell), encoding="utf-8")


if __name__ == "__main__":
    main()
