"""clevrd completion: prints a shell script that completes clevrd's commands and options.

`make completions` writes the scripts, and a test compares them with the command line.
"""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from typing import Final

SHELLS: Final = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the shell."""
    parser.add_argument(
        "shell",
        metavar="SHELL",
        choices=SHELLS,
        help='bash: eval "$(clevrd completion bash)" in ~/.bashrc; zsh: clevrd completion zsh >'
        " a file named _clevrd in a directory of $fpath; fish: clevrd completion fish >"
        " ~/.config/fish/completions/clevrd.fish",
    )


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    script = files("clevrd.cli").joinpath("completions", f"clevrd.{options.shell}")
    sys.stdout.buffer.write(script.read_bytes())
    return 0
