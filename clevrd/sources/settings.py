"""The tables ``[[sources]]`` of the configuration file, checked. No file is opened here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from clevrd.config import Loaded
from clevrd.core.names import check_topic
from clevrd.errors import ConfigError, InvalidRequest
from clevrd.journal.kafka.properties import BadProperty, read_properties
from clevrd.journal.kafka.url import parse_kafka_url
from clevrd.journal.nats.url import parse_nats_url
from clevrd.journal.redis.url import parse_redis_url
from clevrd.journal.url_parts import BadUrl, password_mistakes
from clevrd.sources.filters import Condition, Scalar
from clevrd.sources.mapping import Mapping as RecordMapping
from clevrd.sources.parts import KEY, parse_part
from clevrd.sources.places import Kind, Place, parse_place, shown_place
from clevrd.sources.starts import LATEST, Start, parse_start
from clevrd.sources.templates import Template
from clevrd.table_faults import TableFault, table_fault
from clevrd.tenants.settings import Access
from clevrd.tenants.tenant import DEFAULT_TENANT, check_tenant_name

TABLE: Final = "sources"
# Sources of one daemon; each has a task and some connections.
MAX_SOURCES: Final = 64
MAX_CONDITIONS: Final = 32


class FilterEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of ``filter``: a condition that every record has to fulfil."""

    # key, header:NAME, or a JSON pointer into the value.
    at: str
    # One of these two.
    equals: Scalar | None = None
    exists: bool | None = None


