"""RedisSettings: what the engine has to know, checked by the configuration."""

from __future__ import annotations

import msgspec

from clevrd.journal.redis.url import RedisAddress


class RedisSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the servers are, how a log is laid out in them, and what is promised."""

    address: RedisAddress
    # The URL as it may be shown: without a secret.
    shown: str
    # All keys begin with it, so that several logs may share a Redis.
    prefix: str = "clevrd"
    # Fixed when the log is made.
    partitions: int = 8
    # Replicas that have a message before its publisher is answered.
    min_replicas: int = 0
    # Whether a message is on the primary's disk, and on those of as many replicas, before that.
    must_sync: bool = False
    # Files of the CA, and of a certificate that the server asks for; empty for none.
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    # The Sentinels' own, where they ask for a password.
    sentinel_user: str = ""
    sentinel_password: str = ""
    # How long records are kept, in seconds, and how much of them in all partitions; 0 for no bound.
    retention_s: float = 7 * 86_400.0
    retention_bytes: int = 1 << 30
