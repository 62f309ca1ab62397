"""Setup: all that a daemon is built from, as it was configured and as the process has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from clevrd.config import Config, Loaded
from clevrd.errors import ConfigError
from clevrd.hub import Stats
from clevrd.journal.settings import JournalSettings, journal_of, plain_journal_of
from clevrd.service.given_sockets import GivenSockets
from clevrd.sources.settings import SourceEntry, sources_of
from clevrd.tenants.from_settings import folder_of
from clevrd.tenants.settings import OPEN, Access
from clevrd.tls import TlsSettings, plain_tls_of, tls_of
from clevrd.tracing.settings import TracingSettings, tracing_of
from clevrd.webhooks.settings import Webhook, webhooks_of

_NO_SOCKETS: Final = GivenSockets()


class Setup(msgspec.Struct, frozen=True):
    """One daemon, before any part of it is there."""

    config: Config
    # The rules of access, and the folder of the files that they name.
    access: Access = OPEN
    folder: Path = Path()
    # The certificates, the place where messages are kept, and that to which traces are sent; None
    # for what the plain settings say of each.
    tls: TlsSettings | None = None
    journal: JournalSettings | None = None
    tracing: TracingSettings | None = None
    # Streams whose records are taken into topics.
    read: Sequence[SourceEntry] = ()
    # The URLs to which lifecycle events are posted.
    webhooks: Sequence[Webhook] = ()
    # The source of each setting's value, and the configuration file, for operators.
    sources: Mapping[str, str] = {}
    file: str = ""
    # The load of the machine; None for the real one.
    stats: Stats | None = None
    wall_ns: Callable[[], int] = time.time_ns
    # Sockets that listen already; without any the addresses of the settings count.
    given: GivenSockets = _NO_SOCKETS

    def tls_in_force(self) -> TlsSettings:
        """Return the certificates."""
        return plain_tls_of(self.config) if self.tls is None else self.tls

    def journal_in_force(self) -> JournalSettings:
        """Return where messages are kept."""
        return plain_journal_of(self.config) if self.journal is None else self.journal

    def tracing_in_force(self) -> TracingSettings | None:
        """Return where traces are sent; None for nowhere."""
        return self.tracing or tracing_of(self.config, {})

    def wall_s(self) -> float:
        """Return the wall clock's time, seconds since 1970."""
        return self.wall_ns() / 1e9


def setup_of(
    loaded: Loaded, access: Access, environ: Mapping[str, str], given: GivenSockets
) -> Setup:
    """Return the setup of a process.

    Raises:
        ConfigError: a table of the configuration file is wrong.
    """
    return Setup(
        loaded.config,
        access,
        folder_of(loaded),
        tls=tls_of(loaded),
        journal=journal_of(loaded),
        read=sources_of(loaded, access),
        webhooks=webhooks_of(loaded),
        tracing=tracing_of(loaded.config, environ),
        sources=loaded.sources,
        file=loaded.path,
        given=given,
    )


def check_certificates_are_asked_for(access: Access, tls: TlsSettings) -> None:
    """Raise ConfigError where tenants have certificates that no client would be asked for."""
    if tls.client_certificates != "none":
        return
    for tenant in access.tenants:
        if tenant.client_certificates:
            raise ConfigError(
                f"The tenant {tenant.name} has client_certificates, and clients are asked for none;"
                ' set client_certificates = "optional" and client_ca_file in [tls].'
            )
