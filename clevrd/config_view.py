"""The configuration in force, as an operator may see it: every setting, and the rules of access.

A key has a fingerprint in it, by which another secret is noticed. No digest is in it: an operator's
terminal, and where its text is pasted, is no place for what a password could be guessed from.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from os.path import abspath
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import msgspec

from clevrd import __version__
from clevrd.config import SETTINGS, Config, Loaded
from clevrd.core.message_ids import rfc3339
from clevrd.fingerprints import fingerprint
from clevrd.journal.settings import NO_JOURNAL, JournalSettings, shown_journal
from clevrd.tenants.settings import Access, Auth, Key, Table, TenantEntry

# Keys in one step of a view, at 10 us each.
_KEYS_PER_STEP: Final = 64
# Settings that a reload puts into force; all others need a restart.
RELOADED: Final = frozenset({"allowed_origins", "tls_cert_file", "tls_key_file"})


class SettingView(msgspec.Struct, frozen=True):
    """A setting: its value, where that comes from, and whether another one takes a restart."""

    value: Any
    source: str
    needs_restart: bool


class ConfigView(msgspec.Struct, frozen=True):
    """The answer to GET /config. The tables have the names that they have in the file."""

    version: str
    # The file's absolute path; empty where there is none.
    file: str
    # When the rules in force were read, RFC 3339.
    loaded_at: str
    reloads: int
    settings: dict[str, SettingView]
    auth: dict[str, Any]
    tenants: list[dict[str, Any]]
    # The table that the daemon started with; a reload does not change it.
    journal: dict[str, Any]
    # The same of the sources.
    sources: list[dict[str, Any]] = []
    # The same of the webhooks; none from a daemon that does not show them.
    webhooks: list[dict[str, Any]] | None = None
    # The certificates in force; a reload changes them. None from a daemon that does not show it.
    tls: dict[str, Any] | None = None


class ConfigInForce:
    """The configuration that a daemon works with now.

    Args:
        sources: the source of each setting's value; where one is missing it is the default.
        file: the path of the configuration file; empty where there is none.
        access: the rules that it has.
        wall_s: the wall clock, seconds since 1970.
        journal: where messages are kept.
        read: the tables of the sources, without a secret.
        webhooks: the tables of the webhooks, without a secret.
        tls: returns the table of TLS that is in force.
    """

    def __init__(
        self,
        config: Config,
        sources: Mapping[str, str],
        file: str,
        access: Access,
        wall_s: Callable[[], float],
        journal: JournalSettings = NO_JOURNAL,
        read: Sequence[dict[str, Any]] = (),
        webhooks: Sequence[dict[str, Any]] = (),
        tls: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._journal = journal
        self._read = list(read)
        self._webhooks = list(webhooks)
        self._tls = tls
        self._config = config
        self._sources = dict(sources)
        self._file = abspath(file) if file else ""
        self._access = access
        self._wall_s = wall_s
        self._loaded_at_s = wall_s()
        self._reloads = 0

    def change(self, access: Access, loaded: Loaded | None) -> None:
        """Note that other rules are in force from now on, and the settings read again with them.

        Args:
            loaded: the configuration that was read again; None where the rules alone are others.
        """
        self._access = access
        if loaded is not None:
            again = {field: getattr(loaded.config, field) for field in RELOADED}
            self._config = msgspec.structs.replace(self._config, **again)
            self._sources.update((field, loaded.sources[field]) for field in RELOADED)
        self._loaded_at_s = self._wall_s()
        self._reloads += 1

    def view(self) -> Generator[None, None, ConfigView]:
        """Return what there is to see, in steps that take well under a millisecond."""
        access = self._access
        tenants: list[dict[str, Any]] = []
        work = 0
        for tenant in access.tenants:
            work += 1 + len(tenant.keys) + len(tenant.client_certificates)
            tenants.append(_tenant_view(tenant))
            if work >= _KEYS_PER_STEP:
                work = 0
                yield
        return ConfigView(
            version=__version__,
            file=self._file,
            loaded_at=rfc3339(int(self._loaded_at_s * 1e6)),
            reloads=self._reloads,
            settings={
                setting.field: SettingView(
                    shown_setting(setting.field, getattr(self._config, setting.field)),
                    self._sources.get(setting.field, "default"),
                    needs_restart=setting.field not in RELOADED,
                )
                for setting in SETTINGS
            },
            auth=_auth_view(access.auth),
            tenants=tenants,
            journal={**_fields(self._journal), "url": shown_journal(self._journal.url)},
            sources=self._read,
            webhooks=self._webhooks,
            tls=self._tls(),
        )


def shown_setting(field: str, value: Any) -> Any:
    """Return the value of a setting as an operator may see it."""
    return shown_journal(value) if field == "journal" else value


def _tenant_view(tenant: TenantEntry) -> dict[str, Any]:
    certificates = [_fields(each) for each in tenant.client_certificates]
    keys = [_key_view(key) for key in tenant.keys]
    return {**_fields(tenant), "keys": keys, "client_certificates": certificates}


def _key_view(key: Key) -> dict[str, Any]:
    fields = _fields(key)
    return {"id": fields.pop("id"), "fingerprint": fingerprint(fields.pop("sha256")), **fields}


def _auth_view(auth: Auth) -> dict[str, Any]:
    issuers = [{**_fields(each), "jwks_url": _shown_url(each.jwks_url)} for each in auth.jwt]
    return {**_fields(auth), "jwt": issuers}


def _fields(table: Table | JournalSettings) -> dict[str, Any]:
    """Return the fields of a table, those that are left out in the file too."""
    return {name: getattr(table, name) for name in table.__struct_fields__}


def _shown_url(url: str) -> str:
    """Return a URL with a fingerprint in place of a password and a query, which may be secret."""
    parts = urlsplit(url)
    shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return url if shown == url else f"{shown}#{fingerprint(url)}"
