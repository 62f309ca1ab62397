"""Credential: the API key or token that a client presents, and when it needs a fresh one.

No request is made here. A token's times are read without any check of its signature, which is the
server's to check: they only say when to ask for the next token. Claims: RFC 7519 §4.1.
"""

from __future__ import annotations

import asyncio
import re
import time
from binascii import a2b_base64
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from math import inf
from typing import Final, NamedTuple

import msgspec

from clevrd.client.arguments import check_secret, check_token, type_name
from clevrd.client.errors import NoToken

TokenFunction = Callable[[], str | Awaitable[str]]
Token = str | TokenFunction

# Seconds for a function to return a token.
TOKEN_TIMEOUT_S: Final = 30.0
# A token is renewed when this part of its life is over, and at least _EARLY_S before its end. Half
# of the life is the least, for tokens that last a few seconds.
_USED_PART: Final = 0.8
_EARLY_S: Final = 5.0
_LEAST_PART: Final = 0.5
# The largest part of the wait that chance takes away, so that connections that were opened together
# don't all renew together.
_JITTER: Final = 0.1
# Seconds until a function is asked again that failed, or returned the same token.
AGAIN_S: Final = 1.0
# A longer life is not a wait: a timer takes no number of any size.
_MAX_LIFE_S: Final = 1e9
# A JSON Web Token is three parts of base64url (RFC 7515 §7.1).
_THREE_PARTS: Final = re.compile(r"[\w-]+\.([\w-]+)\.[\w-]*", re.ASCII)


class _Claims(msgspec.Struct, frozen=True):
    """The times that a token names, in seconds since 1970."""

    exp: float
    iat: float | None = None


_decode_claims = msgspec.json.Decoder(_Claims).decode


def life_s(secret: str, now_s: float) -> float:
    """Return the seconds that a token lasts from ``now_s``, of the wall clock.

    Infinity is returned for an API key, and for a token without an end. Where the clock of this
    machine can't be right, because the token would be over already or last longer than its whole
    life, the whole life is returned, if the token tells it.
    """
    parts = _THREE_PARTS.fullmatch(secret)
    if parts is None:
        return inf
    payload = parts[1].translate({ord("-"): "+", ord("_"): "/"})
    try:
        claims = _decode_claims(a2b_base64(payload + "=" * (-len(payload) % 4)))
    except (ValueError, msgspec.MsgspecError):
        return inf
    left_s = claims.exp - now_s
    if claims.iat is not None and not 0 < left_s <= claims.exp - claims.iat:
        left_s = claims.exp - claims.iat
    return inf if left_s > _MAX_LIFE_S else max(0.0, left_s)


def renewal_s(life: float) -> float:
    """Return the seconds after which a token that lasts ``life`` seconds is renewed."""
    return min(_USED_PART * life, max(life - _EARLY_S, _LEAST_PART * life))


class _Fresh(NamedTuple):
    """A secret that a function returned, and what is known of its end."""

    secret: str
    # On the loop's clock: from when on another one is asked for, and when it is over.
    renewed_at_s: float
    over_at_s: float


class Credential:
    """The credential of one client.

    Args:
        token: an API key or a token, or a function that returns one; the function may be async.
        wall_s: the wall clock, seconds since 1970, by which tokens end.
    """

    def __init__(self, token: Token, wall_s: Callable[[], float] = time.time) -> None:
        self._token = check_token(token)
        self._wall_s = wall_s
        # The secret that the function returned last; None before the first, and once it was
        # refused. Changed by get and refuse only.
        self._fresh: _Fresh | None = None
        # The task that asks the function, and how many wait for it: they share what becomes of it.
        # Changed by _share only.
        self._asking: asyncio.Task[str] | None = None
        self._waiters = 0

    @property
    def can_renew(self) -> bool:
        """Whether a function can be asked for a fresh secret."""
        return not isinstance(self._token, str)

    def open(self) -> None:
        """Prepare for use in the running loop."""
        self._fresh = None
        self._asking, self._waiters = None, 0

    async def get(self, other_than: str | None = None) -> str:
        """Return the secret to present; the function is asked where none is kept that is fresh.

        Args:
            other_than: a secret whose time is nearly over, so that it is not the answer again,
                unless the function returns it again.

        Raises:
            NoToken: the function failed, or took too long.
            TypeError, ValueError: what the function returned can be no token.
        """
        if isinstance(self._token, str):
            return self._token
        kept = self._fresh
        if kept and kept.secret != other_than and kept.renewed_at_s > _loop_s():
            return kept.secret
        return await self._share(self._token)

    async def _share(self, ask: TokenFunction) -> str:
        """Return what the call of the function that is under way returns, or begin one.

        The call ends when nobody waits for it any more.
        """
        asking = self._asking
        if asking is None:
            asking = self._asking = asyncio.create_task(self._renew(ask))
        self._waiters += 1
        try:
            return await asyncio.shield(asking)
        finally:
            self._waiters -= 1
            if asking.done() or not self._waiters:
                asking.cancel()
                if self._asking is asking:
                    self._asking = None

    async def _renew(self, ask: TokenFunction) -> str:
        secret = check_secret(await self._ask(ask))
        now_s = _loop_s()
        life = life_s(secret, self._wall_s())
        self._fresh = _Fresh(secret, now_s + renewal_s(life), now_s + life)
        return secret

    def refuse(self, secret: str | None) -> None:
        """Present ``secret`` no more: a server refused it, or its time is over."""
        if self._fresh is not None and self._fresh.secret == secret:
            self._fresh = None

    def renew_in_s(self, secret: str, chance: float) -> float | None:
        """Return the seconds until a connection with ``secret`` presents another one.

        None is returned where there is nothing to wait for: the secret has no end, or is over
        already, as far as this machine's clock can say.

        Args:
            chance: uniform in [0, 1).
        """
        if not self.can_renew:
            return None
        kept = self._fresh
        if kept is None or kept.secret != secret:
            # Another task has got a fresh one meanwhile.
            return 0.0
        left_s = kept.over_at_s - _loop_s()
        if left_s <= 0 or left_s == inf:
            return None
        return renewal_s(left_s) * (1 - _JITTER * chance)

    async def _ask(self, ask: TokenFunction) -> str:
        try:
            async with asyncio.timeout(TOKEN_TIMEOUT_S):
                answer = ask()
                return await answer if isawaitable(answer) else answer
        except Exception as error:
            # The error's own text is the application's, and might hold a secret.
            raise NoToken(f"The token function failed with {type_name(error)}.") from error


def _loop_s() -> float:
    return asyncio.get_running_loop().time()
