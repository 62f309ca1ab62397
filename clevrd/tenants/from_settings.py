"""Makes an Authenticator of the configuration file's tables, and reads the files that they name.

Importing it needs no more than the daemon does: tokens are judged by PyJWT, which is an extra.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clevrd.config import Loaded
from clevrd.errors import ConfigError
from clevrd.tenants.authenticator import Authenticator, limits_of
from clevrd.tenants.origins import read_allowed_origins
from clevrd.tenants.settings import Access, JwtIssuer, read_access
from clevrd.tenants.tickets import Tickets

if TYPE_CHECKING:
    from clevrd.tenants.fetched_keys import FetchedKeys
    from clevrd.tenants.tokens import SigningKeys, Tokens

# Issuer -> the keys in its file; those whose keys are fetched are not among them.
KeyFiles = Mapping[JwtIssuer, "SigningKeys"]


def access_of(loaded: Loaded) -> Access:
    """Return the rules of access in the file of a configuration; raises ConfigError."""
    access = read_access(loaded.tables, f"file {loaded.path}")
    read_allowed_origins(loaded.config.allowed_origins, access.auth.allowed_origins)
    return access


def folder_of(loaded: Loaded) -> Path:
    """Return the folder to which paths in the file are relative."""
    return Path(loaded.path).absolute().parent


class Surroundings(msgspec.Struct, frozen=True):
    """The parts of the daemon that an authenticator needs.

    ``wall_s`` is the wall clock, seconds since 1970; ``now_s`` one that is never set back.
    ``spawn`` runs a coroutine to its end and owns it. ``keys_changed`` is called when an issuer has
    other keys than before: what was judged by the old ones is to be judged again.
    """

    wall_s: Callable[[], float]
    now_s: Callable[[], float]
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    keys_changed: Callable[[], None]


class AuthenticatorMaker:
    """Makes authenticators, one after each change of the file.

    Tickets that were given out outlive such a change, and key sets that were fetched; both are kept
    here.
    """

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self.tickets = Tickets(around.now_s)
        # URL -> the key set there; only of issuers in the newest file.
        self._fetched: dict[str, FetchedKeys] = {}

    def make(self, access: Access, folder: Path) -> Authenticator:
        """Return what judges by ``access``.

        Args:
            folder: where the configuration file is, to which paths in it are relative.

        Raises:
            ConfigError: a file that it names can't be used, or PyJWT is not installed.
        """
        return self.make_with(access, read_key_files(access, folder))

    def make_with(self, access: Access, keys: KeyFiles) -> Authenticator:
        """Return what judges by ``access``, with the keys that were read for it."""
        return Authenticator(access, self._tokens(access, keys), self.tickets)

    def _tokens(self, access: Access, keys: KeyFiles) -> Tokens | None:
        issuers = access.auth.jwt
        if not issuers:
            self._fetched = {}
            return None
        # Imported here since PyJWT may be missing where no issuer is configured.
        from clevrd.tenants.tokens import Issuer, Tokens

        fetched: dict[str, FetchedKeys] = {}
        made = [Issuer(each, self._keys_of(each, keys, fetched)) for each in issuers]
        self._fetched = fetched
        limits = {tenant.name: limits_of(tenant) for tenant in access.tenants}
        return Tokens(made, limits, self._around.wall_s)

    def _keys_of(
        self, issuer: JwtIssuer, keys: KeyFiles, fetched: dict[str, FetchedKeys]
    ) -> SigningKeys:
        from clevrd.tenants.fetched_keys import FetchedKeys

        read = keys.get(issuer)
        if read is not None:
            return read
        url = issuer.jwks_url
        if url not in fetched:
            around = self._around
            known = self._fetched.get(url)
            if known is None:
                known = FetchedKeys(url, around.now_s, around.spawn, around.keys_changed)
                # Begun now, so that the first request need not wait.
                known.fetch_soon()
            fetched[url] = known
        return fetched[url]


def read_key_files(access: Access, folder: Path) -> KeyFiles:
    """Read the files with the keys of issuers.

    Args:
        folder: where the configuration file is, to which paths in it are relative.

    Raises:
        ConfigError: one of them can't be used, or PyJWT is not installed.
    """
    if not access.auth.jwt:
        return {}
    check_jwt_is_installed()
    from clevrd.tenants.signing_keys import read_key_set_file, read_secret_file

    keys: dict[JwtIssuer, SigningKeys] = {}
    for issuer in access.auth.jwt:
        if issuer.secret_file:
            keys[issuer] = read_secret_file(folder / issuer.secret_file)
        elif issuer.jwks_file:
            keys[issuer] = read_key_set_file(folder / issuer.jwks_file)
    return keys


def check_jwt_is_installed(what: str = "[[auth.jwt]]") -> None:
    """Raise ConfigError where PyJWT, or what it needs to verify signatures, is missing.

    Args:
        what: the part of clevrd that needs it.
    """
    if find_spec("jwt") is None or find_spec("cryptography") is None:
        raise ConfigError(
            f"{what} needs PyJWT, which is not installed here; install it with the extra:"
            ' pip install "clevrd[jwt]"'
        )


def check_access(access: Access, folder: Path) -> None:
    """Read all files that ``access`` names, as the daemon does at its start, and drop them.

    Raises:
        ConfigError: as `AuthenticatorMaker.make`.
    """
    nothing = Surroundings(time.time, time.monotonic, _spawn_nothing, lambda: None)
    AuthenticatorMaker(nothing).make(access, folder)


def _spawn_nothing(work: Coroutine[Any, Any, None]) -> None:
    work.close()
