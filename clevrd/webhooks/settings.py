"""``[[webhooks]]`` of the configuration file: where events are posted, checked and with secrets."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from clevrd.config import Loaded
from clevrd.errors import ConfigError, InvalidRequest
from clevrd.fingerprints import fingerprint
from clevrd.plurals import noun_for
from clevrd.private_files import check_private
from clevrd.small_files import read_small
from clevrd.table_faults import table_fault
from clevrd.tenants.tenant import check_tenant_name
from clevrd.tenants.topic_permissions import TopicPermissions

TABLE: Final = "webhooks"

# Each has a queue and a task of its own.
MAX_WEBHOOKS: Final = 20
# HMAC-SHA256 takes keys of any length; shorter ones than this can be guessed.
_MIN_SECRET_BYTES: Final = 16
_MAX_SECRET_BYTES: Final = 1_024

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class WebhookEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table ``[[webhooks]]``."""

    id: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
    url: Annotated[str, Meta(min_length=1, max_length=2_048)]
    secret_file: Annotated[str, Meta(min_length=1, max_length=4_096)]
    tenant: str
    topics: tuple[str, ...] = ("**",)
    events: tuple[Literal["occupied", "vacated", "joined", "left"], ...] = (
        *("occupied", "vacated", "joined", "left"),
    )
    # Addresses and networks that may be posted to though they are no public ones.
    allowed_targets: Annotated[tuple[str, ...], Meta(max_length=100)] = ()


class Webhook(msgspec.Struct, frozen=True):
    """A webhook that can be used. Its secret is in no text of it."""

    id: str
    url: str
    secret: bytes
    tenant: str
    topics: TopicPermissions
    events: frozenset[str]
    allowed_targets: tuple[Network, ...]
    # The file that the secret is from, as the configuration names it.
    secret_file: str = ""

    def __repr__(self) -> str:
        """Return its id alone: this may reach a log by mistake."""
        return f"Webhook({self.id!r})"

    @property
    def shown_url(self) -> str:
        """The URL's host, with a fingerprint in place of what else it has.

        The path of a webhook is often all that a client needs to post to it.
        """
        parts = urlsplit(self.url)
        shown = f"{parts.scheme}://{parts.netloc}"
        is_all = parts.path in ("", "/") and not parts.query
        return shown if is_all else f"{shown}#{fingerprint(self.url)}"

    def view(self) -> dict[str, Any]:
        """Return all fields as operators may see them."""
        return {
            "id": self.id,
            "url": self.shown_url,
            "secret_file": self.secret_file,
            "tenant": self.tenant,
            "topics": list(self.topics.entries),
            "events": sorted(self.events),
            "allowed_targets": [str(each) for each in self.allowed_targets],
        }


def webhooks_of(loaded: Loaded) -> tuple[Webhook, ...]:
    """Return what a configuration says of webhooks; raises ConfigError."""
    return read_webhooks(loaded.tables, loaded.path)


def read_webhooks(tables: Mapping[str, Any], path: str = "") -> tuple[Webhook, ...]:
    """Return the webhooks in the tables of a file, with their secrets.

    Args:
        tables: by name, as TOML has them.
        path: the file, to whose folder the names of files are relative.

    Raises:
        ConfigError: something is wrong; each mistake has a line of its own, but of mistakes of
            shape only the first one is known.
    """
    try:
        entries = msgspec.convert(tables.get(TABLE, []), tuple[WebhookEntry, ...], strict=True)
    except msgspec.ValidationError as error:
        fault = table_fault(error, tuple[WebhookEntry, ...])
        raise ConfigError(fault.sentence(TABLE, f"file {path}")) from error
    mistakes = [f"{place} (file {path}) is not allowed: {why}" for place, why in _mistakes(entries)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    base = Path(path).absolute().parent
    return tuple(
        Webhook(
            each.id,
            each.url,
            _secret_in(base / each.secret_file),
            each.tenant,
            TopicPermissions(each.topics),
            frozenset(each.events),
            tuple(map(ipaddress.ip_network, each.allowed_targets)),
            each.secret_file,
        )
        for each in entries
    )


def _mistakes(entries: tuple[WebhookEntry, ...]) -> Iterator[tuple[str, str]]:
    if len(entries) > MAX_WEBHOOKS:
        yield TABLE, f"there are {len(entries)}; {MAX_WEBHOOKS} are the most."
    ids: set[str] = set()
    for number, each in enumerate(entries):
        place = f"{TABLE}[{number}]"
        if each.id in ids:
            yield f"{place}.id", f"two webhooks are called {each.id!a}."
        ids.add(each.id)
        if why := _fault_of(each.url):
            yield f"{place}.url", why
        try:
            check_tenant_name(each.tenant)
        except InvalidRequest as error:
            yield f"{place}.tenant", str(error)
        for entry in each.topics:
            try:
                TopicPermissions([entry])
            except InvalidRequest as error:
                yield f"{place}.topics", f"{entry[:80]!a}: {error}"
        for target in each.allowed_targets:
            try:
                ipaddress.ip_network(target)
            except ValueError as error:
                yield f"{place}.allowed_targets", f"{error}; give an address or a network."


def _fault_of(url: str) -> str | None:
    """Return what is wrong with a URL; None where it can be posted to."""
    try:
        parts = urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError as error:
        return f"it is no URL: {error}."
    if parts.scheme not in ("https", "http") or not parts.hostname or not port_is_one:
        return "give an https or http URL with a host."
    if parts.username is not None or parts.password is not None or parts.fragment:
        return (
            "it has a user or a fragment, which are not sent; the secret_file signs what is sent."
        )
    return None


def _secret_in(path: Path) -> bytes:
    """Return the secret in a file, without the line's end.

    Raises:
        ConfigError: it can't be read, others may read it, or it is too short or too long.
    """
    check_private(path)
    try:
        secret = read_small(path, _MAX_SECRET_BYTES).strip()
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror or error}.") from error
    if not _MIN_SECRET_BYTES <= len(secret) <= _MAX_SECRET_BYTES:
        raise ConfigError(
            f"The secret in {path} has {len(secret)} {noun_for(len(secret), 'byte')};"
            f" {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} are taken. Make one:"
            " openssl rand -hex 32."
        )
    return secret
