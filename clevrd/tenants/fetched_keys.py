"""FetchedKeys: an issuer's key set, fetched over HTTPS and fetched again for a key it lacks.

The URL is the configuration's, and nothing else is ever asked: no redirect is followed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

import aiohttp

from clevrd.errors import Unavailable
from clevrd.tenants.signing_keys import MAX_SET_BYTES, BadKeySet, KeySet, read_key_set

log = logging.getLogger(__name__)

# A whole fetch, from looking up the name to the last byte.
TIMEOUT_S: Final = 5.0
# Between two fetches for keys that the set does not have: anybody can name such a key.
AGAIN_S: Final = 30.0
# Issuers announce a new key before they use it, and withdraw one that was lost: 10 minutes.
REFRESH_S: Final = 600.0


class FetchedKeys:
    """The keys at a URL. Until they are there, and after a fetch that failed, the last ones hold.

    Args:
        now_s: a clock that is never set back.
        spawn: runs a coroutine to its end and owns it.
        changed: called when a fetch brought other keys than there were.
    """

    def __init__(
        self,
        url: str,
        now_s: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._changed = changed
        self._url = url
        self._now_s = now_s
        self._spawn = spawn
        self._keys: KeySet | None = None
        self._is_fetching = False
        # When the last fetch began; changes in fetch_soon alone.
        self._last_s = -REFRESH_S
        # Fetches that failed, for the figures.
        self.failures = 0

    def find(self, key_id: str | None, algorithm: str) -> Any:
        """Return the key in PyJWT's form, or None where the issuer has none.

        Raises:
            Unavailable: the set is being fetched, or could not be fetched yet.
        """
        now_s = self._now_s()
        if now_s - self._last_s >= REFRESH_S:
            self.fetch_soon()
        key = self._keys.find(key_id, algorithm) if self._keys is not None else None
        if key is not None:
            return key
        if now_s - self._last_s >= AGAIN_S:
            self.fetch_soon()
        if self._is_fetching:
            raise Unavailable(
                "The keys of the token's issuer are being fetched; retry.", bound="signing_keys"
            )
        if self._keys is None:
            left_s = AGAIN_S - (now_s - self._last_s)
            raise Unavailable(
                "The keys of the token's issuer can't be fetched; retry.",
                left_s,
                bound="signing_keys",
            )
        return None

    def fetch_soon(self) -> None:
        """Begin to fetch, unless a fetch is under way."""
        if not self._is_fetching:
            self._is_fetching = True
            self._last_s = self._now_s()
            self._spawn(self._fetch())

    async def _fetch(self) -> None:
        found = self._keys
        try:
            found = read_key_set(await _get(self._url))
        except (BadKeySet, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            self.failures += 1
            why = str(error) or type(error).__name__
            log.warning("key set not fetched url=%s why=%r", self._url, why[:200])
        finally:
            self._is_fetching = False
        # An equal set is let go: tokens that were verified by the keys at hand need not be again.
        if found != self._keys:
            self._keys = found
            self._changed()


async def _get(url: str) -> bytes:
    """Return the body at ``url``, MAX_SET_BYTES and one more of it at most."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        if response.status != 200:
            raise BadKeySet(f"it was answered {response.status}")
        body = bytearray()
        async for piece in response.content.iter_chunked(65_536):
            body += piece
            if len(body) > MAX_SET_BYTES:
                break
        return bytes(body)
