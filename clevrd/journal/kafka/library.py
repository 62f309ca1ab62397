"""confluent-kafka as the engine uses it: what its clients are made with, its errors in a sentence.

Its synchronous clients are served by threads; its asyncio clients gather for milliseconds. Half of
the work is done by librdkafka's own threads, without the interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from clevrd.errors import ConfigError, JournalUnavailable, MessageTooLarge
from clevrd.journal.kafka.settings import KafkaSettings
from clevrd.journal.library_versions import refuse_older

try:
    from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
    from confluent_kafka.admin import AdminClient
except ImportError as error:
    refuse_older("kafka")
    raise ConfigError(
        "The journal is in Kafka, and the Python package confluent-kafka is not installed; install"
        ' it: pip install "clevrd[kafka]".'
    ) from error

refuse_older("kafka")

# The rights that a user of the cluster has to have.
RIGHTS: Final = (
    "Describe, DescribeConfigs, Read and Write on the topic and on TOPIC.checkpoints, Delete on"
    " TOPIC.checkpoints, and Create where the daemon is to make them"
)

# Codes of our own beside librdkafka's names.
LOST: Final = "LOST"
MISSING: Final = "UNKNOWN_TOPIC_OR_PART"
TOO_LARGE: Final = "MSG_SIZE_TOO_LARGE"

# Faults that no waiting mends.
_FINAL: Final = frozenset(
    {
        "_AUTHENTICATION",
        "SASL_AUTHENTICATION_FAILED",
        "UNSUPPORTED_SASL_MECHANISM",
        "ILLEGAL_SASL_STATE",
        "_SSL",
        "TOPIC_AUTHORIZATION_FAILED",
        "CLUSTER_AUTHORIZATION_FAILED",
        "INVALID_REPLICATION_FACTOR",
        "POLICY_VIOLATION",
        "INVALID_CONFIG",
        "INVALID_PARTITIONS",
        "_UNSUPPORTED_FEATURE",
        "UNSUPPORTED_VERSION",
    }
)
# How long what a connection said of its fault is the reason for a question without an answer.
_TELLING_S: Final = 15.0


class KafkaFault(Exception):
    """A broker refused something, or none could be reached; ``code`` is librdkafka's name of it."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code} {text}".strip())
        self.code = code
        self.text = text

    @property
    def is_final(self) -> bool:
        """Whether waiting is no use."""
        return self.code in _FINAL


class Troubles:
    """The last fault that the connections of the clients told of; their threads write it."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.now_s = now_s
        self._last: KafkaFault | None = None
        self._at_s = 0.0

    def note(self, error: KafkaError) -> None:
        """Keep ``error``, unless it says less than one that is known."""
        fault = fault_of(error)
        last = self._last
        says_less = fault.code == "_ALL_BROKERS_DOWN" or (
            last is not None and last.is_final and not fault.is_final
        )
        is_told = last is not None and self.now_s() - self._at_s < _TELLING_S
        if is_told and says_less:
            return
        self._last, self._at_s = fault, self.now_s()

    def reason_for(self, fault: KafkaFault) -> KafkaFault:
        """Return what is behind ``fault``, if that is a question without an answer."""
        last = self._last
        if fault.code != LOST or last is None or self.now_s() - self._at_s >= _TELLING_S:
            return fault
        return KafkaFault(last.code, last.text)

    def final_since(self, since_s: float) -> KafkaFault | None:
        """Return a fault that no waiting mends, if one was told of since then."""
        last = self._last
        if last is None or not last.is_final or self._at_s < since_s:
            return None
        return KafkaFault(last.code, last.text)

    def clear(self) -> None:
        """Forget what was said: a broker has answered."""
        self._last = None


# Names of librdkafka's for brokers that can't be reached.
_LOST_NAMES: Final = frozenset(
    {"_TRANSPORT", "_TIMED_OUT", "_MSG_TIMED_OUT", "_TIMED_OUT_QUEUE", "REQUEST_TIMED_OUT"}
)


def fault_of(error: BaseException | KafkaError) -> KafkaFault:
    """Return an error of the library's, or of waiting for it."""
    if isinstance(error, KafkaFault):
        return error
    if isinstance(error, KafkaException) and error.args:
        return fault_of(error.args[0])
    if isinstance(error, KafkaError):
        name = error.name()
        if name == "_UNKNOWN_TOPIC" or name == "_UNKNOWN_PARTITION":
            return KafkaFault(MISSING, error.str())
        return KafkaFault(LOST if name in _LOST_NAMES else name, error.str())
    if isinstance(error, TimeoutError):
        return KafkaFault(LOST, "no answer in time")
    return KafkaFault(type(error).__name__, str(error))


