"""The table ``[tls]`` of the configuration file, and the two plain settings beside it, checked.

The files that they name are not read here (`contexts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from clevrd.config import Config, Loaded
from clevrd.errors import ConfigError
from clevrd.table_faults import table_fault

TABLE: Final = "tls"

# A name as a client asks for it: lower case, no trailing dot; the first label may be a star (RFC
# 9525 §6.3).
_NAME: Final = re.compile(
    r"(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
)
_FileName = Annotated[str, Meta(min_length=1, max_length=4_096)]


class CertificateEntry(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """``[[tls.certificates]]``: a certificate, its key, and the names that it is shown for."""

    cert_file: _FileName
    key_file: _FileName
    # Empty for the names that stand in the certificate itself.
    names: tuple[str, ...] = ()


class TlsSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """``[tls]``: what the daemon shows its clients, and what it asks them for."""

    # The first one is for clients that ask for no name, or for one that is in none of them.
    certificates: tuple[CertificateEntry, ...] = ()
    # The authorities whose client certificates are taken.
    client_ca_file: str = ""
    client_certificates: Literal["none", "optional", "required"] = "none"

    @property
    def is_on(self) -> bool:
        """Whether TLS is spoken at all."""
        return bool(self.certificates)

    def view(self) -> dict[str, Any]:
        """Return all fields as operators may see them: of keys the names of their files."""
        certificates = [msgspec.structs.asdict(each) for each in self.certificates]
        return {**msgspec.structs.asdict(self), "certificates": certificates}


NO_TLS: Final = TlsSettings()


def read_tls(
    tables: Mapping[str, Any], path: str = "", *, cert_file: str = "", key_file: str = ""
) -> TlsSettings:
    """Return what the table ``tls`` and the plain settings say; files become absolute paths.

    Args:
        tables: the tables of the file, by name, as TOML has them.
        path: the configuration file, to whose folder the names of files are relative.
        cert_file: the setting tls_cert_file, which is relative to the working directory and comes
            before the certificates of the table.
        key_file: the setting tls_key_file.

    Raises:
        ConfigError: something is wrong; each mistake has a line of its own, but of mistakes of
            shape only the first one is known.
    """
    source = f"file {path}"
    try:
        read = msgspec.convert(tables.get(TABLE, {}), TlsSettings, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(table_fault(error, TlsSettings).sentence(TABLE, source)) from error
    base = Path(path).absolute().parent
    certificates = [
        msgspec.structs.replace(
            each, cert_file=str(base / each.cert_file), key_file=str(base / each.key_file)
        )
        for each in read.certificates
    ]
    if cert_file and key_file:
        certificates.insert(0, CertificateEntry(cert_file=cert_file, key_file=key_file))
    settings = msgspec.structs.replace(
        read,
        certificates=tuple(certificates),
        client_ca_file=str(base / read.client_ca_file) if read.client_ca_file else "",
    )
    mistakes = [f"{where} is not allowed: {why}" for where, why in _pair(cert_file, key_file)]
    mistakes += [f"tls.{at} ({source}) is not allowed: {why}" for at, why in _mistakes(settings)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def tls_of(loaded: Loaded) -> TlsSettings:
    """Return what a configuration says of TLS; raises ConfigError."""
    return _with_plain(loaded.config, loaded.tables, loaded.path)


def plain_tls_of(config: Config) -> TlsSettings:
    """Return what the plain settings alone say of TLS; raises ConfigError."""
    return _with_plain(config, {}, "")


def _with_plain(config: Config, tables: Mapping[str, Any], path: str) -> TlsSettings:
    settings = read_tls(tables, path, cert_file=config.tls_cert_file, key_file=config.tls_key_file)
    if settings.is_on and config.address.startswith("unix:"):
        raise ConfigError(
            "A Unix socket speaks no TLS, since only this machine reaches it; leave the"
            " certificates out, or listen on a port (address)."
        )
    return settings


def _pair(cert_file: str, key_file: str) -> Iterator[tuple[str, str]]:
    if bool(cert_file) != bool(key_file):
        given, missing = ("cert", "key") if cert_file else ("key", "cert")
        yield f"tls_{given}_file", f"it means nothing without tls_{missing}_file."


def _mistakes(settings: TlsSettings) -> Iterator[tuple[str, str]]:
    """Yield where something is wrong that no shape says, and why."""
    seen: set[str] = set()
    for number, entry in enumerate(settings.certificates):
        for name in entry.names:
            if not _NAME.fullmatch(name) or len(name) > 253:
                yield (
                    f"certificates[{number}].names",
                    f"{name[:80]!a} is no name of a host in lower case, such as"
                    " events.example.com or *.example.com.",
                )
            elif name in seen:
                yield f"certificates[{number}].names", f"{name!a} stands there twice."
            seen.add(name)
    asks = settings.client_certificates != "none"
    if asks and not settings.client_ca_file:
        yield (
            "client_ca_file",
            "without the authorities that sign them no client certificate can be checked; name"
            " their file.",
        )
    if settings.client_ca_file and not asks:
        yield (
            "client_certificates",
            'client_ca_file means nothing with "none"; say "optional" or "required".',
        )
    if asks and not settings.is_on:
        yield (
            "certificates",
            "client certificates are part of TLS, and there is no certificate of the daemon; make"
            " one for a try with `clevrd cert new`.",
        )