class SourceEntry(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """``[[sources]]``: a stream whose records become messages."""

    # In figures, in the log, and in idempotency keys.
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")]
    url: Annotated[str, Meta(max_length=4_096)]
    # The topic, a template of parts of the record.
    topic: Annotated[str, Meta(min_length=1, max_length=1_024)]
    tenant: str = DEFAULT_TENANT
    # The message's key, a template; empty for none.
    key: Annotated[str, Meta(max_length=1_024)] = ""
    # The field of an entry in Redis that has the value; empty for an object of all fields.
    field: Annotated[str, Meta(max_length=1_024)] = ""
    filter: Annotated[tuple[FilterEntry, ...], Meta(max_length=MAX_CONDITIONS)] = ()
    # Where a source begins that was never read before.
    start: str = LATEST
    # The name by which its position is kept; empty for one made of the source's name.
    group: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{0,128}\Z")] = ""
    # The topic of records that can't be taken; empty for none.
    dead_letter: str = "sources.dead"
    # Files that have nothing but a password.
    password_file: str = ""
    sentinel_user: str = ""
    sentinel_password_file: str = ""
    # Files with the credentials of NATS.
    nkey_seed_file: str = ""
    creds_file: str = ""
    # Properties of Kafka's client library, by name.
    kafka: dict[str, Any] = msgspec.field(default_factory=dict)
    # For TLS: the CA of the servers, and a certificate that they ask for.
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""

    @property
    def place(self) -> Place:
        """The server and the stream; they were checked."""
        return parse_place(self.url)

    @property
    def group_name(self) -> str:
        """The name by which the position is kept."""
        return self.group or f"clevrd-{self.name}"

    @property
    def beginning(self) -> Start:
        """The beginning; it was checked."""
        return parse_start(self.start, self.place.kind)

    @property
    def mapping(self) -> RecordMapping:
        """How its records become messages; it was checked."""
        return RecordMapping(
            self.name,
            Template(self.topic),
            Template(self.key) if self.key else None,
            [Condition(parse_part(each.at), each.equals, each.exists) for each in self.filter],
            self.dead_letter,
        )

    def view(self) -> dict[str, Any]:
        """Return all fields as operators may see them."""
        fields = msgspec.structs.asdict(self)
        conditions = [msgspec.structs.asdict(each) for each in self.filter]
        return {**fields, "url": shown_place(self.url), "filter": conditions}


def sources_of(loaded: Loaded, access: Access) -> tuple[SourceEntry, ...]:
    """Return what a configuration says of sources; raises ConfigError."""
    return read_sources(loaded.tables, access, loaded.path)


def read_sources(
    tables: Mapping[str, Any], access: Access, path: str = ""
) -> tuple[SourceEntry, ...]:
    """Return what the tables ``sources`` say.

    Args:
        tables: the tables of the file, by name, as TOML has them.
        access: the tenants that there are.
        path: the configuration file, for errors.

    Raises:
        ConfigError: something is wrong; each mistake has a line of its own, but of mistakes of
            shape only the first one is known.
    """
    where = f"file {path}"
    try:
        entries = msgspec.convert(tables.get(TABLE, ()), tuple[SourceEntry, ...], strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_shape_mistake(error, where)) from error
    mistakes = [
        f"{TABLE}{at} ({where}) is not allowed: {why}" for at, why in _mistakes(entries, access)
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return entries


def _shape_mistake(error: msgspec.ValidationError, where: str) -> str:
    place, what = table_fault(error, tuple[SourceEntry, ...])
    if place.endswith("url"):
        # Never with the value, which may hold a password.
        what = "must be the URL of a stream, a text of at most 4,096 characters"
    elif place.endswith(("name", "group")):
        what = "must be letters, digits, dots, underscores and hyphens, 64 at most"
    if not place:
        what = f"must be written as [[{TABLE}]], once for each source"
    return TableFault(place, what).sentence(TABLE, where)


def _mistakes(entries: Sequence[SourceEntry], access: Access) -> Iterator[tuple[str, str]]:
    """Yield where something is wrong that no shape says, and why."""
    if len(entries) > MAX_SOURCES:
        yield "", f"there are {len(entries)} of them, and {MAX_SOURCES} are allowed."
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries):
        at = f"[{number}]"
        if entry.name in seen:
            yield (
                f"{at}.name",
                f"sources[{seen[entry.name]}] is called {entry.name!a} as well; the name tells"
                " their positions apart.",
            )
        seen.setdefault(entry.name, number)
        for field, why in _mistakes_of(entry, access):
            yield f"{at}.{field}", why


def _mistakes_of(entry: SourceEntry, access: Access) -> Iterator[tuple[str, str]]:
    try:
        kind = parse_place(entry.url).kind
        yield from _URL_MISTAKES[kind](entry)
    except BadUrl as error:
        yield "url", str(error)
        return
    for field, kinds in _ONLY.items():
        if getattr(entry, field) and kind not in kinds:
            yield field, f"it is for {' and '.join(_CALLED[each] for each in kinds)}."
    try:
        check_tenant_name(entry.tenant)
    except InvalidRequest as error:
        yield "tenant", str(error)
    known = {each.name for each in access.tenants}
    is_closed = access.auth.mode == "required" and not any(
        each.any_tenant for each in access.auth.jwt
    )
    if is_closed and entry.tenant not in known:
        yield (
            "tenant",
            f"nobody could read it, since there is no tenant {entry.tenant!a} in [[tenants]].",
        )
    yield from _template_mistakes("topic", entry.topic, kind)
    if entry.key:
        yield from _template_mistakes("key", entry.key, kind)
    if entry.dead_letter:
        try:
            check_topic(entry.dead_letter)
        except InvalidRequest as error:
            yield "dead_letter", str(error)
    try:
        parse_start(entry.start, kind)
    except ValueError as error:
        yield "start", str(error)
    for number, condition in enumerate(entry.filter):
        for why in _condition_mistakes(condition, kind):
            yield f"filter[{number}]", why


# Settings that some kinds have.
_ONLY: Final[Mapping[str, tuple[Kind, ...]]] = {
    "field": ("redis",),
    "sentinel_user": ("redis",),
    "sentinel_password_file": ("redis",),
    "nkey_seed_file": ("nats",),
    "creds_file": ("nats",),
    "kafka": ("kafka",),
}
_CALLED: Final[Mapping[Kind, str]] = {
    "redis": "streams in Redis",
    "nats": "streams of NATS",
    "kafka": "topics of Kafka",
}


def _kafka_mistakes(entry: SourceEntry) -> Iterator[tuple[str, str]]:
    address = parse_kafka_url(entry.url)
    yield from password_mistakes(address, entry.password_file)
    if entry.password_file and not address.user:
        yield "password_file", "write whose password it is before the @ of the URL."
    if not address.is_tls and (entry.ca_file or entry.client_cert_file):
        yield "ca_file", "certificates are for URLs that begin with kafka+ssl."
    if entry.client_key_file and not entry.client_cert_file:
        yield "client_key_file", "name its certificate too (client_cert_file)."
    try:
        read_properties(entry.kafka)
    except BadProperty as error:
        yield f"kafka.{error.name}", str(error)


def _nats_mistakes(entry: SourceEntry) -> Iterator[tuple[str, str]]:
    address = parse_nats_url(parse_place(entry.url).server)
    given = {
        "url": address.password or (address.token and not entry.password_file),
        "password_file": entry.password_file,
        "nkey_seed_file": entry.nkey_seed_file,
        "creds_file": entry.creds_file,
    }
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        yield names[1], f"there are credentials in {names[0]} already; leave one of them out."
    if not address.is_tls and (entry.ca_file or entry.client_cert_file):
        yield "ca_file", "certificates are for URLs that begin with tls."
    if entry.client_key_file and not entry.client_cert_file:
        yield "client_key_file", "name its certificate too (client_cert_file)."


def _redis_mistakes(entry: SourceEntry) -> Iterator[tuple[str, str]]:
    address = parse_redis_url(parse_place(entry.url).server)
    yield from password_mistakes(address, entry.password_file)
    if address.kind != "sentinel" and (entry.sentinel_user or entry.sentinel_password_file):
        yield "sentinel_user", "it is for URLs that begin with redis+sentinel://."
    if not address.is_tls and (entry.ca_file or entry.client_cert_file):
        yield "ca_file", "certificates are for URLs that begin with rediss."
    if entry.client_key_file and not entry.client_cert_file:
        yield "client_key_file", "name its certificate too (client_cert_file)."


_URL_MISTAKES: Final = {
    "redis": _redis_mistakes,
    "nats": _nats_mistakes,
    "kafka": _kafka_mistakes,
}


def _template_mistakes(field: str, text: str, kind: Kind) -> Iterator[tuple[str, str]]:
    try:
        template = Template(text)
    except ValueError as error:
        yield field, str(error)
        return
    if kind == "redis" and any(part.name == KEY for part in template.parts):
        yield field, _NO_KEY
    if field == "topic" and not template.parts:
        try:
            check_topic(text)
        except InvalidRequest as error:
            yield field, str(error)


_NO_KEY: Final = "entries in Redis have no key; name a field ({header:FIELD}), or a JSON pointer."


def _condition_mistakes(condition: FilterEntry, kind: Kind) -> Iterator[str]:
    try:
        part = parse_part(condition.at)
    except ValueError as error:
        yield f"at: {error}"
        return
    if kind == "redis" and part.name == KEY:
        yield f"at: {_NO_KEY}"
    if (condition.equals is None) == (condition.exists is None):
        yield "give one of equals and exists."
    elif part.pointer is None and not isinstance(condition.equals, str | None):
        yield 'a header or a key is text; write equals = "..." with quotes.'
