"""Tokens of a daemon that trusts an issuer, which tests make."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import jwt
from daemons import Daemon, running
from keys import access

SECRET: Final = "0123456789abcdef0123456789abcdef"  # noqa: S105  # of a test


def token(lasts_s: float, **claims: Any) -> str:
    """Return a token of the tenant acme, for all topics, that lasts so many seconds."""
    now_s = time.time()
    fields = {
        **{"iss": "internal", "aud": "clevrd", "iat": now_s, "exp": now_s + lasts_s},
        **{"tenant": "acme", "subscribe": ["**"], "publish": ["**"], **claims},
    }
    return jwt.encode(fields, SECRET, algorithm="HS256")


class Issuer:
    """Returns a token of so many seconds each time it is asked, and counts."""

    def __init__(self, lasts_s: float) -> None:
        self.lasts_s = lasts_s
        self.tokens: list[str] = []

    def __call__(self) -> str:
        """Return a fresh token."""
        self.tokens.append(token(self.lasts_s))
        return self.tokens[-1]


@asynccontextmanager
async def trusting(folder: Path, **settings: Any) -> AsyncIterator[Daemon]:
    """Run a daemon that takes the tokens of `token`, and the keys of keys.py.

    Args:
        folder: where the secret of the issuer is written.
    """
    (folder / "secret").write_text(SECRET)
    (folder / "secret").chmod(0o600)
    issuer = {
        **{"issuer": "internal", "audience": "clevrd", "algorithms": ["HS256"]},
        **{"secret_file": "secret", "leeway_s": 0},
    }
    rules = access(jwt=[issuer], allowed_origins=settings.pop("allowed_origins", []))
    async with running(access=rules, folder=folder, **settings) as daemon:
        yield daemon