def sentence_of(fault: KafkaFault, shown: str) -> str:
    """Return what happened and what to do about it; ``shown`` is the URL without its secret."""
    code, text = fault.code, fault.text.rstrip(".")
    if code in ("_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED", "ILLEGAL_SASL_STATE"):
        return (
            f"Kafka at {shown} refuses the user or the password ({text}); give them in the URL, or"
            ' the password in a file (password_file), and the mechanism as "sasl.mechanism" in'
            " [journal.kafka]."
        )
    if code == "UNSUPPORTED_SASL_MECHANISM":
        return (
            f"Kafka at {shown} does not know this SASL mechanism ({text}); write the one that it"
            ' has as "sasl.mechanism" in [journal.kafka].'
        )
    if code == "_SSL":
        hint = (
            "name its CA (ca_file), and the host as the certificate does"
            if "verif" in text
            else "it may ask for a certificate (client_cert_file), or speak no TLS (kafka://)"
        )
        return f"Kafka at {shown}: TLS failed ({text}); {hint}."
    if code in ("TOPIC_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED"):
        return (
            f"Kafka at {shown} does not allow its user what the journal needs ({text}); it is:"
            f" {RIGHTS}."
        )
    if code == MISSING:
        return (
            f"Kafka at {shown} has no such topic, or none of the brokers that have it is there; see"
            " to them, and let the daemon's user make it (Create), or make it yourself."
        )
    if code in ("NOT_ENOUGH_REPLICAS", "NOT_ENOUGH_REPLICAS_AFTER_APPEND"):
        return (
            f"Kafka at {shown} takes nothing, since too few replicas are in sync"
            " (min.insync.replicas); see to its brokers."
        )
    if code == "KAFKA_STORAGE_ERROR":
        return f"Kafka at {shown} can't write to its disk and takes nothing; see to it."
    if code in ("INVALID_REPLICATION_FACTOR", "POLICY_VIOLATION", "INVALID_CONFIG"):
        return (
            f"Kafka at {shown} does not make such a topic ({text}); see replication_factor and"
            " min_replicas, or make it yourself."
        )
    if code in ("_UNSUPPORTED_FEATURE", "UNSUPPORTED_VERSION"):
        return f"Kafka at {shown} is too old ({text}); the journal needs 3.0 or newer."
    if code == "_RESOLVE":
        return f"Kafka at {shown} can't be found: {text}; look at the hosts' names."
    if code == "_ALL_BROKERS_DOWN":
        # The library's words count the address in the URL as a broker that is not down.
        text = "no connection to a broker lasts"
    where = "there" if shown.startswith("kafka+ssl") else "(kafka+ssl)"
    return (
        f"Kafka at {shown} can't be reached: {text or code}; see whether its brokers run, and"
        f" whether they speak TLS {where} or ask for a user."
    )


def failed(fault: KafkaFault, shown: str) -> JournalUnavailable:
    """Return the error that the node and its publishers understand."""
    return JournalUnavailable(sentence_of(fault, shown))


