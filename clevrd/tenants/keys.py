"""API keys: long random secrets, known here by their digests alone.

A secret is 32 random bytes, so a fast hash is enough: there is nothing to guess. A slow hash, which
passwords need, would cost each request what it costs an attacker. Digests are compared in constant
time.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import Final, Generic, NamedTuple, TypeVar

# How secrets made by `new_secret` begin, so that a scanner of repositories can find them.
PREFIX: Final = "clevrd_"
_SECRET_BYTES: Final = 32
# A header line has 8 KiB; nobody's key is longer than this, and nothing longer is hashed.
MAX_KEY_BYTES: Final = 1_024
# The bytes of a digest by which it is found; the rest is compared.
_INDEX_BYTES: Final = 8

HolderT = TypeVar("HolderT")


class NewKey(NamedTuple):
    """A secret, which is shown once, and what is kept of it."""

    secret: str
    sha256: str


def digest_of(secret: str) -> str:
    """Return the SHA-256 of a secret as a client presents it, in lower-case hexadecimal."""
    return sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> NewKey:
    """Return a new secret of 256 random bits, in letters that need no quotes anywhere."""
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    return NewKey(secret, digest_of(secret))


class KeyRing(Generic[HolderT]):
    """The holders of keys.

    Args:
        holders: by the key's digest, in lower-case hexadecimal.
    """

    __slots__ = ("_holders",)

    def __init__(self, holders: Mapping[str, HolderT]) -> None:
        # The first bytes of a digest -> all digests that begin so, one as a rule, and the holders.
        self._holders: dict[bytes, list[tuple[bytes, HolderT]]] = {}
        for text, holder in holders.items():
            digest = bytes.fromhex(text)
            self._holders.setdefault(digest[:_INDEX_BYTES], []).append((digest, holder))

    def __len__(self) -> int:
        """Return how many keys there are."""
        return sum(map(len, self._holders.values()))

    def find(self, secret: str) -> HolderT | None:
        """Return who holds the key ``secret``; None if nobody does. 1.5 us."""
        if len(secret) > MAX_KEY_BYTES:
            return None
        return self.find_digest(sha256(secret.encode("utf-8", "surrogatepass")).digest())

    def find_digest(self, presented: bytes) -> HolderT | None:
        """Return who holds the key with the SHA-256 ``presented``; None if nobody does."""
        for digest, holder in self._holders.get(presented[:_INDEX_BYTES], ()):
            if compare_digest(digest, presented):
                return holder
        return None
