"""KafkaSettings: what the engine has to know, checked by the configuration."""

from __future__ import annotations

import msgspec

from clevrd.journal.kafka.url import KafkaAddress


class KafkaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the brokers are, how a topic is made in them, and what is promised."""

    address: KafkaAddress
    # The URL as it may be shown: without a secret.
    shown: str
    # Partitions of the topic; fixed when it is made.
    partitions: int = 8
    # Copies that a topic has which is made here; 0 for as many as the cluster makes by itself.
    replicas: int = 0
    # Copies that have a message before its publisher is answered (min.insync.replicas); 0 for what
    # the topic says.
    min_replicas: int = 0
    # Files of the CA, and of a certificate that the brokers ask for; empty for none.
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    # How long records are kept, in seconds, and how much of them in all partitions; 0 for no bound.
    # For a topic that is made here.
    retention_s: float = 7 * 86_400.0
    retention_bytes: int = 10 << 30
    # Further properties of librdkafka, with their secrets.
    properties: tuple[tuple[str, str], ...] = ()
