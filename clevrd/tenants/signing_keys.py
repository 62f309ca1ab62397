"""The keys of issuers: a secret in a file, or a JSON Web Key Set (RFC 7517) in a file.

Fetching a set over HTTPS is `fetched_keys`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import jwt
import msgspec

from clevrd.errors import ConfigError
from clevrd.private_files import check_private
from clevrd.small_files import read_small

# Ten times the largest set that a provider publishes.
MAX_SET_BYTES: Final = 262_144
MAX_KEYS: Final = 100
# RFC 7518 §3.2: as many bits as the hash has; a shorter secret can be guessed.
MIN_SECRET_BYTES: Final = 32


class BadKeySet(Exception):
    """These bytes are no key set; the text says why."""


class SecretKey:
    """One secret, for symmetric algorithms."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def find(self, key_id: str | None, algorithm: str) -> Any:
        """Return the secret, whatever the token calls it."""
        return self._secret


class KeySet:
    """The public keys of a set, by the id and the algorithm that a token names."""

    def __init__(self, keys: list[tuple[str | None, dict[str, Any]]]) -> None:
        self._keys = keys
        # (kid, alg) -> the key in PyJWT's form; made when it is first asked for. As many as keys
        # and algorithms at most: what is not found is not kept.
        self._made: dict[tuple[str | None, str], Any] = {}

    def __eq__(self, other: object) -> bool:
        """Return whether ``other`` has the same keys in the same order."""
        return isinstance(other, KeySet) and self._keys == other._keys

    __hash__ = None  # type: ignore[assignment]  # equal by its content, and no key of a dict

    def __len__(self) -> int:
        """Return how many keys it has."""
        return len(self._keys)

    def find(self, key_id: str | None, algorithm: str) -> Any:
        """Return the key for a token's ``kid`` and ``alg``, or None.

        A token without a ``kid`` is one of a set with a single key for its algorithm.
        """
        at = (key_id, algorithm)
        if at not in self._made:
            found = [
                key
                for known_id, data in self._keys
                if (key_id is None or known_id == key_id)
                and (key := _made(data, algorithm)) is not None
            ]
            if len(found) != 1:
                return None
            self._made[at] = found[0]
        return self._made[at]


def _made(data: dict[str, Any], algorithm: str) -> Any:
    """Return the key of a set's entry for ``algorithm``; None where it is for something else."""
    if data.get("alg", algorithm) != algorithm or data.get("use", "sig") != "sig":
        return None
    if data.get("kty") == "oct" or "d" in data:
        # A secret or a private key has no place in a set that others can read.
        return None
    try:
        return jwt.PyJWK(data, algorithm=algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None


def read_key_set(content: bytes) -> KeySet:
    """Return the keys in a JSON Web Key Set.

    Raises:
        BadKeySet: it is too large, no JSON, or no set with a key in it.
    """
    if len(content) > MAX_SET_BYTES:
        raise BadKeySet(f"it has more than {MAX_SET_BYTES} bytes")
    try:
        document = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadKeySet("it is not JSON") from error
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise BadKeySet('it has no list "keys" (RFC 7517 §5)')
    if len(entries) > MAX_KEYS:
        raise BadKeySet(f"it has more than {MAX_KEYS} keys")
    keys = [
        (entry["kid"] if isinstance(entry.get("kid"), str) else None, entry)
        for entry in entries
        if isinstance(entry, dict)
    ]
    if not keys:
        raise BadKeySet("there is no key in it")
    return KeySet(keys)


def read_key_set_file(path: Path) -> KeySet:
    """Return the keys in a file.

    Raises:
        ConfigError: it can't be read, or is no key set.
    """
    try:
        return read_key_set(_read(path))
    except BadKeySet as error:
        raise ConfigError(f"The key set {path} can't be used: {error}.") from error


def read_secret_file(path: Path) -> SecretKey:
    """Return the secret in a file; a line's end behind it is not a part of it.

    Raises:
        ConfigError: it can't be read, others may read it, or it is too short.
    """
    check_private(path)
    secret = _read(path).rstrip(b"\r\n")
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"The secret in {path} has {len(secret)} bytes, and {MIN_SECRET_BYTES} at least are"
            f" needed; make one: openssl rand -hex 32 > {path}"
        )
    return SecretKey(secret)


def _read(path: Path) -> bytes:
    try:
        return read_small(path, MAX_SET_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "its name has a zero byte"
        raise ConfigError(f"Can't read {path}: {why}.") from error
