"""clevrd key new: makes an API key. Its secret is shown once, and is nowhere else.

The table to paste goes to standard output, so that it can be appended to the file. The secret goes
to standard error or to a file of its own, so that it can't end up beside the table by mistake.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from clevrd import logs
from clevrd.cli.failures import CommandFailed, UsageError
from clevrd.cli.lines import print_line
from clevrd.cli.permissions import PERMISSIONS, add_permissions, check_permissions
from clevrd.private_files import write_new
from clevrd.tenants.keys import new_key
from clevrd.tenants.settings import KeyId
from clevrd.tenants.tenant import check_tenant_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: whose key it is, and what it allows."""
    parser.add_argument("--tenant", required=True, metavar="NAME", help="the tenant that has it")
    parser.add_argument(
        "--id", required=True, metavar="NAME", help="what logs and refusals call the key"
    )
    add_permissions(parser)
    parser.add_argument(
        "--admin", action="store_true", help="it may operate the daemon, such as read /metrics"
    )
    parser.add_argument(
        "--secret-file",
        metavar="FILE",
        help="a new file for the secret, which its owner alone may read; without it the secret goes"
        " to standard error",
    )


def run(options: argparse.Namespace) -> int:
    """Print the table and show the secret, and return the exit code."""
    check_tenant_name(options.tenant)
    _check_id(options.id)
    check_permissions(options)
    if not (options.admin or any(getattr(options, field) for field in PERMISSIONS)):
        raise UsageError(
            "the key would allow nothing; add --publish, --subscribe, --clear or --admin"
        )
    made = new_key()
    if options.secret_file is not None:
        _write_secret(Path(options.secret_file), made.secret)
    for line in _table(options, made.sha256):
        print_line(line)
    if options.secret_file is None:
        logs.say(f"The secret, which is shown this once: {made.secret}")
    else:
        logs.say(f"The secret is in {options.secret_file}, and nowhere else.")
    return 0


def _check_id(name: str) -> None:
    try:
        msgspec.convert(name, KeyId)
    except msgspec.ValidationError:
        raise UsageError(
            "--id must be 1 to 64 letters, digits, dots, underscores or hyphens, and not begin with"
            " a dot or hyphen"
        ) from None


def _write_secret(path: Path, secret: str) -> None:
    try:
        write_new(path, f"{secret}\n".encode("ascii"), 0o600)
    except FileExistsError:
        raise UsageError(f"--secret-file {path} is there already; name a new file") from None
    except OSError as error:
        raise CommandFailed(f"Can't write {path}: {error.strerror}.") from error


def _table(options: argparse.Namespace, sha256: str) -> Iterator[str]:
    """Yield the lines to paste.

    The tenant's own table is always among them. Without it a key that is appended to a file would
    be the last tenant's there, whoever that is; with it a file that has the tenant already is
    refused, and nobody gets a key by mistake.
    """
    # The file may not end with a line's end.
    yield ""
    yield f"# If the file has the tenant {options.tenant} already, leave out [[tenants]] and name,"
    yield "# and put the rest below its table, before the next [[tenants]]; see clevrd checkconfig."
    yield "[[tenants]]"
    yield f"name = {_toml(options.tenant)}"
    yield ""
    yield "[[tenants.keys]]"
    yield f"id = {_toml(options.id)}"
    yield f"sha256 = {_toml(sha256)}"
    for field in PERMISSIONS:
        if entries := getattr(options, field):
            yield f"{field} = {_toml_list(entries)}"
    if options.admin:
        yield "admin = true"


def _toml(text: str) -> str:
    """Return a name or pattern, which has no control character, as TOML has it: as JSON does."""
    return msgspec.json.encode(text).decode()


def _toml_list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(_toml, texts))}]"
