"""Which reader a source has; its library is imported when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final

import msgspec

from clevrd.errors import ConfigError
from clevrd.journal.kafka.properties import FILE, read_properties
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.kafka.url import parse_kafka_url
from clevrd.journal.nats.settings import NatsSettings
from clevrd.journal.nats.url import parse_nats_url
from clevrd.journal.redis.settings import RedisSettings
from clevrd.journal.redis.url import parse_redis_url
from clevrd.small_files import read_small
from clevrd.sources.progress import Progress
from clevrd.sources.reading import Reader
from clevrd.sources.settings import SourceEntry

# Bytes of a password at most.
MAX_PASSWORD: Final = 4_096
# The packages that a kind needs, and the extra that has them.
_PACKAGES: Final = {
    "redis": (("redis", "hiredis"), "redis"),
    "nats": (("nats", "nkeys"), "nats"),
    "kafka": (("confluent_kafka",), "kafka"),
}


def reader_of(entry: SourceEntry, progress: Progress) -> Reader:
    """Return the reader of a source, not opened yet.

    Raises:
        ConfigError: its library is not installed, or a file can't be used.
    """
    packages, extra = _PACKAGES[entry.place.kind]
    if not all(map(find_spec, packages)):
        raise ConfigError(
            f"The source {entry.name} needs the Python packages {' and '.join(packages)}, which are"
            f' not installed; install them: pip install "clevrd[{extra}]".'
        )
    try:
        return _MAKERS[entry.place.kind](entry, progress)
    except ConfigError as error:
        # The sentence is the journal's, which reads the same files.
        text = str(error).removeprefix("The journal's ").replace("[journal.kafka]", "kafka")
        raise ConfigError(f"The source {entry.name}: {text}") from error


def check_sources(entries: Sequence[SourceEntry]) -> None:
    """Look whether readers could be made; raises ConfigError."""
    for entry in entries:
        reader_of(entry, Progress(entry))


def _redis_reader(entry: SourceEntry, progress: Progress) -> Reader:
    from clevrd.sources.redis_stream import RedisReader

    return RedisReader(entry, _redis_settings(entry), progress)


def _nats_reader(entry: SourceEntry, progress: Progress) -> Reader:
    from clevrd.sources.jetstream import JetStreamReader

    return JetStreamReader(entry, _nats_settings(entry), progress)


def _kafka_reader(entry: SourceEntry, progress: Progress) -> Reader:
    from clevrd.sources.kafka_topic import KafkaReader

    return KafkaReader(entry, _kafka_settings(entry), progress)


_MAKERS: Final = {"redis": _redis_reader, "nats": _nats_reader, "kafka": _kafka_reader}


def _kafka_settings(entry: SourceEntry) -> KafkaSettings:
    address = parse_kafka_url(entry.url)
    if entry.password_file:
        address = msgspec.structs.replace(
            address, password=_password_in(entry.password_file, entry)
        )
    properties = [
        (name.removesuffix(FILE), _password_in(value, entry))
        if name.endswith(FILE)
        else (name, value)
        for name, value in read_properties(entry.kafka).items()
    ]
    return KafkaSettings(
        address=address,
        shown=entry.place.shown,
        ca_file=entry.ca_file,
        client_cert_file=entry.client_cert_file,
        client_key_file=entry.client_key_file,
        properties=tuple(properties),
    )


def _nats_settings(entry: SourceEntry) -> NatsSettings:
    place = entry.place
    address = parse_nats_url(place.server)
    if entry.password_file:
        secret = _password_in(entry.password_file, entry)
        # A name alone before the @ is a user, where its password is in a file; without any name
        # the file has a token.
        user = address.user or address.token
        address = msgspec.structs.replace(
            address, user=user, password=secret if user else "", token="" if user else secret
        )
    for path in filter(None, (entry.nkey_seed_file, entry.creds_file)):
        _text_in(path, "credentials", entry)
    return NatsSettings(
        address=address,
        shown=place.shown,
        ca_file=entry.ca_file,
        client_cert_file=entry.client_cert_file,
        client_key_file=entry.client_key_file,
        nkey_seed_file=entry.nkey_seed_file,
        creds_file=entry.creds_file,
    )


def _redis_settings(entry: SourceEntry) -> RedisSettings:
    place = entry.place
    address = parse_redis_url(place.server)
    if entry.password_file:
        password = _password_in(entry.password_file, entry)
        address = msgspec.structs.replace(address, password=password)
    file = entry.sentinel_password_file
    return RedisSettings(
        address=address,
        shown=place.shown,
        ca_file=entry.ca_file,
        client_cert_file=entry.client_cert_file,
        client_key_file=entry.client_key_file,
        sentinel_user=entry.sentinel_user,
        sentinel_password=_password_in(file, entry) if file else "",
    )


def _password_in(path: str, entry: SourceEntry) -> str:
    """Return the first line of a file; raises ConfigError."""
    lines = _text_in(path, "password", entry).splitlines()
    if not lines or not 0 < len(lines[0]) < MAX_PASSWORD:
        raise ConfigError(
            f"The password file {path} of the source {entry.name} has no password in its first"
            " line."
        )
    return lines[0]


def _text_in(path: str, what: str, entry: SourceEntry) -> str:
    try:
        return read_small(path, MAX_PASSWORD).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The {what} file {path} of the source {entry.name} can't be read: {error}; it has to"
            " be readable for the daemon."
        ) from error
