"""Keys and credentials of NATS users, made for tests. No server here.

Layout of the tokens: docs.nats.io, "JWT and accounts"; they are signed with Ed25519 keys ("nkeys").
"""

from __future__ import annotations

import base64
import json
import os
import time
from typing import Any, NamedTuple

import nkeys  # type: ignore[import-untyped]

OPERATOR, ACCOUNT, USER = 14 << 3, 0, 20 << 3

_LIMITS = dict.fromkeys(
    (
        *("subs", "data", "payload", "imports", "exports", "conn", "leaf"),
        *("mem_storage", "disk_storage", "streams", "consumer"),
    ),
    -1,
)


class Key(NamedTuple):
    """A key pair of an operator, an account or a user."""

    seed: str
    public: str


def make_key(kind: int) -> Key:
    """Return a new key pair."""
    seed = nkeys.encode_seed(os.urandom(32), kind)
    pair = nkeys.from_seed(bytearray(seed))
    return Key(bytes(seed).decode(), pair.public_key.decode())


def token(subject: str, issuer: Key, kind: str, **claims: Any) -> str:
    """Return a signed token."""
    parts = [
        {"typ": "JWT", "alg": "ed25519-nkey"},
        {
            "jti": subject,
            "iat": int(time.time()),
            "iss": issuer.public,
            "name": kind,
            "sub": subject,
            "nats": {"type": kind, "version": 2, **claims},
        },
    ]
    signed = ".".join(_spelled(json.dumps(part).encode()) for part in parts)
    signature = nkeys.from_seed(bytearray(issuer.seed.encode())).sign(signed.encode())
    return f"{signed}.{_spelled(signature)}"


def _spelled(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def with_operator() -> tuple[str, str]:
    """Return a server's configuration with an operator, and a user's credentials file for it."""
    operator, system, account, user = map(make_key, (OPERATOR, ACCOUNT, ACCOUNT, USER))
    system_token = token(
        system.public, operator, "account", limits={"subs": -1, "conn": -1, "leaf": -1, "data": -1}
    )
    account_token = token(
        account.public, operator, "account", limits={**_LIMITS, "wildcards": True}
    )
    operator_token = token(operator.public, operator, "operator", system_account=system.public)
    config = (
        f"operator: {operator_token}\nresolver: MEMORY\nsystem_account: {system.public}\n"
        f"resolver_preload {{\n {system.public}: {system_token}\n"
        f" {account.public}: {account_token}\n}}\n"
    )
    user_token = token(user.public, account, "user", subs=-1, data=-1, payload=-1)
    credentials = (
        f"-----BEGIN NATS USER JWT-----\n{user_token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
    )
    return config, credentials
