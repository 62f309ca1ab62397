"""The table ``[journal]`` of the configuration file, and the setting ``journal``, checked.

No file is opened here and no engine is asked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from clevrd.config import Config, Loaded
from clevrd.core.names import check_topic
from clevrd.core.patterns import Words, parse_pattern
from clevrd.errors import ConfigError, InvalidRequest
from clevrd.fingerprints import fingerprint
from clevrd.journal.kafka.properties import BadProperty, read_properties
from clevrd.journal.kafka.url import SCHEMES as KAFKA_SCHEMES
from clevrd.journal.kafka.url import parse_kafka_url
from clevrd.journal.nats.url import SCHEMES as NATS_SCHEMES
from clevrd.journal.nats.url import parse_nats_url
from clevrd.journal.redis.url import SCHEMES as REDIS_SCHEMES
from clevrd.journal.redis.url import parse_redis_url
from clevrd.journal.url_parts import BadUrl, password_mistakes, scheme_of, shown_url
from clevrd.table_faults import table_fault

TABLE: Final = "journal"

# The engine that each scheme of a URL stands for.
ENGINES: Final[Mapping[str, str]] = {
    **dict.fromkeys(REDIS_SCHEMES, "redis"),
    **dict.fromkeys(NATS_SCHEMES, "nats"),
    **dict.fromkeys(KAFKA_SCHEMES, "kafka"),
}
# Where each engine keeps a journal, as a sentence says it.
PLACES: Final[Mapping[str, str]] = {
    "sqlite": "a directory",
    "redis": "Redis (url)",
    "nats": "NATS (url)",
    "kafka": "Kafka (url)",
}

# Bytes that are kept by servers, of which it is memory in some, unless the file says otherwise.
SERVER_RETENTION_BYTES: Final = 1 << 30
# A node that starts needs what came behind the last checkpoint, which may be some minutes old.
MIN_SERVER_RETENTION_S: Final = 900.0
# Files of a journal in a directory are no shorter.
MIN_SEGMENT_S: Final = 1.0
MIN_SEGMENT_BYTES: Final = 1 << 20
# Settings that not all engines have, and the engines that do.
ENGINES_WITH: Final[Mapping[str, tuple[str, ...]]] = {
    "durability": ("sqlite", "nats", "redis"),
    "retention_messages": ("sqlite",),
    "segment_s": ("sqlite",),
    "segment_bytes": ("sqlite",),
    "partitions": ("redis", "nats", "kafka"),
    "prefix": ("redis", "nats"),
    "min_replicas": ("redis", "kafka"),
    "password_file": ("redis", "nats", "kafka"),
    "sentinel_user": ("redis",),
    "sentinel_password_file": ("redis",),
    "ca_file": ("redis", "nats", "kafka"),
    "client_cert_file": ("redis", "nats", "kafka"),
    "client_key_file": ("redis", "nats", "kafka"),
    "replicas": ("nats",),
    "sync_always": ("nats",),
    "nkey_seed_file": ("nats",),
    "creds_file": ("nats",),
    "replication_factor": ("kafka",),
    "kafka": ("kafka",),
}

# The names of streams in NATS, and words of its subjects.
_STREAM_NAME: Final = re.compile(r"[A-Za-z0-9_-]+\Z")
# Anything that is no path.
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

_DAY_S: Final = 86_400.0

Durability = Literal["fsync", "os"]


class JournalSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """``[journal]``: where messages are kept, for how long, and of which topics."""

    # A directory, for the journal of one process. The setting `journal` is stronger.
    directory: str = ""
    # Servers, for a journal that several nodes share. The setting `journal` is stronger.
    url: str = ""
    # Patterns of the topics that are journaled; the others are this process's memory.
    topics: tuple[str, ...] = ("**",)
    # "fsync": an answered message outlives a power cut. "os": it outlives the process. Where it is
    # not written it follows from `sync_always` in NATS, and is "os" in Redis.
    durability: Durability = "fsync"
    # How long messages are kept, and how much of them in all; 0 for no bound.
    retention_s: Annotated[float, Meta(ge=0, le=10 * 366 * _DAY_S)] = 7 * _DAY_S
    retention_bytes: Annotated[int, Meta(ge=0, le=1 << 50)] = 10 << 30
    # Messages of each topic that can be read back; 0 for all that are kept.
    retention_messages: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    # Topics that may have messages in the journal; each takes 350 bytes of memory.
    max_topics: Annotated[int, Meta(ge=1, le=1 << 30)] = 1_000_000
    # A new file is begun after so long, or so many bytes; files are deleted whole.
    segment_s: Annotated[float, Meta(ge=MIN_SEGMENT_S, le=31 * _DAY_S)] = 3600.0
    segment_bytes: Annotated[int, Meta(ge=MIN_SEGMENT_BYTES, le=1 << 40)] = 1 << 30
    # Logs that topics are divided among; fixed when the journal is made.
    partitions: Annotated[int, Meta(ge=1, le=64)] = 8
    # All keys in Redis, and streams and subjects in NATS, begin with it.
    prefix: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z")] = "clevrd"
    # Copies of the topic that is made in Kafka; 0 for as many as the cluster makes by itself.
    replication_factor: Annotated[int, Meta(ge=0, le=32)] = 0
    # Replicas of Redis, or copies in Kafka, that have a message before it is answered.
    min_replicas: Annotated[int, Meta(ge=0, le=16)] = 0
    # Copies of each stream of NATS.
    replicas: Literal[1, 3, 5] = 1
    # The servers of NATS sync their files before they answer, which clevrd can't see.
    sync_always: bool = False
    # Files that have nothing but a password: the server's, and that of Redis's Sentinels.
    password_file: str = ""
    sentinel_user: str = ""
    sentinel_password_file: str = ""
    # For TLS: the CA of the servers, and a certificate that they ask for.
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    # For NATS, in place of user and password: the seed of an nkey, or a file of credentials.
    nkey_seed_file: str = ""
    creds_file: str = ""
    # Properties of Kafka's client library, by name.
    kafka: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def is_on(self) -> bool:
        """Whether there is a journal at all."""
        return bool(self.directory or self.url)

    @property
    def engine(self) -> str:
        """The engine's name; empty where the URL is none of any engine."""
        return ENGINES.get(scheme_of(self.url), "") if self.url else "sqlite"

    @property
    def shown(self) -> str:
        """Where the messages are, without a secret."""
        return shown_journal(self.url or self.directory)

    @property
    def patterns(self) -> tuple[Words, ...]:
        """The topics' patterns, parsed; they were checked."""
        return tuple(map(_words, self.topics))


