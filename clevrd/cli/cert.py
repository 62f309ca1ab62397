"""clevrd cert new: makes a certificate for a try, signed by itself, and its key.

No program trusts it unless it is told to; for others a certificate comes from an authority.
"""

from __future__ import annotations

import argparse
import ipaddress
from contextlib import suppress
from pathlib import Path
from typing import Final

from clevrd.cli.failures import CommandFailed, UsageError
from clevrd.cli.lines import print_line
from clevrd.private_files import write_new

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
# A year: some programs take no certificate that holds longer than 398 days.
DAYS: Final = 365
_MISSING: Final = (
    "Certificates are made by the package cryptography, which is not installed: pip install"
    " 'clevrd[tls]'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("what", metavar="new", choices=["new"], help="make a new one")
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="a name or an address by which clients reach the daemon, beside localhost",
    )
    parser.add_argument(
        "--cert", metavar="FILE", default="cert.pem", help="where to write it (%(default)s)"
    )
    parser.add_argument(
        "--key", metavar="FILE", default="key.pem", help="where to write its key (%(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Write both files, say how to use them, and return the exit code."""
    try:
        from clevrd.tls.self_signed import BadName, self_signed
    except ImportError as error:
        raise CommandFailed(_MISSING) from error
    cert, key = Path(options.cert), Path(options.key)
    if cert == key:
        raise UsageError("The certificate and the key are two files; name them apart.")
    for path in (cert, key):
        if path.exists():
            raise CommandFailed(f"{path} is there already; remove it, or name another file.")
    names = list(dict.fromkeys([*LOCAL_NAMES, *map(_plain, options.names)]))
    try:
        made = self_signed(names, DAYS)
    except BadName as error:
        raise UsageError(str(error)) from error
    _write(key, made.key, 0o600)
    try:
        _write(cert, made.certificate, 0o644)
    except CommandFailed:
        # Alone it is of no use, and would be in the way of the next try.
        key.unlink()
        raise
    print_line(f"{cert} and {key} are for {', '.join(names)}, for {DAYS} days. Try them:")
    print_line(f"  clevrd serve --tls-cert-file {cert} --tls-key-file {key}")
    print_line(f"  clevrd subscribe demo --url https://localhost:8080 --ca-file {cert}")
    return 0


def _plain(name: str) -> str:
    """Return an address in its usual form, and a name in lower case."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(name.strip("[]")))
    return name.lower()


def _write(path: Path, content: bytes, mode: int) -> None:
    try:
        write_new(path, content, mode)
    except OSError as error:
        raise CommandFailed(f"Can't write {path}: {error.strerror}.") from error
