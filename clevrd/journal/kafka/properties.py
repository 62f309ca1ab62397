"""The table ``[journal.kafka]``: librdkafka's own properties, and those that an operator can't set.

Pure; whether a property exists is for librdkafka to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

# Behind the name of a secret: the file that has it in its first line.
FILE: Final = ".file"
MAX_PROPERTIES: Final = 100

# Properties on which the journal's promises stand, each with the reason.
_PROMISES: Final = "the journal's promises depend on it"
_URL: Final = "the URL says it"
_OWNED: Final[dict[str, str]] = {
    **dict.fromkeys(
        (
            "acks",
            "request.required.acks",
            "allow.auto.create.topics",
            "auto.commit.enable",
            "auto.commit.interval.ms",
            "auto.offset.reset",
            "delivery.timeout.ms",
            "enable.auto.commit",
            "enable.auto.offset.store",
            "enable.gapless.guarantee",
            "enable.idempotence",
            "enable.partition.eof",
            "isolation.level",
            "linger.ms",
            "queue.buffering.max.ms",
            "log.queue",
            "log_level",
            "max.in.flight",
            "max.in.flight.requests.per.connection",
            "message.max.bytes",
            "message.send.max.retries",
            "message.timeout.ms",
            "offset.store.method",
            "partition.assignment.strategy",
            "partitioner",
            "retries",
            "retry.backoff.ms",
            "transactional.id",
        ),
        _PROMISES,
    ),
    "bootstrap.servers": _URL,
    "metadata.broker.list": _URL,
    "security.protocol": "the URL says it: kafka+ssl:// for TLS, and a user for SASL",
    "sasl.username": "write the user in the URL",
    "sasl.password": "write it in the URL, or in a file (password_file)",
    "ssl.ca.location": "write ca_file",
    "ssl.certificate.location": "write client_cert_file",
    "ssl.key.location": "write client_key_file",
}
_OWNED_PREFIXES: Final = ("group.", "consumer.group")
_OWNED_SUFFIXES: Final = ("_cb", ".interceptors")
# Parts of the names of secrets.
_SECRET: Final = ("password", "secret", "passphrase", ".pem", "sasl.oauthbearer.config")


class BadProperty(ValueError):
    """A property that can't be set: its sentence says why, and holds no value."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


def is_secret(name: str) -> bool:
    """Return whether the property's value may not stand in the configuration file."""
    return any(part in name for part in _SECRET)


def read_properties(table: Mapping[str, Any]) -> dict[str, str]:
    """Return the properties of ``table`` by name, as librdkafka is given them.

    TOML makes tables of names with full stops that are not quoted. A name with FILE behind it
    names a file, and the secret in it is to be read.

    Raises:
        BadProperty: one can't be set here.
    """
    found: dict[str, str] = {}
    for name, value in _flat(table, ""):
        if len(found) >= MAX_PROPERTIES:
            raise BadProperty(name, f"there are more than {MAX_PROPERTIES} properties.")
        found[name] = _checked(name, value)
    return found


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _checked(name: str, value: Any) -> str:
    bare = name.removesuffix(FILE)
    if bare in _OWNED or bare.startswith(_OWNED_PREFIXES) or bare.endswith(_OWNED_SUFFIXES):
        raise BadProperty(name, f"clevrd sets it itself ({_OWNED.get(bare, _PROMISES)}).")
    if is_secret(bare) and bare == name:
        raise BadProperty(
            name, f'it is a secret; write "{name}{FILE}" and the path of a file that has it.'
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float) or value == "":
        raise BadProperty(name, "its value is a text, a number, or true or false.")
    return str(value)
