"""Differences between a running daemon's configuration and another one. Pure; no files here."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from clevrd.config_view import ConfigView, SettingView

# The tables, and what puts another one into force.
_TABLES: Final = {
    "auth": "reload",
    "tenants": "reload",
    "journal": "restart",
    "sources": "restart",
    "webhooks": "restart",
    "tls": "reload",
}
# The fields by which an entry of a list is recognised.
_NAMES: Final = (("name",), ("id",), ("cert_file",), ("issuer", "audience"))
_SECRET: Final = "fingerprint"  # noqa: S105  # the name of a field


def outranks_file(setting: SettingView) -> bool:
    """Return whether a value is from a source that is stronger than the file."""
    return setting.source.startswith(("flag ", "environment "))


def differences(running: ConfigView, file: ConfigView) -> Iterator[str]:
    """Yield a line for each difference, with what puts the file's into force.

    Args:
        running: what the daemon works with.
        file: what the file says; settings that it can't change in the daemon are passed over.
    """
    # Names for which a reload does usually, and does not where it would switch TLS.
    switching: Collection[str] = ()
    if running.tls is not None and _has_tls(running) is not _has_tls(file):
        switching = ("tls", "tls_cert_file", "tls_key_file")
    for name, setting in file.settings.items():
        known = running.settings.get(name)
        if known is None or outranks_file(known) or known.value == setting.value:
            continue
        how = "restart" if known.needs_restart or name in switching else "reload"
        yield f"{name}: running {_text(known.value)}, file {_text(setting.value)} ({how})"
    now, later = _plain(running), _plain(file)
    for table, how in _TABLES.items():
        if now.get(table, {}) is None:
            continue
        for line in _between(table, now.get(table, {}), later[table]):
            yield f"{line} ({'restart' if table in switching else how})"


def _has_tls(view: ConfigView) -> bool:
    return bool(view.tls and view.tls.get("certificates"))


def _plain(view: ConfigView) -> dict[str, Any]:
    """Return a view as JSON has it, however it was made."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(view))
    tls = plain["tls"]
    if tls is not None:
        tls.pop("minimum_version", None)
        if _are_entries(entries := tls.get("certificates")):
            tls["certificates"] = list(_in_table(entries, plain["settings"]))
    return plain


def _in_table(
    certificates: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the certificates of the table; that of the plain settings is one of these."""
    plain = settings.get("tls_cert_file", {}).get("value")
    for each in certificates:
        if each.get("cert_file") != plain:
            yield {name: value for name, value in each.items() if name != "ends_at"}


def _between(place: str, running: Any, file: Any) -> Iterator[str]:
    if isinstance(running, Mapping) and isinstance(file, Mapping):
        yield from _between_tables(place, running, file)
    elif _are_entries(running) and _are_entries(file):
        yield from _between_tables(place, _by_name(running), _by_name(file))
    elif running != file:
        if place.endswith(f".{_SECRET}"):
            yield f"{place.removesuffix(f'.{_SECRET}')}: the secret differs"
        else:
            yield f"{place}: running {_text(running)}, file {_text(file)}"


def _between_tables(
    place: str, running: Mapping[str, Any], file: Mapping[str, Any]
) -> Iterator[str]:
    for name in (*running, *(name for name in file if name not in running)):
        here = f"{place}.{ascii(name)[1:-1]}"
        if name not in file:
            yield f"{here}: only running"
        elif name not in running:
            yield f"{here}: only in the file"
        else:
            yield from _between(here, running[name], file[name])


def _are_entries(value: Any) -> bool:
    """Return whether ``value`` is a list of tables; an empty list may be one."""
    return (
        isinstance(value, Sequence)
        and all(isinstance(each, Mapping) for each in value)
        and (not isinstance(value, str))
    )


def _by_name(entries: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {_name_of(entry): entry for entry in entries}


def _name_of(entry: Mapping[str, Any]) -> str:
    for fields in _NAMES:
        if all(field in entry for field in fields):
            return " ".join(str(entry[field]) for field in fields)
    return "?"


def _text(value: Any) -> str:
    """Return a value on one line, as TOML and JSON have it; what is not set is none."""
    return "none" if value is None else json.dumps(value)
