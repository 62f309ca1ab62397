"""When to come back, and whether. Pure but for `Clockwork`, which carries time and chance.

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
# A connection that lived this long was a good one: the next backoff starts small again. One that
# is cut right after its catch-up does not reset it, or a broken server would be asked 8 times/s.
STEADY_S: Final = 10.0
# A Retry-After beyond this is taken for a mistake; a script is not parked for a day.
RETRY_AFTER_CAP_S: Final = 300.0
# A wait beyond this that a server asks for before it goes away is taken for a mistake.
RECONNECT_AFTER_CAP_S: Final = 60.0

_TOO_BIG: Final = 1009
_TOO_MANY: Final = 429


class Next(Enum):
    """What a client does after a close."""

    STAY_AWAY = "stay_away"
    BACK_OFF = "back_off"
    AT_ONCE = "at_once"


class Clockwork(NamedTuple):
    """Time and chance, which tests replace."""

    # Uniform in [0, 1).
    random: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic


def next_after(code: int) -> Next:
    """Return what follows a close with ``code``."""
    # Too big a message would be as big the next time.
    if 4000 <= code < 4100 or code == _TOO_BIG:
        return Next.STAY_AWAY
    return Next.AT_ONCE if 4200 <= code < 4300 else Next.BACK_OFF


def comes_back(error: ClientError) -> bool:
    """Say whether who has lost a connection to ``error`` tries again."""
    match error:
        case Unreachable():
            return True
        case Refused():
            # Without a status it was one command that was refused.
            is_healed = error.is_transient and not error.status
            return is_healed or error.status == _TOO_MANY or error.status >= 500
        case Closed():
            return next_after(error.code) is not Next.STAY_AWAY
    return False


def backoff_s(attempt: int, chance: float) -> float:
    """Return how long to wait before attempt number ``attempt`` (from 0) is repeated.

    Args:
        chance: uniform in [0, 1). All of the delay is random, so that readers that were cut
            together don't come back together.
    """
    return chance * min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(attempt, 16))


def delay_s(attempt: int, error: ClientError, chance: float) -> float:
    """Return how long to wait after ``error``: what the server asked for, and the backoff.

    One that moves its clients on at once is obeyed once; one that does so in circles is not.
    """
    if attempt == 0 and isinstance(error, Closed) and next_after(error.code) is Next.AT_ONCE:
        return 0.0
    return error.retry_after_s + backoff_s(attempt, chance)


def going_away_s(reconnect_after_ms: int) -> float:
    """Return the seconds that a server which goes away asks for, within reason."""
    return min(max(reconnect_after_ms, 0) / 1000, RECONNECT_AFTER_CAP_S)


def retry_after_s(header: str) -> float:
    """Return RFC 9110 §10.2.3 delay-seconds; a date is ignored, since clocks may differ."""
    if not (header.isascii() and header.isdigit() and len(header) < 10):
        return 0.0
    return min(float(header), RETRY_AFTER_CAP_S)
