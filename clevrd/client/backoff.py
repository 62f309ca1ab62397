"""Decides whether and when a client reconnects. Pure, except for `Clockwork`: time and chance.

Exponential backoff with full jitter: AWS Architecture Blog, "Exponential Backoff And Jitter"
(2015). Close codes: docs/wire.md.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, Final, NamedTuple

from clevrd.client.errors import ClientError, Closed, Refused, Unreachable

BACKOFF_BASE_S: Final = 0.25
BACKOFF_CAP_S: Final = 30.0
# A connection that lived this long was a good one: the next backoff starts small again. A
# connection that is cut right after its catch-up does not reset the backoff; otherwise a broken
# server would be asked 8 times/s.
STEADY_S: Final = 10.0
# So is a connection that lived this long until its credential ended: a token may last seconds.
STEADY_UNTIL_EXPIRED_S: Final = 0.5
# A longer Retry-After is taken for a mistake, and cut to this; a script does not sleep for a day.
RETRY_AFTER_CAP_S: Final = 300.0
# A longer wait that a server asks for before it goes away is taken for a mistake, and cut to this.
RECONNECT_AFTER_CAP_S: Final = 60.0

_TOO_BIG: Final = 1009
_EXPIRED: Final = 4102
_TOO_MANY: Final = 429


class Next(Enum):
    """A client's next step after a close."""

    STAY_AWAY = "stay_away"
    BACK_OFF = "back_off"
    AT_ONCE = "at_once"


class Clockwork(NamedTuple):
    """Sources of time and chance, which tests replace."""

    # Returns a number that is uniform in [0, 1).
    random: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic


def next_after(code: int) -> Next:
    """Return the client's next step after a close with ``code``."""
    # A message that is too big would be too big the next time as well.
    if 4000 <= code < 4100 or code == _TOO_BIG:
        return Next.STAY_AWAY
    # A credential that has expired is no trouble of the server's: its client shows a fresh one.
    return Next.AT_ONCE if 4200 <= code < 4300 or code == _EXPIRED else Next.BACK_OFF


def is_expired(error: ClientError) -> bool:
    """Return whether a connection ended because the time of its credential was over."""
    return isinstance(error, Closed) and error.code == _EXPIRED


def comes_back(error: ClientError) -> bool:
    """Return whether a client that lost its connection to ``error`` tries again."""
    match error:
        case Unreachable():
            return True
        case Refused():
            # A refusal without a status was of one command, not of the connection.
            is_healed = error.is_transient and not error.status
            return is_healed or error.status == _TOO_MANY or error.status >= 500
        case Closed():
            return next_after(error.code) is not Next.STAY_AWAY
    return False


def backoff_s(attempt: int, chance: float) -> float:
    """Return the seconds to wait before attempt number ``attempt`` (from 0) is repeated.

    Args:
        chance: uniform in [0, 1). The whole delay is random, so that readers that were cut together
            don't come back together.
    """
    return chance * min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(attempt, 16))


def delay_s(attempt: int, error: ClientError, chance: float) -> float:
    """Return the seconds to wait after ``error``: the server's wish and the backoff.

    A server that tells its clients to come back at once is obeyed once, not in circles.
    """
    is_asked_back = isinstance(error, Closed) and next_after(error.code) is Next.AT_ONCE
    if attempt == 0 and is_asked_back:
        return 0.0
    return error.retry_after_s + backoff_s(attempt, chance)


def going_away_s(reconnect_after_ms: int) -> float:
    """Return the seconds that a closing server asks clients to stay away, within bounds."""
    return min(max(reconnect_after_ms, 0) / 1000, RECONNECT_AFTER_CAP_S)


def retry_after_s(header: str) -> float:
    """Return the delay-seconds of RFC 9110 §10.2.3; a date gives 0, since clocks may differ."""
    if not (header.isascii() and header.isdigit() and len(header) < 10):
        return 0.0
    return min(float(header), RETRY_AFTER_CAP_S)
