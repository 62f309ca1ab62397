"""Makes the engine that the settings name; its library is imported here only if it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from clevrd.errors import CannotStart, ConfigError, JournalUnavailable
from clevrd.journal.base import Engine
from clevrd.journal.kafka.properties import FILE, read_properties
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.kafka.url import parse_kafka_url
from clevrd.journal.nats.settings import NatsSettings
from clevrd.journal.nats.url import parse_nats_url
from clevrd.journal.redis.settings import RedisSettings
from clevrd.journal.redis.url import parse_redis_url
from clevrd.journal.settings import JournalSettings
from clevrd.journal.tls import tls_context
from clevrd.journal.url_parts import shown_url

# Characters of a password at most.
MAX_PASSWORD: Final = 4_096

# Descriptors that an engine has open at most: SQLite's 32 connections that read have 3 each, that
# which writes and the checkpoint's as many, and each thread has one more for a while; Redis has up
# to 2 for each of 64 partitions, and some for questions.
MAX_DESCRIPTORS: Final = 144


def engine_of(settings: JournalSettings, wall_us: Callable[[], int]) -> Engine:
    """Return the engine, not opened yet.

    Raises:
        ConfigError: its library is not installed, or a file can't be read.
    """
    if settings.engine == "redis":
        return _redis_engine(settings)
    if settings.engine == "nats":
        return _nats_engine(settings)
    if settings.engine == "kafka":
        return _kafka_engine(settings)
    from clevrd.journal.sqlite.engine import SqliteEngine
    from clevrd.journal.sqlite.settings import SqliteSettings

    return SqliteEngine(
        SqliteSettings(
            directory=settings.directory,
            durability=settings.durability,
            segment_s=settings.segment_s,
            segment_bytes=settings.segment_bytes,
            retention_s=settings.retention_s,
            retention_bytes=settings.retention_bytes,
            retention_messages=settings.retention_messages,
        ),
        wall_us=wall_us,
    )


def check_files(settings: JournalSettings) -> None:
    """Read the files that the settings name; raises ConfigError where one can't be used."""
    is_tls = False
    if settings.engine == "redis":
        is_tls = _redis_settings(settings).address.is_tls
    elif settings.engine == "kafka":
        is_tls = _kafka_settings(settings).address.is_tls
    elif settings.engine == "nats":
        nats = _nats_settings(settings)
        is_tls = nats.address.is_tls
        for path in filter(None, (nats.nkey_seed_file, nats.creds_file)):
            _first_line_of(path, "credentials")
    if is_tls:
        tls_context(settings.ca_file, settings.client_cert_file, settings.client_key_file)


def check_place(settings: JournalSettings) -> None:
    """Look whether a journal's directory can be one, without making or locking anything.

    Raises:
        CannotStart: with the sentence that a start would end with.
    """
    if settings.directory:
        from clevrd.journal.sqlite.directory import JournalDirectory

        try:
            JournalDirectory(settings.directory).check()
        except JournalUnavailable as error:
            raise CannotStart(str(error)) from error


def _redis_engine(settings: JournalSettings) -> Engine:
    from clevrd.journal.redis.engine import RedisEngine

    return RedisEngine(_redis_settings(settings))


def _redis_settings(settings: JournalSettings) -> RedisSettings:
    address = parse_redis_url(settings.url)
    if settings.password_file:
        password = _password_in(settings.password_file)
        address = msgspec.structs.replace(address, password=password)
    sentinel_file = settings.sentinel_password_file
    return RedisSettings(
        address=address,
        shown=shown_url(settings.url),
        prefix=settings.prefix,
        partitions=settings.partitions,
        min_replicas=settings.min_replicas,
        must_sync=settings.durability == "fsync",
        ca_file=settings.ca_file,
        client_cert_file=settings.client_cert_file,
        client_key_file=settings.client_key_file,
        sentinel_user=settings.sentinel_user,
        sentinel_password=_password_in(sentinel_file) if sentinel_file else "",
        retention_s=settings.retention_s,
        retention_bytes=settings.retention_bytes,
    )


def _nats_engine(settings: JournalSettings) -> Engine:
    from clevrd.journal.nats.engine import NatsEngine

    return NatsEngine(_nats_settings(settings))


def _nats_settings(settings: JournalSettings) -> NatsSettings:
    address = parse_nats_url(settings.url)
    if settings.password_file:
        secret = _password_in(settings.password_file)
        # A token alone before the @ is a user, where its password is in a file; without any name
        # the file has a token.
        user = address.user or address.token
        address = msgspec.structs.replace(
            address, user=user, password=secret if user else "", token="" if user else secret
        )
    return NatsSettings(
        address=address,
        shown=shown_url(settings.url),
        prefix=settings.prefix,
        partitions=settings.partitions,
        replicas=settings.replicas,
        sync_always=settings.sync_always,
        durability=settings.durability,
        ca_file=settings.ca_file,
        client_cert_file=settings.client_cert_file,
        client_key_file=settings.client_key_file,
        nkey_seed_file=settings.nkey_seed_file,
        creds_file=settings.creds_file,
        retention_s=settings.retention_s,
        retention_bytes=settings.retention_bytes,
    )


def _kafka_engine(settings: JournalSettings) -> Engine:
    # The import comes first, since it says in one line if its package is missing.
    import clevrd.journal.kafka.library  # noqa: F401
    from clevrd.journal.kafka.engine import KafkaEngine

    return KafkaEngine(_kafka_settings(settings))


def _kafka_settings(settings: JournalSettings) -> KafkaSettings:
    address = parse_kafka_url(settings.url)
    if settings.password_file:
        password = _password_in(settings.password_file)
        address = msgspec.structs.replace(address, password=password)
    properties = [
        (name.removesuffix(FILE), _first_line_of(value, "secret"))
        if name.endswith(FILE)
        else (name, value)
        for name, value in read_properties(settings.kafka).items()
    ]
    return KafkaSettings(
        address=address,
        shown=shown_url(settings.url),
        partitions=settings.partitions,
        replicas=settings.replication_factor,
        min_replicas=settings.min_replicas,
        ca_file=settings.ca_file,
        client_cert_file=settings.client_cert_file,
        client_key_file=settings.client_key_file,
        retention_s=settings.retention_s,
        retention_bytes=settings.retention_bytes,
        properties=tuple(properties),
    )


def _password_in(path: str) -> str:
    """Return the first line of a file; raises ConfigError."""
    return _first_line_of(path, "password")


def _first_line_of(path: str, what: str) -> str:
    """Return the first line of a file of ``what``; raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(MAX_PASSWORD + 1).rstrip("\r\n")
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"The journal's {what} file {path} can't be read: {error}; it has to be readable for"
            " the daemon, and have one line."
        ) from error
    if not line or len(line) > MAX_PASSWORD:
        raise ConfigError(f"The journal's {what} file {path} has no {what} in its first line.")
    return line
