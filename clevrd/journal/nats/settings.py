"""NatsSettings: what the engine has to know, checked by the configuration."""

from __future__ import annotations

import msgspec

from clevrd.journal.nats.url import NatsAddress


class NatsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the servers are, how a log is laid out in them, and what is promised."""

    address: NatsAddress
    # The URL as it may be shown: without a secret.
    shown: str
    # Streams and subjects begin with it, so that several logs may share an account.
    prefix: str = "clevrd"
    # Fixed when the log is made.
    partitions: int = 8
    # Servers that have a copy of each stream.
    replicas: int = 1
    # The operator says that the servers sync their files before they answer.
    sync_always: bool = False
    # "fsync" or "os"; "fsync" only with `sync_always`.
    durability: str = "os"
    # Files of the CA, and of a certificate that the servers ask for; empty for none.
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    # Files of credentials in place of those of the URL; empty for none.
    nkey_seed_file: str = ""
    creds_file: str = ""
    # How long records are kept, in seconds, and how much of them in all partitions; 0 for no bound.
    retention_s: float = 7 * 86_400.0
    retention_bytes: int = 1 << 30
