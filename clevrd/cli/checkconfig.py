"""clevrd checkconfig: prints every setting, its value and the source of the value.

With --url it prints what differs between a running daemon and the file instead.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Final, TypeVar

from clevrd import logs
from clevrd.cli.credential import credential_of
from clevrd.cli.failures import UsageError
from clevrd.cli.lines import print_line
from clevrd.cli.settings import add_settings, load_settings, value_text
from clevrd.cli.trust import add_trust_and_credential, trust_of
from clevrd.config import BY_FIELD, SETTINGS, Loaded, load
from clevrd.config_differences import differences, outranks_file
from clevrd.config_view import ConfigInForce, ConfigView, shown_setting
from clevrd.journal.engines import check_files, check_place
from clevrd.journal.settings import journal_of
from clevrd.sources.kinds import check_sources
from clevrd.sources.settings import sources_of
from clevrd.tenants.from_settings import access_of, check_access, folder_of
from clevrd.tenants.origins import entries_in_force, read_allowed_origins
from clevrd.tenants.settings import Access, TenantEntry
from clevrd.tls.contexts import TlsContexts, moment_text
from clevrd.tls.settings import tls_of
from clevrd.tracing.settings import tracing_of
from clevrd.webhooks.settings import webhooks_of

# The exit code where something differs, as diff's.
EXIT_DIFFERS: Final = 1

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, and the options to compare with a daemon."""
    add_settings(parser)
    parser.add_argument(
        "--url",
        help="a running daemon, such as http://127.0.0.1:8080: print what differs between what it"
        " works with and the file, and end with 1 where something does. The file is --config's, or"
        " else the one that the daemon names",
    )
    add_trust_and_credential(parser)


def run(options: argparse.Namespace) -> int:
    """Print the settings that serve would use, or what differs, and return the exit code."""
    if options.url is not None:
        return _compare(options)
    if options.ca_file is not None:
        raise UsageError("--ca-file says what to trust at --url; name the daemon by --url, too")
    loaded = load_settings(options)
    # The rules of access are checked as the daemon does at its start, with all files they name.
    access = access_of(loaded)
    check_access(access, folder_of(loaded))
    read_allowed_origins(loaded.config.allowed_origins, access.auth.allowed_origins)
    journal = journal_of(loaded)
    webhooks = webhooks_of(loaded)
    tracing = tracing_of(loaded.config, os.environ)
    check_files(journal)
    check_place(journal)
    sources = sources_of(loaded, access)
    check_sources(sources)
    tls = tls_of(loaded)
    certificates = TlsContexts(tls).shown if tls.is_on else ()
    rows = [("setting", "value", "source")]
    for field, source in loaded.sources.items():
        value = shown_setting(field, getattr(loaded.config, field))
        rows.append((field, value_text(value), source))
    for line in _columns(rows):
        print_line(line)
    if loaded.tables:
        for line in access_lines(access, loaded.config.allowed_origins):
            print_line(line)
    if journal.is_on:
        print_line(
            f"journal          {journal.shown} ({journal.engine}, topics:"
            f" {', '.join(journal.topics)})"
        )
    for each in sources:
        print_line(
            f"source           {each.name} ({each.place.shown} into {each.topic} of tenant"
            f" {each.tenant}, group {each.group_name})"
        )
    for hook in webhooks:
        print_line(f"webhook          {hook.id} ({hook.shown_url}, events of tenant {hook.tenant})")
    if tracing is not None:
        print_line(
            f"tracing          {tracing.endpoint} ({tracing.sample_ratio:.6g} of what has no trace)"
        )
    for shown in certificates:
        print_line(f"certificate      {shown.cert_file} (until {moment_text(shown.ends_s)})")
    for warning in loaded.warnings:
        logs.say(warning)
    return 0


def access_lines(access: Access, allowed_origins: str) -> Iterator[str]:
    """Yield who may ask, by the tables and the setting of that name, without a key's digest."""
    auth = access.auth
    origins = entries_in_force(allowed_origins, auth.allowed_origins)
    yield ""
    yield f"credentials      {auth.mode}"
    yield f"allowed origins  {', '.join(origins) or 'only its own'}"
    for issuer in auth.jwt:
        yield f"issuer           {issuer.issuer} (audience {issuer.audience})"
    for tenant in access.tenants:
        yield f"tenant           {tenant.name} (keys: {', '.join(_ids(tenant)) or 'none'})"


def _ids(tenant: TenantEntry) -> list[str]:
    return [each.id for each in (*tenant.keys, *tenant.client_certificates)]


# --- a running daemon ----------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> int:
    """Print what differs between the daemon and the file, and return 1 where something does."""
    given = vars(options)
    if flags := [setting.flag for setting in SETTINGS if setting.field in given]:
        raise UsageError(f"--url compares a daemon with the file; leave {flags[0]} out")
    # The import takes the time of an HTTP client's.
    from clevrd.cli.running_config import running_config

    running = running_config(options.url, credential_of(options), trust_of(options))
    path = options.config or os.environ.get("CLEVRD_CONFIG") or running.file
    loaded = load({}, _stronger_than_file(running), path or None)
    access = access_of(loaded)
    check_access(access, folder_of(loaded))
    lines = list(differences(running, _view_of(loaded, access)))
    for line in lines:
        print_line(line)
    if lines:
        return EXIT_DIFFERS
    print_line(f"The daemon works with {f'what {path} has' if path else 'the defaults'}.")
    return 0


def _stronger_than_file(running: ConfigView) -> dict[str, str]:
    """Return the daemon's flags and variables, as variables: the file is judged beside them."""
    return {
        BY_FIELD[name].prefixed_env: value_text(setting.value)
        for name, setting in running.settings.items()
        if name in BY_FIELD and outranks_file(setting)
    }


def _view_of(loaded: Loaded, access: Access) -> ConfigView:
    in_force = ConfigInForce(
        *(loaded.config, loaded.sources, loaded.path, access, time.time, journal_of(loaded)),
        [each.view() for each in sources_of(loaded, access)],
        [each.view() for each in webhooks_of(loaded)],
        tls_of(loaded).view,
    )
    return _result_of(in_force.view())


def _result_of(steps: Generator[None, None, T]) -> T:
    """Take all steps at once: no loop waits for this command."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
