"""clevrd key digest: prints what the file holds of a secret that was made elsewhere."""

from __future__ import annotations

import argparse
from typing import Final

from clevrd import logs
from clevrd.cli.failures import UsageError
from clevrd.cli.lines import print_line
from clevrd.cli.secret_input import read_secret
from clevrd.plurals import noun_for
from clevrd.tenants.keys import MAX_KEY_BYTES, digest_of

# 32 random bytes have 43 characters as base64 and 64 in hexadecimal; fewer than these are a
# password, which can be guessed from a digest.
_FEW_CHARACTERS: Final = 32


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Add no argument: a secret on the command line could be seen in the list of processes."""


def run(_: argparse.Namespace) -> int:
    """Print the digest, and return the exit code."""
    secret = read_secret("secret")
    if len(secret) > MAX_KEY_BYTES:
        raise UsageError(f"the secret has {len(secret)} bytes; {MAX_KEY_BYTES} are allowed")
    length = len(secret)
    if length < _FEW_CHARACTERS:
        logs.say(
            f"The secret has {length} {noun_for(length, 'character')} and might be guessed; take 32"
            " random bytes, as clevrd key new does."
        )
    print_line(digest_of(secret))
    return 0