def too_large(limit_bytes: int, size_bytes: int) -> MessageTooLarge:
    """Return the error for a record that the topic does not take."""
    return MessageTooLarge(limit_bytes, size_bytes, "max.message.bytes of the journal's topic")


def client_properties(settings: KafkaSettings, troubles: Troubles) -> dict[str, Any]:
    """Return what all clients are made with."""
    address = settings.address
    is_sasl = bool(address.user) or any(n == "sasl.mechanism" for n, _ in settings.properties)
    protocol = f"{'SASL_' if is_sasl else ''}{'SSL' if address.is_tls else 'PLAINTEXT'}"
    properties: dict[str, Any] = {
        "client.id": "clevrd",
        "socket.keepalive.enable": "true",
        "socket.connection.setup.timeout.ms": "4000",
        "reconnect.backoff.ms": "100",
        "reconnect.backoff.max.ms": "1000",
        "topic.metadata.refresh.interval.ms": "60000",
    }
    if is_sasl:
        properties["sasl.mechanism"] = "PLAIN"
    properties.update(settings.properties)
    properties.update(
        {
            "bootstrap.servers": ",".join(
                f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                for host, port in address.hosts
            ),
            "security.protocol": protocol,
            # Faults come by `error_cb`; the log would be on standard error.
            "log_level": 0,
            "error_cb": troubles.note,
        }
    )
    if address.user:
        properties["sasl.username"] = address.user
        properties["sasl.password"] = address.password
    files = (
        ("ssl.ca.location", settings.ca_file),
        ("ssl.certificate.location", settings.client_cert_file),
        ("ssl.key.location", settings.client_key_file),
    )
    return properties | {name: path for name, path in files if path}


def make_producer(settings: KafkaSettings, troubles: Troubles, max_record_bytes: int) -> Any:
    """Return a producer whose records are taken in their order, each once, by all in sync.

    Raises:
        ConfigError: a property or a file can't be used.
    """
    return _made(
        Producer,
        {
            **client_properties(settings, troubles),
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": 0,
            "allow.auto.create.topics": False,
            # Publishers are told after 5 s; a record that was not taken by then is sent again.
            "message.timeout.ms": 4_000,
            "topic.metadata.propagation.max.ms": 1_000,
            "retry.backoff.ms": 100,
            "message.max.bytes": max_record_bytes,
            "queue.buffering.max.messages": 10_000,
            "queue.buffering.max.kbytes": max(65_536, 2 * max_record_bytes >> 10),
        },
    )


def make_consumer(
    settings: KafkaSettings, troubles: Troubles, queued_kbytes: int, wait_ms: int = 500
) -> Any:
    """Return a consumer that reads where it is told to, in no group; raises ConfigError.

    Args:
        wait_ms: how long a broker holds a question where there are no records yet.
    """
    return _made(
        Consumer,
        {
            **client_properties(settings, troubles),
            # The library asks for one; nothing joins it.
            "group.id": "clevrd",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            # A foreign producer's open transaction must not keep all others from being read.
            "isolation.level": "read_uncommitted",
            "allow.auto.create.topics": False,
            "fetch.wait.max.ms": wait_ms,
            "fetch.error.backoff.ms": 100,
            "fetch.message.max.bytes": 1 << 20,
            "queued.max.messages.kbytes": queued_kbytes,
        },
    )


def make_admin(settings: KafkaSettings, troubles: Troubles) -> Any:
    """Return a client for questions about topics; raises ConfigError."""
    return _made(AdminClient, client_properties(settings, troubles))


def _made(kind: Callable[[dict[str, Any]], Any], properties: dict[str, Any]) -> Any:
    try:
        return kind(properties)
    except (KafkaException, ValueError, TypeError) as error:
        text = fault_of(error).text or str(error)
        raise ConfigError(
            f"The journal's properties for Kafka can't be used: {text.rstrip('.')}; see"
            " [journal.kafka], ca_file, client_cert_file and client_key_file."
        ) from error
