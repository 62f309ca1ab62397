"""The credential that client commands present: a key or a token, from a file or a variable.

There is no option with the secret itself: every user of a machine can see the arguments of all
processes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from clevrd.cli.secret_input import MAX_BYTES, NotASecret, as_secret
from clevrd.errors import ConfigError
from clevrd.private_files import check_private

VARIABLE = "CLEVRD_KEY"
# This sentence follows a refusal where the command had no credential to present.
ADVICE = f"Give a key or token by --key-file FILE, or in the variable {VARIABLE}."


def add_credential(parser: argparse.ArgumentParser) -> None:
    """Add the option for the file."""
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"a file with the key or token to send; without it the one in the variable {VARIABLE},"
        " if any. No option takes the secret itself, since all users see what processes are"
        " started with",
    )


def credential_of(options: argparse.Namespace) -> str | None:
    """Return the secret to send, or None where there is none.

    Raises:
        ConfigError: the file or the variable has none; nothing of it is in the text.
    """
    if options.key_file is not None:
        return read_file(options.key_file)
    if given := os.environ.get(VARIABLE):
        return _checked(os.fsencode(given), f"The variable {VARIABLE}")
    return None


def has_credential(options: argparse.Namespace) -> bool:
    """Return whether a file or the variable is there to hold a secret."""
    return options.key_file is not None or bool(os.environ.get(VARIABLE))


def read_file(name: str) -> str:
    """Return the secret in a file; raises ConfigError."""
    path = Path(name)
    check_private(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror}.") from error
    return _checked(content, f"The file {path}")


def _checked(content: bytes, where: str) -> str:
    try:
        return as_secret(content)
    except NotASecret as error:
        raise ConfigError(f"{where} has no key and no token: {error}.") from None