NO_JOURNAL: Final = JournalSettings()


def journal_of(loaded: Loaded) -> JournalSettings:
    """Return what a configuration says of the journal; raises ConfigError."""
    return read_journal(loaded.tables, loaded.config.journal, loaded.path)


def plain_journal_of(config: Config) -> JournalSettings:
    """Return what the plain setting alone says of the journal; raises ConfigError."""
    return read_journal({}, config.journal)


def read_journal(tables: Mapping[str, Any], directory: str, path: str = "") -> JournalSettings:
    """Return what the table ``journal`` and the plain setting say.

    Args:
        tables: the tables of the file, by name, as TOML has them.
        directory: the setting `journal`: a URL, or a path relative to the working directory.
        path: the configuration file, for errors.

    Raises:
        ConfigError: something is wrong; each mistake has a line of its own, but of mistakes of
            shape only the first one is known.
    """
    source = f"file {path}"
    try:
        settings = msgspec.convert(tables.get(TABLE, {}), JournalSettings, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(table_fault(error, JournalSettings).sentence(TABLE, source)) from error
    if _URL.match(directory):
        settings = msgspec.structs.replace(settings, url=directory, directory="")
    elif directory:
        absolute = str(Path(directory).absolute())
        settings = msgspec.structs.replace(settings, directory=absolute, url="")
    written = frozenset(tables.get(TABLE, {}))
    if settings.url and "retention_bytes" not in written:
        settings = msgspec.structs.replace(settings, retention_bytes=SERVER_RETENTION_BYTES)
    is_unsaid = "durability" not in written
    if is_unsaid and (settings.engine == "redis" or _is_unsynced_nats(settings)):
        settings = msgspec.structs.replace(settings, durability="os")
    if not settings.url:
        settings = _with_fitting_segments(settings, written)
    mistakes = [
        f"{TABLE} is not allowed: {why}"
        if directory and at == "url"
        else f"{TABLE}.{at} ({source}) is not allowed: {why}"
        for at, why in _mistakes(settings, written)
    ]
    if tables.get(TABLE) and not settings.is_on:
        mistakes.append(
            f"{TABLE} ({source}) says how messages are kept, and not where; give the directory"
            ' (directory = "/var/lib/clevrd/journal") or a URL, or leave the table out.'
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def _is_unsynced_nats(settings: JournalSettings) -> bool:
    return settings.engine == "nats" and not settings.sync_always


def _words(text: str) -> Words:
    """Return the words of a pattern, or of a topic's name."""
    if "*" in text:
        return parse_pattern(text)
    check_topic(text)
    return tuple(text.split("."))


def _with_fitting_segments(settings: JournalSettings, written: Collection[str]) -> JournalSettings:
    """Return ``settings`` with files of at most a quarter of what is kept, unless they say more."""
    segment_s, segment_bytes = settings.segment_s, settings.segment_bytes
    if settings.retention_s and "segment_s" not in written:
        segment_s = max(MIN_SEGMENT_S, min(segment_s, settings.retention_s / 4))
    if settings.retention_bytes and "segment_bytes" not in written:
        segment_bytes = max(MIN_SEGMENT_BYTES, min(segment_bytes, settings.retention_bytes // 4))
    return msgspec.structs.replace(settings, segment_s=segment_s, segment_bytes=segment_bytes)


def _mistakes(settings: JournalSettings, written: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield where something is wrong that no shape says, and why.

    Args:
        written: the settings that the table has.
    """
    if settings.directory and not settings.directory.startswith("/"):
        yield "directory", "write an absolute path."
    if not settings.topics:
        yield "topics", 'name a pattern; ["**"] stands for all topics.'
    for index, text in enumerate(settings.topics):
        try:
            _words(text)
        except InvalidRequest as error:
            yield f"topics[{index}]", str(error)
    if settings.url and settings.directory:
        yield "url", "a journal has a directory or a URL, and not both."
    engine = settings.engine
    if not engine:
        schemes = ", ".join(sorted(ENGINES))
        yield (
            "url",
            f"write a URL that begins with one of {schemes}; a journal on this machine is a"
            " directory.",
        )
        return
    for name, engines in ENGINES_WITH.items():
        if engine not in engines and getattr(settings, name) != getattr(NO_JOURNAL, name):
            places = " or ".join(PLACES[each] for each in engines)
            yield name, f"it is for a journal in {places}, and this one is in {PLACES[engine]}."
    if engine == "redis":
        yield from _redis_mistakes(settings)
    elif engine == "kafka":
        yield from _kafka_mistakes(settings)
    elif engine == "nats":
        yield from _nats_mistakes(settings, written)
    if settings.url:
        yield from _server_mistakes(settings)
        return
    # A file is never shorter than the least length, so what is not written is no mistake.
    if "segment_s" in written and 0 < settings.retention_s < settings.segment_s:
        yield "segment_s", "files can't be longer than messages are kept (retention_s)."
    if "segment_bytes" in written and 0 < settings.retention_bytes < settings.segment_bytes * 2:
        yield "segment_bytes", "it must be at most half of retention_bytes; files go whole."


def _server_mistakes(settings: JournalSettings) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with any journal that is kept by servers."""
    if settings.client_key_file and not settings.client_cert_file:
        yield "client_key_file", "name its certificate too (client_cert_file)."
    if 0 < settings.retention_s < MIN_SERVER_RETENTION_S:
        yield "retention_s", f"write {MIN_SERVER_RETENTION_S:.0f} or more, or 0 for no bound."
    if 0 < settings.retention_bytes < settings.partitions << 20:
        yield "retention_bytes", "write at least 1 MiB for each partition, or 0 for no bound."


def _redis_mistakes(settings: JournalSettings) -> Iterator[tuple[str, str]]:
    try:
        address = parse_redis_url(settings.url)
    except BadUrl as error:
        yield "url", str(error)
        return
    yield from password_mistakes(address, settings.password_file)
    if address.kind != "sentinel" and (settings.sentinel_user or settings.sentinel_password_file):
        yield "sentinel_user", "it is for URLs that begin with redis+sentinel://."
    if not address.is_tls and (settings.ca_file or settings.client_cert_file):
        yield "ca_file", "certificates are for URLs that begin with rediss."


def _nats_mistakes(
    settings: JournalSettings, written: Collection[str]
) -> Iterator[tuple[str, str]]:
    try:
        address = parse_nats_url(settings.url)
    except BadUrl as error:
        yield "url", str(error)
        return
    yield from password_mistakes(address, settings.password_file)
    ways = (
        bool(address.user or address.token or settings.password_file),
        bool(settings.nkey_seed_file),
        bool(settings.creds_file),
    )
    if sum(ways) > 1:
        name = "creds_file" if settings.creds_file else "nkey_seed_file"
        yield name, "give one of user and password, a token, nkey_seed_file and creds_file."
    if not address.is_tls and (settings.ca_file or settings.client_cert_file):
        yield "ca_file", "certificates are for URLs that begin with tls://."
    if not _STREAM_NAME.match(settings.prefix):
        yield "prefix", "streams of NATS are named by it: write letters, digits, - and _ alone."
    if settings.sync_always:
        return
    if "durability" in written and settings.durability == "fsync":
        yield (
            "durability",
            "a NATS server answers before its disk has a message, unless it is configured with"
            ' jetstream { sync_interval: always }; write sync_always = true if yours are, or "os".',
        )
    elif settings.replicas > 1 and "durability" not in written:
        yield (
            "replicas",
            "copies don't outlive a power cut that hits several servers, since they answer before"
            " their disks have a message; configure them with jetstream { sync_interval: always }"
            ' and write sync_always = true, or write durability = "os".',
        )


def _kafka_mistakes(settings: JournalSettings) -> Iterator[tuple[str, str]]:
    try:
        address = parse_kafka_url(settings.url)
    except BadUrl as error:
        yield "url", str(error)
        return
    yield from password_mistakes(address, settings.password_file)
    if settings.password_file and not address.user:
        yield "password_file", "write whose password it is before the @ of the URL."
    if not address.is_tls and (settings.ca_file or settings.client_cert_file):
        yield "ca_file", "certificates are for URLs that begin with kafka+ssl."
    if 0 < settings.replication_factor < settings.min_replicas:
        yield "min_replicas", "it can't be more than replication_factor."
    try:
        read_properties(settings.kafka)
    except BadProperty as error:
        yield f"kafka.{error.name}", str(error)


def shown_journal(place: str) -> str:
    """Return a directory or a URL, without user and password, and with a fingerprint of them."""
    shown = shown_url(place)
    return shown if shown == place else f"{shown}#{fingerprint(place)}"
