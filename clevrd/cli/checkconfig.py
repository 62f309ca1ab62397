"""clevrd checkconfig: prints every setting, its value and the source of the value."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from clevrd import logs
from clevrd.cli.output import print_line
from clevrd.cli.settings import add_settings, load_settings, value_text
from clevrd.tenants.from_settings import access_of, check_access, folder_of
from clevrd.tenants.origins import read_allowed_origins
from clevrd.tenants.settings import Access, TenantEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting."""
    add_settings(parser)


def run(options: argparse.Namespace) -> int:
    """Print the settings that serve would use, and return the exit code."""
    loaded = load_settings(options)
    # The rules of access are checked as the daemon does at its start, with all files they name.
    access = access_of(loaded)
    check_access(access, folder_of(loaded))
    read_allowed_origins(loaded.config.allowed_origins, access.auth.allowed_origins)
    rows = [("setting", "value", "source")]
    for field, source in loaded.sources.items():
        rows.append((field, value_text(getattr(loaded.config, field)), source))
    for line in _columns(rows):
        print_line(line)
    if loaded.tables:
        for line in access_lines(access):
            print_line(line)
    for warning in loaded.warnings:
        logs.say(warning)
    return 0


def access_lines(access: Access) -> Iterator[str]:
    """Yield what the tables say of who may ask, without a digest of any key."""
    auth = access.auth
    yield ""
    yield f"credentials      {auth.mode}"
    yield f"allowed origins  {', '.join(auth.allowed_origins) or 'only its own'}"
    for issuer in auth.jwt:
        yield f"issuer           {issuer.issuer} (audience {issuer.audience})"
    for tenant in access.tenants:
        yield f"tenant           {tenant.name} (keys: {', '.join(_ids(tenant)) or 'none'})"


def _ids(tenant: TenantEntry) -> list[str]:
    return [key.id for key in tenant.keys]


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
